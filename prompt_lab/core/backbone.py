"""The one frozen language model: loss, label scores and generation under a bank of prompts.

A prompt is prepended to the input embeddings: of the encoder for encoder-decoder models (T5, BART),
of the decoder for decoder-only models (GPT-2, BLOOM, Llama, Qwen2). In a decoder-only model the
rows of a prompt see only each other, so their keys and values are the same for every row of text
that follows: they are computed once per prompt, with gradient, and shared by the rows that name it.
Logits are made only where targets are. Both are exact.

The backbone is frozen: evaluation mode, no gradients for its weights, no dropout. It does not
train, choose prompts or read data; the fine-tuning baseline alone asks it to :meth:`unfreeze`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prompt_lab.core.batch import IGNORE, Batch, index_tensor, make_batch
from prompt_lab.core.candidates import Follow, LabelScore, candidate_scores
from prompt_lab.core.pretrained import (
    DTYPES,
    ENCODER_DECODER,
    load_pretrained,
    refuse_not_finite,
    refuse_unsupported,
    weights_digest,
)
from prompt_lab.core.text import ChatFrame, Frame, Side, check_template, find_specials
from prompt_lab.core.training_forward import (
    attention_window,
    causal_mask,
    compile_training,
    position_masks,
    recompute_layers,
    tokens_mask,
)
from prompt_lab.sandbox import SANDBOX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prefix = tuple[Tensor, ...]
"""What :meth:`Backbone.prefix` returns."""

_POSITIONS = {"bart": "max_position_embeddings", "gpt2": "n_positions"}
_POSITIONS |= dict.fromkeys(("llama", "qwen2"), "max_position_embeddings")


class Backbone(nn.Module):
    """A frozen Hugging Face model that runs rows of text under prompts of a bank.

    Args:
        model: an encoder-decoder (T5, mT5, BART) or decoder-only (GPT-2, BLOOM, Llama, Qwen2)
            language model; it is frozen and put in evaluation mode.
        tokenizer: its tokenizer.
        name: hub id or folder, for messages and prompt files.

    Raises:
        ValueError: an architecture that is not supported, T5 in float16, or special tokens that the
            model's files do not agree on (``text.find_specials``).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model"
    ) -> None:
        super().__init__()
        kind = model.config.model_type
        refuse_unsupported(kind, model.dtype, name)
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer: Any = tokenizer
        self.specials = find_specials(model, tokenizer, name)
        self.name = name
        self.is_encoder_decoder = kind in ENCODER_DECODER
        self.model.generation_config = self._plain_generation()
        self.hidden_size: int = self.model.get_input_embeddings().weight.shape[1]
        field = _POSITIONS.get(kind)
        self.max_positions: int | None = getattr(model.config, field) if field else None
        self.pad_id = self.specials.pad
        self.window = attention_window(model.config)
        self._candidates: dict[tuple[Any, ...], Tensor] = {}
        plain = Frame(tokenizer, self.specials, self.is_encoder_decoder, name)
        self._frames: dict[tuple[str, str | None], Frame] = {("plain", None): plain}

    @classmethod
    def load(
        cls,
        name: str = SANDBOX,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    ) -> Backbone:
        """Load a model and its tokenizer from the hub, its cache, or a local folder.

        Args:
            name: hub id, folder, ``.gguf`` file, or ``sandbox`` for the tiny model that ships with
                the package.
            dtype: dtype of the frozen weights; prompts and losses stay float32.
            attention: attention implementation of transformers. BLOOM has its own and ignores it.

        Raises:
            ValueError: no such model, a folder without tokenizer, an unsupported architecture, or
                T5 in float16.
        """
        model, tokenizer = load_pretrained(name, dtype, attention)
        digest = weights_digest(model)  # of the weights as published, before the cast
        refuse_not_finite(model.to(DTYPES[dtype]), name)
        backbone = cls(model, tokenizer, name)
        for weight in backbone.model.parameters():
            # Files are mapped at any address; matrix products repeat bit for bit on aligned memory.
            weight.data = weight.data.clone()
        backbone.digest = digest
        return backbone

    def _plain_generation(self) -> Any:
        """Generation settings of special ids only: published penalties would change answers."""
        from transformers import GenerationConfig

        return GenerationConfig(
            eos_token_id=self.specials.ends,
            pad_token_id=self.specials.pad,
            decoder_start_token_id=self.specials.start if self.is_encoder_decoder else None,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names, shapes, dtypes and bytes of the weights when first asked."""
        return weights_digest(self.model)

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 over the rules that make tokens of a text, and the special tokens."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        digest.update(repr(sorted(self.tokenizer.all_special_tokens)).encode())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever a trainer asks: frozen means no dropout."""
        return super().train(False)

    def unfreeze(self) -> None:
        """Let the weights be trained, for the fine-tuning baseline; dropout stays off.

        ``digest`` stays that of the weights as they are now.

        Raises:
            ValueError: weights in half precision.
        """
        half = {w.dtype for w in self.model.parameters()} & {torch.bfloat16, torch.float16}
        if half:
            raise ValueError(
                f"backbone {self.name!r} has weights in {str(half.pop()).split('.')[-1]}, which "
                "rounds small updates away: to train them use model.backbone.dtype float32 (and "
                "trainer.precision bf16-mixed for speed)"
            )
        _ = self.digest  # made once, before training
        self.model.requires_grad_(True)

    def recompute_layers(self) -> None:
        """Keep activations of one layer at a time in training: less memory, more time, exact."""
        recompute_layers(self.model)

    def compile_training(self) -> None:
        """Compile the model's passes with ``torch.compile`` where gradients are asked for."""
        model = self.model
        parts = (model.get_encoder(), model.get_decoder()) if self.is_encoder_decoder else ()
        compile_training(parts or (model.base_model,))

    # ---- text to tokens -------------------------------------------------------------------------

    def frame(self, template: str = "plain", system: str | None = None) -> Frame:
        """What stands around inputs and answers, made once; plain where a method is given none.

        Args:
            template: ``plain``, or ``chat`` for the tokenizer's chat template.
            system: system text of a chat; None for what the template does without.

        Raises:
            ValueError: another template, a system text of plain rows, or as :class:`ChatFrame`.
        """
        if (template, system) not in self._frames:
            check_template(template, system)
            self._frames[template, system] = ChatFrame(self.frame(), system)
        return self._frames[template, system]

    def encode_inputs(self, texts: Sequence[str], frame: Frame | None = None) -> list[list[int]]:
        """As :meth:`Frame.encode_inputs`."""
        return (frame or self.frame()).encode_inputs(texts)

    def cut_input(
        self, ids: list[int], max_length: int, side: Side = "right", frame: Frame | None = None
    ) -> list[int]:
        """As :meth:`Frame.cut_input`."""
        return (frame or self.frame()).cut_input(ids, max_length, side)

    def encode_targets(self, texts: Sequence[str], frame: Frame | None = None) -> list[list[int]]:
        """As :meth:`Frame.encode_targets`."""
        return (frame or self.frame()).encode_targets(texts)

    def look_alikes(self, answers: Sequence[str], frame: Frame | None = None) -> list[list[str]]:
        """As :meth:`Frame.look_alikes`."""
        return (frame or self.frame()).look_alikes(answers)

    def batch(
        self,
        inputs: Sequence[str],
        targets: Sequence[str] | None = None,
        prompt_index: Sequence[int] | None = None,
        max_input_length: int = 512,
        frame: Frame | None = None,
    ) -> Batch:
        """Tokenise and pad texts into a :class:`Batch` on the backbone's device.

        Rows are sorted by length; ``batch.rows`` tells the place of each in ``inputs``. Every row
        runs under prompt 0 unless ``prompt_index`` says otherwise. Warns of inputs that are cut.
        """
        whole = self.encode_inputs(inputs, frame)
        if any(len(ids) > max_input_length for ids in whole):
            warnings.warn(
                f"inputs of over {max_input_length} tokens lose their end (max_input_length)",
                stacklevel=2,
            )
        made = make_batch(
            [self.cut_input(ids, max_input_length, frame=frame) for ids in whole],
            None if targets is None else self.encode_targets(targets, frame),
            [0] * len(inputs) if prompt_index is None else prompt_index,
            pad_id=self.pad_id,
            left_padded=not self.is_encoder_decoder,
        )
        return made.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of token ids as the model sees them (scaled for BART): (..., D)."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def embedding_table(self) -> Tensor:
        """The input embeddings as the model sees them: (V, D) float32, on the CPU."""
        count = self.model.get_input_embeddings().weight.shape[0]
        return self.embed(torch.arange(count, device=self.device)).float().cpu()

    # ---- the three verbs ------------------------------------------------------------------------

    def loss(self, prompts: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of each row's target tokens, float32 (B,), in nats.

        Args:
            prompts: (R, N, D) bank; gradients flow into it.
            batch: rows with targets; ``batch.prompt_index`` names the prompt of each.
            label_smoothing: share of the probability spread evenly over the vocabulary.

        Raises:
            ValueError: a bank of another width, or rows longer than the model's positions.
        """
        return self.row_losses(self.prefix(prompts), batch, label_smoothing)

    def prefix(self, prompts: Tensor) -> Prefix:
        """What rows need of their prompts, computed once per prompt and with gradient.

        The bank (R, N, D) itself for encoder-decoder models; for decoder-only models the keys and
        values of all layers, alternating, each (R, heads, N, head size). All are in the weights'
        dtype. Differentiating a loss with respect to these and pulling the result back through
        them gives the prompts' gradient; so micro-batches share one pass over the prompts, and
        all batches of an evaluation do: ``score`` and ``generate`` take it in place of a bank.

        Raises:
            ValueError: a bank of another width, or prompts longer than the model's positions.
        """
        self._check_prompts(prompts)
        cast = prompts.to(self.model.dtype)
        if self.is_encoder_decoder or prompts.shape[1] == 0:
            return (cast,)
        from prompt_lab.core.prompt_cache import prompt_cache

        count = prompts.shape[1]
        self._check_positions(count)
        masks = None
        self._beyond_window(count)
        if self.window is not None and not self._is_flash:
            places = torch.arange(count, device=cast.device)[None]
            known = torch.ones_like(places)
            masks = position_masks(self.model.config, places, known, places, cast.dtype)
        cache = prompt_cache(self.model.config.num_hidden_layers)
        self.model.base_model(inputs_embeds=cast, attention_mask=masks, cache=cache, use_cache=True)
        return tuple(part for layer in cache.layers for part in (layer.keys, layer.values))

    def row_losses(self, prefix: Prefix, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """As :meth:`loss`, given what :meth:`prefix` returned: (B,)."""
        if self.is_encoder_decoder:
            logits = self._decode(*self._encode(prefix, batch), self._shift(batch.target_ids))
            at, targets = None, batch.target_ids.flatten()
        else:
            at = index_tensor(_target_places(batch), batch.target_ids.device)
            logits = self._target_logits(prefix, batch)
            targets = batch.target_ids.flatten().index_select(0, at)
        losses = F.cross_entropy(
            _at_least_float32(logits).flatten(0, -2),
            targets,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        if at is not None:
            losses = losses.new_zeros(batch.target_ids.numel()).index_copy(0, at, losses)
        return losses.view_as(batch.target_ids).sum(1) / (batch.target_ids != IGNORE).sum(1)

    @torch.no_grad()
    def score(
        self,
        prompts: Tensor | Prefix,
        batch: Batch,
        candidates: Sequence[str],
        label_score: LabelScore = "sum",
        frame: Frame | None = None,
    ) -> Tensor:
        """Log-likelihood of every candidate answer, end token included: float32 (B, C), in nats.

        Args:
            prompts: (R, N, D) bank, or what :meth:`prefix` made of it.
            batch: rows; their targets are not looked at.
            candidates: C answers, the same for all rows.
            label_score: ``sum`` over an answer's tokens, or their ``mean``.
            frame: what the rows were made with, plain by default.

        Raises:
            ValueError: no candidates, a bank of another width, or rows longer than the model's
                positions.
        """
        return self._candidate_scores(prompts, batch, candidates, True, label_score, frame)

    @torch.no_grad()
    def choose(
        self,
        prompts: Tensor | Prefix,
        batch: Batch,
        candidates: Sequence[str],
        label_score: LabelScore = "sum",
        frame: Frame | None = None,
    ) -> list[int]:
        """The place of each row's likeliest candidate: ``score(...).argmax(1)``, but faster.

        Candidates that cannot win any more are not run to their end (``candidates.py``).

        Args:
            prompts: (R, N, D) bank, or what :meth:`prefix` made of it.
            batch: rows; their targets are not looked at.
            candidates: C answers, the same for all rows.
            label_score: as :meth:`score`.
            frame: as :meth:`score`.

        Raises:
            ValueError: as :meth:`score`.
        """
        scores = self._candidate_scores(prompts, batch, candidates, False, label_score, frame)
        return scores.argmax(1).tolist()

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Prefix,
        batch: Batch,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        frame: Frame | None = None,
    ) -> list[str]:
        """Greedy (or beam) answers, one per row in the batch's order, stripped of white space.

        Args:
            prompts: (R, N, D) bank, or what :meth:`prefix` made of it.
            batch: rows; their targets are not looked at.
            max_new_tokens: longest answer, end token included.
            num_beams: beams of each row; 1 is greedy.
            frame: what the rows were made with, plain by default.

        Raises:
            ValueError: a bank of another width, or rows longer than the model's positions.
        """
        if len(batch) == 0:
            return []
        prefix, ends = self._as_prefix(prompts), (frame or self.frame()).ends
        if self._pads_windows(prefix, batch, max_new_tokens):
            texts = [""] * len(batch)
            for length in dict.fromkeys(batch.input_lengths):
                rows = [row for row, own in enumerate(batch.input_lengths) if own == length]
                made = self._generate(prefix, batch.take(rows), max_new_tokens, num_beams, ends)
                for row, text in zip(rows, made, strict=True):
                    texts[row] = text
            return texts
        return self._generate(prefix, batch, max_new_tokens, num_beams, ends)

    def _pads_windows(self, prefix: Prefix, batch: Batch, max_new_tokens: int) -> bool:
        """Whether padding would count in windows; rows of one length at a time have none.

        While it generates, transformers makes the masks, by counting keys.
        """
        width = batch.input_ids.shape[1]
        if self.window is None or min(batch.input_lengths, default=0) == width:
            return False
        count = 0 if len(prefix) == 1 else prefix[0].shape[2]
        return self._beyond_window(count + width + max_new_tokens)

    def _generate(
        self, prefix: Prefix, batch: Batch, max_new_tokens: int, num_beams: int, ends: list[int]
    ) -> list[str]:
        """As :meth:`generate`, given what :meth:`prefix` returned."""
        settings = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "do_sample": False,
            "eos_token_id": ends,
        }
        if self.is_encoder_decoder:
            from transformers.modeling_outputs import BaseModelOutput

            self._check_positions(max_new_tokens)
            states, _ = self._encode(prefix, batch)
            mask = F.pad(batch.input_mask, (prefix[0].shape[1], 0), value=1)
            output = BaseModelOutput(last_hidden_state=states)
            made = self.model.generate(encoder_outputs=output, attention_mask=mask, **settings)
            made = made[:, 1:]  # without the start token, which may be an end, too
        else:
            batch = batch.padded_left()
            cache, mask, _, _ = self._growing_cache(prefix, batch)
            self._check_positions(mask.shape[1] + max_new_tokens)
            if cache.get_seq_length():
                cache.batch_repeat_interleave(num_beams)
            made = self.model.generate(
                batch.input_ids,
                attention_mask=mask,
                cache=cache,
                use_cache=True,
                **settings,
            )[:, batch.input_ids.shape[1] :]
        answers = [_before(ends, ids) for ids in made.tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _candidate_scores(
        self,
        prompts: Tensor | Prefix,
        batch: Batch,
        candidates: Sequence[str],
        exhaustive: bool,
        label_score: LabelScore = "sum",
        frame: Frame | None = None,
    ) -> Tensor:
        """Scores (B, C), or bounds whose largest is exact."""
        if label_score not in get_args(LabelScore):
            allowed = ", ".join(get_args(LabelScore))
            raise ValueError(f"label_score is {label_score!r}; allowed: {allowed}")
        answers = self._encode_candidates(tuple(candidates), frame).to(batch.input_ids.device)
        prefix = self._as_prefix(prompts)
        start = self._start_answers if self.is_encoder_decoder else self._start_rows
        first, follow = start(prefix, batch, answers.shape[1])
        settings = {"exhaustive": exhaustive, "mean": label_score == "mean"}
        return candidate_scores(first, answers, follow, self.pad_id, **settings)

    def _encode_candidates(self, candidates: tuple[str, ...], frame: Frame | None) -> Tensor:
        """Token ids (C, T) of answers, padded on the right with ``IGNORE``; kept for next time."""
        if not candidates:
            raise ValueError("score needs at least one candidate answer")
        if (candidates, frame) not in self._candidates:
            encoded = self.encode_targets(candidates, frame)
            depth = max(map(len, encoded))
            rows = [[*ids, *[IGNORE] * (depth - len(ids))] for ids in encoded]
            self._candidates[candidates, frame] = torch.tensor(rows)
        return self._candidates[candidates, frame]

    def _as_prefix(self, prompts: Tensor | Prefix) -> Prefix:
        """The prefix of a bank, or the prefix that was given."""
        return self.prefix(prompts) if isinstance(prompts, Tensor) else prompts

    # ---- encoder-decoder ------------------------------------------------------------------------

    def _encode(self, prefix: Prefix, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Encoder states (B, N + S, D) of rows behind their prompts, and the mask of attention.

        There is no mask where no row is padded, else it is as :func:`tokens_mask` makes it.
        """
        (prompts,) = prefix
        count = prompts.shape[1]
        self._check_positions(count + batch.input_ids.shape[1])
        chosen = prompts.index_select(0, batch.prompt_index)  # (B, N, D)
        embeddings = torch.cat([chosen, self.embed(batch.input_ids)], dim=1)
        mask = None
        if min(batch.input_lengths, default=0) < batch.input_ids.shape[1]:
            tokens = F.pad(batch.input_mask, (count, 0), value=1)
            mask = tokens_mask(self.model.config, tokens, embeddings.dtype)
        encoder = self.model.get_encoder()
        states = encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return states, mask

    def _decode(self, states: Tensor, mask: Tensor | None, decoder_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the decoder over given encoder states."""
        self._check_positions(decoder_ids.shape[1])
        config, own = self.model.config, None
        if config.model_type == "bart":  # without a mask it makes one, and looks at its values
            own = causal_mask(config, torch.ones_like(decoder_ids), states.dtype)
        made = self.model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=own,
            use_cache=False,
        )
        return made.logits

    def _shift(self, target_ids: Tensor) -> Tensor:
        """Decoder inputs (B, T): the start token, then the targets without their last."""
        start = torch.full_like(target_ids[:, :1], self.specials.start)
        shifted = torch.cat([start, target_ids[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORE, self.pad_id)

    def _start_answers(self, prefix: Prefix, batch: Batch, depth: int) -> tuple[Tensor, Follow]:
        """Logits (B, V) of the first answer token, and a way to run answers behind the start.

        The encoder and the cross-attention's keys and values are computed once for all answers.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        self._check_positions(depth)
        states, mask = self._encode(prefix, batch)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def run(ids: Tensor) -> Tensor:
            """Logits (b, t, V) behind decoder inputs (b, t)."""
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

        start = torch.full_like(batch.input_ids[:, :1], self.specials.start)
        return run(start)[:, -1], follow

    # ---- decoder-only ---------------------------------------------------------------------------

    def _growing_cache(self, prefix: Prefix, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Cache of each row's prompt that takes up what follows, mask, and positions.

        As :meth:`_rows` gives them.
        """
        from prompt_lab.core.prompt_cache import growing_cache

        parts, mask, positions, places = self._rows(prefix, batch)
        return growing_cache(parts), mask, positions, places

    def _rows(self, prefix: Prefix, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Keys and values of each row's prompt, and mask and positions of its tokens.

        The list is empty for prompts of no tokens, which leave no keys. Mask (B, N + S) and the
        last, positions of keys (B, N + S), are of prompt and text; positions (B, S) of the text.
        """
        empty = len(prefix) == 1
        count = 0 if empty else prefix[0].shape[2]
        parts = [] if empty else [part.index_select(0, batch.prompt_index) for part in prefix]
        mask = F.pad(batch.input_mask, (count, 0), value=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return parts, mask, places[:, count:], places

    def _beyond_window(self, length: int) -> bool:
        """Whether rows of so many keys, padding included, reach beyond a layer's window.

        Raises:
            ValueError: they do, and the attention is one that would count padding.
        """
        if self.window is None or length <= self.window:
            return False
        if self._is_flash:
            raise ValueError(
                f"rows of {length} tokens reach beyond the window of {self.window} in layers of "
                f"backbone {self.name!r}, where flash_attention_2 would count padding: use "
                "model.backbone.attention sdpa"
            )
        return True

    @property
    def _is_flash(self) -> bool:
        """Whether attention is a package of fused kernels, which take no made masks."""
        return self.model.config._attn_implementation.startswith("flash")

    def _causal_mask(self, batch: Batch, mask: Tensor) -> Tensor | None:
        """Mask of attention of rows without a prompt, of whose mask (B, L) models see the values.

        BLOOM does not, and counts positions by it. Models with windows make a mask for each kind
        of layer.
        """
        config, lengths = self.model.config, batch.target_lengths
        if config.model_type == "bloom" or self.window is not None:
            return mask
        whole = min(batch.input_lengths, default=0) == batch.input_ids.shape[1]
        if whole and min(lengths, default=0) == max(lengths, default=0):
            return None
        return causal_mask(config, mask, self.model.dtype)

    def _follow(
        self, ids: Tensor, cache: Any, mask: Tensor | None, positions: Tensor, places: Tensor
    ) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L) behind a cache, which grows by them.

        The mask (B, K) says which of the keys are tokens, and ``places`` (B, K) their positions.
        """
        config, masks = self.model.config, mask
        self._beyond_window(places.shape[1])
        if mask is not None and self.window is not None and not self._is_flash:
            masks = position_masks(config, places, mask, positions, self.model.dtype)
        made = self.model.base_model(
            inputs_embeds=self.embed(ids),
            attention_mask=masks,
            cache=cache,
            use_cache=True,
            **({} if config.model_type == "bloom" else {"position_ids": positions}),
        )
        return made.last_hidden_state

    def _target_logits(self, prefix: Prefix, batch: Batch) -> Tensor:
        """Logits (M, V) at the M targets of rows ``[prompt] input target``, row by row."""
        from prompt_lab.core.prompt_cache import prompt_cache, row_cache

        batch = batch.padded_left()
        parts, mask, positions, places = self._rows(prefix, batch)
        # Without a prompt too the cache must stay as it is when a layer is recomputed.
        layers = self.model.config.num_hidden_layers
        cache = row_cache(parts) if parts else prompt_cache(layers)
        width = batch.input_ids.shape[1]
        rows = zip(batch.input_lengths, batch.target_lengths, strict=True)
        self._check_positions(mask.shape[1] - width + max(map(sum, rows)))  # padding takes none
        known = batch.target_ids[:, :-1]  # the last target is only predicted
        present = (known != IGNORE).long()
        ids = torch.cat([batch.input_ids, known.masked_fill(known == IGNORE, self.pad_id)], dim=1)
        mask = torch.cat([mask, present], dim=1)
        behind = positions[:, -1:] + present.cumsum(1)
        positions, places = (torch.cat([before, behind], dim=1) for before in (positions, places))
        ready = mask if parts else self._causal_mask(batch, mask)
        states = self._follow(ids, cache, ready, positions, places)  # (B, S + T - 1, D)
        length = states.shape[1]
        before = [
            row * length + width - 1 + at
            for row, count in enumerate(batch.target_lengths)
            for at in range(count)
        ]
        chosen = states.flatten(0, 1).index_select(0, index_tensor(before, states.device))
        return self.model.get_output_embeddings()(chosen)

    def _start_rows(self, prefix: Prefix, batch: Batch, depth: int) -> tuple[Tensor, Follow]:
        """Logits (B, V) of the first answer token, and a way to run answers behind the text.

        The text runs once behind its prompt's keys and values, for all answers.
        """
        batch = batch.padded_left()
        cache, mask, positions, places = self._growing_cache(prefix, batch)
        self._check_positions(mask.shape[1] + depth)
        head = self.model.get_output_embeddings()
        states = self._follow(batch.input_ids, cache, mask, positions, places)

        def follow(keep: Tensor | None, ids: Tensor) -> Tensor:
            """Logits (b, t, V) behind tokens (b, t) of the rows to keep; the cache forgets them."""
            nonlocal mask, places
            if keep is not None:
                mask, places = mask[keep], places[keep]
                cache.batch_select_indices(keep)
            ones = torch.ones_like(ids)
            following = places[:, -1:] + ones.cumsum(1)
            keys = torch.cat([mask, ones], 1), torch.cat([places, following], 1)
            behind = self._follow(ids, cache, keys[0], following, keys[1])
            cache.crop(-ids.shape[1])
            return head(behind)

        return head(states[:, -1]), follow

    def _check_prompts(self, prompts: Tensor) -> None:
        """Refuse what is not a bank of this model's width."""
        if prompts.dim() != 3 or prompts.shape[2] != self.hidden_size:
            raise ValueError(
                f"prompts have shape {tuple(prompts.shape)}; backbone {self.name!r} takes "
                f"(R, N, {self.hidden_size})"
            )

    def _check_positions(self, length: int) -> None:
        """Refuse rows that are longer than the model's positions."""
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"rows of {length} positions (prompt, input and answer) do not fit backbone "
                f"{self.name!r}, which has {self.max_positions}: lower max_input_length, "
                "num_virtual_tokens or max_new_tokens"
            )


def _before(ends: Sequence[int], ids: list[int]) -> list[int]:
    """The tokens of an answer before the first that ends it."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _target_places(batch: Batch) -> list[int]:
    """Places of the targets among the B * T places of ``target_ids``, row by row."""
    depth = batch.target_ids.shape[1]
    return [
        row * depth + at for row, count in enumerate(batch.target_lengths) for at in range(count)
    ]


def _at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
