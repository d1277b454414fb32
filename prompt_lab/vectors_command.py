"""The commands ``prompt-lab vectors apply`` and ``vectors show``.

``apply`` evaluates an expression of task prompt vectors (Belanec et al. 2024, arXiv 2408.01119) and
writes the prompts as a store; ``show`` lists the vectors that stores hold. The vector of a prompt
file is its ``prompt`` minus its ``init``. Of a grid the file of best dev score stands for its task,
sample and seed; files that ``apply`` wrote hold no vector of a task and are passed over. No model
is loaded: prompts combine by the digests in their files. Left out: the choice of a scale on dev.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.prompt_file import Prompt

LONGEST_EXPRESSION, LONGEST_NAME = 100, 200
"""Characters in a file's name; what is longer is cut there and gets a digest."""

LABELS = ("labels", "metric")
ANSWERS = ("decoding", "max_new_tokens", "num_beams", "max_input_length", *LABELS)
"""Fields that say how a prompt answers, and those of them that belong to its task."""

Group = tuple[int | None, int | None]
"""Few-shot sample and seed of the initial prompt; None where a file does not say."""


@dataclass(frozen=True)
class Source:
    """A prompt file that takes part.

    Attributes:
        path: its file.
        prompt: what the file holds; prompt and init are (N, D) float32.
    """

    path: Path
    prompt: Prompt

    @property
    def vector(self) -> Tensor:
        """Its task prompt vector (N, D), float64."""
        from prompt_lab.arithmetic import task_vector

        return task_vector(self.prompt.prompt, self.prompt.init)

    @property
    def start(self) -> Tensor:
        """The initial prompt that it stands for (N, D): its init, or what was made to start from.

        A file with an origin, as meta-learning and ``vectors apply`` write, is itself a start.
        """
        return self.prompt.prompt if self.prompt.origin else self.prompt.init

    def provenance(self) -> dict[str, str]:
        """Name, path and SHA-256 of the file."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"name": self.prompt.name, "path": str(self.path), "sha256": digest}


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
    def origin(self) -> str:
        """What to call its results."""
        if self.scale == 1:
            return f"vectors {self.expression}"
        return f"vectors {self.scale:g} * ({self.expression})"

    @property
    def file_name(self) -> str:
        """The expression in letters, digits and - . _, as the start of file names."""
        words: list[str] = []
        for name, value in self.coefficients.items():
            words += ["minus"] if value < 0 else ["plus"] * bool(words)
            words += [f"{abs(value):g}".replace("+", "")] * (abs(value) != 1)
            words.append(re.sub(r"[^\w.-]+", "-", name))
        words += [f"times_{self.scale:g}".replace("+", "")] * (self.scale != 1)
        return _shortened("_".join(words), LONGEST_EXPRESSION)


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
        prompts: prompt stores, or folders of fits, that hold the tuned prompts.
        out: prompt store to write to; made if it is not there.
        init: what to apply to: the initial prompt that a prompt file was tuned from, or every
            different one of a prompt store or fit; the prompt itself of a file that was made to
            start from, as by MetaPrompt. By default the initial prompt that the vectors share.
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
    from prompt_lab.arithmetic import parse_expression
    from prompt_lab.prompt_file import PromptStore

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
    groups = _complete(find_vectors(prompts), list(coefficients), prompts)
    made = _results(asked, groups, None if init is None else _initial_prompts(Path(init)))
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
        prompts: prompt stores, or folders of fits.

    Raises:
        FileNotFoundError: a store that is not there.
        ValueError: stores without tuned prompts, prompts of different backbones or shapes, or
            numbers that are not finite.
    """
    rows: list[tuple[str, ...]] = []
    first = None
    for (sample, seed), paths in find_vectors(prompts).items():
        sources = {task: _load(path) for task, path in paths.items()}
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


def find_vectors(folders: Sequence[str]) -> dict[Group, dict[str, Path]]:
    """The files of the tuned prompts of stores.

    Args:
        folders: prompt stores, or folders of fits.

    Returns:
        By sample and seed, in rising order, and by task, the file of best dev score; of equal ones
        the first.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: a damaged file, or no prompt that was tuned for a task.
    """
    from prompt_lab.prompt_file import read_metadata

    best: dict[Group, dict[str, tuple[float, Path]]] = {}
    for path in (path for folder in folders for path in _files(Path(folder))):
        known = read_metadata(path)
        task = known.get("task")
        if not task or known.get("made_from"):
            continue
        of_group = best.setdefault((known.get("sample"), known.get("init_seed")), {})
        dev = known.get("dev_score")
        score = -math.inf if dev is None else float(dev)
        if task not in of_group or score > of_group[task][0]:
            of_group[task] = score, path
    if not best:
        raise ValueError(f"no tuned prompt of a task in {', '.join(folders)}: give stores of fits")
    groups = sorted(best, key=lambda group: [-math.inf if n is None else n for n in group])
    return {g: {task: path for task, (_, path) in sorted(best[g].items())} for g in groups}


def _files(folder: Path) -> list[Path]:
    """The prompt files of a store, or of the store in the folder of a fit."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no prompt store {folder}: give the folder of prompt files or fit")
    inner = folder / "prompts"
    return sorted((inner if inner.is_dir() else folder).glob("*.safetensors"))


def _complete(
    found: Mapping[Group, Mapping[str, Path]], names: Sequence[str], folders: Sequence[str]
) -> dict[Group, dict[str, Path]]:
    """The files of the named tasks, for every sample and seed that has them all."""
    known = {name: [group for group in found if name in found[group]] for name in names}
    tasks = sorted({task for paths in found.values() for task in paths})
    for name, groups in known.items():
        if not groups:
            raise ValueError(
                f"no prompt of task {name!r} in {', '.join(folders)}; " + _near(name, tasks)
            )
    complete = {
        group: {name: paths[name] for name in names}
        for group, paths in found.items()
        if all(name in paths for name in names)
    }
    if not complete:
        parts = [f"{name} has {_listed(map(_words, groups))}" for name, groups in known.items()]
        raise ValueError(f"no sample and seed has all tasks: {'; '.join(parts)}")
    some = {group for groups in known.values() for group in groups}
    partial = [group for group in found if group in some and group not in complete]
    if partial:
        left_out = (
            f"{_words(group)} lacks {', '.join(n for n in names if n not in found[group])}"
            for group in partial
        )
        print(f"prompt-lab: left out: {_listed(left_out)}", file=sys.stderr)
    return complete


def _near(name: str, tasks: Sequence[str]) -> str:
    """What may be meant by the name of no task."""
    joined = [task for task in tasks if name.startswith(f"{task}-")]
    if joined:
        return f"a minus needs spaces around it: {joined[0]} - ..."
    near = difflib.get_close_matches(name, tasks, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(tasks)}"


def _shortened(name: str, longest: int) -> str:
    """A name for a file, cut with a digest of the whole where it is too long."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= longest else f"{name[:longest]}_{digest}"


def _words(group: Group) -> str:
    """A sample and a seed, in words."""
    sample, seed = ("none" if number is None else number for number in group)
    return f"sample {sample} seed {seed}"


def _listed(parts: Iterable[str]) -> str:
    """The first of some parts, and how many more there are."""
    parts = list(parts)
    more = f", and {len(parts) - 5} more" if len(parts) > 5 else ""
    return ", ".join(parts[:5]) + more


def _load(path: Path) -> Source:
    """A prompt file whose numbers are all finite."""
    from prompt_lab.prompt_file import load_prompt

    prompt = load_prompt(path)
    if not (prompt.prompt.isfinite().all() and prompt.init.isfinite().all()):
        raise ValueError(f"{path}: the prompt holds numbers that are not finite")
    return Source(path, prompt)


def _initial_prompts(path: Path) -> list[Source]:
    """A prompt file, or of a store the first file of every different initial prompt."""
    sources = [_load(file) for file in (_files(path) if path.is_dir() else [path])]
    if not sources:
        raise FileNotFoundError(f"no prompt files in {path}: give another initial prompt")
    different: dict[bytes, Source] = {}
    for source in sources:
        different.setdefault(source.start.numpy().tobytes(), source)
    return list(different.values())


def _common_init(sources: Sequence[Source]) -> Source:
    """The first source, where all start from one initial prompt."""
    first = sources[0]
    for other in sources[1:]:
        check_compatible(first, other)
        if not first.prompt.init.equal(other.prompt.init):
            raise ValueError(
                f"{first.path} ({first.prompt.initialised}) and {other.path} "
                f"({other.prompt.initialised}) start from different initial prompts: name one to "
                "apply to with --init"
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
                f"{one.path} and {other.path} do not combine: {what} {ours[1]} and {theirs[1]}"
            )


def _facts(prompt: Prompt) -> list[tuple[Any, str]]:
    """Weights, tokenizer and shape, and how to call them."""
    weights, tokenizer = prompt.backbone_digest, prompt.tokenizer_digest
    return [
        (weights, f"{prompt.backbone!r} with weights {weights[:12]}"),
        (tokenizer, tokenizer[:12]),
        (prompt.prompt.shape, " x ".join(map(str, prompt.prompt.shape))),
    ]


# ---- what is written -----------------------------------------------------------------------------


def _results(
    asked: Combination, groups: Mapping[Group, Mapping[str, Path]], given: list[Source] | None
) -> list[Prompt]:
    """The prompts of all samples and seeds, on the given initial prompts or on their own."""
    made: list[Prompt] = []
    first: Source | None = None
    for group, paths in groups.items():
        vectors = {name: _load(path) for name, path in paths.items()}
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
            own = _common_init(list(vectors.values()))
            made.append(_result(stem, asked, vectors, own, own.prompt.init))
            continue
        for base in given:
            name = _shortened(f"{stem}_on_{base.path.stem}", LONGEST_NAME)
            made.append(_result(name, asked, vectors, base, base.start))
    return made


def _tell_zero(sources: Iterable[Source]) -> None:
    """Name the prompts that are their own init, as imported ones and those of step 0."""
    for source in sources:
        if source.prompt.prompt.equal(source.prompt.init):
            print(f"prompt-lab: {source.path} adds nothing: it is its own init", file=sys.stderr)


def _result(
    name: str, asked: Combination, vectors: Mapping[str, Source], base: Source, init: Tensor
) -> Prompt:
    """The prompt init + scale * expression, with where it comes from."""
    import torch

    from prompt_lab import __version__
    from prompt_lab.arithmetic import apply_vector, combine
    from prompt_lab.prompt_file import Prompt

    factors = asked.coefficients
    stacked = torch.stack([vectors[task].vector for task in factors])
    prompt = apply_vector(init, combine(stacked, list(factors.values())), asked.scale)
    if not prompt.isfinite().all():
        raise ValueError(f"{name}: the numbers get too large for float32: give a smaller scale")
    some = vectors[next(iter(factors))].prompt
    parts = [
        {"task": task, "coefficient": factors[task], **vectors[task].provenance()}
        for task in factors
    ]
    is_start = init is base.prompt.prompt
    return Prompt(
        prompt=prompt,
        init=init,
        name=name,
        backbone=some.backbone,
        backbone_digest=some.backbone_digest,
        tokenizer_digest=some.tokenizer_digest,
        task=asked.task,
        sample=some.sample,
        initialised=base.prompt.origin if is_start else base.prompt.initialised,
        init_seed=base.prompt.init_seed,
        **_way_of_answering(asked, [source.prompt for source in vectors.values()]),
        version=__version__,
        origin=asked.origin,
        source_tasks=list(factors),
        made_from={
            "expression": asked.expression,
            "scale": asked.scale,
            "vectors": parts,
            "init": {"tensor": "prompt" if is_start else "init", **base.provenance()},
        },
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
