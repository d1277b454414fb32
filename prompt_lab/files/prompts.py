"""The prompt file, the prompt store, and the one look-up of prompts.

A prompt file is a tensor file with ``prompt`` (N, D) and the ``init`` (N, D) it was trained from,
both float32, and metadata that says which backbone, task, seeds and scores it belongs to. A prompt
store is a folder of prompt files; its ``index.csv`` only repeats their metadata and is rebuilt from
them. :func:`find_prompts` reads what a place holds, whichever kind of place it is. Nothing that is
missing is silently replaced.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prompt_lab.files.results import Start, choose_by_dev
from prompt_lab.files.tensors import (
    check_backbone,
    load_tensors,
    read_metadata,
    save_tensors,
    write_csv,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone

Key = TypeVar("Key", bound=Hashable)
TaskSample = tuple[str, int]
"""Task and few-shot sample, -1 for none."""

PLACES = "a prompt file, a prompt store, the folder of a fit, a PEFT folder or a checkpoint (.ckpt)"

TARGET_OF = "attempt"
"""Field of a prompt's ``made_from`` that names the attention beside which it was trained."""


@dataclass
class Prompt:
    """One soft prompt with where it comes from; what is not known of it is empty or None."""

    prompt: Tensor  # (N, D) float32, the prompt to use
    init: Tensor  # (N, D) float32, what it was trained from
    name: str  # within a store, also the file's name
    backbone: str  # hub id or folder of the model
    backbone_digest: str  # SHA-256 of its weights
    tokenizer_digest: str  # SHA-256 of its vocabulary
    task: str = ""
    sample: int | None = None  # few-shot sample
    start: str = ""  # what init is, as fields of Start, with the three that follow
    start_of: str = ""
    start_seed: int | None = None
    start_file: str = ""
    init_seed: int | None = None  # seed of the initial prompt
    order_seed: int | None = None  # seed of the data order
    learning_rate: float | None = None  # the peak
    batch_size: int | None = None  # rows per step
    steps: int | None = None  # optimizer steps that led to prompt
    dev_score: float | None = None  # score on dev that chose it
    test_score: float | None = None
    metric: str = ""  # of both scores
    status: str = ""  # how its training ended
    seconds: float | None = None  # wall-clock seconds of the fit it was part of
    run: int | None = None  # place in the grid of the fit; of equal dev scores the first counts
    decoding: str = ""  # score or generate: how it answered when it was tested
    labels: list[str] | None = None  # what scored answers were chosen from
    max_new_tokens: int | None = None  # longest generated answer
    num_beams: int | None = None  # beams of generated answers
    max_input_length: int | None = None  # inputs were cut to this many tokens
    truncation_side: str = "right"  # on this side
    task_prefix: bool = False  # whether the task's name stood in front of the inputs
    label_score: str = "sum"  # of a label's tokens, or mean
    template: str = "plain"  # or chat: what stood around inputs and answers
    system: str | None = None  # system text of the chat
    version: str = ""  # of the package that wrote it
    code: Tensor | None = None  # (I,) float32, what a subspace made the prompt from
    role: str = "prompt"  # to others that start from it; or sum, mixture, meta, multitask
    source_tasks: list[str] | None = None  # what a prompt for other tasks was learned on
    source_set: str = ""  # the same as they were named, such as mpt/cls_to_cls/source
    made_from: dict[str, Any] | None = None  # expression, scale, files; None where it was tuned

    @property
    def start_fields(self) -> Start:
        """Where it was trained from."""
        return Start(self.start, self.start_of, self.start_seed, self.start_file)

    def metadata(self) -> dict[str, Any]:
        """All that is not a tensor."""
        return {k: v for k, v in vars(self).items() if k not in TENSORS}


TENSORS = ("prompt", "init", "code")
METADATA_FIELDS = tuple(f.name for f in fields(Prompt) if f.name not in TENSORS)


# ---- one file ------------------------------------------------------------------------------------


def save_prompt(path: str | Path, prompt: Prompt) -> None:
    """Write a prompt file, whole or not at all.

    Raises:
        ValueError: tensors that are not two (N, D) of one shape.
    """
    shape, other = tuple(prompt.prompt.shape), tuple(prompt.init.shape)
    if len(shape) != 2 or shape != other:
        raise ValueError(f"prompt {shape} and init {other} must both be (N, D)")
    made = {name: getattr(prompt, name) for name in TENSORS}
    tensors = {name: one.detach().float().clone() for name, one in made.items() if one is not None}
    sizes = {"num_virtual_tokens": shape[0], "hidden_size": shape[1]}
    save_tensors(path, "prompt", tensors, {**sizes, **prompt.metadata()})


def load_prompt(path: str | Path, backbone: Backbone | None = None) -> Prompt:
    """Read a prompt file, for a backbone if one is given, whose weights and width are compared.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a prompt file, damaged, a newer format, or made for another backbone.
    """
    tensors, metadata = load_tensors(path, "prompt", backbone)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    size = (metadata["num_virtual_tokens"], metadata["hidden_size"])
    code = shapes.get("code", ())
    if shapes != {"prompt": size, "init": size} | ({"code": code} if len(code) == 1 else {}):
        raise ValueError(
            f"{path}: damaged: a prompt file of this metadata holds prompt and init, both {size}, "
            f"and code (I,) where a subspace made the prompt; here: {shapes}"
        )
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    return Prompt(**floats, **_known(metadata))


def _known(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in METADATA_FIELDS if name in metadata}


def check_prompt(prompt: Prompt, backbone: Backbone, where: str | Path) -> None:
    """Refuse (``ValueError``) a prompt of another width or weights; PEFT's do not say for which."""
    sizes = {"hidden_size": prompt.prompt.shape[1]}
    check_backbone({**prompt.metadata(), **sizes}, backbone, where)


# ---- the look-up ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FoundPrompt:
    """A prompt that a place holds; the tensors of a prompt file are read when they are asked for.

    ``path`` is a prompt file, a PEFT folder or a checkpoint, ``metadata`` all fields of
    :class:`Prompt` but the tensors; ``read`` is the prompt where the whole was read.
    """

    path: Path
    metadata: dict[str, Any]
    read: Prompt | None = None

    @property
    def where(self) -> str:
        """Its place in words, which no other prompt has."""
        inside = self.path.suffix == ".ckpt"
        return f"{self.path} {self.metadata['name']}" if inside else str(self.path)

    @property
    def stem(self) -> str:
        """The name of its file, or its own inside a checkpoint or a PEFT folder."""
        return self.path.stem if self.read is None else self.metadata["name"]

    @property
    def dev(self) -> float:
        """Its dev score; minus infinity where there is none or it is NaN."""
        score = self.metadata.get("dev_score")
        return -math.inf if score is None or math.isnan(score) else float(score)

    def load(self, backbone: Backbone | None = None) -> Prompt:
        """The prompt with its tensors, for a backbone if one is given, as :func:`load_prompt`."""
        if self.read is None:
            return load_prompt(self.path, backbone)
        if backbone is not None:
            check_prompt(self.read, backbone, self.where)
        return self.read

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt, read once; a ``ValueError`` where its numbers are not all finite."""
        found = self.load()
        if not (found.prompt.isfinite().all() and found.init.isfinite().all()):
            raise ValueError(f"{self.where}: the prompt holds numbers that are not finite")
        return found

    @property
    def vector(self) -> Tensor:
        """Its task prompt vector (N, D), float64."""
        from prompt_lab.core.vectors import task_vector

        return task_vector(self.prompt.prompt, self.prompt.init)

    @property
    def is_start(self) -> bool:
        """Whether it was made to start from, as by meta-learning or ``vectors apply``."""
        return self.metadata.get("role", "prompt") != "prompt"

    @property
    def start(self) -> Tensor:
        """The initial prompt (N, D) that it stands for: its init, or itself where it is a start."""
        return self.prompt.prompt if self.is_start else self.prompt.init

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its file."""
        from prompt_lab.files.peft import WEIGHTS

        file = self.path / WEIGHTS if self.path.is_dir() else self.path
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def provenance(self) -> dict[str, str]:
        """Name, path and SHA-256 of its file."""
        return {"name": self.metadata["name"], "path": str(self.path), "sha256": self.digest}

    def check_answers_alone(self) -> None:
        """Refuse (``ValueError``) a target prompt of ``Attempt``, only a part of what answers."""
        if TARGET_OF in (self.metadata.get("made_from") or {}):
            raise ValueError(
                f"{self.where}: target prompts of Attempt answer only in mixtures with source "
                "prompts, by the attention of their fit: use prompt-lab test with its config"
            )


def find_prompts(*places: str | Path) -> list[FoundPrompt]:
    """The prompts of some places; those of a folder sorted by the names of their files.

    A place is a prompt file, a prompt store, the folder of a fit (its store is ``prompts``), a PEFT
    folder, or a Lightning checkpoint of PromptTuning (``.ckpt``).

    Raises:
        FileNotFoundError: a place that is not there or holds no prompt.
        ValueError: a damaged file, or one of something else.
    """
    found = []
    for place in map(Path, places):
        from prompt_lab.files.peft import is_peft, load_checkpoint, load_peft  # and torch

        if not place.exists():
            raise FileNotFoundError(f"no prompt file or folder {place}: give {PLACES}")
        if place.suffix == ".ckpt" or is_peft(place):
            read = load_checkpoint(place) if place.is_file() else [load_peft(place)]
            found += [FoundPrompt(place, prompt.metadata(), prompt) for prompt in read]
            continue
        store = place / "prompts" if (place / "prompts").is_dir() else place
        files = sorted(store.glob("*.safetensors")) if place.is_dir() else [place]
        if not files:
            raise FileNotFoundError(f"{place} holds no prompts: give {PLACES}")
        found += [FoundPrompt(file, _known(read_metadata(file, "prompt"))) for file in files]
    return found


def is_single(place: str | Path) -> bool:
    """Whether a place is one prompt by its kind: a prompt file or a PEFT folder."""
    from prompt_lab.files.peft import is_peft

    place = Path(place)
    return is_peft(place) or (place.is_file() and place.suffix != ".ckpt")


def best_found(
    found: Iterable[FoundPrompt], key_of: Callable[[dict[str, Any]], Key | None]
) -> dict[Key, FoundPrompt]:
    """The prompt of best dev score for each key, by :func:`choose_by_dev`, in the order found.

    ``key_of`` gives the key by metadata; None leaves a prompt out. No dev score is the worst.
    """
    import pandas as pd

    known = [(key, one) for one in found if (key := key_of(one.metadata)) is not None]
    place = {key: at for at, key in enumerate(dict.fromkeys(key for key, _ in known))}
    rows = [(place[key], one.dev, one.metadata.get("run")) for key, one in known]
    frame = pd.DataFrame(rows, columns=["key", "dev", "run"])
    chosen = choose_by_dev(frame, ["key"]).sort_values("key").index
    return dict(known[at] for at in chosen)


def best_prompts(places: Sequence[str]) -> dict[TaskSample, FoundPrompt]:
    """The best prompt of each task and sample (-1 for none) of some places; others are left out."""

    def key_of(known: dict[str, Any]) -> TaskSample | None:
        task, sample = known.get("task"), known.get("sample")
        return (task, -1 if sample is None else sample) if task else None

    return best_found(find_prompts(*places), key_of)


def source_prompts(
    places: Sequence[str], keys: Sequence[TaskSample], backbone: Backbone, num_virtual_tokens: int
) -> list[Prompt]:
    """The best prompt of each of some (task, sample), as other methods start from them.

    Raises:
        FileNotFoundError: a place without prompts, or prompts that no place has, all named.
        ValueError: a damaged file, or prompts of another backbone or another N; both sides named.
    """
    best = best_prompts(places)
    if missing := [f"{task} {sample}" for task, sample in keys if (task, sample) not in best]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(keys)} source prompts are not in {', '.join(places)}: "
            f"{', '.join(missing)}; tune them first, or leave their tasks out"
        )
    found = [best[key].load(backbone) for key in keys]
    for key, prompt in zip(keys, found, strict=True):
        if len(prompt.prompt) != num_virtual_tokens:
            raise ValueError(
                f"{best[key].where} has {len(prompt.prompt)} virtual tokens, but "
                f"model.num_virtual_tokens is {num_virtual_tokens}"
            )
    return found


# ---- the store -----------------------------------------------------------------------------------


class PromptStore:
    """A folder of prompt files; made when the first prompt is saved."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """File of the prompt of that name; a ``ValueError`` for one that would leave the folder."""
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
        if missing := [name for name in names if not self.path(name).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} prompts are not in {self.folder}: "
                f"{', '.join(missing)}"
            )
        return [load_prompt(self.path(name), backbone) for name in names]

    def index(self) -> list[dict[str, Any]]:
        """Metadata of every prompt file in the folder, sorted by name.

        Raises:
            FileNotFoundError, ValueError: no such folder; a damaged file.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no prompt store {self.folder}")
        files = sorted(self.folder.glob("*.safetensors"))
        return [_known(read_metadata(path, "prompt")) for path in files]

    def write_index(self) -> None:
        """Rebuild ``index.csv`` from the files."""
        write_csv(self.folder / "index.csv", METADATA_FIELDS, self.index())
