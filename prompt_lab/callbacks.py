"""Lightning callbacks of the command line: progress in words, the saved config, wandb's table.

None of them changes what is trained.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from prompt_lab.atomic_file import write_atomically
from prompt_lab.methods.prompt_method import PromptMethod
from prompt_lab.results import CURVE_COLUMNS, read_csv

NOT_SAVED = ("ckpt_path", "dry_run", "run_dir", "weights_only")


class EvaluationLines(Callback):
    """Prints one line per evaluation where there is no terminal for a progress bar."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, and say what is trained."""
        self.started = time.monotonic()
        if trainer.is_global_zero:
            print(
                f"{_method(pl_module).summary()} on {trainer.world_size} x "
                f"{pl_module.device.type}, {trainer.max_steps} steps, "
                f"in {trainer.default_root_dir}",
                flush=True,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of an evaluation within a fit."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting or not trainer.is_global_zero or sys.stdout.isatty():
            return
        seen = trainer.callback_metrics
        alive = ""
        if "runs_alive" in seen:
            alive = f"  alive {int(seen['runs_alive'])}/{len(_method(pl_module).runs)}"
        best = seen["best/val_score"].item()
        score = "" if math.isnan(best) else f"  best dev {best:.3f}"
        print(
            f"step {trainer.global_step:>6}/{trainer.max_steps}"
            f"{alive}"
            f"  loss {seen['train/loss']:.4f}"
            f"{score}"
            f"  {time.monotonic() - self.started:.0f} s",
            flush=True,
        )


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config-fit.yaml`` (or validate, test) into the run folder, and flags to wandb.

    The file holds the whole config but what belongs to one call only (checkpoint, run folder), so
    that it can be given to a later ``fit``, ``validate`` or ``test``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first process only."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read ``curves.csv`` and log it."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                rows = read_csv(Path(trainer.default_root_dir) / "curves.csv")
                data = [[row[name] for name in CURVE_COLUMNS] for row in rows]
                logger.log_table("curves", columns=list(CURVE_COLUMNS), data=data)


def _method(module: Any) -> PromptMethod:
    """The module, which is one of this package's methods."""
    return module


def flag_names(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under the names of their flags: ``{"model.optim.name": "adamw", ...}``.

    A class becomes its short name under the key itself, its arguments ``key.argument``.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "class_path" in value:
            flat[name] = value["class_path"].rsplit(".", 1)[-1]
            flat |= flag_names(value.get("init_args") or {}, f"{name}.")
        elif isinstance(value, dict):
            flat |= flag_names(value, f"{name}.")
        else:
            flat[name] = value
    return flat
