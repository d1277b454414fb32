"""Partitions of tasks by name: what to learn from, and what to test on.

The partitions of the papers stand in ``partitions.yaml`` beside this module. A partition has source
tasks (to learn from), dev tasks (to choose settings with; often none) and target tasks (to report);
no name stands in two of them. A set is written as a list, or as others changed:
``{like: [a/source, a/dev], without: [...], plus: [...]}``, where ``like`` names sets further up.

CrossFit's own files are mended where they must be: four of them keep the held-out tasks under
``dev``, which is the target here, and ``sick``, which one file has in both of its sets, is a target
only. Each such place has a note. Left out: IPT's splits by task family and its further drafts. Two
tasks that are made from the same texts are named in notes where it is known; nothing refuses them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prompt_lab.data.tasks import read_yaml

_SETS = ("source", "dev", "target")


@dataclass(frozen=True)
class Partition:
    """Tasks by their part in an experiment; the sets share no name."""

    name: str  # such as "crossfit/random"
    source: tuple[str, ...]  # tasks to learn from
    dev: tuple[str, ...]  # tasks to choose settings with; empty where there are none
    target: tuple[str, ...]  # tasks to report
    paper: str = ""  # where it was published, and under which name; empty where it was not
    note: str = ""  # what to know of it, such as where a paper and its code differ


@cache
def load_partitions() -> Mapping[str, Partition]:
    """The partitions of the package by name, in file order; read once, not to be changed."""
    found: dict[str, Partition] = {}
    for name, row in read_yaml(Path(__file__).with_name("partitions.yaml")).items():
        sets = {which: _names(row.pop(which, []), found) for which in _SETS}
        found[name] = Partition(name, **sets, **row)
    return found


def _names(value: Any, above: Mapping[str, Partition]) -> tuple[str, ...]:
    """A set of tasks: a list as it is, or sets of partitions above without some and plus others."""
    if isinstance(value, list):
        return tuple(value)
    like, without = value["like"], value.get("without", ())
    parts = [like] if isinstance(like, str) else like
    sets = [part.rpartition("/") for part in parts]
    base = [name for head, _, which in sets for name in getattr(above[head], which)]
    return (*(name for name in base if name not in without), *value.get("plus", ()))


def partition(name: str) -> Partition:
    """Look up one partition, such as "mpt/cls_to_cls".

    Raises:
        ValueError: The name is unknown; the message gives near ones.
    """
    known = load_partitions()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"unknown partition {name!r}: {hint}")
    return known[name]


def expand_sets(names: Iterable[str]) -> list[str]:
    """Names of tasks; a set of a partition, such as "mpt/cls_to_cls/target", gives its tasks.

    Raises:
        ValueError: A name with a slash that is no set of a partition.
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
