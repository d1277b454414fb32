"""G21: evaluating 100 prompts on one test set in a bank, against one prompt after another.

Both sides run the same code, that of ``Evaluation`` without metrics and files: rows longest first,
batches cut by tokens, the prompts of a decoder-only model run once. In a bank the rows of all
prompts are cut into batches together, as ``VectorArithmetic`` has them; one after another, each
prompt is a bank of one. Labels are chosen by log-likelihood, or answers of at most 4 tokens are
generated. Where answers are generated, a second baseline is PEFT's way, as in ``answers.py``:
batches of 16 rows, one prompt after another.

A bank of one computes nothing twice, so a bank of many saves only padding, batches that are not
full, and the fixed costs of a forward pass; the smaller the model and the test set, the more that
is. Rows of a decoder-only model come prompt by prompt, so a batch that holds the end of one and the
start of the next has short and long rows, and a bank may pad more than single prompts do. On a CPU
the models are tiny, so that a pair takes seconds; larger ones bring the ratio nearer to 1. The
answers of both sides are compared before anything is timed; rounding may flip a few where two
tokens are nearly as likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from answers import LABELS, PEFT_NEW_TOKENS, let_rows_differ, peft_answers
from models import (
    DECODER,
    T5,
    TINY,
    make_backbone,
    make_model,
    make_prompts,
    make_rows,
    task_lengths,
)
from pairs import Settings, measure
from steps import Result, virtual_tokens
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes, renumber
from prompt_lab.core.batch import default_tokens_per_forward
from prompt_lab.core.run import Run
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.data.sampling import EvaluationBatch, EvaluationSteps, Layout, Rows
from prompt_lab.data.tasks import Task

TOKENS = 20  # N, but on CUDA as in the papers
SANDBOX_TASK, SAMPLE = "sandbox-review", 100
SAME = {torch.float32: 0.99, torch.bfloat16: 0.8}
"""Least share of equal answers, by the dtype of the weights."""

Way = Literal["scored", "generated"]
Answers = list[list[str]]
"""By prompt, then by row."""


@dataclass(frozen=True)
class Study:
    """What both sides are given.

    Attributes:
        name: of the model.
        backbone: the frozen model.
        prompts: (R, N, D).
        rows: the test set.
    """

    name: str
    backbone: Backbone
    prompts: Tensor
    rows: Rows

    def steps(self, runs: Sequence[int], way: Way) -> EvaluationSteps:
        """The batches of all rows under some prompts, as ``PromptMethod`` asks for them."""
        key, backbone = (self.rows.task.name, SAMPLE), self.backbone
        longest = self.rows.longest_target if way == "scored" else PEFT_NEW_TOKENS
        own = self.prompts.shape[1] if backbone.is_encoder_decoder else 0
        return EvaluationSteps(
            [Run(*key, seed, 0.3, 8) for seed in range(len(self.prompts))],
            {key: self.rows},
            Layout(backbone.pad_id, not backbone.is_encoder_decoder),
            default_tokens_per_forward(backbone.device),
            {key: longest},
            lambda task, longest: own + longest,
            lambda: list(runs),
        )

    def answer(self, prefixes: Prefixes, step: EvaluationBatch, way: Way) -> list[str]:
        """The answers of a batch, as ``PromptMethod`` makes them."""
        used = sorted(set(step.batch.prompts))
        prefix, batch = prefixes.of(used), renumber(step.batch, used)
        if way == "generated":
            return self.backbone.generate(prefix, batch, step.max_new_tokens)
        labels = self.rows.task.labels or ()
        return [labels[choice] for choice in self.backbone.choose(prefix, batch, labels)]

    def in_banks(self, size: int, way: Way) -> Callable[[], Answers]:
        """A whole evaluation, so many prompts side by side."""

        def evaluate() -> Answers:
            """The answers of all prompts."""
            count = len(self.prompts)
            found = [[""] * len(self.rows) for _ in range(count)]
            for start in range(0, count, size):
                prefixes = Prefixes(self.backbone, self.prompts)
                for step in self.steps(range(start, min(start + size, count)), way):
                    step = step.to(self.backbone.device)
                    texts = self.answer(prefixes, step, way)
                    places = zip(step.batch.prompts, step.batch.rows, texts, strict=True)
                    for prompt, row, text in places:
                        found[prompt][row] = text
            return found

        return evaluate

    def by_peft(self) -> Callable[[], Answers]:
        """A whole evaluation with PEFT, one prompt after another."""
        prompts = self.prompts.split(1)
        singles = [peft_answers(self.backbone, prompt, self.rows.inputs) for prompt in prompts]
        return lambda: [[text.strip() for text in single()] for single in singles]


def evaluation(settings: Settings) -> Iterator[Result]:
    """G21: a T5-like and a GPT-2-like model, and the backbone of the sandbox."""
    for study in studies(settings):
        count, length, _ = study.prompts.shape
        case = f"{study.name}, N {length}, {len(study.rows)} rows"
        least = SAME[study.backbone.model.dtype]
        ways: tuple[Way, ...] = ("scored", "generated")
        for way in ways:
            alone, bank = study.in_banks(1, way), study.in_banks(count, way)
            agreement = check_answers(alone(), bank(), least)
            what = f"evaluation of {count} prompts one by one / in a bank, {case}, {way}"
            found = measure(alone, bank, settings) | {"agreement": agreement}
            yield what, {**found, "threshold": settings.goal(1.0, 1.0)}
        theirs, bank = study.by_peft(), study.in_banks(count, "generated")
        what = f"evaluation of {count} prompts one by one by PEFT / in a bank, {case}, generated"
        agreement = check_answers(theirs(), bank(), least)
        yield what, {**measure(theirs, bank, settings), "agreement": agreement}


def studies(settings: Settings) -> Iterator[Study]:
    """The models with their prompts and rows, one after another."""
    count, size = (3, 8) if settings.quick else (100, 64)
    large = settings.size == "cuda"
    length = virtual_tokens(settings) if large else TOKENS
    for kind, name, sizes in (("t5", "T5-like", T5), ("gpt2", "GPT-2-like", DECODER)):
        chosen = sizes["cuda"] if large else TINY
        backbone = make_backbone(make_model(kind, chosen, settings.device, settings.dtype))
        if kind == "t5":
            let_rows_differ(backbone)
        labels = LABELS[2]
        longest = max(map(len, backbone.encode_targets(labels)))
        inputs = [ids for ids, _ in make_rows(backbone, task_lengths(size))]
        task = Task("benchmark", "custom", "ACC", None, labels)
        rows = Rows(task, inputs, [[[0] * longest]] * len(inputs))
        prompts = make_prompts(backbone, count, length)
        yield Study(f"{name} (d {chosen.width})", backbone, prompts, rows)
    backbone = Backbone.load("sandbox").to(settings.device)
    data = CrossFitDataModule([SANDBOX_TASK], samples=[SAMPLE])
    data.setup()
    data.connect(backbone)
    rows = data.tokens(SANDBOX_TASK, SAMPLE, "test")
    rows = replace(rows, inputs=rows.inputs[:size])
    yield Study("sandbox", backbone, make_prompts(backbone, count, TOKENS), rows)


def check_answers(alone: Answers, bank: Answers, least: float) -> dict[str, float]:
    """Compare the answers of the two sides, before anything is timed.

    Raises:
        RuntimeError: a smaller share of them than ``least`` is equal.
    """
    pairs = [
        own == other
        for of_one, of_other in zip(alone, bank, strict=True)
        for own, other in zip(of_one, of_other, strict=True)
    ]
    same = sum(pairs) / len(pairs)
    if not same >= least:
        raise RuntimeError(
            f"{same:.3f} of the answers in a bank are those of single prompts (wanted {least:g}); "
            "nothing was timed"
        )
    return {"same_answers": same, "different_answers": len({text for of in bank for text in of})}
