r"""From rows of a data set to lines of a few-shot file, by the templates of the task table.

``{sentence}`` in a template is the value of that column, ``{sql.text}`` the value inside a mapping,
and ``{sentence|clean}`` the value after a filter:

- ``clean`` puts a space for tabs, for line ends and for the two characters ``\n``, one space for
  several, and none at the ends. It is what many builders of the CrossFit gym do;
- ``one_line`` puts a space for each line feed;
- ``strip`` drops spaces and line ends at both ends.

What a template cannot say is a function of `prompt_lab.data.prepare`. A template computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prompt_lab.data import prepare
from prompt_lab.data.cleaning import clean, one_line
from prompt_lab.data.files import DataError
from prompt_lab.data.prepare import Row
from prompt_lab.data.tasks import Source, Task

Line = tuple[str, ...]
"""A line of a few-shot file: the input, then one or more references."""

_PLACE = re.compile(r"\{([^{}|]+)(?:\|([^{}|]*))?\}")


_FILTERS: dict[str, Callable[[str], str]] = {
    "clean": clean,
    "one_line": one_line,
    "strip": str.strip,
}


def make_lines(rows: Iterable[Row], task: Task) -> Iterator[Line]:
    """Make the lines of a task's file from the rows of one split.

    Args:
        rows: All rows of the split, in their order.
        task: Row of the task table, with a source.

    Raises:
        DataError: A column is missing, holds nothing, or holds no label of the task; the message
            names task, row (counted from 1) and column.
    """
    source = task.source
    assert source is not None
    for number, row in enumerate(_prepared(rows, task.name, source.prepare), 1):
        try:
            line = (render(source.input, row), *_answers(source, task, row))
        except DataError as error:
            raise DataError(f"{task.name}, row {number}: {error}") from None
        yield line


def _prepared(rows: Iterable[Row], task: str, name: str | None) -> Iterator[Row]:
    """The rows with the columns of the templates; a row that cannot be read gives one line."""
    if name is None:
        yield from rows
        return
    number = 0
    try:
        for row in find_prepare(name)(rows):
            number += 1
            yield row
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        kind = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{task}, after {number} rows: prepare function {name} cannot read a row ({kind}); its "
            "columns are not those that the table knows"
        ) from error


def find_prepare(name: str) -> Callable[[Iterable[Row]], Iterator[Row]]:
    """The function of `prompt_lab.data.prepare` with a name.

    Raises:
        DataError: There is none.
    """
    function: Any = getattr(prepare, name, None)
    if getattr(function, "__module__", None) != prepare.__name__ or name.startswith("_"):
        raise DataError(f"prepare is {name!r}, which is no function of prompt_lab.data.prepare")
    return function


def render(template: str, row: Row) -> str:
    """Put the values of a row into a template.

    Raises:
        DataError: A column is missing, or its value is neither text nor a number.
    """
    return _PLACE.sub(lambda place: _text(place[0], _value(place, row)), template)


def _answers(source: Source, task: Task, row: Row) -> list[str]:
    """The references of a row."""
    if source.label is not None:
        return [_label(_column(source.label, row), source.label, task.labels or ())]
    target = source.target or ""
    place = _PLACE.fullmatch(target)
    value = None if place is None else _value(place, row)
    if isinstance(value, list):
        if not value:
            raise DataError(f"{target} is an empty list: the row has no answer")
        return [_text(target, item) for item in value]
    return [render(target, row)]


def _label(value: Any, column: str, labels: tuple[str, ...]) -> str:
    """The label that a column's value says, as an index or as its text."""
    if isinstance(value, str) and value in labels:
        return value
    if isinstance(value, str) and value.isdecimal():  # a table of text
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(labels):
        return labels[value]
    raise DataError(
        f"column {column!r} holds {value!r}; allowed: 0 to {len(labels) - 1}, or one of "
        f"{', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}"
    )


def _value(place: re.Match[str], row: Row) -> Any:
    """The filtered value of a placeholder."""
    value = _column(place[1], row)
    if place[2] is None:
        return value
    if place[2] not in _FILTERS:
        raise DataError(f"{place[0]}: no filter {place[2]!r}; allowed: {', '.join(_FILTERS)}")
    chosen = _FILTERS[place[2]]
    if isinstance(value, list):
        return [chosen(_text(place[0], item)) for item in value]
    return chosen(_text(place[0], value))


def _column(path: str, row: Row) -> Any:
    """The value of a column, or inside of one: ``sql.text``."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"no column {path!r}; the row has {', '.join(map(str, row))}")
        value = value[key]
    return value


def _text(place: str, value: Any) -> str:
    """A value as text; what is neither text nor a number is refused."""
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{place} is {type(value).__name__}, not text or a number")
