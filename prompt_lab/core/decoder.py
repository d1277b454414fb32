"""How a decoder-only model runs rows behind prompts: shared keys and values, rows packed.

The tokens of a prompt see only each other, so their keys and values are computed once per prompt,
with gradient, and the rows of the prompt stand behind them. How rows are laid out and what the
model is told of it is its *way*; ``self_check.py`` finds the fastest that is exact for a model:

- ``kinds``, ``window``, ``causal``: packs (``packing.py``) under additive masks made from
  positions: one for each of ``config.layer_types``, one with the model's window, one without;
- ``rows``: a row a sequence, padded behind; the model makes its mask, and BLOOM its positions, of
  which keys are tokens;
- ``lengths``: rows of one length at a time and no mask, for models that count keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prompt_lab.core.batch import Batch, by_length, index_tensor, to_device
from prompt_lab.core.candidates import Follow
from prompt_lab.core.forward import additive, head_at
from prompt_lab.core.packing import PADDING, Sequences, lay_out, packs_of

Way = Literal["kinds", "window", "causal", "rows", "lengths"]
"""How rows are laid out, and what a model is told of it."""

_PROMPT = -2  # the row of a prompt's tokens, which all rows of a sequence see
_ANSWERS = 2**20  # a row's number plus so many times the number of an answer behind it


class Decoder:
    """Runs the rows of batches behind the keys and values of prompts.

    Args:
        model: a decoder-only language model of transformers.

    Attributes:
        way: how rows are laid out.
        packs: whether several rows may stand in one sequence; adapters, which differ by row, say
            no.
        pads_generation: whether rows of unequal lengths may generate together, padded in front.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.way: Way = "causal"
        self.packs = True
        self.pads_generation = True
        config = model.config.get_text_config()
        self.config = config
        parameters = inspect.signature(type(model.base_model).forward).parameters
        self._takes_positions = "position_ids" in parameters

    def ways(self) -> list[Way]:
        """The ways that a model of this config may be run in, fastest first."""
        found: list[Way] = ["rows", "lengths"]
        if self.config.model_type in ("gpt_neo",):  # local layers keep masks that count keys
            return ["lengths"]
        if self._takes_positions:
            found = ["causal", *found]
            if getattr(self.config, "sliding_window", None):
                found = ["window", *found]
            if getattr(self.config, "layer_types", None):
                found = ["kinds", *found]
        return found

    def groups(self, batch: Batch, longest: int | None = None) -> list[list[int]] | None:
        """The rows that may run together, by length, where not all may; None where all may.

        Args:
            batch: rows.
            longest: positions of the longest row at the end, its prompt included, where rows
                generate: transformers counts keys in windows, and so the padding. None where rows
                are predicted or scored.
        """
        lengths, apart = batch.input_lengths, self.way == "lengths"
        if longest is not None:
            window = self.config.sliding_window if self.way in ("kinds", "window") else None
            apart |= not self.pads_generation or (window is not None and longest > window)
        else:
            lengths = [sum(pair) for pair in zip(lengths, batch.target_lengths, strict=True)]
        return by_length(lengths) if apart else None

    def prefix(self, prompts: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of prompts (R, N, D), alternating by layer, each (R, heads, N, size)."""
        from prompt_lab.core.prompt_cache import prompt_cache

        if prompts.shape[1] == 0:
            return (prompts,)
        cache = prompt_cache()
        self.model.base_model(inputs_embeds=prompts, cache=cache, use_cache=True)
        return tuple(part for layer in cache.layers for part in (layer.keys, layer.values))

    def target_logits(self, prefix: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Logits (M, V) at the M targets of rows, row by row.

        The prefix is what :meth:`prefix` returned, or the bank itself (R, N, D): then the prompt of
        each sequence runs in front of it, in the same pass.
        """
        from prompt_lab.core.prompt_cache import row_cache

        laid = lay_out(batch, batch.target_lengths, self._packs(batch, batch.target_lengths))
        device = batch.weight.device
        at = index_tensor([batch.prompts[rows[0]] for rows in laid.rows], device)
        parts = [part.index_select(0, at) for part in prefix]
        count = parts[0].shape[-2]
        keys = _Keys(laid, count, device)
        ids = torch.cat([batch.input_ids, batch.target_ids.clamp(min=0)], 1).flatten()
        embeddings = self.model.get_input_embeddings()(ids[keys.source])
        if len(parts) > 1:
            before = to_device(torch.from_numpy(laid.before), device)
            queries = keys.row[:, count:], keys.place[:, count:]
            return self._run(embeddings, row_cache(parts), queries, keys.all, before)
        embeddings = torch.cat([parts[0].to(embeddings.dtype), embeddings], 1)
        # Places among N + L tokens a sequence instead of L.
        before = laid.before + count * (1 + laid.before // laid.row.shape[1])
        before = to_device(torch.from_numpy(before), device)
        return self._run(embeddings, None, keys.all, keys.all, before)

    def start(self, prefix: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Follow]:
        """Logits (B, V) of the first answer token, and a way to run answers behind the text.

        The text runs once behind its prompt's keys and values, for all answers.
        """
        from prompt_lab.core.prompt_cache import growing_cache

        ones, device = [1] * len(batch), batch.weight.device
        laid = lay_out(batch, ones, self._packs(batch, ones))
        at = index_tensor([batch.prompts[rows[0]] for rows in laid.rows], device)
        parts = [] if len(prefix) == 1 else [part.index_select(0, at) for part in prefix]
        count = parts[0].shape[2] if parts else 0
        keys = _Keys(laid, count, device)
        cache, embed = growing_cache(parts), self.model.get_input_embeddings()
        ids = torch.cat([batch.input_ids, batch.target_ids], 1).flatten()[keys.source]
        queries = keys.row[:, count:], keys.place[:, count:]
        before = to_device(torch.from_numpy(laid.before), device)
        first = self._run(embed(ids), cache, queries, keys.all, before)
        sequences, alive = laid.rows, list(range(len(batch)))

        def follow(keep: Tensor | None, ids: Tensor) -> Tensor:
            """Logits (b, t, V) behind tokens (b, t) of the rows to keep; the cache forgets them."""
            nonlocal sequences, alive
            if keep is not None:
                alive = [alive[at] for at in keep.tolist()]
                kept = {*alive}
                left = [[row for row in rows if row in kept] for rows in sequences]
                used = [at for at, rows in enumerate(left) if rows]
                if len(used) < len(left):
                    at = index_tensor(used, device)
                    cache.batch_select_indices(at)
                    keys.row, keys.place = keys.row[at], keys.place[at]
                sequences = [rows for rows in left if rows]
            answers = _answers(sequences, alive, ids.shape[1], batch.input_lengths, count)
            source, row, place = (to_device(torch.from_numpy(one), device) for one in answers[:3])
            logits = self._run(
                embed(ids.flatten()[source]),
                cache,
                (row, place),
                (torch.cat([keys.row, row], 1), torch.cat([keys.place, place], 1)),
                to_device(torch.from_numpy(answers[3]), device),
            )
            cache.crop(-source.shape[1])
            return logits.view(*ids.shape, -1)

        return first, follow

    def generate(
        self, prefix: tuple[Tensor, ...], batch: Batch, settings: dict[str, Any]
    ) -> Tensor:
        """Ids (B * beams kept, new tokens) that transformers generates behind rows."""
        from prompt_lab.core.prompt_cache import growing_cache

        batch = batch.padded_left()
        parts = [] if len(prefix) == 1 else [p.index_select(0, batch.prompt_index) for p in prefix]
        mask = F.pad(batch.input_mask, (parts[0].shape[2] if parts else 0, 0), value=1)
        cache = growing_cache(parts)
        if parts:
            cache.batch_repeat_interleave(settings["num_beams"])
        made = self.model.generate(
            batch.input_ids, attention_mask=mask, cache=cache, use_cache=True, **settings
        )
        return made[:, batch.input_ids.shape[1] :]

    def _packs(self, batch: Batch, targets: Sequence[int]) -> list[list[int]]:
        """The rows of each sequence."""
        if not self.packs or self.way in ("rows", "lengths"):
            return [[row] for row in range(len(batch))]
        return packs_of(batch, targets)

    def _run(
        self,
        embeddings: Tensor,
        cache: Any,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        at: Tensor,
    ) -> Tensor:
        """Logits (M, V) at M of the P * L tokens of embeddings (P, L, D), behind a cache if any.

        Queries (P, L) and keys (P, K) are told by their rows and positions.
        """
        settings: dict[str, Any] = {"attention_mask": self._mask(*queries, *keys)}
        if self._takes_positions:
            settings["position_ids"] = queries[1]
        if cache is not None:
            settings["cache"] = cache
        with head_at(self.model, at):
            made = self.model(inputs_embeds=embeddings, use_cache=cache is not None, **settings)
        return made.logits[0]

    def _mask(self, row: Tensor, place: Tensor, key_row: Tensor, key_place: Tensor) -> Any:
        """What the model is told of which keys (P, K) its queries (P, Q) see."""
        if self.way == "lengths":
            return None
        if self.way == "rows":
            return (key_row != PADDING).long()
        back = place[:, :, None] - key_place[:, None]
        seen = (row[:, :, None] == key_row[:, None]) | (key_row == _PROMPT)[:, None]
        seen |= (row % _ANSWERS)[:, :, None] == key_row[:, None]  # an answer sees its row
        seen &= back >= 0
        dtype = self.model.dtype
        if self.way == "causal":
            return additive(seen, dtype)
        near = additive(seen & (back < self.config.sliding_window), dtype)
        if self.way == "window":
            return near
        return {"full_attention": additive(seen, dtype), "sliding_attention": near}


class _Keys:
    """Rows and places (P, N + L) of the keys of sequences and their prompts, on a device."""

    def __init__(self, laid: Sequences, count: int, device: torch.device) -> None:
        row = np.pad(laid.row, ((0, 0), (count, 0)), constant_values=_PROMPT)
        place = np.pad(laid.place + count, ((0, 0), (count, 0)))
        place[:, :count] = np.arange(count)
        self.source, self.row, self.place = (
            to_device(torch.from_numpy(one), device) for one in (laid.source, row, place)
        )

    @property
    def all(self) -> tuple[Tensor, Tensor]:
        """Rows and places of all keys."""
        return self.row, self.place


def _answers(
    sequences: list[list[int]], alive: list[int], depth: int, lengths: list[int], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source, row and place (P, L) of the answers' tokens of rows, and where each (b * t) stands.

    Args:
        sequences: the rows of each sequence that are left.
        alive: the row of each of b answers.
        depth: t, tokens of each answer.
        lengths: tokens of each row's text.
        count: N.
    """
    of_row: dict[int, list[int]] = {}
    for at, row in enumerate(alive):
        of_row.setdefault(row, []).append(at)
    answers = [[at for row in rows for at in of_row[row]] for rows in sequences]
    width = max(map(len, answers)) * depth
    source = np.zeros((len(sequences), width), dtype=np.int64)
    place, row_of = np.zeros_like(source), np.full_like(source, PADDING)
    where = np.zeros((len(alive), depth), dtype=np.int64)
    steps = np.arange(depth)
    for at, own in enumerate(answers):
        for turn, answer in enumerate(own):
            here, row = slice(turn * depth, (turn + 1) * depth), alive[answer]
            source[at, here] = answer * depth + steps
            place[at, here] = count + lengths[row] + steps
            row_of[at, here] = row + _ANSWERS * (1 + answer)
            where[answer] = at * width + turn * depth + steps
    return source, row_of, place, where.flatten()
