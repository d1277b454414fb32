"""The task table: what a task measures, which answers it allows, and what its files are made from.

The rows stand in ``tasks.yaml`` beside this module (the 160 tasks of the CrossFit few-shot gym, and
those that the papers use besides), and a user can add rows of the same form in a file of their own.
Training reads the first half of a row (metric, shots, labels), since few-shot files hold finished
text; the second half, a `Source`, is what ``prompt-lab tasks build`` makes the files from.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from prompt_lab.core.metric_names import METRICS
from prompt_lab.sandbox import TASKS as sandbox_tasks

Kind = Literal["classification", "text_to_text"]
Shots = int | Literal["all"]
Part = tuple[float, float]
"""Rows from (included) and to (excluded): shares as float, row numbers as int."""


@dataclass(frozen=True)
class Source:
    """What the files of a task are made from."""

    train: str  # split that train and dev are drawn from
    test: str  # split that becomes test; the same as `train` where there is only one
    input: str  # template (`prompt_lab.data.templates`)
    label: str | None = None  # column with index or text of the label, or an expression of it
    target: str | None = None  # template of the answers, where there is no label
    hub: str | None = None  # id of the data set on the Hugging Face hub; None: not there
    config: str | None = None  # configuration of the data set, where it has several
    train_part: Part | None = None  # rows of `train` to draw from, after a shuffle; None for all
    test_part: Part | None = None  # the same for `test`
    prepare: str | None = None  # function of `prompt_lab.data.prepare` that groups or draws rows
    keep: str | None = None  # expression that is true of the rows to use


_SOURCE_KEYS = [field.name for field in fields(Source)]
_SETTINGS = ("ontology", "kind", "metric", "shots", "labels")
_KEYS = (*_SETTINGS, *_SOURCE_KEYS, "licence", "note")
_NO_TEXTS = ("metric", "kind", "shots", "labels", "train_part", "test_part")


@dataclass(frozen=True)
class Task:
    """One row of the task table; ``name`` is also the task's folder below the data root."""

    name: str
    ontology: str  # kind of task, such as "cls/nli"; "custom" for users' rows that do not say
    metric: str  # one of `prompt_lab.core.metric_names.METRICS`
    shots: Shots | None  # K of the file names, or None where any K in the folder will do
    labels: tuple[str, ...] | None  # the C allowed answers in label order, or None: open answers
    kind: Kind = "classification"  # few-shot files have K rows of each label, or K in all
    source: Source | None = None  # None where the row does not say what files are made from
    licence: str = "not known here"  # what the authors of the data state
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
    """Look up tasks by name, in the order given; of the package's rows only these are typed.

    Raises:
        ValueError: A name is unknown (the message gives the nearest known ones) or occurs twice, or
            as `load_tasks`.
    """
    if isinstance(names, str):
        raise ValueError(f"task names must be a list, not the text {names!r}: write [{names}]")
    if twice := repeated(names):
        raise ValueError(f"tasks are named more than once: {', '.join(twice)}; name each once")
    own = _own(extra)
    known = [*_packaged_rows(), *own]
    unknown = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            unknown.append(f"unknown task {name!r}{hint}")
    if unknown:
        raise ValueError("; ".join([*unknown, "tasks of your own are rows of a task file"]))
    return [own[name] if name in own else _packaged(name) for name in names]


@cache
def _packaged_rows() -> dict[str, Any]:
    sandbox = {name: task.row for name, task in sandbox_tasks.items()}
    return read_yaml(Path(__file__).with_name("tasks.yaml")) | sandbox


@cache
def _packaged(name: str) -> Task:
    return _parse_row(name, _packaged_rows()[name])


def _own(extra: str | Path | None) -> dict[str, Task]:
    if extra is None:
        return {}
    path, tasks = Path(extra), {}
    if not path.is_file():
        raise FileNotFoundError(f"no task file {path}: give a YAML file of task rows")
    for name, row in read_yaml(path).items():
        try:
            if name in _packaged_rows():
                raise ValueError("the package already has a task of this name; choose another")
            tasks[name] = _parse_row(name, row)
        except ValueError as error:
            raise ValueError(f"{path}, row {name!r}: {error}") from None
    return tasks


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of C where there is one


class _Loader(_SafeLoader):
    """Safe YAML in which no key of a mapping may occur twice; PyYAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if twice := repeated(str(key.value) for key, _ in node.value):
            last = [key for key, _ in node.value if str(key.value) == twice[0]][-1]
            problem = f"{twice[0]!r} occurs twice; keep one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=last.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; ``ValueError`` where it is none, or has a key twice."""
    try:
        rows = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(rows, dict):
        raise ValueError(f"{path}: must hold rows of the form name: {{metric: ACC, ...}}")
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
    row = {key: value for key, value in row.items() if value is not None}
    if unknown := [str(key) for key in row if key not in _KEYS]:
        raise ValueError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(_KEYS)}")
    for key, value in row.items():
        if key not in _NO_TEXTS and not (isinstance(value, str) and value):
            raise ValueError(f"{key} must be text, not {value!r}; quote it")
    labels, shots, metric = _parse_labels(row.get("labels")), row.get("shots"), row.get("metric")
    kind = row.get("kind", "classification" if labels else "text_to_text")
    for key, value, allowed in (("metric", metric, METRICS), ("kind", kind, get_args(Kind))):
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
    if shots not in (None, "all") and (type(shots) is not int or shots < 1):
        raise ValueError(f"shots must be a whole number above 0, or all, not {shots!r}")
    source = {key: row[key] for key in _SOURCE_KEYS if key in row}
    return Task(
        name,
        row.get("ontology", "custom"),
        row["metric"],
        shots,
        labels,
        kind,
        _parse_source(source, labels) if source else None,
        **{key: row[key] for key in ("licence", "note") if key in row},
    )


def _parse_source(row: dict[str, Any], labels: tuple[str, ...] | None) -> Source:
    """Check what the files are made from."""
    for key in ("train", "input"):
        if key not in row:
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
    parts: dict[str, Part] = {}
    for key in {"train_part", "test_part"} & row.keys():
        part = row[key]
        kinds = {type(end) for end in part} if isinstance(part, list) and len(part) == 2 else None
        most = 1.0 if kinds == {float} else float("inf")
        if kinds not in ({float}, {int}) or not 0 <= part[0] < part[1] <= most:
            raise ValueError(
                f"{key} is {part!r}; give two shares such as [0.0, 0.1], or two row numbers such "
                "as [0, 1000], the smaller one first"
            )
        parts[key] = tuple(part)
    if "test" not in row:
        if len(parts) == 1:
            raise ValueError(
                "with one split, give train_part and test_part, or neither for 80 % to 20 %"
            )
        parts = parts or {"train_part": (0.0, 0.8), "test_part": (0.8, 1.0)}
    for key in ("input", "target"):
        if key in row and not any(mark in row[key] for mark in ("{{", "{%")):
            raise ValueError(
                f"{key} is the same for all rows; put a column in it as {{{{column}}}}"
            )
    return Source(**{"test": row["train"], **row, **parts})


def _parse_labels(labels: object) -> tuple[str, ...] | None:
    """Check the closed label set; None where the row has none."""
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
    if twice := repeated(labels):
        raise ValueError(f"labels occur twice: {', '.join(twice)}")
    return tuple(labels)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, each named once."""
    return [name for name, count in Counter(names).items() if count > 1]
