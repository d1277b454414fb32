"""The prompt file and the prompt store: how methods hand prompts to each other.

A prompt file is one ``.safetensors`` with two float32 tensors, ``prompt`` (N, D) and the ``init``
(N, D) it was trained from, and string metadata that says which backbone, task, seeds and scores it
belongs to. A prompt store is a folder of prompt files; its ``index.csv`` only repeats their
metadata and is rebuilt from them whenever it does not match. Files are written whole or not at all.
Nothing is ever unpickled, and nothing that is missing is silently replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompt_lab.core.atomic_file import write_atomically, write_csv
from prompt_lab.files.results import Start

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone

FORMAT_VERSION = 1


@dataclass
class Prompt:
    """One soft prompt with where it comes from.

    Attributes:
        prompt: (N, D) float32, the prompt to use.
        init: (N, D) float32, what it was trained from.
        name: name within a store, also the file's name.
        backbone: hub id or folder of the model.
        backbone_digest: SHA-256 of its weights.
        tokenizer_digest: SHA-256 of its vocabulary.
        task: task name.
        sample: few-shot sample.
        start: what ``init`` is (see :class:`Start`); likewise the three that follow.
        start_of: what it is of.
        start_seed: the seed it was made under.
        start_file: the file it was read from.
        init_seed: seed of the initial prompt.
        order_seed: seed of the data order.
        learning_rate: peak learning rate.
        batch_size: rows per step.
        steps: optimizer steps that led to ``prompt``.
        dev_score: score on dev that chose it, or None.
        test_score: score on test, or None.
        metric: name of the metric of both.
        status: how its training ended.
        seconds: wall-clock seconds of the fit it was part of.
        decoding: ``score`` or ``generate``, how its answers were made when it was tested.
        labels: what scored answers were chosen from.
        max_new_tokens: longest generated answer.
        num_beams: beams of generated answers.
        max_input_length: inputs were cut to this many tokens.
        truncation_side: the side on which they were cut.
        task_prefix: whether the task's name stood in front of the inputs.
        version: version of the package that wrote it.
        code: (I,) float32, what a subspace made the prompt from; None where it was tuned itself.
        kind: what the prompt is to others that start from it: ``prompt``, tuned for its task;
            ``sum`` of vectors; ``mixture``; ``meta`` or ``multitask``, learned on many tasks.
        source_tasks: tasks that a prompt for other tasks was learned on.
        source_set: the same as they were named, such as ``mpt/cls_to_cls/source``.
        made_from: what arithmetic made the prompt from: expression, scale, and files with their
            digests; None where it was tuned.
    """

    prompt: Tensor
    init: Tensor
    name: str
    backbone: str
    backbone_digest: str
    tokenizer_digest: str
    task: str = ""
    sample: int | None = None
    start: str = ""
    start_of: str = ""
    start_seed: int | None = None
    start_file: str = ""
    init_seed: int | None = None
    order_seed: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    dev_score: float | None = None
    test_score: float | None = None
    metric: str = ""
    status: str = ""
    seconds: float | None = None
    decoding: str = ""
    labels: list[str] | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    max_input_length: int | None = None
    truncation_side: str = "right"
    task_prefix: bool = False
    version: str = ""
    code: Tensor | None = None
    kind: str = "prompt"
    source_tasks: list[str] | None = None
    source_set: str = ""
    made_from: dict[str, Any] | None = None

    @property
    def start_fields(self) -> Start:
        """Where it was trained from."""
        return Start(self.start, self.start_of, self.start_seed, self.start_file)

    def metadata(self) -> dict[str, Any]:
        """All that is not a tensor."""
        return {k: v for k, v in vars(self).items() if k not in TENSORS}


REQUIRED_FIELDS = ("name", "backbone", "backbone_digest", "tokenizer_digest")
TENSORS = ("prompt", "init", "code")
METADATA_FIELDS = tuple(f.name for f in fields(Prompt) if f.name not in TENSORS)


def save_prompt(path: str | Path, prompt: Prompt) -> None:
    """Write a prompt file, whole or not at all.

    Raises:
        ValueError: tensors that are not two (N, D) of one shape.
    """
    from safetensors.torch import save

    if prompt.prompt.dim() != 2 or prompt.prompt.shape != prompt.init.shape:
        raise ValueError(
            f"prompt {tuple(prompt.prompt.shape)} and init {tuple(prompt.init.shape)} must both "
            "be (N, D)"
        )
    tensors = {
        name: getattr(prompt, name).detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in TENSORS
        if getattr(prompt, name) is not None
    }
    count, width = prompt.prompt.shape
    metadata = {
        "format": "prompt_lab",
        "format_version": str(FORMAT_VERSION),
        "num_virtual_tokens": str(count),
        "hidden_size": str(width),
        **{k: json.dumps(v) for k, v in prompt.metadata().items()},
    }
    write_atomically(path, save(tensors, metadata))


def load_prompt(path: str | Path, backbone: Backbone | None = None) -> Prompt:
    """Read a prompt file.

    Args:
        path: the file.
        backbone: the model it is meant for; its weights and width are compared with the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a prompt file, damaged, a newer format, or made for another backbone.
    """
    metadata = read_metadata(path)
    from safetensors.torch import load

    tensors = load(Path(path).read_bytes())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    size, code = shapes.get("prompt", ()), shapes.get("code", (0,))
    known = len(size) == 2 and len(code) == 1 and set(shapes) <= set(TENSORS)
    if not known or shapes.get("init") != size:
        raise ValueError(
            f"{path}: a prompt file holds prompt and init, both (N, D), and code (I,) where a "
            f"subspace made the prompt; here: {shapes}"
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    prompt = Prompt(**tensors, **metadata)
    if backbone is not None:
        check_backbone(prompt, backbone, path)
    return prompt


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a prompt file, without reading its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a prompt file, damaged, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            raw = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or not a safetensors file ({error}); get or make it again"
        ) from error
    if raw.get("format") != "prompt_lab":
        raise ValueError(f"{path}: not a prompt file of prompt_lab (no such metadata)")
    try:
        version = int(raw["format_version"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged, no version of the format ({error!r})") from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: prompt file format {version}; this version of prompt_lab reads up to "
            f"{FORMAT_VERSION}: upgrade prompt_lab"
        )
    lacking = [name for name in REQUIRED_FIELDS if name not in raw]
    if lacking:
        raise ValueError(f"{path}: the prompt file's metadata lacks {', '.join(lacking)}")
    try:
        known = {name: json.loads(raw[name]) for name in METADATA_FIELDS if name in raw}
    except ValueError as error:
        raise ValueError(f"{path}: damaged, its metadata is not JSON ({error})") from None
    wrong = [name for name in REQUIRED_FIELDS if not isinstance(known[name], str)]
    if wrong:
        raise ValueError(f"{path}: damaged, {', '.join(wrong)} in its metadata is no text")
    return known


def check_backbone(prompt: Prompt, backbone: Backbone, where: str | Path) -> None:
    """Refuse a prompt that was made for another backbone.

    Raises:
        ValueError: naming both sides.
    """
    width = prompt.prompt.shape[1]
    if width != backbone.hidden_size:
        raise ValueError(
            f"{where}: prompt of width {width} made for {prompt.backbone!r}, but backbone "
            f"{backbone.name!r} has hidden size {backbone.hidden_size}"
        )
    if prompt.backbone_digest != backbone.digest:
        raise ValueError(
            f"{where}: made for backbone {prompt.backbone!r} with weights "
            f"{prompt.backbone_digest[:12]}, but {backbone.name!r} has weights "
            f"{backbone.digest[:12]}"
        )


class PromptStore:
    """A folder of prompt files.

    Args:
        folder: the folder; made when the first prompt is saved.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """File of the prompt of that name.

        Raises:
            ValueError: a name that would leave the folder.
        """
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} cannot be the name of a prompt: it is not a plain name")
        return self.folder / f"{name}.safetensors"

    def save(self, prompts: Iterable[Prompt]) -> None:
        """Write prompts under their names and bring the index up to date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for prompt in prompts:
            save_prompt(self.path(prompt.name), prompt)
        self.write_index()

    def load(self, names: Sequence[str], backbone: Backbone | None = None) -> list[Prompt]:
        """Prompts by name.

        Raises:
            FileNotFoundError: naming every prompt that is missing.
            ValueError: a damaged file, or one made for another backbone.
        """
        missing = [name for name in names if not self.path(name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} prompts are not in {self.folder}: "
                f"{', '.join(missing)}"
            )
        return [load_prompt(self.path(name), backbone) for name in names]

    def index(self) -> list[dict[str, Any]]:
        """Metadata of every prompt file in the folder, sorted by name.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a damaged file.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no prompt store {self.folder}")
        return [read_metadata(path) for path in sorted(self.folder.glob("*.safetensors"))]

    def write_index(self) -> None:
        """Rebuild ``index.csv`` from the files."""
        write_csv(self.folder / "index.csv", METADATA_FIELDS, self.index())
