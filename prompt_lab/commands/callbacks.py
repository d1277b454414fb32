"""Lightning callbacks of the command line: progress and speed, the saved config, wandb's table.

None of them changes what is trained.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from prompt_lab.data.sampling import Episodes
from prompt_lab.files.results import CURVE_COLUMNS, read_csv
from prompt_lab.files.tensors import write_atomically
from prompt_lab.methods.configs import flag_names

NOT_SAVED = ("ckpt_path", "dry_run", "overwrite", "resume", "run_dir", "weights_only")


class Bar(RichProgressBar):
    """Lightning's bar in one line of a terminal: steps without epochs, and two short numbers."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Loss, and the mean of the best dev scores."""
        seen = super().get_metrics(trainer, pl_module)
        names = {"loss": "train/loss", "dev": "best/val_score"}
        return {short: f"{seen[name]:.3f}" for short, name in names.items() if name in seen}


class EvaluationLines(Callback):
    """Prints one line per evaluation where there is no terminal for a progress bar."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the time, and say what is trained."""
        self.started = time.monotonic()
        if trainer.is_global_zero:
            where = f"{trainer.world_size} x {pl_module.device.type}, {trainer.max_steps} steps"
            print(f"{pl_module.summary()} on {where}, in {trainer.default_root_dir}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the line of an evaluation within a fit."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting or not trainer.is_global_zero or sys.stdout.isatty():
            return
        seen = trainer.callback_metrics
        said = [f"step {trainer.global_step:>6}/{trainer.max_steps}"]
        if "runs_alive" in seen:
            said.append(f"alive {int(seen['runs_alive'])}/{len(pl_module.all_runs)}")
        said.append(f"loss {seen['train/loss']:.4f}")
        best = seen["best/val_score"].item()
        if best == best:
            said.append(f"best dev {best:.3f}")
        print("  ".join([*said, f"{time.monotonic() - self.started:.0f} s"]), flush=True)


class FitReport(Callback):
    """Prints and logs at the end of a fit how fast it was, and its peak memory (``figures``).

    They are of the steps that this call of ``fit`` made; one that made none, or that was
    interrupted, prints nothing.

    - Tokens are those of the inputs and targets of the steps' rows, without padding and prompts,
      each row once, however many passes a method makes over it; processes of a job sum theirs.
    - Steps and tokens per second are over the time from the first step to the last, evaluations
      left out; making batches and writing checkpoints is in it.
    - Runs per second are over the whole fit but loading backbone and data; none if it was resumed.
    - Memory is what tensors took on a GPU, else the peak resident size of the process; of several
      processes, that of the largest.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start clock and counts."""
        self.figures: dict[str, float] = {}
        self.steps = self.tokens = 0
        self.evaluating, self.started = 0.0, time.monotonic()
        self.on_gpu = pl_module.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note where training starts."""
        self.first_step, self.train_started = trainer.global_step, time.monotonic()
        self.evaluated_before = self.evaluating  # scores of step 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of a batch by its lists on the host, without waiting for the device."""
        parts = [batch]
        if isinstance(batch, Episodes):
            judged = getattr(pl_module, "algorithm", None) != "reptile"  # which reads no query rows
            parts = [*batch.support, *[batch.query] * judged]
        self.tokens += sum(sum(part.input_lengths) + sum(part.target_lengths) for part in parts)
        self.tokens += sum(len(part) * len(part.front) for part in parts)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin an evaluation, once the device has done the steps before it."""
        _wait(pl_module.device)
        self.evaluation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End an evaluation."""
        if trainer.state.fn == "fit":
            self.evaluating += time.monotonic() - self.evaluation_started

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sum over processes, while they are still joined."""
        _wait(pl_module.device)
        self.steps = trainer.global_step - self.first_step
        evaluating = self.evaluating - self.evaluated_before
        self.training = time.monotonic() - self.train_started - evaluating
        is_bank = "runs_alive" in trainer.callback_metrics
        self.runs = len(pl_module.all_runs) if is_bank else 0
        on_gpu, device = self.on_gpu, pl_module.device
        self.memory = torch.cuda.max_memory_allocated(device) if on_gpu else _resident_memory()
        if trainer.world_size > 1:
            both = torch.tensor([self.tokens, self.memory], device=device).double()
            reduce = trainer.strategy.reduce
            self.tokens = int(reduce(both.clone(), reduce_op="sum")[0])
            self.memory = int(reduce(both, reduce_op="max")[1])

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the line and log the figures."""
        if not trainer.is_global_zero or not self.steps:
            return
        seconds, whole = time.monotonic() - self.started, ""
        rates = {
            "steps_per_second": self.steps / self.training,
            "tokens_per_second": self.tokens / self.training,
            "peak_memory_gb": self.memory / 1e9,
        }
        what = f"{self.runs} {'run' if self.runs == 1 else 'runs'} " if self.runs else ""
        start = f"from step {self.first_step} " if self.first_step else ""
        if self.runs and not self.first_step:
            rates["runs_per_second"] = self.runs / seconds
            whole = f", {_short(rates['runs_per_second'])} runs/s"
        said = {name: _short(rate) for name, rate in rates.items()}
        self.figures = {f"fit/{name}": rate for name, rate in rates.items()}
        print(
            f"trained {what}{start}in {_short(seconds)} s{whole}: {self.steps} steps in "
            f"{_short(self.training)} s, {said['steps_per_second']} steps/s, "
            f"{said['tokens_per_second']} tokens/s; evaluation {_short(self.evaluating)} s; peak "
            f"memory {'' if self.on_gpu else 'of the process '}{said['peak_memory_gb']} GB",
            flush=True,
        )
        for logger in trainer.loggers:
            logger.log_metrics(self.figures, step=trainer.global_step)


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config-fit.yaml`` (or validate, test) into the run folder, and flags to wandb.

    The file holds the whole config but what belongs to one call only (checkpoint, run folder), so
    that it can be given to a later ``fit``, ``validate`` or ``test``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Called on the first process only."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for name in NOT_SAVED:
            settings.pop(name, None)
        # The command line put the run folder in these; a later call may have another.
        run_dir = settings["trainer"].pop("default_root_dir", None)
        loggers = settings["trainer"]["logger"]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if logger and logger.get("init_args", {}).get("save_dir") == run_dir:
                logger["init_args"]["save_dir"] = "."
        assert trainer.state.fn is not None
        name = f"config-{trainer.state.fn.value}.yaml"
        text = yaml.safe_dump(settings, sort_keys=False)
        write_atomically(Path(trainer.default_root_dir) / name, text.encode())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                kept = {k: settings[k] for k in ("model", "data", "trainer", "seed_everything")}
                run = logger.experiment
                new = {k: v for k, v in flag_names(kept).items() if k not in run.config}
                run.config.update(new, allow_val_change=True)


class WandbCurves(Callback):
    """Logs the curves of all runs to wandb as one table, at the end of a fit."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Read ``curves.csv`` and log it."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                rows = read_csv(Path(trainer.default_root_dir) / "curves.csv")
                data = [[row[name] for name in CURVE_COLUMNS] for row in rows]
                logger.log_table("curves", columns=list(CURVE_COLUMNS), data=data)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _short(number: float) -> str:
    """A positive number with three digits before or behind the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}" if number < 1 else f"{number:.3g}"
