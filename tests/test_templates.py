"""Rows of data sets as lines of few-shot files."""

from __future__ import annotations

from typing import Any

import pytest

from prompt_lab.data.cleaning import clean
from prompt_lab.data.files import DataError
from prompt_lab.data.tasks import Source, Task
from prompt_lab.data.templates import make_lines, render

ROW = {"a": "x", "n": 3, "deep": {"b": "y"}, "a.b": "dotted", "dirty": " p\tq\\n\n r ", "l": ["u"]}


def task(**source: Any) -> Task:
    """A task with labels red and blue, made from the columns given."""
    parts = {"hub": None, "config": None, "train": "train", "test": "test", "train_part": None}
    rest = {"test_part": None, "prepare": None, "input": "{a}", "label": None, "target": None}
    made = Source(**{**parts, **rest, **source})
    return Task("mine", "cls/other", "ACC", 16, ("red", "blue"), source=made)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}", "x"),
        ("a: {a} [SEP] n: {n}", "a: x [SEP] n: 3"),
        ("{deep.b}{a.b}", "ydotted"),
        ("{dirty|clean}", "p q r"),
        ("{dirty|one_line}", " p\tq\\n  r "),
        ("{dirty|strip}", "p\tq\\n\n r"),
        ("no place", "no place"),
    ],
)
def test_columns_stand_in_their_places(template: str, expected: str):
    assert render(template, ROW) == expected


def test_clean_leaves_one_space_at_most():
    assert clean("  a \r\n\t b\\n\\nc ") == "a b c"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{c}", "no column 'c'; the row has a, n, deep"),
        ("{deep.c}", "no column 'deep.c'"),
        ("{a|upper}", "no filter 'upper'; allowed: clean, one_line, strip"),
        ("{l}", r"\{l\} is list, not text or a number"),
        ("{deep}", "is dict, not text"),
    ],
)
def test_what_cannot_be_rendered_is_said(template: str, reason: str):
    with pytest.raises(DataError, match=reason):
        render(template, ROW)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "red"), (True, "blue"), ("blue", "blue"), ("1", "blue")]
)
def test_a_label_is_an_index_or_a_label(value: object, expected: str):
    assert list(make_lines([{"a": "x", "y": value}], task(label="y"))) == [("x", expected)]


@pytest.mark.parametrize("value", [2, -1, "green", None, "2"])
def test_other_labels_are_refused_with_task_row_and_column(value: object):
    rows = [{"a": "x", "y": 0}, {"a": "x", "y": value}]
    with pytest.raises(DataError, match=r"mine, row 2: column 'y' holds .*; allowed: 0 to 1, or"):
        list(make_lines(rows, task(label="y")))


def test_a_list_gives_several_references_and_a_text_one():
    rows = [{"a": "x", "y": ["u", "v"]}, {"a": "x", "y": "u"}]
    assert list(make_lines(rows, task(target="{y}"))) == [("x", "u", "v"), ("x", "u")]


def test_filters_apply_to_each_reference():
    assert list(make_lines([{"a": "x", "y": [" u ", "v"]}], task(target="{y|strip}"))) == [
        ("x", "u", "v")
    ]


def test_an_empty_list_of_answers_is_refused():
    with pytest.raises(DataError, match=r"mine, row 1: .* is an empty list"):
        list(make_lines([{"a": "x", "y": []}], task(target="{y}")))


def test_an_unknown_prepare_function_is_refused():
    for name in ("missing", "np", "Row", "__name__"):
        with pytest.raises(DataError, match=r"is no function of prompt_lab.data.prepare"):
            list(make_lines([ROW], task(target="{a}", prepare=name)))
