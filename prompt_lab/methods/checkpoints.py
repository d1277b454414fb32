"""What a checkpoint holds beside the weights, and what it must agree in with the settings.

The frozen backbone is in none. Where processes share whole runs, one checkpoint has those of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prompt_lab.core.text import some
from prompt_lab.files.peft import read_pickle

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod


def fill_checkpoint(method: PromptMethod, checkpoint: dict[str, Any]) -> None:
    """Join the runs of all processes, and note what they are, and what must agree."""
    change_runs(method, checkpoint, method.shares.join_tensor)
    kind = type(method)
    checkpoint |= {
        "method": f"{kind.__module__}.{kind.__qualname__}",
        "runs": [asdict(run) for run in method.all_runs],
        "starts": [asdict(start) for start in method.shares.join(method.starts)],
        "identity": whole_identity(method),
        "backbone_digest": method.backbone.digest,
        "tokenizer_digest": method.backbone.tokenizer_digest,
        "template": method.datamodule.template,
        "system": method.datamodule.system,
    }


def change_runs(
    method: PromptMethod, checkpoint: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> None:
    """Put what ``change`` makes of it in the place of what a checkpoint holds of each run."""
    if not method.shares.divided:
        return
    state = checkpoint["state_dict"]
    changed = {name: change(value) for name, value in state.items() if value.dim()}
    checkpoint["state_dict"] = {**state, **changed}
    for of_optimizer in checkpoint.get("optimizer_states", []):
        of_optimizer["state"] = {
            parameter: {name: change(value) for name, value in values.items()}
            for parameter, values in of_optimizer["state"].items()
        }


def whole_identity(method: PromptMethod) -> dict[str, Any]:
    """What a checkpoint must agree in."""
    names = [
        f"{run.task} {run.sample} seed {run.init_seed}" + (run.source and f" from {run.source}")
        for run in method.all_runs
    ]
    common = {"method": type(method).__name__, "backbone": method.backbone.digest, "runs": names}
    return common | method.identity()


def check_identity(method: PromptMethod, saved: dict[str, Any]) -> None:
    """Refuse (``ValueError``) a checkpoint of other data, seeds or weights, naming both sides.

    Lists by their first members, digests by their beginning.
    """

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"{len(value)} ({some([str(item) for item in value])})"
        return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)

    for name, own in whole_identity(method).items():
        if saved.get(name) != own:
            raise ValueError(
                f"the checkpoint is of {name.replace('_', ' ')} {shown(saved.get(name))}, the "
                f"settings give {shown(own)}: resume with those of the fit"
            )


def kind_of(path: Any) -> type[PromptMethod]:
    """The class of the method that a checkpoint is of, a ``ValueError`` for none.

    Only classes that are there are taken, also those of one's own: a file does not say what to
    import.
    """
    import prompt_lab
    from prompt_lab.methods.method import PromptMethod

    saved = read_pickle(path)
    name = str(saved.get("method", "")) if isinstance(saved, dict) else ""
    public = name.rpartition(".")[2]
    if public in prompt_lab.__all__:
        getattr(prompt_lab, public)  # imports it
    kinds: list[type[PromptMethod]] = [PromptMethod]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
        if f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
    raise ValueError(
        f"{path} is the checkpoint of {name or 'no method of prompt_lab'}; a method of one's own "
        "is imported before, or loaded by its own class"
    )
