"""The prompts that `prompt-lab interpret` reads, and the distances between them.

Prompts come from files, stores and folders of fits, of one backbone; of a grid in a folder the best
by dev stands for its task, sample and seeds. Left out: what prompts say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.files.prompts import FoundPrompt, Prompt


@dataclass(frozen=True)
class Tuned:
    """A prompt that is interpreted.

    Attributes:
        label: its name in the report, which no other one has.
        where: its place.
        prompt: what is there.
    """

    label: str
    where: str
    prompt: Prompt

    @property
    def group(self) -> str:
        """What it is a run of: its task, or what it was learned as, or itself."""
        made = (self.prompt.role, self.prompt.source_set)
        return self.prompt.task or (self.prompt.source_set and " ".join(made)) or self.label


def find_tuned(places: Sequence[str]) -> tuple[list[Tuned], list[str]]:
    """The prompts of some places, all of one backbone.

    Args:
        places: as of :func:`prompt_lab.files.prompts.find_prompts`.

    Returns:
        The prompts, those of a task together, and notes on what was left out.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompts.
        ValueError: a damaged file, NaN or infinite numbers, or several backbones.
    """
    from prompt_lab.files.prompts import best_found, find_prompts

    found: dict[str, FoundPrompt] = {}
    left_out = 0
    for place in places:
        own = find_prompts(place)
        best = best_found(own, _run).values()
        chosen = {*best, *(one for one in own if _run(one.metadata) is None)}
        found |= {one.where: one for one in own if one in chosen}
        left_out += len(own) - len(chosen)
    tuned = []
    for one, label in zip(found.values(), _labels(list(found.values())), strict=True):
        prompt = one.load()
        if not (prompt.prompt.isfinite().all() and prompt.init.isfinite().all()):
            raise ValueError(
                f"{one.where} holds NaN or infinite numbers: tune it again or leave it out"
            )
        tuned.append(Tuned(label, one.where, prompt))
    first = tuned[0]
    for other in tuned:
        if other.prompt.backbone_digest != first.prompt.backbone_digest:
            raise ValueError(
                f"{first.where} was made for backbone {first.prompt.backbone!r} with weights "
                f"{first.prompt.backbone_digest[:12]}, but {other.where} for "
                f"{other.prompt.backbone!r} with weights {other.prompt.backbone_digest[:12]}: only "
                "prompts of one backbone have one vocabulary"
            )
    order = list(dict.fromkeys(one.group for one in tuned))
    tuned.sort(key=lambda one: order.index(one.group))
    if not left_out:
        return tuned, []
    return tuned, [f"Of grids, {left_out} prompts with a lower dev score are left out."]


def _run(known: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the prompts of a grid have in common; None for one that was not tuned for a task."""
    if not known.get("task") or known.get("made_from"):
        return None
    names = ("task", "sample", "init_seed", "order_seed", "start", "start_of")
    return tuple(known.get(name) for name in names)


def _labels(found: Sequence[FoundPrompt]) -> list[str]:
    """A name for each prompt: its own, with as many folders before it as make it different.

    The folder ``prompts``, which every fit has, tells nothing apart.
    """
    folders = [[part for part in one.path.parts[:-1] if part != "prompts"] for one in found]
    for depth in range(1, max(map(len, folders)) + 2):
        parts = ([*own, one.stem] for own, one in zip(folders, found, strict=True))
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [one.where for one in found]


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
