"""Partitions of tasks by name: what to learn from, and what to test on.

The partitions of the papers stand in ``partitions.yaml`` beside this module, and a user can add
partitions of the same form in a file of their own. A partition has source tasks (to learn from),
dev tasks (to choose settings with; often none) and target tasks (to report); no name stands in two
of them. A set is written as a list, or as other sets changed:

    mine/to_paraphrase:
      source: {like: [crossfit/random/source, crossfit/random/dev], without: [glue-qqp, paws]}
      target: [glue-qqp, paws]

``like`` names sets of the package's partitions or of those further up in the same file; ``plus``
adds names.

CrossFit's own files are mended where they must be: four of them keep the held-out tasks under
``dev``, which is the target here, and ``sick``, which one file has in both of its sets, is a target
only. Each such place has a note. Left out: IPT's splits by task family and its further drafts. Two
tasks that are made from the same texts are named in notes where it is known; nothing refuses them.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prompt_lab.data.tasks import find_tasks, repeated

_SETS = ("source", "dev", "target")
_KEYS = ("paper", "note", *_SETS, "outside")
_CHANGES = ("like", "without", "plus")
_PACKAGED = Path(__file__).with_name("partitions.yaml")


@dataclass(frozen=True)
class Partition:
    """Tasks by their part in an experiment; the sets share no name.

    Attributes:
        name: Name of the partition, such as "crossfit/random".
        source: Tasks to learn from, at least one.
        dev: Tasks to choose settings with; empty where there are none.
        target: Tasks to report, at least one.
        outside: Those of the names that have no row in the package's task table. They need a row in
            a user's own task file, and data.
        paper: Where it was published, and under which name; empty where it was not.
        note: What to know of it, such as where a paper and its code differ; may be empty.
    """

    name: str
    source: tuple[str, ...]
    dev: tuple[str, ...]
    target: tuple[str, ...]
    outside: tuple[str, ...] = ()
    paper: str = ""
    note: str = ""


def partition(
    name: str, extra: str | Path | None = None, task_file: str | Path | None = None
) -> Partition:
    """Look up one partition.

    Args:
        name: Its name, such as "mpt/cls_to_cls"; `partition_names` lists them.
        extra: A user's own partitions, as for `load_partitions`.
        task_file: A user's own task rows, as for `load_partitions`.

    Raises:
        FileNotFoundError: There is no file ``extra`` or ``task_file``.
        ValueError: The name is unknown (the message gives near ones), or a file is not valid.
    """
    known = load_partitions(extra, task_file)
    if name not in known:
        raise ValueError(f"unknown partition {name!r}: {_hint(name, known)}")
    return known[name]


def expand_sets(names: Iterable[str]) -> list[str]:
    """Names of tasks; a set of a partition, such as "mpt/cls_to_cls/target", gives its tasks.

    Raises:
        ValueError: A name with a slash that is no set of a partition of the package.
    """
    tasks: list[str] = []
    for name in names:
        head, slash, part = name.rpartition("/")
        if not slash:
            tasks.append(name)
        elif part in _SETS:
            tasks += getattr(partition(head), part)
        else:
            raise ValueError(
                f"{name!r} is neither a task nor a set of a partition; write a task's name, or "
                f"a partition and one of {', '.join(_SETS)}, as in mpt/cls_to_cls/target"
            )
    return tasks


def partition_names(
    extra: str | Path | None = None, task_file: str | Path | None = None
) -> tuple[str, ...]:
    """The names of all partitions: the package's in file order, then the user's.

    The arguments and the errors are those of `load_partitions`.
    """
    return tuple(load_partitions(extra, task_file))


def load_partitions(
    extra: str | Path | None = None, task_file: str | Path | None = None
) -> dict[str, Partition]:
    """Read the partitions of the package, and a user's own.

    Args:
        extra: YAML file with rows ``name: {source, target, dev, outside, paper, note}``, of which
            ``source`` and ``target`` are required. Its tasks must stand in the task table, in
            ``task_file`` or in the row's ``outside``.
        task_file: A user's own task rows, as for `prompt_lab.data.tasks.load_tasks`.

    Returns:
        The partitions by name: the package's, then the user's, in file order.

    Raises:
        FileNotFoundError: There is no file ``extra`` or ``task_file``.
        ValueError: A row is not valid: unknown tasks, names that occur twice, tasks in more than
            one set; the message names file, row and all such names.
    """
    partitions = dict(_packaged_partitions())
    if extra is None:
        return partitions
    path = Path(extra)
    if not path.is_file():
        raise FileNotFoundError(f"no partition file {path}: give a YAML file of partitions")
    _add_rows(partitions, path)
    for name in list(partitions)[len(_packaged_partitions()) :]:
        try:
            _check_tasks(partitions[name], task_file)
        except ValueError as error:
            raise ValueError(f"{path}, partition {name!r}: {error}") from None
    return partitions


@cache
def _packaged_partitions() -> dict[str, Partition]:
    """The partitions that ship with the package; read once, never changed."""
    partitions: dict[str, Partition] = {}
    _add_rows(partitions, _PACKAGED)
    return partitions


class _Loader(yaml.SafeLoader):
    """YAML in which no key of a mapping may occur twice; PyYAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; a key that occurs twice is an error with its line."""
        keys = [str(key.value) for key, _ in node.value]
        twice = repeated(keys)
        if twice:
            mark = node.value[len(keys) - 1 - keys[::-1].index(twice[0])][0].start_mark
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} occurs twice", problem_mark=mark)
        return super().construct_mapping(node, deep=deep)


def _add_rows(partitions: dict[str, Partition], path: Path) -> None:
    """Parse the partitions of a file, in its order, and add them to ``partitions``."""
    try:
        rows = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(rows, dict):
        form = "name: {source: [...], target: [...]}"
        raise ValueError(f"{path}: must hold rows of the form {form}")
    for name, row in rows.items():
        try:
            if name in partitions:
                raise ValueError("the package already has a partition of this name; choose another")
            partitions[name] = _parse_row(name, row, partitions)
        except ValueError as error:
            raise ValueError(f"{path}, partition {name!r}: {error}") from None


def _parse_row(name: object, row: object, above: dict[str, Partition]) -> Partition:
    """Check one row, whose sets may be like those ``above``; the error says the reason only."""
    if not isinstance(name, str) or not name or name != name.strip():
        raise ValueError("the name must be text, not empty, without spaces around it")
    if name.split("/")[-1] in _SETS:
        raise ValueError(f"a name may not end in a set ({', '.join(_SETS)}); choose another")
    if not isinstance(row, dict):
        raise ValueError("must be a mapping such as {source: [glue-sst2], target: [imdb]}")
    _check_keys(row, _KEYS)
    sets = {which: _parse_set(which, row.get(which, []), above) for which in _SETS}
    empty = [which for which in ("source", "target") if not sets[which]]
    if empty:
        raise ValueError(f"{' and '.join(empty)} without a task: name at least one in each")
    _check_disjoint(sets)
    outside = _names("outside", row.get("outside", []))
    stray = [task for task in outside if not any(task in tasks for tasks in sets.values())]
    if stray:
        raise ValueError(f"outside names {', '.join(stray)}, which no set has; take it out")
    paper, note = (_text(key, row.get(key, "")) for key in ("paper", "note"))
    return Partition(name, **sets, outside=outside, paper=paper, note=note)


def _parse_set(which: str, value: object, above: dict[str, Partition]) -> tuple[str, ...]:
    """The names of a set: a list as it is, or other sets without some names and plus others."""
    if not isinstance(value, dict):
        return _names(which, value)
    _check_keys(value, _CHANGES)
    like = value.get("like")
    references = [like] if isinstance(like, str) else _names(f"{which}, like", like)
    base = [task for reference in references for task in _find_set(which, reference, above)]
    without = _names(f"{which}, without", value.get("without", []))
    absent = [task for task in without if task not in base]
    if absent:
        raise ValueError(
            f"{which} is without {', '.join(absent)}, which {', '.join(references)} "
            "does not have; take it out"
        )
    plus = _names(f"{which}, plus", value.get("plus", []))
    return _once(which, [*(task for task in base if task not in without), *plus])


def _find_set(which: str, reference: str, above: dict[str, Partition]) -> tuple[str, ...]:
    """The set that ``partition/set`` names, among the partitions above."""
    name, _, part = reference.rpartition("/")
    if part not in _SETS:
        raise ValueError(
            f"{which} is like {reference!r}; name one set, as in crossfit/random/source "
            f"({', '.join(_SETS)})"
        )
    if name not in above:
        raise ValueError(f"{which} is like {reference!r}, no partition above: {_hint(name, above)}")
    return getattr(above[name], part)


def _names(which: str, value: object) -> tuple[str, ...]:
    """A list of names, none of them twice."""
    if not isinstance(value, list):
        raise ValueError(f"{which} must be a list of names, not {value!r}: write [glue-sst2, imdb]")
    wrong = [item for item in value if not isinstance(item, str) or not item]
    if wrong:
        raise ValueError(f"{which}: YAML read {wrong[0]!r} not as a name; quote it")
    return _once(which, value)


def _once(which: str, names: list[str]) -> tuple[str, ...]:
    """The names as a tuple, where none occurs twice."""
    twice = repeated(names)
    if twice:
        raise ValueError(f"{which} names tasks more than once: {', '.join(twice)}; name each once")
    return tuple(names)


def _text(key: str, value: object) -> str:
    """A text of a row."""
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {value!r}; quote it")
    return value


def _check_keys(row: dict[Any, Any], allowed: tuple[str, ...]) -> None:
    """Refuse keys that mean nothing here."""
    unknown = [str(key) for key in row if key not in allowed]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")


def _check_disjoint(sets: dict[str, tuple[str, ...]]) -> None:
    """Refuse tasks that stand in more than one set, all in one sentence."""
    places = {
        task: [which for which in _SETS if task in sets[which]]
        for which in _SETS
        for task in sets[which]
    }
    shared = [f"{task} ({', '.join(at)})" for task, at in places.items() if len(at) > 1]
    if shared:
        raise ValueError(f"tasks in more than one set: {', '.join(shared)}; keep each in one")


def _check_tasks(found: Partition, task_file: str | Path | None) -> None:
    """Refuse names that have no task, but for those said to be outside."""
    names = (*found.source, *found.dev, *found.target)
    find_tasks([name for name in names if name not in found.outside], task_file)


def _hint(name: object, known: Iterable[str]) -> str:
    """The known names that come nearest, or the families that there are."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"there are {', '.join(names)}"
