r"""From rows of a data set to lines of a few-shot file, by the Jinja2 templates of the task table.

``{{sentence}}`` in a template is the value of that column, ``{{sql.text}}`` the value inside a
mapping, and ``{{row["question-X"]}}`` that of a column whose name is no identifier. ``keep`` and
``label`` are expressions, and so is a target that is one placeholder: it may give a list, each item
a reference. Only text and numbers can stand in a file. Filters beside Jinja2's own:

- ``clean`` puts a space for tabs, for line ends and for the two characters ``\n``, one space for
  several, and none at the ends. It is what many builders of the CrossFit gym do;
- ``one_line`` puts a space for each line feed, ``flat`` also for carriage returns and tabs;
- ``strip`` drops spaces and line ends at both ends;
- ``spaced`` puts spaces around punctuation, as T5 wrote SQuAD;
- ``options`` writes texts to choose from: ``(A) red (B) blue``, or with the marks that are given;
- ``letter`` is the number of an answer from its letter, ``int`` that of its digits;
- ``distinct`` drops repeated and empty texts of a list; ``majority`` is what most of a list say, or
  none; ``fifths`` rounds a number to the nearest 0.2.

What groups or draws rows is a function of `prompt_lab.data.prepare`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from prompt_lab.data import prepare
from prompt_lab.data.files import DataError
from prompt_lab.data.prepare import FLAT, Row
from prompt_lab.data.tasks import Task

Line = tuple[str, ...]
"""A line of a few-shot file: the input, then one or more references."""

_PLACE = re.compile(r"\{\{((?:(?!\}\}).)*)\}\}", re.DOTALL)


def make_lines(rows: Iterable[Row], task: Task) -> Iterator[Line]:
    """Make the lines of a task's file from all rows of one split, in their order.

    Raises:
        DataError: A template is not valid, a column is missing, holds nothing, or holds no label of
            the task; the message names task, row (counted from 1) and column.
    """
    source = task.source
    assert source is not None
    keep, text = _compile(task, "keep"), _compile(task, "input")
    label, target = _compile(task, "label"), _compile(task, "target")
    for number, row in enumerate(_prepared(rows, task.name, source.prepare), 1):
        try:
            if source.keep is None or keep(row):
                found = target(row) if source.label is None else _label(task, label(row))
                if found == []:
                    raise DataError(f"{source.target} is an empty list: the row has no answer")
                yield text(row), *(found if isinstance(found, list) else [found])
        except DataError as error:
            raise DataError(f"{task.name}, row {number}: {error}") from None


def _compile(task: Task, key: str) -> Callable[[Row], Any]:
    """The value of a row that a template or an expression of a task says; its errors name it."""
    template = getattr(task.source, key) or ""
    place = _PLACE.fullmatch(template) if key == "target" else None
    made: Any
    try:
        if place or key in ("keep", "label"):
            expression = place[1] if place else template or "none"
            made = _JINJA.compile_expression(expression, undefined_to_none=False)
        else:
            made = _JINJA.from_string(template).render
    except TemplateError as error:
        raise DataError(f"{task.name}: {key} {template!r} cannot be read: {error}") from None

    def value(row: Row) -> Any:
        try:
            found = made({**row, "row": row})
            if place and isinstance(found, list | tuple | Iterator):
                return [_text(item) for item in found]
            return _text(found) if place or isinstance(found, StrictUndefined) else found
        except Exception as error:  # whatever an expression raises
            is_text = key in ("input", "target")
            where = _find_fault(template, row) if is_text else f"{key} {template!r}"
            raise DataError(f"{where}: {error}; the row has {', '.join(map(str, row))}") from None

    return value


def _find_fault(template: str, row: Row) -> str:
    """The first placeholder of a template that has no value for a row; or the whole template."""
    for place in _PLACE.finditer(template):
        try:
            _JINJA.from_string(place[0]).render({**row, "row": row})
        except Exception:
            return place[0]
    return template


def _label(task: Task, value: Any) -> str:
    """The label that a value says, as an index or as its text."""
    labels = task.labels or ()
    if isinstance(value, str) and value in labels:
        return value
    if isinstance(value, str) and value.isdecimal():  # a table of text
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(labels):
        return labels[value]
    raise DataError(
        f"label {task.source and task.source.label!r} is {value!r}; allowed: 0 to "
        f"{len(labels) - 1}, or one of {', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}"
    )


def _prepared(rows: Iterable[Row], task: str, name: str | None) -> Iterator[Row]:
    """The rows with the columns of the templates; a row that cannot be read gives one line."""
    if name is None:
        yield from rows
        return
    function: Any = getattr(prepare, name, None)
    if getattr(function, "__module__", None) != prepare.__name__ or name.startswith("_"):
        raise DataError(f"prepare is {name!r}, which is no function of prompt_lab.data.prepare")
    number = 0
    try:
        for row in function(rows):
            number += 1
            yield row
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        kind = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{task}, after {number} rows: prepare function {name} cannot read a row ({kind}); its "
            "columns are not those that the table knows"
        ) from error


# ---- values and filters --------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as text; what is neither text nor a number is refused."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, StrictUndefined):
        return str(value)  # says which column is missing
    raise TypeError(f"{type(value).__name__} is not text or a number")


def _clean(value: Any) -> str:
    return " ".join(_text(value).replace("\\n", " ").split())


def _spaced(value: Any) -> str:
    """A text with spaces around every sign but letters, digits, accents and underscores.

    T5 wrote SQuAD so (Raffel et al. 2020, `_pad_punctuation` in their code); one space for several.
    """
    signs = (
        sign if sign == "_" or unicodedata.category(sign)[0] in "LNM" else f" {sign} "
        for sign in _text(value)
    )
    return " ".join("".join(signs).split())


def _options(texts: Iterable[str], marks: Iterable[object] | None = None) -> str:
    texts = list(texts)
    marks = [chr(ord("A") + at) for at in range(len(texts))] if marks is None else marks
    pairs = zip(marks, texts, strict=True)
    return " ".join(f"({_text(mark)}) {_text(text)}" for mark, text in pairs)


def _majority(values: Iterable[Hashable]) -> Any:
    (most, votes), *others = Counter(values).most_common(2)
    return most if not others or votes > others[0][1] else None


def _fifths(value: Any) -> str:
    """A number to the nearest 0.2, computed in 32 bits as T5 does STS-B's, such as "3.2"."""
    return f"{np.round(np.float32(value) * np.float32(5)) / 5:.1f}"


_JINJA = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_text)
_JINJA.filters |= {
    "clean": _clean,
    "one_line": lambda value: _text(value).replace("\n", " "),
    "flat": lambda value: _text(value).translate(FLAT),
    "strip": lambda value: _text(value).strip(),
    "spaced": _spaced,
    "options": _options,
    "letter": lambda key: ord(key) - ord("A"),
    "int": int,
    "distinct": lambda texts: list(dict.fromkeys(text for text in texts if text)) or [""],
    "majority": _majority,
    "fifths": _fifths,
}
