"""G7 and G8: answering the rows of a classification set, generation with PEFT against ours.

PEFT's side is the fastest that answers rightly: rows in file order in batches of 16, greedy, at
most 4 new tokens, decoded. An encoder-decoder model takes PEFT's ``generate``. A decoder-only model
does not: there PEFT 0.21.2 with transformers 5.24 puts the prompt in front of every token that it
makes from a cache, ``use_cache=False`` computes everything anew, and padding comes between prompt
and text. So PEFT's prompt is put in front of each text, behind the padding, and the model's own
``generate`` makes the answers from a cache. Every token is held against a plain call of the model
before anything is timed.

Our side is what ``prompt-lab test`` does: longest rows first, batches cut by tokens, labels chosen
by log-likelihood. The two answer differently, so ours is held against the log-likelihoods of plain
calls of the model, one row at a time and without padding.

The T5's prompt is tuned for a few steps, so that it answers with labels as tuned prompts do. A
random GPT-2 cannot be tuned to do so: PEFT's side generates all 4 tokens, and ours has to follow
every label to its end, since no first token tells them apart. With more labels that costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from models import (
    DECODER,
    T5,
    make_backbone,
    make_model,
    make_prompts,
    make_rows,
    our_batch,
    pad,
    peft_model,
    task_lengths,
)
from pairs import Settings, measure
from steps import Result, virtual_tokens
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes
from prompt_lab.core.batch import default_tokens_per_forward
from prompt_lab.core.run import Run
from prompt_lab.data.sampling import EvaluationSteps, Layout, Rows
from prompt_lab.data.tasks import Task

LABELS = {
    2: ("acceptable", "unacceptable"),
    6: ("positive", "negative", "maybe", "no", "dog", "house"),  # words of the tests' tokenizer
}
PEFT_BATCH, PEFT_NEW_TOKENS = 16, 4
CLOSE = 1e-3  # nats within which two labels count as equal, where weights are float32


def causal_answers(settings: Settings) -> Iterator[Result]:
    """G7."""
    goal = settings.goal(2.5, 8.0)
    yield from _answers("gpt2", "GPT-2-like", DECODER[settings.size], goal, settings)


def t5_answers(settings: Settings) -> Iterator[Result]:
    """G8."""
    yield from _answers("t5", "T5-like", T5[settings.size], settings.goal(1.2, 4.0), settings)


def _answers(
    kind: str, name: str, size: Any, goal: float | None, settings: Settings
) -> Iterator[Result]:
    """Two and six labels on one model."""
    backbone = make_backbone(make_model(kind, size, settings.device, settings.dtype))
    if kind == "t5":
        let_rows_differ(backbone)
    start = make_prompts(backbone, 1, virtual_tokens(settings))
    count = 16 if settings.quick else 64
    inputs = [ids for ids, _ in make_rows(backbone, task_lengths(count))]
    for labels in LABELS.values():
        prompts = tuned(backbone, start, inputs, labels) if kind == "t5" else start
        check_tokens(backbone, prompts[0], inputs, peft_tokens(backbone, prompts, inputs)())
        theirs = peft_answers(backbone, prompts, inputs)
        ours = our_answers(backbone, prompts, inputs, labels)
        agreement = check_answers(backbone, prompts[0], inputs, labels, ours())
        what = (
            f"evaluation by generating with PEFT / ours, {name}, {count} rows, {len(labels)} labels"
        )
        found = measure(theirs, ours, settings)
        yield what, {**found, "threshold": goal, "agreement": agreement}


def tuned(
    backbone: Backbone, prompts: Tensor, inputs: list[list[int]], labels: tuple[str, ...]
) -> Tensor:
    """The prompt after 20 steps towards the labels, drawn at random for each row."""
    rng, targets = np.random.default_rng(0), backbone.encode_targets(labels)
    bank = torch.nn.Parameter(prompts.clone())
    optimizer = torch.optim.AdamW([bank], lr=0.3)
    for _ in range(20):
        rows = [
            (inputs[i][:40], targets[int(rng.integers(len(targets)))])
            for i in rng.integers(len(inputs), size=8)
        ]
        optimizer.zero_grad()
        backbone.loss(bank, our_batch(backbone, [rows])).mean().backward()
        optimizer.step()
    return bank.detach()


def let_rows_differ(backbone: Backbone) -> None:
    """Sharpen the cross-attention of a random T5, which else gives all rows the same label."""
    for name, weight in backbone.model.named_parameters():
        if "EncDecAttention.q" in name or "EncDecAttention.o" in name:
            weight.data.mul_(10)


def our_answers(
    backbone: Backbone, prompts: Tensor, inputs: list[list[int]], labels: tuple[str, ...]
) -> Callable[[], list[int]]:
    """A whole evaluation: the label of every row, in file order."""
    longest = max(map(len, backbone.encode_targets(labels)))
    key, run = ("benchmark", 0), Run("benchmark", 0, 0, 0.3, 8)
    task = Task("benchmark", "custom", "ACC", None, labels)
    rows = Rows(task, inputs, [[[0] * longest]] * len(inputs))
    layout = Layout(backbone.pad_id, not backbone.is_encoder_decoder)
    own = prompts.shape[1] if backbone.is_encoder_decoder else 0

    def evaluate() -> list[int]:
        steps = EvaluationSteps(
            [run],
            {key: rows},
            layout,
            default_tokens_per_forward(backbone.device),
            {key: longest},
            lambda task, longest: own + longest,
            lambda: [0],
        )
        found, prefixes = [0] * len(inputs), Prefixes(backbone, prompts)
        for step in steps:
            batch = step.batch.to(backbone.device)
            chosen = backbone.choose(prefixes.of([0]), batch, labels)
            for row, label in zip(batch.rows, chosen, strict=True):
                found[row] = label
        return found

    return evaluate


def peft_answers(
    backbone: Backbone, prompts: Tensor, inputs: list[list[int]]
) -> Callable[[], list[str]]:
    """A whole evaluation with PEFT: the text of every row, in file order."""
    made = peft_tokens(backbone, prompts, inputs)
    return lambda: backbone.tokenizer.batch_decode(made(), skip_special_tokens=True)


def peft_tokens(
    backbone: Backbone, prompts: Tensor, inputs: list[list[int]]
) -> Callable[[], list[list[int]]]:
    """The tokens that PEFT's prompt makes of every row, in file order; padding may follow them."""
    model, _ = peft_model(backbone, prompts[0])
    settings = {"max_new_tokens": PEFT_NEW_TOKENS, "do_sample": False}
    settings |= {"pad_token_id": backbone.pad_id}

    def of_batch(part: list[list[int]]) -> Tensor:
        """The new tokens of some rows."""
        left, count = not backbone.is_encoder_decoder, prompts.shape[1]
        room = [0] * count if left else []  # for the prompt, between the padding and the text
        ids = pad([room + row for row in part], backbone.pad_id, left).to(backbone.device)
        mask = pad([room + [1] * len(row) for row in part], 0, left).to(backbone.device)
        if not left:
            return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, 1:]
        embeddings, prompt = backbone.embed(ids), model.get_prompt(batch_size=1)[0]
        for i, row in enumerate(part):
            start = ids.shape[1] - len(row) - count
            embeddings[i, start : start + count] = prompt
            mask[i, start : start + count] = 1
        base = model.get_base_model()
        return base.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)

    @torch.no_grad()
    def evaluate() -> list[list[int]]:
        starts = range(0, len(inputs), PEFT_BATCH)
        parts = [of_batch(inputs[start : start + PEFT_BATCH]) for start in starts]
        return [row for part in parts for row in part.tolist()]

    return evaluate


def check_tokens(
    backbone: Backbone, prompt: Tensor, inputs: list[list[int]], made: list[list[int]]
) -> None:
    """Hold generated tokens against plain calls of the model, row by row, without padding.

    Raises:
        RuntimeError: one up to the end token is not the likeliest, to rounding.
    """
    for ids, row in zip(inputs, made, strict=True):
        end = next((at for at, token in enumerate(row) if token in backbone.specials.ends), None)
        logits = plain_logits(backbone, prompt, ids, row[: None if end is None else end + 1])
        tokens = torch.tensor(row[: len(logits)], device=logits.device)[:, None]
        worst = (logits.amax(1, keepdim=True) - logits.gather(1, tokens)).max().item()
        if not worst <= close(backbone):
            raise RuntimeError(
                f"a token generated with PEFT is {worst:.2g} nats below the likeliest one; nothing "
                "was timed"
            )


def check_answers(
    backbone: Backbone,
    prompt: Tensor,
    inputs: list[list[int]],
    labels: tuple[str, ...],
    found: list[int],
) -> dict[str, float]:
    """Hold our labels against plain calls of the model, row by row, without padding.

    Raises:
        RuntimeError: a label differs whose log-likelihood is not the largest to rounding.
    """
    same, worst = 0, 0.0
    for ids, label in zip(inputs, found, strict=True):
        scores = plain_scores(backbone, prompt, ids, labels)
        same += int(scores.argmax()) == label
        worst = max(worst, (scores.max() - scores[label]).item())
    if not worst <= close(backbone):
        raise RuntimeError(f"our label is {worst:.2g} nats below the best one; nothing was timed")
    return {"same_labels": same / len(found), "labels_chosen": len(set(found))}


def plain_scores(
    backbone: Backbone, prompt: Tensor, ids: list[int], labels: tuple[str, ...]
) -> Tensor:
    """Log-likelihoods (C,) of the labels after one row."""
    scores = []
    for target in backbone.encode_targets(labels):
        found = plain_logits(backbone, prompt, ids, target).log_softmax(1)
        scores.append(found.gather(1, torch.tensor(target, device=found.device)[:, None]).sum())
    return torch.stack(scores)


@torch.no_grad()
def plain_logits(backbone: Backbone, prompt: Tensor, ids: list[int], target: list[int]) -> Tensor:
    """Logits (T, V), float32, at the tokens of a target after one row, by calls of the model."""
    row, targets = (torch.tensor([tokens], device=backbone.device) for tokens in (ids, target))
    start = torch.cat([prompt[None].to(backbone.model.dtype), backbone.embed(row)], dim=1)
    if backbone.is_encoder_decoder:
        return backbone.model(inputs_embeds=start, labels=targets).logits[0].float()
    joined = torch.cat([start, backbone.embed(targets)], dim=1)
    return backbone.model(inputs_embeds=joined).logits[0, start.shape[1] - 1 : -1].float()


def close(backbone: Backbone) -> float:
    """Nats within which two answers count as equal."""
    return CLOSE if backbone.model.dtype == torch.float32 else 0.3
