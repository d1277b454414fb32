"""The sandbox tasks: small text-to-text tasks over made-up sentences and word lists.

A task is a family, the factors that choose one member of it, and, where the answer set is closed,
its label words. Seven families: `sort` (which class of an attribute does the sentence show), `find`
(a word of the sentence, perhaps in another form), `list` (the first or last item of a class), `has`
and `count` (is a class in the list, how often), `same` (do two phrases agree), `fill` (the word
that goes with another). Rows are functions of (task, sample, split) alone. Left out: natural text;
results here say nothing about it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from prompt_lab.sandbox.lexicon import (
    ATTRIBUTES,
    COUNTS,
    CUES,
    FOREIGN,
    PLURAL,
    TOPICS,
    VALUE_OF,
    VERBS,
    WORDS,
    vocabulary,
)

Split = Literal["train", "dev", "test"]
Role = Literal["pretraining", "validation", "held_out"]
SPLIT_ROWS: dict[str, int] = {"train": 512, "dev": 64, "test": 256}

# The classes whose words may stand in lists.
LIST_CLASSES: tuple[str, ...] = (
    *TOPICS,
    *"person indoor outdoor warm cool hard soft fast slow big small".split(),  # noqa: SIM905
)
# What `find` may ask for, and the attribute whose word answers.
SLOTS: dict[str, str] = {
    "person": "gender",
    "object": "topic",
    "colour": "colour",
    "place": "place",
    "day": "day",
    "month": "season",
    "hour": "daytime",
    "material": "material",
    "manner": "manner",
}
# A word as it is, its plural, its foreign word or its class, by the name of the form.
IN_FORM: dict[str, dict[str, str]] = {
    "plain": {word: word for word in vocabulary()},
    "plural": PLURAL,
    "foreign": FOREIGN,
    "class": VALUE_OF,
}
# The attributes of a phrase, in the order of their words before the noun.
PHRASE_ATTRIBUTES = tuple("day place frequency manner sentiment size colour material".split())  # noqa: SIM905


@dataclass(frozen=True)
class SandboxTask:
    """One task of the sandbox.

    `pretraining` tasks are covered by the backbone's pretraining, `validation` tasks chose its
    recipe, `held_out` tasks did neither.
    """

    name: str  # in the task table; begins with `sandbox-`
    family: str  # one of `lexicon.FAMILIES`
    factors: tuple[str, ...]  # what chooses the member of the family: an attribute or a class ...
    labels: tuple[str, ...] | None  # of the attribute's values; for yes and no; None: open answers
    role: Role

    @property
    def row(self) -> dict[str, object]:
        """The task as a row of the task table."""
        kind = "extraction" if self.family in ("find", "list") else "classification"
        labels = {"labels": list(self.labels)} if self.labels else {}
        metric = "ACC" if self.labels else "EM"
        shots = SPLIT_ROWS["train"]
        return {"ontology": f"sandbox/{kind}", "metric": metric, "shots": shots, **labels}


def _task(name: str, role: Role, family: str, factors: str, labels: str = "") -> SandboxTask:
    return SandboxTask(
        f"sandbox-{name}", family, tuple(factors.split()), tuple(labels.split()) or None, role
    )


_TASKS: tuple[SandboxTask, ...] = (
    _task("number", "pretraining", "sort", "number", "odd even"),
    _task("place", "pretraining", "sort", "place", "closed open"),
    _task("size", "pretraining", "sort", "size", "high low"),
    _task("warmth", "pretraining", "sort", "colour", "fire water"),
    _task("material", "pretraining", "sort", "material", "sharp blunt"),
    _task("manner", "pretraining", "sort", "manner", "early late"),
    _task("frequency", "pretraining", "sort", "frequency", "full empty"),
    _task("day", "pretraining", "sort", "day", "start stop"),
    _task("review", "pretraining", "sort", "sentiment", "up down"),
    _task("topic", "pretraining", "sort", "topic", "north south east west left right"),
    _task("who", "pretraining", "find", "person plain"),
    _task("what", "pretraining", "find", "object plain"),
    _task("where", "pretraining", "find", "place plain"),
    _task("what-class", "pretraining", "find", "object class", " ".join(TOPICS)),
    _task("has-animal", "pretraining", "has", "animal", "true false"),
    _task("has-tool", "pretraining", "has", "tool", "plus minus"),
    _task("count-plant", "pretraining", "count", "plant", " ".join(COUNTS[:4])),
    _task("count-vehicle", "pretraining", "count", "vehicle", " ".join(COUNTS[:4])),
    _task("first-animal", "pretraining", "list", "animal plain first"),
    _task("last-tool", "pretraining", "list", "tool plain last"),
    _task("first-plant-foreign", "pretraining", "list", "plant foreign first"),
    _task("same-number", "pretraining", "same", "number", "agree reject"),
    _task("same-topic", "pretraining", "same", "topic", "win fail"),
    _task("fill-gender", "pretraining", "fill", "gender", " ".join(CUES["gender"])),
    _task("tense", "validation", "sort", "tense", "former current coming"),
    _task("season", "validation", "sort", "season", "hot cold"),
    _task("what-plural", "validation", "find", "object plural"),
    _task("has-garment", "validation", "has", "garment", "included missing"),
    _task("count-garment", "validation", "count", "garment", " ".join(COUNTS[:4])),
    _task("last-tool-foreign", "validation", "list", "tool foreign last"),
    _task("same-material", "validation", "same", "material", "alike unlike"),
    _task("sst", "held_out", "sort", "sentiment", "great terrible"),
    _task("gender", "held_out", "sort", "gender", "male female"),
    _task("daytime", "held_out", "sort", "daytime", "bright gloomy"),
    _task("what-foreign", "held_out", "find", "object foreign"),
    _task("has-food", "held_out", "has", "food", "contained absent"),
    _task("count-food", "held_out", "count", "food", " ".join(COUNTS[:4])),
    _task("first-food-foreign", "held_out", "list", "food foreign first"),
    _task("last-animal-plural", "held_out", "list", "animal plural last"),
    _task("same-colour", "held_out", "same", "colour", "matching differing"),
)
TASKS: dict[str, SandboxTask] = {task.name: task for task in _TASKS}


def rows(task_name: str, sample: int, split: Split) -> list[tuple[str, str]]:
    """The pairs of input and target of one split of a task; `SPLIT_ROWS` says how many.

    Train and dev depend on `sample`; test is the same for every sample. No input occurs twice
    within the three splits of a sample.

    Raises:
        ValueError: no such task or split.
    """
    if task_name not in TASKS:
        raise ValueError(f"Unknown sandbox task {task_name!r}; choose one of {', '.join(TASKS)}.")
    if split not in SPLIT_ROWS:
        raise ValueError(f"Unknown split {split!r}; choose train, dev or test.")
    task = TASKS[task_name]
    seen: set[str] = set()
    test = _distinct_rows(task, random.Random(f"{task_name}/test"), SPLIT_ROWS["test"], seen)
    if split == "test":
        return test
    rng = random.Random(f"{task_name}/{sample}")
    train = _distinct_rows(task, rng, SPLIT_ROWS["train"], seen)
    return train if split == "train" else _distinct_rows(task, rng, SPLIT_ROWS["dev"], seen)


def _distinct_rows(
    task: SandboxTask, rng: random.Random, count: int, seen: set[str]
) -> list[tuple[str, str]]:
    """Draws rows whose inputs are not in `seen`, and adds them to it."""
    result: list[tuple[str, str]] = []
    while len(result) < count:
        text, target = draw_row(task.family, task.factors, task.labels, rng)
        if text not in seen:
            seen.add(text)
            result.append((text, target))
    return result


def draw_row(
    family: str, factors: tuple[str, ...], labels: tuple[str, ...] | None, rng: random.Random
) -> tuple[str, str]:
    """Draws input and target of the task (family, factors, labels).

    `labels` as in `SandboxTask`; None gives each class its own name (has and same: `yes`, `no`).
    """
    if family == "sort":
        values = factors[1:] or ATTRIBUTES[factors[0]]
        value = rng.choice(values)
        answers = labels or values
        return sentence(rng, {factors[0]: value}), answers[values.index(value)]
    if family == "find":
        return _find_row(factors[0], factors[1], rng)
    if family == "list":
        return _list_row(factors[0], factors[1], factors[2], rng)
    if family == "fill":
        value = rng.randrange(2)
        attribute = factors[0]
        text = sentence(rng, {attribute: ATTRIBUTES[attribute][value]})
        return f"{text} with blank", CUES[attribute][value]
    if family == "count":
        number = rng.randrange(4)
        return " ".join(_items(rng, factors[0], number)), COUNTS[number]
    answer = rng.randrange(2)
    target = (labels or ("yes", "no"))[answer]
    if family == "has":
        return " ".join(_items(rng, factors[0], 0 if answer else 1)), target
    return _pair(rng, factors[0], same=not answer), target


def words_of(name: str) -> tuple[str, ...]:
    """Returns the words of a class of list items; `any` means every word of the sandbox."""
    if name == "any":
        return tuple(vocabulary())
    return WORDS["man"] + WORDS["woman"] if name == "person" else WORDS[name]


def sentence(rng: random.Random, values: dict[str, str]) -> str:
    """Draws a sentence of 4 to 14 words that shows the given value of each given attribute."""
    shown = set(values) | set(rng.sample(("size", "colour", "material", "manner", "frequency"), 1))
    shown |= set(rng.sample(("place", "sentiment", "day", "season", "daytime"), rng.randint(1, 2)))
    word = {
        name: rng.choice(WORDS[values.get(name) or rng.choice(ATTRIBUTES[name])])
        for name in ATTRIBUTES
        if name not in ("tense", "number")
    }
    tense = values.get("tense") or rng.choice(ATTRIBUTES["tense"])
    base, past, present = rng.choice(VERBS)
    verb = {"past": past, "present": present, "future": f"will {base}"}[tense]
    number = values.get("number") or rng.choice(ATTRIBUTES["number"])
    noun = word["topic"] if number == "one" else PLURAL[word["topic"]]
    parts = [word["gender"], word["frequency"] if "frequency" in shown else "", verb, "the"]
    parts += [word[name] for name in ("size", "colour", "material") if name in shown]
    parts += [noun, word["manner"] if "manner" in shown else ""]
    places = {"place": "in the", "day": "on", "season": "in", "daytime": "at"}
    places["sentiment"] = "it was"
    parts += [f"{before} {word[name]}" for name, before in places.items() if name in shown]
    return " ".join(part for part in parts if part)


def _find_row(slot: str, form: str, rng: random.Random) -> tuple[str, str]:
    """Draws a sentence and one of its words, perhaps in another form."""
    value = rng.choice(ATTRIBUTES[SLOTS[slot]])
    one = {"number": "one"} if slot == "object" else {}
    text = sentence(rng, {SLOTS[slot]: value} | one)
    word = next(word for word in text.split() if VALUE_OF.get(word) == value)
    return text, IN_FORM[form][word]


def _items(rng: random.Random, name: str, count: int) -> list[str]:
    """Draws 3 to 6 list items, `count` of them from the class `name`."""
    others = [other for other in LIST_CLASSES if other != name]
    total = count if name == "any" else max(rng.randint(3, 6), count)
    items = rng.sample(words_of(name), count)
    items += [rng.choice(words_of(rng.choice(others))) for _ in range(total - count)]
    rng.shuffle(items)
    return items


def _list_row(name: str, form: str, end: str, rng: random.Random) -> tuple[str, str]:
    """Draws a list and its first or last item of the class `name`."""
    items = _items(rng, name, rng.randint(1, 3) if name != "any" else rng.randint(3, 6))
    inside = [item for item in items if item in words_of(name)]
    return " ".join(items), IN_FORM[form][inside[0 if end == "first" else -1]]


def _pair(rng: random.Random, attribute: str, *, same: bool) -> str:
    """Draws two phrases that have the same value of the attribute, or not."""
    values = ATTRIBUTES[attribute]
    left = rng.choice(values)
    right = left if same else rng.choice([value for value in values if value != left])
    return f"{_phrase(rng, attribute, left)} and {_phrase(rng, attribute, right)}"


def _phrase(rng: random.Random, attribute: str, value: str) -> str:
    """Draws a noun phrase of two or three words that shows the value of the attribute."""
    shown = {attribute, rng.choice(PHRASE_ATTRIBUTES)}
    words = [
        rng.choice(WORDS[value if name == attribute else rng.choice(ATTRIBUTES[name])])
        for name in PHRASE_ATTRIBUTES
        if name in shown
    ]
    noun = rng.choice(WORDS[value if attribute == "topic" else rng.choice(TOPICS)])
    number = value if attribute == "number" else rng.choice(ATTRIBUTES["number"])
    return " ".join([*words, noun if number == "one" else PLURAL[noun]])
