"""``fit``, ``validate`` and ``test``: LightningCLI with the traps taken out.

Flags and files are LightningCLI's; what is different: everything of a run lands in ``--run_dir``;
earlier work there is moved aside, not overwritten; a checkpoint never overrides flags; the saved
config never aborts a second run; ``--dry_run`` shows the grid; errors are sentences.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from prompt_lab.callbacks import EvaluationLines, SaveRunConfig, WandbCurves, flag_names
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.attempt import Attempt
from prompt_lab.methods.fine_tuning import FineTuning
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.meta_prompt import MetaPrompt
from prompt_lab.methods.prompt_method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.vector_arithmetic import VectorArithmetic

METHODS = {
    kind.__name__: kind
    for kind in (
        *(PromptTuning, IntrinsicSubspace, MetaPrompt, Attempt),
        *(AdapterSubspace, AdapterTuning, FineTuning, VectorArithmetic),
    )
}
RUN_DIR_VARIABLE = "PROMPT_LAB_RUN_DIR"
OUTPUTS = ("prompts", "checkpoints", "logs", "results.csv", "curves.csv", "predictions.jsonl")
OUTPUTS += ("*.safetensors", "target_prompts", "attention.csv", "steps")


class PromptLabParser(LightningArgumentParser):
    """Says what is wrong in one sentence instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2."""
        print(f"prompt-lab: {_plain_error(message)}", file=sys.stderr)
        sys.exit(2)


class PromptLabCLI(LightningCLI):
    """LightningCLI for the methods of this package."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            PromptMethod,
            CrossFitDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            parser_class=PromptLabParser,
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
                "callbacks": [EvaluationLines(), WandbCurves()],
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The three commands that run a trainer."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings beside model, data and trainer."""
        parser.set_defaults({"model": {"class_path": "PromptTuning"}})
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for everything of this run (default: a new one below runs/).",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After fit, score each run's best prompt on test, as the command test does.",
        )
        parser.add_argument(
            "--dry_run",
            type=bool,
            default=False,
            help="Print the grid of runs, its cost and memory, and train nothing.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; ``--dry_run`` alone means true."""
        given = sys.argv[1:] if args is None else list(args)
        given = [
            f"{word}=true" if word in ("--dry_run", "--test_after_fit") else word for word in given
        ]
        self.config = parser.parse_args(_join_booleans(given))

    def _parse_ckpt_path(self) -> None:
        """Keep the flags where a checkpoint holds other settings, and tell the differences.

        LightningCLI would silently take the checkpoint's.
        """
        config = self._settings
        self._resolve_checkpoint(config)
        path = config.get("ckpt_path")
        if not path:
            return
        saved = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
        old = flag_names({k: v for k, v in saved.items() if not k.startswith("_")})
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        new = flag_names(dumped[self.config.subcommand]["model"]["init_args"])
        changed = [f"{k} {old[k]!r} -> {new[k]!r}" for k in old if k in new and old[k] != new[k]]
        if changed and rank_zero_only.rank == 0:
            print(f"the checkpoint had other settings: {', '.join(changed)}", file=sys.stderr)

    @property
    def _settings(self) -> Any:
        """The settings of the command."""
        return self.config[self.config.subcommand]

    def _resolve_checkpoint(self, config: Any) -> None:
        """Turn ``--ckpt_path last`` into a file, and a file into its run folder.

        Raises:
            ValueError: there is no such checkpoint.
        """
        path = config.get("ckpt_path")
        if not path:
            return
        if path == "last":
            if config.run_dir is None:
                raise ValueError("--ckpt_path last needs --run_dir, the folder of the fit")
            path = Path(config.run_dir) / "checkpoints" / "last.ckpt"
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no checkpoint {path}: leave --ckpt_path out to start anew")
        config.ckpt_path = str(path)
        if config.run_dir is None and path.parent.name == "checkpoints":
            config.run_dir = str(path.parent.parent)

    def before_instantiate_classes(self) -> None:
        """Put the run folder where trainer and logger look for it."""
        config, command = self._settings, self.config.subcommand
        trainer = config.trainer
        if trainer.default_root_dir is not None:
            raise ValueError("use --run_dir instead of --trainer.default_root_dir")
        if command != "fit" and config.run_dir is None:
            raise ValueError(f"{command} needs --run_dir, the folder of the fit")
        run_dir = Path(config.run_dir or _new_run_dir())
        os.environ[RUN_DIR_VARIABLE] = str(run_dir)  # for the processes that DDP starts
        trainer.default_root_dir = str(run_dir)
        if trainer.logger in (None, True):
            trainer.logger = _csv_logger(run_dir)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if logger and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = str(run_dir)
        if command == "fit" and not config.get("ckpt_path") and not config.dry_run:
            _set_aside(run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with one checkpoint that holds the last state."""
        trainer = self._settings.trainer
        if trainer.enable_checkpointing is not False and self.config.subcommand == "fit":
            checkpoint = ModelCheckpoint(
                dirpath=Path(trainer.default_root_dir) / "checkpoints",
                filename="last",
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            )
            kwargs["callbacks"] = [
                *(self.config_init[self.config.subcommand].trainer.callbacks or []),
                checkpoint,
            ]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """With ``--dry_run``, print the grid and leave."""
        if self._settings.dry_run:
            self.datamodule.setup("fit")
            print(self.model.describe_fit(self.datamodule, self.trainer))
            sys.exit(0)

    def after_fit(self) -> None:
        """With ``--test_after_fit``, test what was trained."""
        if self._settings.test_after_fit:
            self.trainer.test(self.model, datamodule=self.datamodule)


def run(args: list[str] | None = None) -> int:
    """Run a command of the command line; errors of the user are one sentence and status 1."""
    _quieten()
    try:
        PromptLabCLI(args)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("PROMPT_LAB_TRACEBACK"):
            raise
        print(f"prompt-lab: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    """What a constructor said, without the parser's account of all types that it tried."""
    said = re.search(r"^Errors:\n  - (?!Expected a )(.+)$", str(error), re.MULTILINE)
    return said[1] if said else str(error)


def _new_run_dir() -> str:
    """A new folder below ``runs/``, the same on all processes of a job."""
    if (
        "LOCAL_RANK" in os.environ and RUN_DIR_VARIABLE in os.environ
    ):  # started by the first process
        return os.environ[RUN_DIR_VARIABLE]
    job = next(
        (
            os.environ[name]
            for name in ("WANDB_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
            if name in os.environ
        ),
        None,
    )
    return f"runs/{job or time.strftime('%Y%m%d-%H%M%S') + f'-{os.getpid()}'}"


def _set_aside(run_dir: Path) -> None:
    """Move the outputs of an earlier fit in the same folder to ``previous-N`` within it."""
    found = [path for name in OUTPUTS for path in sorted(run_dir.glob(name))]
    if not found or rank_zero_only.rank != 0:
        return
    number = 1
    while (run_dir / f"previous-{number}").exists():
        number += 1
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for path in [*found, *run_dir.glob("config-*.yaml"), *run_dir.glob("digests.json")]:
        path.rename(target / path.name)
    print(
        f"{run_dir} held an earlier run, now in {target} (to resume it instead: --ckpt_path last)",
        file=sys.stderr,
    )


def _csv_logger(run_dir: Path) -> Any:
    """The default logger, as a config."""
    from jsonargparse import Namespace

    arguments = Namespace(save_dir=str(run_dir), name="logs", version=None)
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=arguments)


def _join_booleans(words: list[str]) -> list[str]:
    """``--flag=true false`` (from ``--flag false``) back to ``--flag=false``."""
    joined: list[str] = []
    for word in words:
        if (
            word in ("true", "false")
            and joined
            and joined[-1] in ("--dry_run=true", "--test_after_fit=true")
        ):
            joined[-1] = joined[-1].replace("true", word)
        else:
            joined.append(word)
    return joined


def _plain_error(message: str) -> str:
    """A parser's message without its nested repetitions, with the nearest known name."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(lines)
    unknown = re.search(r"import path string: (\w+)", text) or re.search(
        r"class_path.*?'(\w+)'", text
    )
    if unknown and unknown[1] not in METHODS and "model" in text:
        near = difflib.get_close_matches(unknown[1], METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"no method {unknown[1]!r}; known: {', '.join(METHODS)}{hint}"
    return text


def _quieten() -> None:
    """Silence what Lightning and transformers print that says nothing about the run."""

    class Advert(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            """Let all but adverts and missing devices through."""
            return not re.match(
                r"💡|GPU available|TPU available|HPU available", record.getMessage()
            )

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(Advert())
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
        r".*isinstance\(treespec, LeafSpec\).*",
    ):
        warnings.filterwarnings("ignore", pattern)
