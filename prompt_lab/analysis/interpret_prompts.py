"""The prompts that `prompt-lab interpret` reads, and the distances between them.

Prompts come from files, stores and folders of fits, of one backbone; of a grid in a folder the best
by dev stands for its task, sample and seeds. Left out: what prompts say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.files.prompt_file import Prompt


@dataclass(frozen=True)
class Tuned:
    """A prompt that is interpreted.

    Attributes:
        label: its name in the report, which no other one has.
        path: its file.
        prompt: what the file holds.
    """

    label: str
    path: Path
    prompt: Prompt

    @property
    def group(self) -> str:
        """What it is a run of: its task, or what it was learned as, or itself."""
        made = (self.prompt.kind, self.prompt.source_set)
        return self.prompt.task or (self.prompt.source_set and " ".join(made)) or self.label


def find_prompts(places: Sequence[str]) -> tuple[list[Tuned], list[str]]:
    """The prompts of some files, stores and folders of fits, all of one backbone.

    Args:
        places: where they are.

    Returns:
        The prompts, those of a task together, and notes on what was left out.

    Raises:
        FileNotFoundError: a place that is not there.
        ValueError: no prompts, a damaged file, NaN or infinite numbers, or several backbones.
    """
    from prompt_lab.files.prompt_file import load_prompt

    paths, left_out = [], 0
    for place in map(Path, places):
        found, fewer = _files(place)
        paths += found
        left_out += fewer
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValueError(f"no prompt files in {', '.join(places) or 'nothing'}: give some")
    tuned = []
    for path, label in zip(paths, _labels(paths), strict=True):
        prompt = load_prompt(path)
        if not (prompt.prompt.isfinite().all() and prompt.init.isfinite().all()):
            raise ValueError(f"{path} holds NaN or infinite numbers: tune it again or leave it out")
        tuned.append(Tuned(label, path, prompt))
    first = tuned[0]
    for other in tuned:
        if other.prompt.backbone_digest != first.prompt.backbone_digest:
            raise ValueError(
                f"{first.path} was made for backbone {first.prompt.backbone!r} with weights "
                f"{first.prompt.backbone_digest[:12]}, but {other.path} for "
                f"{other.prompt.backbone!r} with weights {other.prompt.backbone_digest[:12]}: only "
                "prompts of one backbone have one vocabulary"
            )
    order = list(dict.fromkeys(one.group for one in tuned))
    tuned.sort(key=lambda one: order.index(one.group))
    if not left_out:
        return tuned, []
    return tuned, [f"Of grids, {left_out} prompts with a lower dev score are left out."]


def _files(place: Path) -> tuple[list[Path], int]:
    """The prompt files of a place, of a grid the best, and how many are left out."""
    from prompt_lab.files.prompt_file import read_metadata

    if place.is_file():
        return [place], 0
    if not place.is_dir():
        raise FileNotFoundError(f"no prompt file or folder {place}")
    store = place / "prompts" if (place / "prompts").is_dir() else place
    paths = sorted(store.glob("*.safetensors"))
    best: dict[Any, tuple[float, Path]] = {}
    for path in paths:
        known = read_metadata(path)
        key: Any = path
        if known.get("task") and not known.get("made_from"):
            key = tuple(
                known.get(name)
                for name in ("task", "sample", "init_seed", "order_seed", "start", "start_of")
            )
        dev = known.get("dev_score")
        score = -math.inf if dev is None or math.isnan(dev) else float(dev)
        if key not in best or score > best[key][0]:
            best[key] = score, path
    return [path for _, path in best.values()], len(paths) - len(best)


def _labels(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with as many folders before it as make it different.

    The folder ``prompts``, which every fit has, tells nothing apart.
    """
    folders = [[part for part in path.parts[:-1] if part != "prompts"] for path in paths]
    for depth in range(1, max(map(len, folders)) + 2):
        parts = ([*own, path.stem] for own, path in zip(folders, paths, strict=True))
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def prompt_distances(tuned: Sequence[Tuned], compare: str) -> Tensor:
    """Distances (R, R) of all prompts; refuses several lengths where rows are compared."""
    from prompt_lab.analysis.interpretation import frobenius_distances, mean_row_distances

    prompts = [one.prompt.prompt for one in tuned]
    if compare == "mean":
        return mean_row_distances(prompts)
    by_length = {len(one.prompt.prompt): one for one in reversed(tuned)}
    if len(by_length) > 1:
        which = ", ".join(f"{one.label} has {n}" for n, one in sorted(by_length.items()))
        raise ValueError(
            f"prompts of several lengths ({which} rows) have no Frobenius distance: give prompts "
            "of one length at a time, tune them again with one num_virtual_tokens, or give "
            "--compare mean, which compares their mean rows"
        )
    return frobenius_distances(prompts)


def distance_name(compare: str) -> str:
    """What distances are."""
    return "Frobenius distance" if compare == "rows" else "distance of mean rows"


def start_notes(tuned: Sequence[Tuned]) -> Iterator[str]:
    """What distances between prompts hold beside what training did."""
    starts = {one.prompt.init.numpy().tobytes() for one in tuned}
    if len(starts) > 1:
        yield (
            f"The prompts start from {len(starts)} different initial prompts, so distances between "
            "them hold what lay between these, too."
        )
    if len({one.prompt.learning_rate for one in tuned}) > 1:
        yield "The prompts differ in learning rate, which spread holds, too."
