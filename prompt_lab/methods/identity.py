"""What a fit is: its settings, and the name that equal settings, weights and data give it."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from prompt_lab.methods.configs import flag_names, plain

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod

TRAINER_SETTINGS = (
    *("max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch"),
    *("limit_train_batches", "limit_val_batches", "precision"),
    *("accumulate_grad_batches", "gradient_clip_val"),
)
DATA_SETTINGS = (
    *("samples", "max_input_length", "truncation_side", "task_prefix", "order_seed"),
    *("template", "system"),
)

NO_NUMBER = (
    *("model.backbone.name", "model.init.path", "model.subspace.path"),
    *("model.prompts", "model.source_prompts", "model.adapters", "model.attention"),
    *("model.tokens_per_forward", "model.test_baselines", "model.save_steps", "model.dev_loss"),
    *("model.backbone.compile", "model.backbone.gradient_checkpointing"),
)
"""Settings that name files, whose digests count instead, or that change nothing but rounding."""


def settings_of(method: PromptMethod) -> dict[str, Any]:
    """What can change a number, by the names of the flags; instead of paths see `digests`.

    Of the trainer those of the fit, also in a later test by another trainer.
    """
    data = method.datamodule
    given = {k: v for k, v in method.hparams.items() if not k.startswith("_")}
    for name in given:  # a dict that leaves out fields stands for their defaults
        own = getattr(method, f"{name}_config", getattr(method, name, None))
        given[name] = plain(own) if is_dataclass(own) else given[name]
    found = {f"model.{k}": v for k, v in flag_names(given).items()}
    found |= {f"data.{name}": getattr(data, name) for name in DATA_SETTINGS}
    found["data.tasks"] = list(data.tasks)
    found["data.shots"] = [task.shots for task in data.tasks.values()]
    own = trainer_settings(method.trainer)
    if method.trainer.state.fn != "fit" and method.trains:
        own = method.fit_record().get("trainer", own)
    found |= {f"trainer.{k}": v for k, v in own.items() if method.trains}
    found["test.precision"] = method.trainer.precision
    found["test.limit_test_batches"] = method.trainer.limit_test_batches
    return {name: found[name] for name in sorted(found) if name not in NO_NUMBER}


def unusual(method: PromptMethod, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that are not at their defaults, and the trainer's."""
    usual = {}
    for group, kind in {"model": type(method), "data": type(method.datamodule)}.items():
        known: dict[str, Any] = {}
        for parent in reversed(kind.__mro__):
            if "__init__" in vars(parent) and parent is not object:
                known |= inspect.signature(parent.__init__).parameters
        defaults = {name: plain(parameter.default) for name, parameter in known.items()}
        usual |= {f"{group}.{k}": v for k, v in flag_names(defaults).items()}
    usual["test.limit_test_batches"] = 1.0
    return {k: v for k, v in settings.items() if k not in usual or plain(v) != usual[k]}


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """The trainer's settings that can change what is trained."""
    return {name: getattr(trainer, name) for name in TRAINER_SETTINGS}


def fit_id(method: PromptMethod) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A name for this fit, its settings and the digests of what it read; all processes call it.

    Equal settings, weights and data give equal names, wherever files lie.
    """
    settings, digests = settings_of(method), method.digests()
    identity = {"method": type(method).__name__, "settings": settings, "digests": digests}
    identity["runs"] = [run.name for run in method.all_runs]
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12], settings, digests
