"""A batch of tokenised rows, each naming its prompt: what every method feeds the backbone.

Rows are kept sorted by length, longest first, so that a slice of a batch is a micro-batch with
little padding. Lengths, runs and row numbers stand beside the tensors as plain lists: cutting and
bookkeeping never wait for the device. It holds no text and knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Marks padding in ``target_ids``; the value that PyTorch's cross entropy skips."""


@dataclass
class Batch:
    """B padded rows.

    Attributes:
        input_ids: (B, S) token ids; padded on the left where ``left_padded``, else on the right.
        input_mask: (B, S) long, 1 for tokens and 0 for padding.
        target_ids: (B, T) token ids padded on the right with ``IGNORE``; T is 0 without targets.
        prompt_index: (B,) the prompt of the bank that each row runs under.
        weight: (B,) float32, what the row's mean loss counts in the loss of the step.
        prompts: ``prompt_index`` as a list on the host.
        rows: the row numbers within their split, on the host.
        input_lengths: tokens of each input.
        target_lengths: tokens of each target.
        left_padded: on which side the inputs are padded.
        front: token ids that stand between the prompt and every row, and not in ``input_ids``.
    """

    input_ids: Tensor
    input_mask: Tensor
    target_ids: Tensor
    prompt_index: Tensor
    weight: Tensor
    prompts: list[int]
    rows: list[int]
    input_lengths: list[int]
    target_lengths: list[int]
    left_padded: bool
    front: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``; to a GPU without waiting for it."""
        moved = {
            name: to_device(getattr(self, name), torch.device(device))
            for name in ("input_ids", "input_mask", "target_ids", "prompt_index", "weight")
        }
        return Batch(**{**vars(self), **moved})

    def slice(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` (exclusive), without the padding that they do not need."""
        inputs = max(self.input_lengths[start:stop], default=0)
        targets = max(self.target_lengths[start:stop], default=0)
        width = self.input_ids.shape[1]
        columns = slice(width - inputs, width) if self.left_padded else slice(0, inputs)
        return Batch(
            input_ids=self.input_ids[start:stop, columns],
            input_mask=self.input_mask[start:stop, columns],
            target_ids=self.target_ids[start:stop, :targets],
            prompt_index=self.prompt_index[start:stop],
            weight=self.weight[start:stop],
            prompts=self.prompts[start:stop],
            rows=self.rows[start:stop],
            input_lengths=self.input_lengths[start:stop],
            target_lengths=self.target_lengths[start:stop],
            left_padded=self.left_padded,
            front=self.front,
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """Some rows in the given order, without the padding that they do not need."""
        at = index_tensor(rows, self.weight.device)
        fields = vars(self)
        tensors = {k: v.index_select(0, at) for k, v in fields.items() if isinstance(v, Tensor)}
        lists = {k: [v[i] for i in rows] for k, v in fields.items() if isinstance(v, list)}
        return Batch(**{**fields, **tensors, **lists}).slice(0, len(rows))

    def padded_left(self) -> Batch:
        """The same rows with their inputs' padding on the left, as decoders need it."""
        if self.left_padded:
            return self
        width = self.input_ids.shape[1]
        place = torch.arange(width, device=self.input_ids.device)
        source = (place + self.input_mask.sum(1, keepdim=True)) % width  # (B, S), cyclic shift
        ids, mask = self.input_ids.gather(1, source), self.input_mask.gather(1, source)
        return Batch(**{**vars(self), "input_ids": ids, "input_mask": mask, "left_padded": True})


def make_batch(
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None,
    prompts: Sequence[int],
    *,
    pad_id: int,
    left_padded: bool,
    weight: Sequence[float] | None = None,
    rows: Sequence[int] | None = None,
    front: Sequence[int] = (),
) -> Batch:
    """Pad B token lists into a :class:`Batch`, longest row (input and target) first.

    Args:
        inputs: B lists of input ids.
        targets: B lists of target ids, or None for rows without targets.
        prompts: the prompt of each row.
        pad_id: id that fills the inputs' padding.
        left_padded: pad inputs on the left (decoder-only backbones) or the right.
        weight: weight of each row; 1 by default.
        rows: number of each row within its split; its place in ``inputs`` by default.
        front: ids that the inputs begin with, which are then run once per prompt; where one does
            not, or has no others, all rows run whole.

    Raises:
        ValueError: the lists differ in length.
    """
    count = len(inputs)
    targets = [[]] * count if targets is None else targets
    weight = [1.0] * count if weight is None else weight
    rows = range(count) if rows is None else rows
    sizes = {"targets": len(targets), "prompts": len(prompts), "weight": len(weight)}
    wrong = {name: size for name, size in {**sizes, "rows": len(rows)}.items() if size != count}
    if wrong:
        raise ValueError(f"{count} inputs, but {wrong}: give one of each for every row")
    front, shared = tuple(front), len(front)
    if any(len(ids) <= shared or tuple(ids[:shared]) != front for ids in inputs):
        front, shared = (), 0
    inputs = [ids[shared:] for ids in inputs]
    order = sorted(range(count), key=lambda i: -(len(inputs[i]) + len(targets[i])))
    input_lengths = [len(inputs[i]) for i in order]
    target_lengths = [len(targets[i]) for i in order]
    width, depth = max(input_lengths, default=0), max(target_lengths, default=0)
    input_ids = np.full((count, width), pad_id, dtype=np.int64)
    input_mask = np.zeros((count, width), dtype=np.int64)
    target_ids = np.full((count, depth), IGNORE, dtype=np.int64)
    for at, i in enumerate(order):
        start = width - input_lengths[at] if left_padded else 0
        columns = slice(start, start + input_lengths[at])
        input_ids[at, columns] = inputs[i]
        input_mask[at, columns] = 1
        target_ids[at, : target_lengths[at]] = targets[i]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        input_mask=torch.from_numpy(input_mask),
        target_ids=torch.from_numpy(target_ids),
        prompt_index=torch.tensor([prompts[i] for i in order], dtype=torch.long),
        weight=torch.tensor([weight[i] for i in order], dtype=torch.float32),
        prompts=[prompts[i] for i in order],
        rows=[rows[i] for i in order],
        input_lengths=input_lengths,
        target_lengths=target_lengths,
        left_padded=left_padded,
        front=front,
    )


def by_length(lengths: Sequence[int]) -> list[list[int]] | None:
    """Rows of equal length, in groups; None where all are equal."""
    places: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        places.setdefault(length, []).append(row)
    return list(places.values()) if len(places) > 1 else None


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device, without waiting for what the device works on."""
    return to_device(torch.tensor(values, dtype=torch.long), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the host to a GPU over pinned memory, in the order of its work.

    So a step is prepared while the GPU works on the one before. A plain copy waits for all of that.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def default_tokens_per_forward(device: torch.device) -> int:
    """Padded tokens of a forward pass where none are given: what a CPU's caches and a GPU like.

    On a CPU larger passes are slower, and short rows are padded to longer ones.
    """
    return 2048 if device.type == "cpu" else 16384


def micro_batches(batch: Batch, tokens_per_forward: int, extra_per_row: int = 0) -> list[Batch]:
    """Cut a batch into the slices that :func:`spans` gives.

    Raises:
        ValueError: ``tokens_per_forward`` is not positive.
    """
    cuts = spans(batch.input_lengths, batch.target_lengths, tokens_per_forward, extra_per_row)
    return [batch.slice(start, stop) for start, stop in cuts]


def spans(
    inputs: Sequence[int], targets: Sequence[int], tokens_per_forward: int, extra_per_row: int = 0
) -> list[tuple[int, int]]:
    """Consecutive spans of rows of at most ``tokens_per_forward`` padded tokens.

    A row costs its span's widest input plus widest target plus ``extra_per_row`` (the virtual
    tokens, where the backbone runs them once per row). One row is always taken, however long. A
    span that is a quarter full ends before a row of less than half its width, which would be
    mostly padding.

    Args:
        inputs: tokens of each row's input, longest rows first for little padding.
        targets: tokens of each row's target.
        tokens_per_forward: the bound.
        extra_per_row: tokens of a row beside input and target.

    Raises:
        ValueError: ``tokens_per_forward`` is not positive.
    """
    if tokens_per_forward < 1:
        raise ValueError(f"tokens_per_forward is {tokens_per_forward}: give at least 1")
    found, start = [], 0
    widest_input = widest_target = 0
    for at, (own_input, own_target) in enumerate(zip(inputs, targets, strict=True)):
        width = widest_input + widest_target + extra_per_row
        next_input, next_target = max(widest_input, own_input), max(widest_target, own_target)
        over = (at - start + 1) * (next_input + next_target + extra_per_row) > tokens_per_forward
        short = 2 * (own_input + own_target + extra_per_row) < width
        if at > start and (over or (short and 4 * (at - start) * width >= tokens_per_forward)):
            found.append((start, at))
            start, next_input, next_target = at, own_input, own_target
        widest_input, widest_target = next_input, next_target
    return [*found, (start, len(inputs))] if start < len(inputs) else found
