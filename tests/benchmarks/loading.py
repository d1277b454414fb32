"""G17: loading of few-shot tasks from their TSV files.

The tasks are made up, of CrossFit's sizes: every other one has labels (16 rows of each in train and
in dev), the rest are open (32 rows), and the test rows are the same in all samples of a task. To
load is what a fit and its test do before the first step: find the tasks in the table, read and
check the files, and have the token ids of all three splits. The tokenizer is a byte-level BPE that
makes about two tokens of a made-up word. All files are in the operating system's cache.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from models import TINY, make_model
from pairs import Settings, seconds
from steps import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prompt_lab.core.backbone import Backbone
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.data.files import SPLITS
from prompt_lab.data.sampling import Rows

TASKS, SAMPLES = 120, [100, 13, 21, 42, 87]
TEST_ROWS, WORDS = 500, 8000
PER_LABEL, PER_SET = 16, 32
INPUT_WORDS, ANSWER_WORDS = 25, 3  # medians

Keys = tuple[list[str], list[int]]
Loaded = dict[tuple[str, int, str], Rows]


def loading(settings: Settings) -> Iterator[Result]:
    """G17: one task with one sample, and 120 tasks with 5 samples each."""
    tasks, test_rows = (4, 20) if settings.quick else (TASKS, TEST_ROWS)
    words = _words(200 if settings.quick else WORDS)
    backbone = _backbone(words)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write_tasks(root, tasks, test_rows, words)
        one, all_of_them = (names[:1], SAMPLES[:1]), (names, SAMPLES)
        yield from _measure("one task, one sample", backbone, root, one, 1000, 20.0, settings)
        what = f"{tasks} tasks x {len(SAMPLES)} samples"
        yield from _measure(what, backbone, root, all_of_them, 1, 10.0, settings)


def _measure(
    what: str,
    backbone: Backbone,
    root: Path,
    keys: Keys,
    per_second: int,
    limit: float,
    settings: Settings,
) -> Iterator[Result]:
    """The median time of a load, the first one not counted.

    Args:
        what: words for the lines.
        backbone: whose tokens are made.
        root: the data root.
        keys: tasks and samples.
        per_second: units of time in a second, 1000 for milliseconds.
        limit: most of these units that a load may take.
        settings: of the command line.
    """
    made = load(backbone, root, keys)
    times = [seconds(lambda: load(backbone, root, keys), "cpu") for _ in range(settings.pairs)]
    unit = {1000: "milliseconds", 1: "seconds"}[per_second]
    yield (
        f"{unit} to load {what}",
        {
            **{"value": per_second * median(times), "min": per_second * min(times)},
            **{"max": per_second * max(times), "pairs": len(times)},
            **{"threshold": settings.goal(limit, limit), "sense": "<="},
            "rows": sum(map(len, made.values())),
            "tokens": sum(len(ids) for rows in made.values() for ids in rows.inputs),
        },
    )


def load(backbone: Backbone, root: Path, keys: Keys) -> Loaded:
    """The tokenised rows of tasks and samples, by task, sample and split."""
    tasks, samples = keys
    data = CrossFitDataModule(tasks, str(root), samples, str(root / "tasks.yaml"))
    data.setup()
    data.connect(backbone)
    return {
        (task, sample, split): data.tokens(task, sample, split)
        for task in tasks
        for sample in samples
        for split in SPLITS
    }


# ---- what is loaded ------------------------------------------------------------------------------


def _words(count: int) -> list[str]:
    """Made-up words of two to four syllables, the most frequent first."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(syllables, k=rng.randint(2, 4)))] = None
    return list(found)


def _text(rng: random.Random, words: list[str], weights: list[float], median: int) -> str:
    """Words by Zipf's law; their number is log-normal, from 1 to 200."""
    count = min(max(round(rng.lognormvariate(0, 0.6) * median), 1), 200)
    return " ".join(rng.choices(words, cum_weights=weights, k=count))


def _write_tasks(root: Path, tasks: int, test_rows: int, words: list[str]) -> list[str]:
    """Write the files of all tasks and samples, and their table; the names of the tasks."""
    rng = random.Random(1)
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def lines(kind: str, count: int, labels: list[str] | None) -> str:
        made = []
        for row in range(count):
            text = f"{kind} {row} {_text(rng, words, weights, INPUT_WORDS)}"
            answer = rng.choice(labels) if labels else _text(rng, words, weights, ANSWER_WORDS)
            made.append(f"{text}\t{answer}\n")
        return "".join(made)

    table: dict[str, dict[str, Any]] = {}
    for number in range(tasks):
        name, labels = f"made-up-{number}", words[: 2 + number % 5] if number % 2 else None
        shots = PER_LABEL if labels else PER_SET
        table[name] = {"metric": "ACC" if labels else "Rouge-L", "shots": shots}
        table[name] |= {"labels": labels} if labels else {}
        (root / name).mkdir()
        test = lines("test", test_rows, labels)
        for sample in SAMPLES:
            for split in SPLITS:
                count = shots * len(labels or [""])
                text = test if split == "test" else lines(f"{split} {sample}", count, labels)
                path = root / name / f"{name}_{shots}_{sample}_{split}.tsv"
                path.write_text(text, encoding="utf-8")
    (root / "tasks.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    return list(table)


def _backbone(words: list[str]) -> Backbone:
    """A tiny random T5, which is not run, with a tokenizer that knows the words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(words) + 300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return Backbone(make_model("t5", replace(TINY, vocabulary=len(fast))), fast, "random-t5")
