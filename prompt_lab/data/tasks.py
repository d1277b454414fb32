"""The task table: what a task measures, which answers it allows, and what its files are made from.

The rows stand in ``tasks.yaml`` beside this module (the 160 tasks of the CrossFit few-shot gym, and
those that the papers use besides), and a user can add rows of the same form in a file of their own.
Training reads the first half of a row (metric, shots, labels), since few-shot files hold finished
text; the second half, a `Source`, is what ``prompt-lab tasks build`` makes the files from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from prompt_lab.core.metric_names import METRICS

Kind = Literal["classification", "text_to_text"]
Shots = int | Literal["all"]
Part = tuple[float, float]
"""Rows from (included) and to (excluded): shares as float, row numbers as int."""

_SOURCE_KEYS = (
    "hub",
    "config",
    "train",
    "test",
    "train_part",
    "test_part",
    "prepare",
    "keep",
    "input",
    "label",
    "target",
)
_KEYS = ("ontology", "kind", "metric", "shots", "labels", *_SOURCE_KEYS, "licence", "note")
_PACKAGED = (
    Path(__file__).with_name("tasks.yaml"),
    Path(__file__).parents[1] / "sandbox" / "tasks.yaml",
)


@dataclass(frozen=True)
class Source:
    """What the files of a task are made from.

    Attributes:
        hub: Id of the data set on the Hugging Face hub, or None where the rows are not there.
        config: Configuration of the data set, or None where it has only one.
        train: Split that train and dev are drawn from.
        test: Split that becomes test; the same as ``train`` where there is only one.
        train_part: Rows of ``train`` to draw from, after a shuffle; None for all, unshuffled.
        test_part: The same for ``test``.
        prepare: Function of `prompt_lab.data.prepare` that groups, draws or takes apart the rows,
            or None where templates suffice.
        keep: Expression that is true of the rows to use, or None for all.
        input: Template of the input (`prompt_lab.data.templates`).
        label: Column with the index or the text of the label, or an expression of it; None where
            ``target`` says the answer.
        target: Template of the answers, or None.
    """

    hub: str | None
    config: str | None
    train: str
    test: str
    train_part: Part | None
    test_part: Part | None
    prepare: str | None
    keep: str | None
    input: str
    label: str | None
    target: str | None


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    Attributes:
        name: Name of the task, which is also its folder below the data root.
        ontology: Kind of task, such as "cls/nli"; "custom" for users' rows that do not say.
        metric: One of `prompt_lab.core.metric_names.METRICS`.
        shots: The K of the file names, or None where any K in the folder will do.
        labels: The C answers that are allowed, in label order, or None for open answers.
        kind: How few-shot files are drawn: K rows of each label ("classification"), or K in all.
        source: What the files are made from, or None where the row does not say.
        licence: What the authors of the data state; "not known here" where the row does not say.
        note: What to know of the task, or empty.
    """

    name: str
    ontology: str
    metric: str
    shots: Shots | None
    labels: tuple[str, ...] | None
    kind: Kind = "classification"
    source: Source | None = None
    licence: str = "not known here"
    note: str = ""


def load_tasks(extra: str | Path | None = None) -> dict[str, Task]:
    """Read the task table of the package, and a user's own rows.

    Args:
        extra: YAML file with rows ``name: {metric, ontology, shots, labels, ...}``. Only ``metric``
            is required; ``ontology`` is "custom" and ``shots`` any K where they are left out, and
            answers are open where ``labels`` is. To build files, a row needs ``train``, ``input``,
            and ``label`` or ``target``; ``kind`` is "classification" where there are labels.

    Returns:
        The tasks by name: the package's in alphabetical order, then the user's in file order.

    Raises:
        FileNotFoundError: There is no file ``extra``.
        ValueError: A row is not valid; the message names file, row and reason.
    """
    return {name: _packaged(name) for name in _packaged_rows()} | _own(extra)


def find_tasks(names: Sequence[str], extra: str | Path | None = None) -> list[Task]:
    """Look up tasks by name; of the package's rows only these are checked and typed.

    Args:
        names: Names of tasks, none of them twice.
        extra: A user's own task file, as for `load_tasks`.

    Returns:
        The tasks in the order of ``names``.

    Raises:
        ValueError: A name is unknown (the message gives the nearest known ones) or occurs twice.
    """
    if isinstance(names, str):
        raise ValueError(f"task names must be a list, not the text {names!r}: write [{names}]")
    twice = repeated(names)
    if twice:
        raise ValueError(f"tasks are named more than once: {', '.join(twice)}; name each once")
    own, packaged = _own(extra), _packaged_rows()
    unknown = [n for n in names if n not in own and n not in packaged]
    if unknown:
        raise ValueError("; ".join(_describe_unknown(name, [*packaged, *own]) for name in unknown))
    return [own[name] if name in own else _packaged(name) for name in names]


@cache
def _packaged_rows() -> dict[str, Any]:
    """The rows that ship with the package, as YAML has them."""
    return {name: row for path in _PACKAGED for name, row in _read_rows(path).items()}


@cache
def _packaged(name: str) -> Task:
    """A row of the package."""
    return _parse_row(name, _packaged_rows()[name])


def _own(extra: str | Path | None) -> dict[str, Task]:
    """A user's own rows."""
    if extra is None:
        return {}
    path, tasks = Path(extra), {}
    if not path.is_file():
        raise FileNotFoundError(f"no task file {path}: give a YAML file of task rows")
    for name, row in _read_rows(path).items():
        try:
            if name in _packaged_rows():
                raise ValueError("the package already has a task of this name; choose another")
            tasks[name] = _parse_row(name, row)
        except ValueError as error:
            raise ValueError(f"{path}, row {name!r}: {error}") from None
    return tasks


def _read_rows(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; a name that occurs twice is an error."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_bytes())
        node = loader.get_single_node()
        rows = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(rows, dict):
        raise ValueError(f"{path}: must hold rows of the form name: {{metric: ACC, ...}}")
    twice = repeated(key.value for key, _ in node.value)
    if twice:
        raise ValueError(f"{path}, row {twice[0]!r}: the name occurs twice; keep one row")
    return rows


def _parse_row(name: object, row: object) -> Task:
    """Check one row; the error says the reason only."""
    if not isinstance(name, str):
        raise ValueError(f"the name is not text but {type(name).__name__}; quote it")
    if not name or set("/\\") & set(name) or name.startswith(".") or name != name.strip():
        raise ValueError(
            "a name is also a folder name: no slash, no dot at its start, no spaces around it, not "
            "empty"
        )
    if not isinstance(row, dict):
        raise ValueError("must be a mapping such as {metric: ACC, labels: [good, bad]}")
    unknown = [str(key) for key in row if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(_KEYS)}")
    if row.get("metric") not in METRICS:
        allowed = ", ".join(METRICS)
        raise ValueError(f"metric is {row.get('metric')!r}; allowed: {allowed}")
    ontology = row.get("ontology", "custom")
    if not isinstance(ontology, str) or not ontology:
        raise ValueError(f"ontology must be text, not {ontology!r}")
    labels = _parse_labels(row)
    kind = row.get("kind", "classification" if labels else "text_to_text")
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(get_args(Kind))}")
    return Task(
        name,
        ontology,
        row["metric"],
        _parse_shots(row.get("shots")),
        labels,
        kind,
        _parse_source(row, labels),
        _text(row, "licence") or "not known here",
        _text(row, "note") or "",
    )


def _parse_source(row: dict[Any, Any], labels: tuple[str, ...] | None) -> Source | None:
    """Check what the files are made from; None where a row has none of its keys."""
    if not any(key in row for key in _SOURCE_KEYS):
        return None
    for key in ("train", "input"):
        if not _text(row, key):
            raise ValueError(
                f"the files cannot be built without {key}; add it, or leave all of "
                f"{', '.join(_SOURCE_KEYS)} out"
            )
    if ("label" in row) == ("target" in row):
        raise ValueError(
            "give label (the column of the label's index) or target (a template), and not both"
        )
    if "label" in row and labels is None:
        raise ValueError("label is the index of a label, but there are no labels; list them")
    parts = {key: _parse_part(row, key) for key in ("train_part", "test_part")}
    only = "test" not in row
    if only and (parts["train_part"] is None) != (parts["test_part"] is None):
        raise ValueError(
            "with one split, give train_part and test_part, or neither for 80 % to 20 %"
        )
    if only and parts["train_part"] is None:
        parts = {"train_part": (0.0, 0.8), "test_part": (0.8, 1.0)}
    for key in ("input", "target"):
        text = _text(row, key)
        if text and not any(mark in text for mark in ("{{", "{%")):
            raise ValueError(
                f"{key} is the same for all rows; put a column in it as {{{{column}}}}"
            )
    return Source(
        hub=_text(row, "hub"),
        config=_text(row, "config"),
        train=row["train"],
        test=_text(row, "test") or row["train"],
        prepare=_text(row, "prepare"),
        keep=_text(row, "keep"),
        input=row["input"],
        label=_text(row, "label"),
        target=_text(row, "target"),
        **parts,
    )


def _parse_part(row: dict[Any, Any], key: str) -> Part | None:
    """Check a pair of shares or of row numbers."""
    part = row.get(key)
    if part is None:
        return None
    if isinstance(part, list) and len(part) == 2:
        start, stop = part
        shares = type(start) is type(stop) is float and 0 <= start < stop <= 1
        numbers = type(start) is type(stop) is int and 0 <= start < stop
        if shares or numbers:
            return start, stop
    raise ValueError(
        f"{key} is {part!r}; give two shares such as [0.0, 0.1], or two row numbers such as "
        "[0, 1000], the smaller one first"
    )


def _text(row: dict[Any, Any], key: str) -> str | None:
    """A text of a row, or None where it is left out."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError(f"{key} must be text, not {value!r}; quote it")


def _parse_shots(shots: object) -> Shots | None:
    """Check the K of the file names."""
    if shots is None or (isinstance(shots, int) and not isinstance(shots, bool) and shots > 0):
        return shots
    if shots == "all":
        return "all"
    raise ValueError(f"shots must be a whole number above 0, or all, not {shots!r}")


def _parse_labels(row: dict[Any, Any]) -> tuple[str, ...] | None:
    """Check the closed label set; None where the row has none."""
    labels = row.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) < 2:
        raise ValueError(f"labels must be a list of two or more, not {labels!r}; or leave it out")
    for label in labels:
        if not isinstance(label, str):
            kind = type(label).__name__
            raise ValueError(
                f'YAML read a label as {label!r} ({kind}), not as text; quote it, as in "yes"'
            )
        if not label or label != label.strip() or any(mark in label for mark in "\t\r\n"):
            raise ValueError(
                f"label {label!r} is empty or has a tab, a line break or spaces around it"
            )
    twice = repeated(labels)
    if twice:
        raise ValueError(f"labels occur twice: {', '.join(twice)}")
    return tuple(labels)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, each named once."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name for name, count in seen.items() if count > 1]


def _describe_unknown(name: str, known: Iterable[str]) -> str:
    """Say that a task is unknown, and which known names come nearest."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "add a row for it in a task file"
    return f"unknown task {name!r}: {hint}"
