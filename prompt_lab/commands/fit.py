"""The commands ``fit``, ``validate`` and ``test``: LightningCLI with the traps taken out.

Everything of a run lands in ``--run_dir``; a used folder is refused without ``--resume`` or
``--overwrite``, and one process at a time has it. Checkpoints are written whole or not at all,
never override flags and are never unpickled. Errors are sentences. A config may name any class that
can be imported, as Lightning lets it: it is to be read before it is run, like a program.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack, suppress
from datetime import timedelta
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_parsing_settings
from jsonargparse.typing import register_type, timedelta_deserializer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prompt_lab.commands.callbacks import (
    Bar,
    EvaluationLines,
    FitReport,
    SaveRunConfig,
    WandbCurves,
)
from prompt_lab.commands.parsing import PlainParser, plain_warnings
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.peft import read_pickle
from prompt_lab.files.tensors import held, write_atomically
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.attempt import Attempt
from prompt_lab.methods.checks import refuse_strategy
from prompt_lab.methods.configs import flag_names
from prompt_lab.methods.fine_tuning import FineTuning
from prompt_lab.methods.identity import TRAINER_SETTINGS
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.look import describe, look_at_rows
from prompt_lab.methods.meta_prompt import MetaPrompt
from prompt_lab.methods.method import FIT_RECORD, PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.vector_arithmetic import SCALES, VectorArithmetic

set_parsing_settings(unset_sentinel=True)  # else null is "not given", which is never checked


def _duration(value: Any) -> str:
    """The text of a duration, and of null none: jsonargparse's own saves it as ``None``."""
    if value is None:
        raise ValueError("null is no duration")
    return str(value)


register_type(timedelta, _duration, timedelta_deserializer)

METHODS = {
    kind.__name__: kind
    for kind in (
        *(PromptTuning, IntrinsicSubspace, MetaPrompt, Attempt),
        *(AdapterSubspace, AdapterTuning, FineTuning, VectorArithmetic),
    )
}
WORDS = "--config FILE.yaml [--run_dir DIR] [--any.setting value ...]"
DESCRIPTIONS = {
    "fit": "Train a bank of prompts, or what another method trains, from a YAML config.",
    "validate": "Score the best prompts of a fit on dev.",
    "test": "Score the best prompts of a fit on test, and write results.csv.",
}
RUN_DIR_VARIABLE = "PROMPT_LAB_RUN_DIR"
OF_TEST = ("predictions.jsonl", "digests.json", "results.csv")  # in the order of writing
OUTPUTS = ("prompts", "target_prompts", "steps", "checkpoints", "logs", "config-*.yaml")
OUTPUTS += ("curves.csv", "attention.csv", SCALES, FIT_RECORD, *OF_TEST)
OUTPUTS += tuple(
    f"{name}.safetensors" for name in ("prompt", "best", "attention", "subspace_*", "adapters_*")
)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads nothing but tensors and plain values.

    Lightning copies them from the folder for temporary files; a killed process leaves a part.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a draft beside the file; what is not on a disk, as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = BytesIO()
        torch.save(checkpoint, content)
        write_atomically(path, content.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: Any = None
    ) -> Any:
        """As Lightning's, whatever ``--weights_only`` says."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class PromptLabParser(PlainParser, LightningArgumentParser):
    """The flags of the commands with a trainer."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As always, with the method that has nearly a name in the message, or all methods."""
        if "PromptMethod" in message:
            words = sorted({*re.findall(r"\b[A-Z]\w+", message)} - METHODS.keys())
            near = [m for word in words for m in difflib.get_close_matches(word, METHODS, 1, 0.8)]
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(METHODS)}"
            message = f"{message}; {hint}"
        super().error(message, ex)


class PromptLabCLI(LightningCLI):
    """LightningCLI for the methods of this package."""

    is_finished = False

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            PromptMethod,
            CrossFitDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            parser_class=PromptLabParser,
            parser_kwargs={
                name: {"usage": f"prompt-lab {name} {WORDS}", "description": text}
                for name, text in DESCRIPTIONS.items()
            },
            trainer_defaults={
                "max_epochs": -1,
                "max_steps": 1000,
                "val_check_interval": 100,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "inference_mode": False,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stdout.isatty(),
                "callbacks": [EvaluationLines(), WandbCurves(), FitReport()],
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The three commands that run a trainer."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in DESCRIPTIONS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings beside model, data and trainer."""
        parser.set_defaults({"model": {"class_path": "PromptTuning"}})
        groups: Any = parser._action_groups  # in --help, what is Lightning's comes last
        groups.sort(key=lambda group: "training via flags" in (group.title or ""))
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for everything of this run (default: a new one below runs/).",
        )
        switches = {
            "test_after_fit": "After fit, score each run's best prompt on test, as the command "
            "test does.",
            "dry_run": "Print the grid of runs, its cost and memory, and train nothing.",
            "resume": "Go on with the fit in run_dir from its last checkpoint; start anew where "
            "there is none, and train nothing where it is finished.",
            "overwrite": "Delete what an earlier fit left in run_dir.",
        }
        for name, text in switches.items():
            parser.add_argument(
                f"--{name}", type=bool, nargs="?", const=True, default=False, help=text
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; tell what a replaced class took along."""
        given = sys.argv[1:] if args is None else list(args)
        self.config = parser.parse_args(given)
        if rank_zero_only.rank == 0 and self.config.get("subcommand"):
            command = self.config.subcommand
            dropped = _dropped(_given(given, command), self._dumped())
            for line in [*_overridden(given, command), *dropped]:
                print(f"prompt-lab: {line}", file=sys.stderr)

    @property
    def _settings(self) -> Any:
        return self.config[self.config.subcommand]

    def _dumped(self) -> dict[str, Any]:
        dumped = self.parser.dump(self.config, skip_unset=False)
        return yaml.safe_load(dumped)[self.config.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint; keep the flags where it holds other settings, and tell them.

        LightningCLI would silently take the checkpoint's.
        """
        config = self._settings
        if self.config.subcommand == "fit" and config.resume:
            self._resume(config)
        path = config.get("ckpt_path")
        if not path:
            return
        if not Path(path).is_file():
            raise ValueError(f"no checkpoint {path}: leave --ckpt_path out to start anew")
        if config.run_dir is None and Path(path).parent.name == "checkpoints":
            config.run_dir = str(Path(path).parent.parent)
        saved = read_pickle(path)
        needed = ("state_dict", "hyper_parameters", "pytorch-lightning_version")
        if not isinstance(saved, dict) or any(name not in saved for name in needed):
            raise ValueError(f"{path} is not the checkpoint of a fit: leave --ckpt_path out")
        settings = saved["hyper_parameters"].items()
        old = flag_names({k: v for k, v in settings if not k.startswith("_")})
        new = old | flag_names(self._dumped()["model"]["init_args"])
        changed = [f"{k} {old[k]!r} -> {new[k]!r}" for k in old if old[k] != new[k]]
        if changed and rank_zero_only.rank == 0:
            print(f"the checkpoint had other settings: {', '.join(changed)}", file=sys.stderr)

    def _resume(self, config: Any) -> None:
        """Go on from the last checkpoint of ``run_dir``, if there is one and it is of this fit."""
        if config.run_dir is None or config.get("ckpt_path") or config.overwrite:
            raise ValueError(
                "--resume goes on with the fit in --run_dir: give that, and neither --ckpt_path "
                "nor --overwrite"
            )
        run_dir = Path(config.run_dir)
        last, known = run_dir / "checkpoints/last.ckpt", run_dir / "config-fit.yaml"
        record = run_dir / FIT_RECORD
        if last.is_file():
            config.ckpt_path = str(last)
        if not known.is_file() or not (last.is_file() or record.is_file()):
            return
        settings = yaml.safe_load(known.read_text())
        old, new = (_of_fit(x) for x in (settings, self._dumped()))
        more = (old["trainer.max_steps"] or -1) < (new["trainer.max_steps"] or -1)
        differ = [
            f"{name} {old.get(name)!r} there, {new.get(name)!r} here"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name) and not (name == "trainer.max_steps" and more)
        ]
        if differ:
            raise ValueError(
                f"--resume: the fit in {run_dir} has other settings: {'; '.join(differ)}; give "
                "those of the fit (a larger trainer.max_steps is allowed), or another --run_dir"
            )
        timed = settings["trainer"].get("max_time")  # which may have ended it before its end
        self.is_finished = record.is_file() and not more and not timed

    def before_instantiate_classes(self) -> None:
        """Put the run folder where trainer and logger look for it."""
        config, command = self._settings, self.config.subcommand
        trainer = config.trainer
        if re.match("fsdp|deepspeed|model_parallel", str(trainer.strategy)):
            refuse_strategy(str(trainer.strategy))
        if trainer.default_root_dir is not None:
            raise ValueError("use --run_dir instead of --trainer.default_root_dir")
        method = str(config.model.class_path).rpartition(".")[2]
        makes_results = command == "fit" or (command, method) == ("test", "VectorArithmetic")
        if config.run_dir is None and not makes_results:
            raise ValueError(f"{command} needs --run_dir, the folder of the fit")
        run_dir = Path(config.run_dir or _new_run_dir())
        os.environ[RUN_DIR_VARIABLE] = str(run_dir)  # for the processes that DDP starts
        trainer.default_root_dir = str(run_dir)
        if trainer.logger in (None, True):
            arguments = Namespace(save_dir=str(run_dir), name="logs", version=None)
            kind = "lightning.pytorch.loggers.CSVLogger"
            trainer.logger = Namespace(class_path=kind, init_args=arguments)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if logger and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = str(run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with a bar in a terminal and one checkpoint that holds the last state."""
        trainer = self._settings.trainer
        given = self.config_init[self.config.subcommand].trainer.callbacks or []
        callbacks = [*given] if isinstance(given, list) else [given]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if trainer.enable_progress_bar is not False and not has_bar and find_spec("rich"):
            callbacks.append(Bar())
        if trainer.enable_checkpointing is not False and self.config.subcommand == "fit":
            checkpoint = ModelCheckpoint(
                dirpath=Path(trainer.default_root_dir) / "checkpoints",
                filename="last",
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            )
            callbacks.append(checkpoint)
        made = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        self.model.run_dir = trainer.default_root_dir
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the config names
            made.strategy.checkpoint_io = AtomicCheckpoints()
        return made

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command while the first process of the job holds the run folder."""
        config = self._settings
        run_dir = Path(config.trainer.default_root_dir)
        # A job whose processes something else than the first one starts has an id.
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""
        is_first, is_dry = rank_zero_only.rank == 0, subcommand == "fit" and config.dry_run
        with ExitStack() as stack:
            if not is_dry and (is_first or job):
                by = "another prompt-lab fit, validate or test"
                stack.enter_context(held(run_dir, by, job, first=is_first))
            if is_first and not is_dry:
                for folder in ("checkpoints", "prompts"):
                    for draft in (run_dir / folder).glob(".*.part"):  # of a process that was killed
                        draft.unlink()
                if self.is_finished:
                    print(f"the fit in {run_dir} is finished: nothing is left to train")
                elif subcommand == "fit":
                    _clear(run_dir, config.get("ckpt_path"), config.overwrite or config.resume)
            if not self.is_finished or is_dry:
                super()._run_subcommand(subcommand)
            elif not (run_dir / OF_TEST[-1]).is_file():  # what is left of it, its test
                self.after_fit()

    def before_fit(self) -> None:
        """With ``--dry_run``, print the grid and leave."""
        if self._settings.dry_run:
            self.datamodule.setup("fit")
            print(describe(self.model, self.datamodule, self.trainer))
            print(*look_at_rows(self.model, self.datamodule, "train", "dev", "test"), sep="\n")
            sys.exit(0)

    def after_fit(self) -> None:
        """With ``--test_after_fit``, test what was trained."""
        if self._settings.test_after_fit:
            saved = self._settings.ckpt_path if self.is_finished else None
            self.trainer.test(self.model, self.datamodule, ckpt_path=saved, verbose=False)


class ParseOnly(PromptLabCLI):
    """Parses the words of a command, by one parser for all, and makes and runs nothing."""

    _made: ClassVar[dict[str, Any]] = {}

    def setup_parser(self, *args: Any) -> None:
        """Make the parser once."""
        if not self._made:
            super().setup_parser(*args)
            self._made.update(vars(self))
        vars(self).update(self._made)

    def _nothing(self, *args: Any, **settings: Any) -> None:
        """Do nothing."""

    _parse_ckpt_path = _set_seed = before_instantiate_classes = _nothing
    instantiate_classes = _run_subcommand = _nothing


def run(args: list[str] | None = None) -> int:
    """Run a command of the command line; errors of the user are one sentence and status 1."""
    _quieten()
    try:
        PromptLabCLI(args)
        return 0
    except SIGTERMException:  # a SystemExit without a status, which would count as success
        print("prompt-lab: ended by SIGTERM; a fit goes on with --resume", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (ValueError, OSError, MisconfigurationException, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError):
            of_gloo = re.search("gloo.*(closed|reset by peer|Timed out|timeout)", said, re.DOTALL)
            if not (of_gloo or isinstance(error, torch.distributed.DistBackendError)):
                raise
            said = (
                "another process of this job is gone or cannot be reached (what it said may tell "
                "why). A fit can go on from its last evaluation: --resume and the same --run_dir. "
                f"{' '.join(said.split())}"
            )
        if os.environ.get("PROMPT_LAB_TRACEBACK"):
            raise
        # What a constructor said, without the parser's account of all types that it tried.
        own = re.search(r"^Errors:\n  - (?!Expected a )(.+)$", said, re.MULTILINE)
        print(f"prompt-lab: {own[1] if own else said}", file=sys.stderr)
        return 1


def _new_run_dir() -> str:
    """A new folder below ``runs/``, the same on all processes of a job."""
    if "LOCAL_RANK" in os.environ and RUN_DIR_VARIABLE in os.environ:
        return os.environ[RUN_DIR_VARIABLE]  # this process was started by the first one
    names = ("WANDB_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
    job = next((os.environ[name] for name in names if name in os.environ), None)
    if job == "none":
        raise ValueError("torchrun gives this job no id (--standalone, --rdzv_id): give --run_dir")
    return f"runs/{job or time.strftime('%Y%m%d-%H%M%S') + f'-{os.getpid()}'}"


def _of_fit(settings: dict[str, Any]) -> dict[str, Any]:
    trainer = {name: settings["trainer"].get(name) for name in TRAINER_SETTINGS}
    kept = {"model": settings["model"], "data": settings["data"], "trainer": trainer}
    return flag_names({**kept, "seed_everything": settings.get("seed_everything")})


def _clear(run_dir: Path, checkpoint: str | None, allowed: bool) -> None:
    """Delete what an earlier fit left, if it is allowed; of one that goes on, what its end left."""
    goes_on = checkpoint and Path(checkpoint).resolve().is_relative_to(run_dir.resolve())
    names = (FIT_RECORD, *OF_TEST) if goes_on else OUTPUTS
    found = [path for name in names for path in sorted(run_dir.glob(name))]
    if found and not goes_on and not allowed:
        raise ValueError(
            f"{run_dir} holds an earlier fit: --resume to go on with it, --overwrite to delete it, "
            "or give another --run_dir"
        )
    signs = ("config-*.yaml", "curves.csv", FIT_RECORD, "checkpoints/last.ckpt", "results.csv")
    if found and not any(True for name in signs for _ in run_dir.glob(name)):
        raise ValueError(
            f"{run_dir} holds {found[0].name} and no fit of prompt-lab, so nothing there is "
            "deleted: give another --run_dir"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _given(words: list[str], subcommand: str) -> list[tuple[str, Any]]:
    """The settings that files and flags give, by the names of their flags."""
    given: list[tuple[str, Any]] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            continue
        content = text = value if equals else following
        with suppress(OSError, ValueError, yaml.YAMLError):
            if Path(text).suffix in (".yaml", ".yml", ".json") and Path(text).is_file():
                text = Path(text).read_text(encoding="utf-8")
            content = get_loader("yaml")(text)
        if name in ("-c", "--config"):
            content = content.get(subcommand, content) if isinstance(content, dict) else {}
        else:
            content = {name.removeprefix("--"): content}
        for long, setting in flag_names(content).items():
            short = long.replace(".init_args.", ".").removesuffix(".class_path")
            given.append((short, setting))
    return given


def _overridden(words: list[str], subcommand: str) -> list[str]:
    """A line for each flag that a config behind it sets to something else, which counts."""
    flags: dict[str, Any] = {}
    lines, last = [], dict(_given(words, subcommand))
    for place, word in enumerate(words):
        value = [x for x in words[place + 1 : place + 2] if not x.startswith("-")]
        found = dict(_given([word, *value], subcommand))
        if word.partition("=")[0] not in ("-c", "--config"):
            flags |= found
            continue
        for name in found.keys() & flags.keys():
            if str(flags[name]) != str(found[name]) == str(last[name]):
                told = f"--{name} {flags[name]} stands before --config, which sets it to"
                lines.append(f"{told} {found[name]}: put --config first")
    return sorted(lines)


def _dropped(given: list[tuple[str, Any]], config: dict[str, Any]) -> list[str]:
    """A line for each class that replaced another one, if it did not keep all settings given to it.

    jsonargparse keeps what the new class has too, where it takes the value.
    """
    settings, last = flag_names(config), dict(given)
    nulled = tuple(f"{name}." for name, value in last.items() if value is None)

    def is_lost(name: str) -> bool:
        is_group = any(other.startswith(f"{name}.") for other in settings)
        if is_group or name.startswith(nulled):
            return False
        new, old = settings.get(name, ...), last[name]
        return new != old and str(new) != str(old)

    lines = []
    for key, kind in settings.items():
        own = [name for name, _ in given if name == key or name.startswith(f"{key}.")]
        classes = [str(value).rpartition(".")[2] for name, value in given if name == key]
        if key == "model" and own[:1] != [key]:  # the default had settings already
            classes.insert(0, "PromptTuning")
        others = [name for name in classes if name != kind]
        lost = [x.removeprefix(f"{key}.") for x in dict.fromkeys(own) if x != key and is_lost(x)]
        if others and lost:
            lines.append(f"{key} is {kind} instead of {others[-1]}: dropped {', '.join(lost)}")
    return lines


def _quieten() -> None:
    """Silence what Lightning and transformers print that says nothing about the run."""
    plain_warnings()
    noise = re.compile(r"💡|[GTH]PU available|`Trainer.fit` stopped: `max_")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not noise.match(record.getMessage()))
    for pattern in (
        r"Found \d+ module\(s\) in eval mode",
        r".*LeafSpec.*",
        r".*recommended to use .*sync_dist.*",
        r".*does not have many workers.*",
        r"The ``compute`` method of metric BankMetric was called before.*",
        r"Checkpoint directory .* exists and is not empty",
        r".*instantiate_classes.*",
        r"You're resuming from a checkpoint that ended before the epoch ended.*",
        r"The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", pattern)
