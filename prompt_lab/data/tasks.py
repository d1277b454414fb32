"""The task table: what each task measures, and which answers it allows.

The rows stand in ``tasks.yaml`` beside this module (the 160 tasks of the CrossFit few-shot gym, and
snli and sst5), and a user can add rows of the same form in a file of their own. A row says nothing
about where data come from nor how inputs are worded; the few-shot files hold finished text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prompt_lab.metric_names import METRICS

_KEYS = ("ontology", "metric", "shots", "labels")
_PACKAGE_TABLE = Path(__file__).with_name("tasks.yaml")
_SANDBOX_TABLE = Path(__file__).parents[1] / "sandbox" / "tasks.yaml"


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    Attributes:
        name: Name of the task, which is also its folder below the data root.
        ontology: Kind of task, such as "cls/nli"; "custom" for users' rows that do not say.
        metric: One of `prompt_lab.metric_names.METRICS`.
        shots: The K of the file names, or None where any K in the folder will do.
        labels: The C answers that are allowed, in label order, or None for open answers.
    """

    name: str
    ontology: str
    metric: str
    shots: int | None
    labels: tuple[str, ...] | None


def load_tasks(extra: str | Path | None = None) -> dict[str, Task]:
    """Read the task table of the package, and a user's own rows.

    Args:
        extra: YAML file with rows ``name: {metric, ontology, shots, labels}``. Only ``metric`` is
            required; ``ontology`` is "custom" and ``shots`` any K where they are left out, and
            answers are open where ``labels`` is.

    Returns:
        The tasks by name: the package's in alphabetical order, then the user's in file order.

    Raises:
        FileNotFoundError: There is no file ``extra``.
        ValueError: A row is not valid; the message names file, row and reason.
    """
    tasks = dict(_packaged_tasks())
    if extra is not None:
        path = Path(extra)
        if not path.is_file():
            raise FileNotFoundError(f"no task file {path}: give a YAML file of task rows")
        _add_rows(tasks, path)
    return tasks


def find_tasks(names: Sequence[str], extra: str | Path | None = None) -> list[Task]:
    """Look up tasks by name.

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
    tasks = load_tasks(extra)
    unknown = [_describe_unknown(name, tasks) for name in names if name not in tasks]
    if unknown:
        raise ValueError("; ".join(unknown))
    return [tasks[name] for name in names]


@cache
def _packaged_tasks() -> dict[str, Task]:
    """The rows that ship with the package; read once, never changed."""
    tasks: dict[str, Task] = {}
    for path in (_PACKAGE_TABLE, _SANDBOX_TABLE):
        if path.is_file():
            _add_rows(tasks, path)
    return tasks


def _add_rows(tasks: dict[str, Task], path: Path) -> None:
    """Parse the rows of a file and add them to `tasks`, where no name may be present yet."""
    for name, row in _read_rows(path).items():
        try:
            if name in tasks:
                raise ValueError("the package already has a task of this name; choose another")
            tasks[name] = _parse_row(name, row)
        except ValueError as error:
            raise ValueError(f"{path}, row {name!r}: {error}") from None


def _read_rows(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; a name that occurs twice is an error."""
    try:
        loader = yaml.SafeLoader(path.read_bytes())
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
    if not name or "/" in name or name != name.strip():
        raise ValueError("a name is also a folder name: no slash, no spaces around it, not empty")
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
    return Task(name, ontology, row["metric"], _parse_shots(row.get("shots")), _parse_labels(row))


def _parse_shots(shots: object) -> int | None:
    """Check the K of the file names."""
    if shots is None or (isinstance(shots, int) and not isinstance(shots, bool) and shots > 0):
        return shots
    raise ValueError(f"shots must be a whole number above 0, not {shots!r}")


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
