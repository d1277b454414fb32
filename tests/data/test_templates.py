"""Rows of data sets as lines of few-shot files."""

from __future__ import annotations

from typing import Any

import pytest

from prompt_lab.data.files import DataError
from prompt_lab.data.tasks import Source, Task
from prompt_lab.data.templates import make_lines

ROW = {"a": "x", "n": 3, "deep": {"b": "y"}, "a.b": "dotted", "dirty": " p\tq\\n\n r ", "l": ["u"]}


def task(**source: Any) -> Task:
    """A task with labels red and blue, made from the columns given."""
    made = Source(**{"train": "train", "test": "test", "input": "{{a}}", **source})
    return Task("mine", "cls/other", "ACC", 16, ("red", "blue"), source=made)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{a}}", "x"),
        ("a: {{a}} [SEP] n: {{n}}\n", "a: x [SEP] n: 3\n"),
        ('{{deep.b}}{{row["a.b"]}}', "ydotted"),
        ("{{dirty|clean}}", "p q r"),
        ("{{dirty|one_line}}", " p\tq\\n  r "),
        ("{{dirty|flat}}", " p q\\n  r "),
        ("{{dirty|strip}}", "p\tq\\n\n r"),
        ("{% filter clean %}  {{a}} \r\n\t b\\n\\nc {% endfilter %}", "x b c"),
        ("{{a|spaced}} {{'(b)'|spaced}} {{l|options}} {{l|options(['1'])}}", "x ( b ) (A) u (1) u"),
        ("{{['u', 'v'][n|int - 2]}} {{'C'|letter}} {{'1.29'|fifths}}", "v 2 1.2"),
    ],
)
def test_columns_stand_in_their_places(template: str, expected: str):
    assert list(make_lines([ROW], task(input=template, target="{{a}}"))) == [(expected, "x")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{a}} {{c}}", r"row 1: \{\{c\}\}: 'c' is undefined; the row has a, n, deep"),
        ("{{deep.c}}", r"row 1: \{\{deep.c\}\}: 'dict object' has no attribute 'c'"),
        ("{{c|clean}}", r"row 1: \{\{c\|clean\}\}: 'c' is undefined"),
        ("{{a}}{{l}}", r"row 1: \{\{l\}\}: list is not text or a number"),
        ("{{deep}}", "row 1: .*: dict is not text or a number"),
        ("{{[deep]|options}}", "row 1: .*: dict is not text or a number"),
        ("{{a|int}}", "row 1: .*: invalid literal"),
        ("{{a.__class__}}", "row 1: .*: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{a|upperr}}", r"mine: (input|target) '\{\{a\|upperr\}\}' cannot be read: No filter"),
        ("{{a", "mine: .* cannot be read: "),
    ],
)
def test_what_cannot_be_rendered_is_said_with_task_row_and_column(template: str, reason: str):
    for line in ({"input": template, "target": "{{a}}"}, {"target": template}):
        with pytest.raises(DataError) as refused:
            list(make_lines([ROW], task(**line)))
        assert str(refused.value).startswith("mine")
        assert "\n" not in str(refused.value)
        if "target" not in reason and "input" in line:
            assert refused.match(reason)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "red"), (True, "blue"), ("blue", "blue"), ("1", "blue")]
)
def test_a_label_is_an_index_or_a_label(value: object, expected: str):
    assert list(make_lines([{"a": "x", "y": value}], task(label="y"))) == [("x", expected)]


@pytest.mark.parametrize("value", [2, -1, "green", None, "2"])
def test_other_labels_are_refused_with_task_row_and_column(value: object):
    rows = [{"a": "x", "y": 0}, {"a": "x", "y": value}]
    with pytest.raises(DataError, match=r"mine, row 2: label 'y' is .*; allowed: 0 to 1, or"):
        list(make_lines(rows, task(label="y")))


def test_rows_are_kept_by_an_expression_and_labels_may_be_one():
    rows = [{"a": "x", "y": 0.9}, {"a": "y", "y": 0.5}, {"a": "z", "y": 0.1}]
    kept = task(keep="y < 0.4 or y > 0.6", label="y > 0.6")
    assert list(make_lines(rows, kept)) == [("x", "blue"), ("z", "red")]
    with pytest.raises(DataError, match=r"mine, row 2: keep .*: 'y' is undefined; the row has a$"):
        list(make_lines([*rows[:1], {"a": "x"}], kept))


def test_a_list_gives_several_references_and_a_text_one():
    rows = [{"a": "x", "y": ["u", "v"]}, {"a": "x", "y": "u"}]
    assert list(make_lines(rows, task(target="{{y}}"))) == [("x", "u", "v"), ("x", "u")]
    mapped = task(target="{{y|map('strip')}}")
    assert list(make_lines([{"a": "x", "y": [" u ", "v"]}], mapped)) == [("x", "u", "v")]
    with pytest.raises(DataError, match=r"mine, row 1: .* is an empty list"):
        list(make_lines([{"a": "x", "y": []}], task(target="{{y}}")))


def test_an_unknown_prepare_function_is_refused():
    for name in ("missing", "np", "Row", "__name__"):
        with pytest.raises(DataError, match=r"is no function of prompt_lab.data.prepare"):
            list(make_lines([ROW], task(target="{{a}}", prepare=name)))
