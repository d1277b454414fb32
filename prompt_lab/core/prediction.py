"""New inputs, answered under one or many prompts, in memory: ``predict`` and ``label_scores``.

Spaces around inputs and labels are dropped, as in few-shot files and on the command line; else they
are taken as they are. References and metrics are left to ``prompt-lab test``; reading and writing
files to the command ``predict``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone
    from prompt_lab.core.batch import Batch
    from prompt_lab.core.candidates import LabelScore
    from prompt_lab.core.text import Frame, Side, Template


def predict(
    backbone: Backbone,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    tokens_per_forward: int | None = None,
    max_input_length: int = 512,
    truncation_side: Side = "right",
    input_prefix: str = "",
    template: Template = "plain",
    system: str | None = None,
    label_score: LabelScore = "sum",
) -> list[list[str]]:
    """Answer B inputs under R prompts: B lists of R texts.

    Args:
        backbone: the frozen model that the prompts were made for.
        prompts: (R, N, D), or R prompts (N, D) whose N may differ.
        inputs: B texts; spaces around them are dropped.
        labels: C answers to choose from by log-likelihood, likewise; without them answers are
            generated.
        max_new_tokens: longest generated answer.
        num_beams: beams of generated answers; 1 is greedy.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; None
            for 2048 on a CPU and 16384 on a GPU.
        max_input_length: longer inputs are cut to so many tokens, and to what the positions of the
            backbone leave beside prompt and answer; the first cut is told in a warning.
        truncation_side: the side on which longer inputs are cut, ``right`` (the end) or ``left``.
        input_prefix: text in front of every input, kept as it is: ``" [TASK] "`` for a prompt that
            was trained with ``data.task_prefix``, TASK being the task's name.
        template: ``chat`` for prompts that were trained with ``data.template chat``.
        system: system text of the chat.
        label_score: what a label's score is of its tokens' log-likelihoods, ``sum`` or ``mean``.

    Raises:
        ValueError: prompts of another shape or width, one text instead of several, an input that is
            empty, labels that occur twice, a number below 1, no positions left for the input, a
            chat template that cannot be used, or a mean score of generated answers.
    """
    from prompt_lab.core.candidates import check_label_score

    check_at_least_one(max_new_tokens=max_new_tokens, num_beams=num_beams)
    check_label_score(label_score, labels is None)
    frame = backbone.frame(template, system)
    labels = None if labels is None else tidy_labels(labels, frame)
    longest = max_new_tokens if labels is None else _longest(frame, labels)
    pairs = _batches(
        *(backbone, frame, prompts, _tidy(inputs, input_prefix), longest),
        beams=num_beams if labels is None else 1,
        tokens_per_forward=tokens_per_forward,
        max_input_length=max_input_length,
        truncation_side=truncation_side,
    )
    answers = [[""] * len(prompts) for _ in inputs]
    for prefix, batch, places in pairs:
        if labels is None:
            texts = backbone.generate(prefix, batch, max_new_tokens, num_beams, frame)
        else:
            chosen = backbone.choose(prefix, batch, labels, label_score, frame)
            texts = [labels[choice] for choice in chosen]
        for row, at, text in zip(batch.rows, batch.prompts, texts, strict=True):
            answers[row][places[at]] = text
    return answers


def label_scores(
    backbone: Backbone,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    labels: Sequence[str],
    *,
    tokens_per_forward: int | None = None,
    max_input_length: int = 512,
    truncation_side: Side = "right",
    input_prefix: str = "",
    template: Template = "plain",
    system: str | None = None,
    label_score: LabelScore = "sum",
) -> Tensor:
    """Log-likelihoods of C labels for B inputs under R prompts: (B, R, C) float32, on the CPU.

    The largest along C is the answer of :func:`predict`; arguments and errors are as there.
    """
    import torch

    frame = backbone.frame(template, system)
    labels = tidy_labels(labels, frame)
    scores = torch.empty(len(inputs), len(prompts), len(labels))
    for prefix, batch, places in _batches(
        *(backbone, frame, prompts, _tidy(inputs, input_prefix), _longest(frame, labels)),
        tokens_per_forward=tokens_per_forward,
        max_input_length=max_input_length,
        truncation_side=truncation_side,
    ):
        columns = [places[at] for at in batch.prompts]
        found = backbone.score(prefix, batch, labels, label_score, frame)
        scores[batch.rows, columns] = found.cpu()
    return scores


def _batches(
    backbone: Backbone,
    frame: Frame,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    longest: int,
    *,
    beams: int = 1,
    tokens_per_forward: int | None,
    max_input_length: int,
    truncation_side: Side,
) -> Iterator[tuple[tuple[Tensor, ...], Batch, list[int]]]:
    """Every input under every prompt, longest first: the prompts' prefix, rows, prompt numbers.

    ``batch.rows`` are places in ``inputs``, and ``batch.prompts`` places among the prompt numbers.
    """
    import torch

    from prompt_lab.core.bank import Prefixes
    from prompt_lab.core.batch import default_tokens_per_forward, make_batch, spans

    if tokens_per_forward is None:
        tokens_per_forward = default_tokens_per_forward(backbone.device)
    check_at_least_one(tokens_per_forward=tokens_per_forward, max_input_length=max_input_length)
    groups = _groups(prompts, tokens_per_forward)
    whole = frame.encode_inputs(inputs)
    for places in groups:
        bank = torch.stack([prompts[place] for place in places]).to(backbone.device)
        prefixes = Prefixes(backbone, bank)
        room = _input_room(backbone, bank.shape[1], longest, max_input_length)
        ids = [frame.cut_input(one, room, truncation_side) for one in whole]
        if any(len(one) > room for one in whole):
            end = "end" if truncation_side == "right" else "beginning"
            warnings.warn(
                f"inputs of over {room} tokens lose their {end} (max_input_length, "
                "truncation_side)",
                stacklevel=3,
            )
        pairs = [(at, row) for row in range(len(ids)) for at in range(len(places))]
        pairs.sort(key=lambda pair: -len(ids[pair[1]]))
        extra = beams * longest + (bank.shape[1] if backbone.is_encoder_decoder else 0)
        lengths = [len(ids[row]) for _, row in pairs]
        for start, stop in spans(lengths, [0] * len(pairs), tokens_per_forward, extra):
            part = pairs[start:stop]
            batch = make_batch(
                [ids[row] for _, row in part],
                None,
                [at for at, _ in part],
                pad_id=backbone.pad_id,
                left_padded=not backbone.is_encoder_decoder,
                rows=[row for _, row in part],
                front=backbone.front(frame),
            )
            prefix = prefixes.of(list(range(len(places))), batch.front)
            yield prefix, batch.to(backbone.device), places


def _groups(prompts: Tensor | Sequence[Tensor], tokens_per_forward: int) -> list[list[int]]:
    """Numbers of prompts of equal N, so many together as one pass over themselves allows."""
    if not all(prompt.isfinite().all() for prompt in prompts):
        raise ValueError("a prompt holds numbers that are not finite: tune it again")
    wrong = next((prompt.shape for prompt in prompts if prompt.dim() != 2), None)
    if wrong is not None or len(prompts) == 0:
        given = "there are none" if wrong is None else f"one has shape {tuple(wrong)}"
        raise ValueError(f"prompts are (R, N, D), or a list of (N, D), at least one; {given}")
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    groups = []
    for count, places in by_length.items():
        size = max(1, tokens_per_forward // max(1, count))
        groups += [places[at : at + size] for at in range(0, len(places), size)]
    return groups


def _input_room(backbone: Backbone, virtual_tokens: int, longest: int, wanted: int) -> int:
    """How many tokens of an input are kept."""
    positions = backbone.max_positions
    if positions is None:
        return wanted
    room = positions - virtual_tokens - (0 if backbone.is_encoder_decoder else longest)
    if room < 1 or longest > positions:
        raise ValueError(
            f"{virtual_tokens} virtual tokens and answers of up to {longest} tokens leave no room "
            f"for an input in the {positions} positions of backbone {backbone.name!r}: lower "
            "max_new_tokens"
        )
    return min(wanted, room)


def _longest(frame: Frame, labels: Sequence[str]) -> int:
    """Tokens of the longest label."""
    return max(map(len, frame.encode_targets(labels)))


def tidy_labels(labels: Sequence[str], frame: Frame | None = None) -> list[str]:
    """Labels without spaces around them; warns of those that are the same tokens in a frame.

    Raises:
        ValueError: a single text, fewer than two labels, empty ones, some that occur twice, or
            labels that are all the same tokens to the backbone.
    """
    tidy = [] if isinstance(labels, str) else [str(label).strip() for label in labels]
    if len(tidy) < 2 or not all(tidy):
        raise ValueError(f"labels are {labels!r}: give two answers or more to choose from")
    if len(set(tidy)) < len(tidy):
        raise ValueError(
            f"a label occurs twice in {tidy} (spaces around them dropped): give it once"
        )
    for alike in [] if frame is None else frame.look_alikes(tidy):
        told = f"labels {', '.join(map(repr, alike))} are the same tokens to the backbone"
        if len(alike) == len(tidy):
            raise ValueError(f"{told}: give others, or take a backbone that knows them")
        warnings.warn(f"{told}; the first is answered for all of them", stacklevel=3)
    return tidy


def _tidy(inputs: Sequence[str], prefix: str) -> list[str]:
    """Inputs without spaces around them, behind a prefix."""
    if isinstance(inputs, str):
        raise ValueError(f"inputs is one text, {inputs[:40]!r}: give a list of texts")
    if others := [one for one in inputs if not isinstance(one, str)]:
        raise ValueError(f"inputs hold {others[0]!r}, which is no text: give a list of texts")
    tidy = [text.strip() for text in inputs]
    if not all(tidy):
        raise ValueError(
            f"inputs[{tidy.index('')}] is empty, or spaces alone: give it text, or leave it out"
        )
    return [prefix + text for text in tidy]


def check_at_least_one(**numbers: int) -> None:
    """Refuse numbers below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: give at least 1")
