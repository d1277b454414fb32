"""What templates cannot say of a task: functions between the rows of the hub and its templates.

A row of the task table names one of them under ``prepare``. Each reads all rows of a split in their
order and yields rows with the columns that the templates name: it picks, joins, groups, shuffles or
leaves out. Rows are mappings in the schema of the data set on the hub; they are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Row = dict[str, Any]
"""One row: column name to value, as the data set's Parquet files have it."""

FLAT = str.maketrans(dict.fromkeys("\n\r\t", " "))


def split_options(rows: Iterable[Row]) -> Iterator[Row]:
    """The five options that stand in one text: ``a ) 38 , b ) 27 ...`` (MathQA).

    They are cut at commas, as CrossFit cuts them, also where a comma stands inside of a number.
    Rows whose answer is then empty are left out.
    """
    for row in rows:
        first, *middle, last = row["options"].split(",")[:5]
        texts = [first[4:-1], *(text[5:-1] for text in middle), last[5:]]
        if answer := texts["ABCDE".index(row["correct"].upper())]:
            yield {**row, "options": texts, "answer": answer}


def shuffle_options(rows: Iterable[Row]) -> Iterator[Row]:
    """The right answer shuffled among three others (SciQ); no row without supporting text.

    One stream of random numbers, seeded with 42, for each split.
    """
    random = np.random.RandomState(42)
    for row in rows:
        if row["support"]:
            names = ["distractor1", "distractor2", "distractor3", "correct_answer"]
            random.shuffle(names)
            yield {**row, "options": [row[name] for name in names]}


def group_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per question (MultiRC): all its answers as options, the right ones as one target."""
    for group in _groups(rows, lambda row: row["idx"]["question"]):
        right = [row["answer"] for row in group if row["label"] == 1]
        yield {
            **group[0],
            "options": [row["answer"] for row in group],
            "right": " [SEP] ".join(right) or "NO ANSWER!",
        }


def single_acronym(rows: Iterable[Row]) -> Iterator[Row]:
    """Sentences with one acronym and one long form, both found by their tags; others are dropped.

    Tags of the words: 0 begins a long form, 1 an acronym; 2 and 3 continue them; 4 is neither.
    """
    for row in rows:
        tags = row["labels"]
        if tags.count(0) == 1 and tags.count(1) == 1:
            text = " ".join(row["tokens"])
            long, short = _span(row, 0, 2), _span(row, 1, 3)
            yield {**row, "text": text, "long": long, "acronym": short}


def draw_order(rows: Iterable[Row]) -> Iterator[Row]:
    """Two sentences in an order drawn row by row with seed 42: label 0 keeps it, 1 turns it."""
    random = np.random.RandomState(42)
    for row in rows:
        yield {**row, "label": 0 if random.random_sample() > 0.5 else 1}


def group_concepts(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per set of concepts, with every sentence written for it as a reference."""
    for group in _groups(rows, lambda row: row["concept_set_idx"]):
        concepts = ", ".join(group[0]["concepts"])
        yield {"concepts": concepts, "targets": [row["target"] for row in group]}


def group_utterances(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per situation and feeling, with all utterances of its dialogues as references.

    The files write a comma as ``_comma_``; utterances with "hit:" are broken lines and dropped.
    """
    whole = (row for row in rows if "hit:" not in row["utterance"])
    for group in _groups(
        whole, lambda row: (row["prompt"].replace("_comma_", ","), row["context"])
    ):
        prompt = group[0]["prompt"].replace("_comma_", ",")
        texts = [row["utterance"].replace("_comma_", ",").translate(FLAT) for row in group]
        yield {"situation": f"{prompt} [SEP] {group[0]['context']}", "utterances": texts}


def record_texts(rows: Iterable[Row]) -> Iterator[Row]:
    """ReCoRD as T5 wrote it: highlights as sentences of the passage."""
    for row in rows:
        ended = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
        yield {**row, "passage": ended.replace("\n@highlight\n", ". ")}


def marked_spans(rows: Iterable[Row]) -> Iterator[Row]:
    """WSC's text as T5 wrote it: the noun (span 1) between ``*``, the pronoun between ``#``."""
    for row in rows:
        first, second = row["span1_index"], row["span2_index"]
        text = _mark(row["text"], row["span1_text"], first, "*")
        moved = second + 2 if first < second else second  # by the two marks before it
        yield {**row, "text": _mark(text, row["span2_text"], moved, "#")}


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """Rows of one key together, in the order in which keys first come up."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _span(row: Row, first: int, inside: int) -> str:
    """The words from the one tagged `first` through those tagged `inside`."""
    tags = row["labels"]
    start = tags.index(first)
    stop = start + 1
    while stop < len(tags) and tags[stop] == inside:
        stop += 1
    return " ".join(row["tokens"][start:stop])


def _mark(text: str, span: str, index: int, sign: str) -> str:
    """The text with signs around the span that starts at a word; as it is, if none starts there."""
    words = re.match(rf"(?:\S+\s){{{index}}}", text)
    if words is None or not text.startswith(span, words.end()):
        return text
    start = words.end()
    return f"{text[:start]}{sign} {span} {sign}{text[start + len(span) :]}"
