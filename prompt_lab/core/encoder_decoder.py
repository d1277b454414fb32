"""How an encoder-decoder model runs rows behind prompts: prepended to the encoder's input."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prompt_lab.core.batch import IGNORE, Batch, by_length
from prompt_lab.core.candidates import Follow
from prompt_lab.core.forward import causal_mask, tokens_mask

Way = Literal["rows", "lengths"]
"""Whether rows of unequal lengths run together, padded behind, or rows of one length at a time."""

_BLIND = ("t5", "mt5", "umt5")
"""Types whose decoder makes its mask without a look at the values of one."""


class EncoderDecoder:
    """Runs the rows of batches behind prompts in the encoder.

    Args:
        model: an encoder-decoder language model of transformers.
        start: the token that its decoder starts from.
        pad_id: id that stands for padding.

    Attributes:
        way: which rows run together.
        pads_generation: whether rows of unequal lengths may generate together.
    """

    def __init__(self, model: Any, start: int, pad_id: int) -> None:
        self.model, self.start_id, self.pad_id = model, start, pad_id
        self.way: Way = "rows"
        self.packs = False
        self.pads_generation = True

    def ways(self) -> list[Way]:
        """The ways that a model may be run in, fastest first."""
        return ["rows", "lengths"]

    def groups(self, batch: Batch, longest: int | None = None) -> list[list[int]] | None:
        """The rows that may run together, by length, where not all may; None where all may."""
        apart = self.way == "lengths" or (longest is not None and not self.pads_generation)
        return by_length(batch.input_lengths) if apart else None

    def prefix(self, prompts: Tensor) -> tuple[Tensor, ...]:
        """The bank itself (R, N, D)."""
        return (prompts,)

    def target_logits(self, prefix: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Logits (B, T, V) of the decoder at the targets of rows, padding included."""
        states, mask = self.encode(prefix, batch)
        start = torch.full_like(batch.target_ids[:, :1], self.start_id)
        shifted = torch.cat([start, batch.target_ids[:, :-1]], dim=1)
        shifted = shifted.masked_fill(shifted == IGNORE, self.pad_id)
        config, own = self.model.config, None
        if config.model_type not in _BLIND:
            own = causal_mask(config, torch.ones_like(shifted), states.dtype)
        made = self.model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=shifted,
            decoder_attention_mask=own,
            use_cache=False,
        )
        return made.logits

    def start(self, prefix: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Follow]:
        """Logits (B, V) of the first answer token, and a way to run answers behind the start.

        The encoder and the cross-attention's keys and values are computed once for all answers.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        states, mask = self.encode(prefix, batch)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def run(ids: Tensor) -> Tensor:
            made = self.model(
                encoder_outputs=(states,),
                attention_mask=mask,
                decoder_input_ids=ids,
                cache=cache,
                use_cache=True,
            )
            return made.logits

        def follow(keep: Tensor | None, ids: Tensor) -> Tensor:
            """Logits (b, t, V) behind tokens (b, t) of the rows to keep; the cache forgets them."""
            nonlocal states, mask
            if keep is not None:
                states, mask = states[keep], None if mask is None else mask[keep]
                cache.batch_select_indices(keep)
            logits = run(ids)
            cache.crop(-ids.shape[1])
            return logits

        return run(torch.full_like(batch.input_ids[:, :1], self.start_id))[:, -1], follow

    def generate(
        self, prefix: tuple[Tensor, ...], batch: Batch, settings: dict[str, Any]
    ) -> Tensor:
        """Ids (B, new tokens) that transformers generates for rows."""
        from transformers.modeling_outputs import BaseModelOutput

        states, _ = self.encode(prefix, batch)
        mask = F.pad(batch.input_mask, (prefix[0].shape[1], 0), value=1)
        output = BaseModelOutput(last_hidden_state=states)
        made = self.model.generate(encoder_outputs=output, attention_mask=mask, **settings)
        return made[:, 1:]  # without the start token, which may be an end, too

    def encode(self, prefix: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Encoder states (B, N + S, D) of rows behind their prompts, and the mask of attention.

        There is no mask where no row is padded, else it is as :func:`tokens_mask` makes it.
        """
        (prompts,) = prefix
        chosen = prompts.index_select(0, batch.prompt_index)  # (B, N, D)
        embed = self.model.get_input_embeddings()
        embeddings = torch.cat([chosen, embed(batch.input_ids)], dim=1)
        mask = None
        if min(batch.input_lengths, default=0) < batch.input_ids.shape[1]:
            tokens = F.pad(batch.input_mask, (prompts.shape[1], 0), value=1)
            mask = tokens_mask(self.model.config, tokens, embeddings.dtype)
        encoder = self.model.get_encoder()
        states = encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return states, mask
