"""Which task prompt vectors stores hold, and which of them may be combined.

Vectors are looked up by few-shot sample, seed of the initial prompt, and task. The vector of a
prompt file is its ``prompt`` minus its ``init`` (Belanec et al. 2024, arXiv 2408.01119). Of a grid
the file of best dev score stands for its task, sample and seed; files that were made by arithmetic
hold no vector of a task and are passed over. Prompts combine by the digests in their files, so no
model is loaded. The arithmetic itself is in ``prompt_lab.core.arithmetic``.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prompt_lab.files.prompts import FoundPrompt, best_found, find_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.files.prompts import Prompt

Group = tuple[int | None, int | None]
"""Few-shot sample and seed of the initial prompt; None where a file does not say."""

LONGEST_EXPRESSION = 100
"""Characters of an expression in a file's name; a longer one is cut there and gets a digest."""


@dataclass(frozen=True)
class Source:
    """A prompt that takes part.

    Attributes:
        found: where it is.
        prompt: what is there; prompt and init are (N, D) float32.
    """

    found: FoundPrompt
    prompt: Prompt

    @property
    def vector(self) -> Tensor:
        """Its task prompt vector (N, D), float64."""
        from prompt_lab.core.arithmetic import task_vector

        return task_vector(self.prompt.prompt, self.prompt.init)

    @property
    def start(self) -> Tensor:
        """The initial prompt that it stands for (N, D): its init, or what was made to start from.

        What meta-learning and ``vectors apply`` write was made to be a start itself.
        """
        return self.prompt.init if self.prompt.role == "prompt" else self.prompt.prompt

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, when it is first asked for."""
        return self.found.digest()

    def provenance(self) -> dict[str, str]:
        """Name, path and SHA-256 of the file."""
        return {"name": self.prompt.name, "path": str(self.found.path), "sha256": self.digest}


def load_source(found: FoundPrompt) -> Source:
    """A prompt whose numbers are all finite.

    Raises:
        ValueError: a damaged file, or numbers that are not finite.
    """
    prompt = found.load()
    if not (prompt.prompt.isfinite().all() and prompt.init.isfinite().all()):
        raise ValueError(f"{found.where}: the prompt holds numbers that are not finite")
    return Source(found, prompt)


# ---- the look-up ---------------------------------------------------------------------------------


def find_vectors(places: Sequence[str]) -> dict[Group, dict[str, FoundPrompt]]:
    """The tuned prompts of some places.

    Args:
        places: as of :func:`prompt_lab.files.prompts.find_prompts`.

    Returns:
        By sample and seed, in rising order, and by task, the prompt of best dev score; of equal
        ones the first.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompt.
        ValueError: a damaged file, or no prompt that was tuned for a task.
    """

    def key_of(known: dict[str, Any]) -> tuple[Group, str] | None:
        """Sample and seed, and task, of a tuned prompt."""
        task = known.get("task")
        if not task or known.get("made_from"):
            return None
        return (known.get("sample"), known.get("init_seed")), task

    best = best_found(find_prompts(*places), key_of)
    if not best:
        raise ValueError(f"no tuned prompt of a task in {', '.join(places)}: give stores of fits")
    found: dict[Group, dict[str, FoundPrompt]] = {}
    for group, task in sorted(best, key=_place):
        found.setdefault(group, {})[task] = best[group, task]
    return found


def _place(key: tuple[Group, str]) -> tuple[list[float], str]:
    """Where the vector of a sample, seed and task stands among others; none before all numbers."""
    group, task = key
    return [-math.inf if number is None else number for number in group], task


def complete(
    found: Mapping[Group, Mapping[str, FoundPrompt]], names: Sequence[str], places: Sequence[str]
) -> tuple[dict[Group, dict[str, FoundPrompt]], str]:
    """The prompts of the named tasks, for every sample and seed that has them all.

    Args:
        found: as :func:`find_vectors` gives it.
        names: tasks.
        places: where they were looked for.

    Returns:
        Prompts by sample and seed, and by task in the order of ``names``; and which samples and
        seeds have some of the tasks only, in words, or an empty text.

    Raises:
        ValueError: a task without any prompt, or no sample and seed that has all tasks.
    """
    known = {name: [group for group in found if name in found[group]] for name in names}
    tasks = sorted({task for paths in found.values() for task in paths})
    for name, groups in known.items():
        if not groups:
            raise ValueError(
                f"no prompt of task {name!r} in {', '.join(places)}; " + _near(name, tasks)
            )
    whole = {
        group: {name: paths[name] for name in names}
        for group, paths in found.items()
        if all(name in paths for name in names)
    }
    if not whole:
        parts = [f"{name} has {listed(map(_words, groups))}" for name, groups in known.items()]
        raise ValueError(f"no sample and seed has all tasks: {'; '.join(parts)}")
    some = {group for groups in known.values() for group in groups}
    partial = [group for group in found if group in some and group not in whole]
    lacking = (
        f"{_words(group)} lacks {', '.join(n for n in names if n not in found[group])}"
        for group in partial
    )
    return whole, listed(lacking)


def _near(name: str, tasks: Sequence[str]) -> str:
    """What may be meant by the name of no task."""
    joined = [task for task in tasks if name.startswith(f"{task}-")]
    if joined:
        return f"a minus needs spaces around it: {joined[0]} - ..."
    near = difflib.get_close_matches(name, tasks, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(tasks)}"


def _words(group: Group) -> str:
    """A sample and a seed, in words."""
    sample, seed = ("none" if number is None else number for number in group)
    return f"sample {sample} seed {seed}"


def listed(parts: Iterable[str]) -> str:
    """The first five of some parts, and how many more there are; empty where there is none."""
    parts = list(parts)
    more = f", and {len(parts) - 5} more" if len(parts) > 5 else ""
    return ", ".join(parts[:5]) + more


# ---- what combines -------------------------------------------------------------------------------


def common_init(sources: Sequence[Source], advice: str) -> Source:
    """The first source, where all start from one initial prompt.

    Args:
        sources: prompts, at least one.
        advice: what to do where they do not, for the error.

    Raises:
        ValueError: prompts that do not combine, or different initial prompts.
    """
    first = sources[0]
    for other in sources[1:]:
        check_compatible(first, other)
        if not first.prompt.init.equal(other.prompt.init):
            raise ValueError(
                f"{first.found.where} ({first.prompt.start}) and {other.found.where} "
                f"({other.prompt.start}) start from different initial prompts: {advice}"
            )
    return first


def check_compatible(one: Source, other: Source) -> None:
    """Refuse two prompts that do not combine.

    Raises:
        ValueError: different weights, tokenizers or shapes, naming both.
    """
    for what, ours, theirs in zip(
        ("backbone", "tokenizer", "shape"), _facts(one.prompt), _facts(other.prompt), strict=True
    ):
        if ours[0] != theirs[0]:
            raise ValueError(
                f"{one.found.where} and {other.found.where} do not combine: {what} {ours[1]} and "
                f"{theirs[1]}"
            )


def _facts(prompt: Prompt) -> list[tuple[Any, str]]:
    """Weights, tokenizer and shape, and how to call them."""
    weights, tokenizer = prompt.backbone_digest, prompt.tokenizer_digest
    return [
        (weights, f"{prompt.backbone!r} with weights {weights[:12]}"),
        (tokenizer, tokenizer[:12]),
        (prompt.prompt.shape, " x ".join(map(str, prompt.prompt.shape))),
    ]


# ---- what is made --------------------------------------------------------------------------------


def applied(
    name: str, init: Tensor, sources: Sequence[Source], coefficients: Sequence[float], scale: float
) -> Tensor:
    """The prompt init + scale * sum of coefficient * vector (N, D), rounded once to float32.

    Args:
        name: what is made, for errors.
        init: (N, D), the initial prompt.
        sources: prompt files whose vectors are added.
        coefficients: factor of each vector.
        scale: factor of the whole, lambda.

    Raises:
        ValueError: numbers too large for float32.
    """
    import torch

    from prompt_lab.core.arithmetic import apply_vector, combine

    total = combine(torch.stack([source.vector for source in sources]), coefficients)
    prompt = apply_vector(init, total, scale)
    if not prompt.isfinite().all():
        raise ValueError(f"{name}: the numbers get too large for float32: give a smaller scale")
    return prompt


def made_from(
    expression: str,
    scale: float,
    vectors: Mapping[str, Source],
    coefficients: Mapping[str, float],
    init: dict[str, Any] | None,
) -> dict[str, Any]:
    """The provenance of a prompt that was made by arithmetic, for its file.

    Args:
        expression: the sum, as the user wrote it.
        scale: factor of the whole.
        vectors: the files whose vectors took part, by task.
        coefficients: factor of each task's vector.
        init: what says which initial prompt was taken; None for none.
    """
    parts = [
        {"task": task, "coefficient": factor, **vectors[task].provenance()}
        for task, factor in coefficients.items()
    ]
    return {"expression": expression, "scale": scale, "vectors": parts, "init": init}


def file_name(coefficients: Mapping[str, float], scale: float = 1.0) -> str:
    """A scaled sum in letters, digits and - . _, as the start of file names."""
    words: list[str] = []
    for name, value in coefficients.items():
        words += ["minus"] if value < 0 else ["plus"] * bool(words)
        words += [f"{abs(value):g}".replace("+", "")] * (abs(value) != 1)
        words.append(re.sub(r"[^\w.-]+", "-", name))
    words += [f"times_{scale:g}".replace("+", "")] * (scale != 1)
    return shortened("_".join(words), LONGEST_EXPRESSION)


def shortened(name: str, longest: int) -> str:
    """A name for a file, cut with a digest of the whole where it is too long."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= longest else f"{name[:longest]}_{digest}"
