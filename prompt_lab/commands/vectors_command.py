"""The commands ``prompt-lab vectors apply`` and ``vectors show``.

``apply`` evaluates an expression of task prompt vectors (Belanec et al. 2024, arXiv 2408.01119) and
writes the prompts as a store; ``show`` lists the vectors that stores hold. The vector of a prompt
file is its ``prompt`` minus its ``init``. Of a grid the file of best dev score stands for its task,
sample and seed; files that ``apply`` wrote hold no vector of a task and are passed over. No model
is loaded: prompts combine by the digests in their files. Left out: the choice of a scale on dev.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.files.prompts import FoundPrompt, find_prompts
from prompt_lab.methods.task_vectors import (
    Group,
    Source,
    applied,
    check_compatible,
    common_init,
    complete,
    file_name,
    find_vectors,
    load_source,
    made_from,
    shortened,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.files.prompts import Prompt

LONGEST_NAME = 200
"""Characters in a file's name; what is longer is cut there and gets a digest."""

LABELS = ("labels", "metric")
ANSWERS = ("decoding", "max_new_tokens", "num_beams", "max_input_length", *LABELS)
"""Fields that say how a prompt answers, and those of them that belong to its task."""


@dataclass(frozen=True)
class Combination:
    """What is asked for.

    Attributes:
        expression: as the user wrote it.
        coefficients: factor of each task's vector.
        scale: factor of the whole.
        task: task of the results; empty for none.
    """

    expression: str
    coefficients: dict[str, float]
    scale: float
    task: str

    @property
    def file_name(self) -> str:
        """The expression in letters, digits and - . _, as the start of file names."""
        return file_name(self.coefficients, self.scale)


def apply_vectors(
    expression: str,
    *,
    prompts: list[str],
    out: str,
    init: str | None = None,
    scale: float = 1.0,
    task: str | None = None,
) -> list[Path]:
    """Write the prompts init + scale * EXPRESSION, EXPRESSION being a sum of task prompt vectors.

    An expression names tasks: 'qnli + mnli', '0.5 * qnli - mnli', 'mean(qnli, mnli)', '- sst2',
    '2 * (a + b)'. A minus needs spaces around it, as names may hold one. Names that do not begin
    with a letter, or hold other marks than - . _ go in quotes. '0 * qnli' is the bare initial
    prompt.

    It is evaluated for every sample and seed that all its tasks have; others are named and left
    out. In each file, init is the initial prompt it was applied to, and made_from tells the
    expression, the scale, and the files that took part with their digests. It answers as the
    prompts of its tasks where they agree. Nothing is overwritten.

    Args:
        expression: sum of vectors, by the names of their tasks.
        prompts: prompt stores, folders of fits, prompt files or checkpoints with tuned prompts.
        out: prompt store to write to; made if it is not there.
        init: what to apply to: the initial prompt that a prompt file was tuned from, or every
            different one of a prompt store, fit or checkpoint; the prompt itself of a file that was
            made to start from, as by MetaPrompt. By default the initial prompt that the vectors
            share.
        scale: factor of the whole expression, the paper's lambda.
        task: task that the written prompts are for; by default the one of the expression, and none
            where there are several.

    Returns:
        The prompt files that were written.

    Raises:
        FileNotFoundError: a store or an initial prompt that is not there.
        ValueError: an expression that cannot be read, tasks without prompts, prompts of different
            backbones or shapes, vectors of different initial prompts where none is named, numbers
            that are not finite, or a file that exists.
    """
    from prompt_lab.core.arithmetic import parse_expression
    from prompt_lab.files.prompts import PromptStore

    coefficients = parse_expression(expression)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: give a finite number")
    if task is None:
        task = next(iter(coefficients)) if len(coefficients) == 1 else ""
    asked = Combination(" ".join(expression.split()), coefficients, scale, task)
    store = PromptStore(out)
    if store.folder.exists():
        if not store.folder.is_dir():
            raise ValueError(f"out is the file {out}: give a folder")
        store.index()  # refuses a folder of something else
    groups, left_out = complete(find_vectors(prompts), list(coefficients), prompts)
    if left_out:
        print(f"prompt-lab: left out: {left_out}", file=sys.stderr)
    made = _results(asked, groups, None if init is None else _initial_prompts(init))
    there = [path for path in (store.path(prompt.name) for prompt in made) if path.exists()]
    if there:
        raise ValueError(f"{there[0]} is there and is not overwritten: choose another folder")
    store.save(made)
    return [store.path(prompt.name) for prompt in made]


def show_vectors(prompts: list[str]) -> None:
    """List the task prompt vectors of prompt stores, one line for each.

    A line has the task, sample and seed, the norm of the vector and of the initial prompt (both
    Frobenius), their ratio, and the cosine between the vector and the mean of those of the other
    tasks of the same sample and seed. A - stands where there is none: a single task, or a vector of
    norm 0.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints.

    Raises:
        FileNotFoundError: a store that is not there.
        ValueError: stores without tuned prompts, prompts of different backbones or shapes, or
            numbers that are not finite.
    """
    rows: list[tuple[str, ...]] = []
    first = None
    for (sample, seed), paths in find_vectors(prompts).items():
        sources = {task: load_source(path) for task, path in paths.items()}
        for source in sources.values():
            first = first or source
            check_compatible(first, source)
        vectors = {task: source.vector for task, source in sources.items()}
        for task, vector in vectors.items():
            others = [other for name, other in vectors.items() if name != task]
            norm, start = vector.norm().item(), sources[task].prompt.init.double().norm().item()
            ratio, cosine = norm / start if start else None, _cosine_to_mean(vector, others)
            places = ("-" if place is None else str(place) for place in (sample, seed))
            rows.append((task, *places, *map(_cell, (norm, start, ratio, cosine))))
    head = ("task", "sample", "seed", "vector", "init", "ratio", "cosine to others")
    rows.sort(key=lambda row: row[0])  # stable: samples and seeds stay in order
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cosine_to_mean(vector: Tensor, others: Sequence[Tensor]) -> float | None:
    """Cosine between a vector and the mean of others; None where that is not defined."""
    if not others:
        return None
    mean = sum(others[1:], others[0]) / len(others)
    norms = (vector.norm() * mean.norm()).item()
    return (vector * mean).sum().item() / norms if norms else None


def _cell(number: float | None) -> str:
    """A number in a table."""
    return "-" if number is None else f"{number:.4g}"


# ---- which prompts -------------------------------------------------------------------------------


def _initial_prompts(place: str) -> list[Source]:
    """The first prompt of every different initial prompt."""
    different: dict[bytes, Source] = {}
    for source in map(load_source, find_prompts(place)):
        different.setdefault(source.start.numpy().tobytes(), source)
    return list(different.values())


# ---- what is written -----------------------------------------------------------------------------


def _results(
    asked: Combination,
    groups: Mapping[Group, Mapping[str, FoundPrompt]],
    given: list[Source] | None,
) -> list[Prompt]:
    """The prompts of all samples and seeds, on the given initial prompts or on their own."""
    made: list[Prompt] = []
    first: Source | None = None
    for group, paths in groups.items():
        vectors = {name: load_source(path) for name, path in paths.items()}
        _tell_zero(vectors.values())
        first = first or next(iter(vectors.values()))
        for source in (*vectors.values(), *(given or ())):
            check_compatible(first, source)
        stem = asked.file_name + "".join(
            f"_{word}{number}"
            for word, number in zip(("", "seed"), group, strict=True)
            if number is not None
        )
        if given is None:
            own = common_init(list(vectors.values()), "name one to apply to with --init")
            made.append(_result(stem, asked, vectors, own, own.prompt.init))
            continue
        for base in given:
            name = shortened(f"{stem}_on_{base.found.stem}", LONGEST_NAME)
            made.append(_result(name, asked, vectors, base, base.start))
    return made


def _tell_zero(sources: Iterable[Source]) -> None:
    """Name the prompts that are their own init, as imported ones and those of step 0."""
    for source in sources:
        if source.prompt.prompt.equal(source.prompt.init):
            print(
                f"prompt-lab: {source.found.where} adds nothing: it is its own init",
                file=sys.stderr,
            )


def _result(
    name: str, asked: Combination, vectors: Mapping[str, Source], base: Source, init: Tensor
) -> Prompt:
    """The prompt init + scale * expression, with where it comes from."""
    from prompt_lab import __version__
    from prompt_lab.files.prompts import Prompt
    from prompt_lab.files.results import start_from

    factors = asked.coefficients
    sources = [vectors[task] for task in factors]
    some = sources[0].prompt
    is_start = init is base.prompt.prompt
    return Prompt(
        prompt=applied(name, init, sources, list(factors.values()), asked.scale),
        init=init,
        name=name,
        backbone=some.backbone,
        backbone_digest=some.backbone_digest,
        tokenizer_digest=some.tokenizer_digest,
        task=asked.task,
        sample=some.sample,
        **asdict(
            start_from(base.prompt.metadata(), base.found.path)
            if is_start
            else base.prompt.start_fields
        ),
        init_seed=base.prompt.init_seed,
        **_way_of_answering(asked, [source.prompt for source in vectors.values()]),
        version=__version__,
        role="sum",
        source_tasks=list(factors),
        made_from=made_from(
            asked.expression,
            asked.scale,
            vectors,
            factors,
            {"tensor": "prompt" if is_start else "init", **base.provenance()},
        ),
    )


def _way_of_answering(asked: Combination, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The fields that say how to answer: of the task's own prompt, or where all prompts agree.

    A task that has no part in the expression has its own labels and metric, which are not known
    here; its name stands in front of inputs where all prompts had theirs there.
    """
    own = [prompt for prompt in prompts if prompt.task == asked.task] or prompts
    names = [name for name in ANSWERS if own is not prompts or not asked.task or name not in LABELS]
    found = {
        name: getattr(own[0], name)
        for name in names
        if all(getattr(prompt, name) == getattr(own[0], name) for prompt in own)
    }
    return {**found, "task_prefix": bool(asked.task) and all(p.task_prefix for p in own)}
