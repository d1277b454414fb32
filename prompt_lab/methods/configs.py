"""Settings of methods: the backbone's, and settings as plain values and by flag."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal

from prompt_lab.core.backbone import Backbone
from prompt_lab.sandbox import SANDBOX


@dataclass
class BackboneConfig:
    """Which frozen model, and how it runs.

    Args:
        name: hub id, folder, ``.gguf`` file (extra ``gguf``), or ``sandbox`` for the tiny model
            that ships with the package.
        dtype: dtype of the frozen weights; prompts, optimizer and losses stay float32. bfloat16 is
            the fast one. float16 is for GPUs without it: T5 and mT5 are refused, since they
            overflow, and a run of another model that overflows stops and says so.
        attention: attention implementation of transformers.
        gradient_checkpointing: keep the activations of one layer at a time; exact but slower, for
            backbones whose activations do not fit.
        compile: run training steps through ``torch.compile``; exact up to rounding, and the first
            steps take minutes.
    """

    name: str = SANDBOX
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False

    def load(self) -> Backbone:
        """The backbone, frozen; errors as :meth:`Backbone.load`."""
        if self.gradient_checkpointing and self.compile:
            raise ValueError(
                "model.backbone.gradient_checkpointing and model.backbone.compile do not go "
                "together: use checkpointing where memory is short, compile where it is not"
            )
        backbone = Backbone.load(self.name, self.dtype, self.attention)
        if self.gradient_checkpointing:
            backbone.recompute_layers()
        if self.compile:
            backbone.compile_training()
        return backbone


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


def as_config(kind: Any, value: Any) -> Any:
    """A dataclass from itself or from a dict of its fields; a ``TypeError`` for another value."""
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        names = ", ".join(field.name for field in fields(kind))
        raise TypeError(f"{value!r} is no {kind.__name__}: give one, or a dict with any of {names}")
    return kind(**value)


def as_list(value: Any) -> list[Any]:
    """One value or several, as a list."""
    return list(value) if isinstance(value, list) else [value]


def plain(value: Any) -> Any:
    """Dataclasses and namespaces as dicts and lists of simple values, fit for a checkpoint."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
