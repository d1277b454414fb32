"""The one frozen language model: loss, label scores and generation under a bank of prompts.

A prompt is prepended to the input embeddings: of the encoder for encoder-decoder models (T5, BART),
of the decoder for decoder-only models (Llama, Qwen, Gemma, GPT-2 and the like). How either kind
runs is in ``encoder_decoder.py`` and ``decoder.py``; which way is exact for a model is found at
loading (``self_check.py``).

The backbone is frozen: evaluation mode, no gradients for its weights, no dropout. It does not
train, choose prompts or read data; the fine-tuning baseline alone asks it to :meth:`unfreeze`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prompt_lab.core import packing
from prompt_lab.core.batch import IGNORE, Batch, index_tensor, make_batch, micro_batches
from prompt_lab.core.candidates import (
    Follow,
    LabelScore,
    candidate_scores,
    check_label_score,
)
from prompt_lab.core.decoder import Decoder
from prompt_lab.core.encoder_decoder import EncoderDecoder
from prompt_lab.core.forward import compile_training, recompute_layers
from prompt_lab.core.pretrained import (
    DTYPES,
    load_pretrained,
    refuse_not_finite,
    refuse_unsupported,
    weights_digest,
)
from prompt_lab.core.self_check import choose_way
from prompt_lab.core.text import ChatFrame, Frame, Side, check_template, find_specials
from prompt_lab.sandbox import SANDBOX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prefix = tuple[Tensor, ...]
"""What :meth:`Backbone.prefix` returns."""


class Backbone(nn.Module):
    """A frozen Hugging Face model that runs rows of text under prompts of a bank.

    Args:
        model: an encoder-decoder or decoder-only language model of transformers; it is frozen and
            put in evaluation mode.
        tokenizer: its tokenizer.
        name: hub id or folder, for messages and prompt files.

    Raises:
        ValueError: a kind of model that cannot work, T5 in float16, special tokens that the model's
            files do not agree on (``text.find_specials``), or results that differ from those of
            plain prepending (``self_check.py``).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model"
    ) -> None:
        super().__init__()
        refuse_unsupported(model.config, model.dtype, name)
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer: Any = tokenizer
        self.specials = find_specials(model, tokenizer, name)
        self.name = name
        self.is_encoder_decoder: bool = model.config.is_encoder_decoder
        self.model.generation_config = self._plain_generation()
        self.vocabulary, self.hidden_size = self.model.get_input_embeddings().weight.shape
        config = model.config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.pad_id = self.specials.pad
        self._candidates: dict[tuple[Any, ...], Tensor] = {}
        plain = Frame(tokenizer, self.specials, self.is_encoder_decoder, name)
        self._frames: dict[tuple[str, str | None], Frame] = {("plain", None): plain}
        self.runner: Decoder | EncoderDecoder = Decoder(self.model)
        if self.is_encoder_decoder:
            self.runner = EncoderDecoder(self.model, self.specials.start, self.pad_id)
        choose_way(self)

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
            attention: attention implementation of transformers; eager, which is told, where a
                model has no sdpa.

        Raises:
            ValueError: as :class:`Backbone`; or no such model, damaged or missing files or weights,
                or a folder without tokenizer.
        """
        model, tokenizer = load_pretrained(name, dtype, attention)
        digest = weights_digest(model)  # of the weights as published, before the cast
        for weight in model.parameters():
            # Files are mapped at any address; matrix products repeat bit for bit on aligned memory.
            weight.data = weight.data.to(DTYPES[dtype], copy=True)
        refuse_not_finite(model.to(DTYPES[dtype]), name)
        backbone = cls(model, tokenizer, name)
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

    @property
    def packs(self) -> bool:
        """Whether rows of one prompt share a sequence, so that none is padded to another."""
        return self.runner.packs and self.runner.way not in ("rows", "lengths")

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

    def front(self, frame: Frame | None = None) -> tuple[int, ...]:
        """Tokens in front of every input, such as a chat's head, that can run once per prompt.

        Batches made with them (``make_batch``) need a :meth:`prefix` made with them. There are none
        where rows share no sequence.
        """
        return tuple((frame or self.frame()).front) if self.packs else ()

    def micro_batches(
        self, batch: Batch, tokens_per_forward: int, num_virtual_tokens: int
    ) -> list[Batch]:
        """Cut a batch into slices of at most so many tokens in a forward pass, padding counted.

        Encoder-decoder models run the N virtual tokens of each row with it.

        Raises:
            ValueError: ``tokens_per_forward`` is not positive.
        """
        if self.packs:
            return packing.cut(batch, tokens_per_forward)
        extra = num_virtual_tokens if self.is_encoder_decoder else 0
        return micro_batches(batch, tokens_per_forward, extra)

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
        return self.embed(torch.arange(self.vocabulary, device=self.device)).float().cpu()

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
        return self.row_losses(self.prefix_for(prompts, batch), batch, label_smoothing)

    def prefix_for(self, prompts: Tensor, batch: Batch) -> Prefix:
        """What one pass over rows needs of their prompts (R, N, D), with gradient.

        Where the rows of each prompt are one pack this is the bank itself, in the weights' dtype:
        prompts and rows run together, so that weights are read once. Else it is :meth:`prefix`.
        """
        if not self.packs or not packing.is_one_each(batch):
            return self.prefix(prompts, batch.front)
        self._check_prompts(prompts)
        return (self._with_front(prompts, batch.front),)

    def prefix(self, prompts: Tensor, front: Sequence[int] = ()) -> Prefix:
        """What rows need of their prompts, computed once per prompt and with gradient.

        The bank (R, N, D) itself for encoder-decoder models; for decoder-only models the keys and
        values of all layers, alternating, each (R, heads, N, head size). All are in the weights'
        dtype. Differentiating a loss with respect to these and pulling the result back through
        them gives the prompts' gradient; so micro-batches share one pass over the prompts, and
        all batches of an evaluation do: ``score`` and ``generate`` take it in place of a bank.

        Args:
            prompts: (R, N, D) bank.
            front: of the batches, ``batch.front``; these tokens are run with the prompts.

        Raises:
            ValueError: a bank of another width, or prompts longer than the model's positions.
        """
        self._check_prompts(prompts)
        self._check_positions(prompts.shape[1] + len(front))
        return self.runner.prefix(self._with_front(prompts, front))

    def _with_front(self, prompts: Tensor, front: Sequence[int]) -> Tensor:
        """Prompts and the tokens behind them, (R, N + F, D) in the weights' dtype."""
        prompts = prompts.to(self.model.dtype)
        if not front:
            return prompts
        tokens = self.embed(index_tensor(front, prompts.device))
        return torch.cat([prompts, tokens.expand(len(prompts), -1, -1)], 1)

    def row_losses(self, prefix: Prefix, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """As :meth:`loss`, given what :meth:`prefix` returned: (B,)."""
        self._check_positions(self._longest(prefix, batch, batch.target_lengths))
        groups = self.runner.groups(batch)
        if groups is None:
            return self._row_losses(prefix, batch, label_smoothing)
        parts = [self._row_losses(prefix, batch.take(rows), label_smoothing) for rows in groups]
        return torch.cat(parts).index_select(0, _back_in_order(groups, self.device))

    def _row_losses(self, prefix: Prefix, batch: Batch, label_smoothing: float) -> Tensor:
        logits = self.runner.target_logits(prefix, batch)
        at, targets = None, batch.target_ids.flatten()
        if not self.is_encoder_decoder:  # logits of targets alone
            at = index_tensor(_target_places(batch), batch.target_ids.device)
            targets = targets.index_select(0, at)
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
        answers = self._encode_candidates(tuple(candidates), frame)
        check_label_score(label_score)
        mean = label_score == "mean"
        return self.scores_of(self._as_prefix(prompts, batch), batch, answers, mean=mean)

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
        answers = self._encode_candidates(tuple(candidates), frame)
        check_label_score(label_score)
        mean = label_score == "mean"
        scores = self.scores_of(self._as_prefix(prompts, batch), batch, answers, False, mean)
        return scores.argmax(1).tolist()

    def scores_of(
        self,
        prefix: Prefix,
        batch: Batch,
        answers: Tensor,
        exhaustive: bool = True,
        mean: bool = False,
    ) -> Tensor:
        """As :meth:`score`, of C answers as token ids (C, T), padded behind with ``IGNORE``.

        Args:
            prefix: what :meth:`prefix` returned.
            batch: rows; their targets are not looked at.
            answers: the candidates.
            exhaustive: false for upper bounds whose largest is exact.
            mean: divide by the answers' tokens.
        """
        answers = answers.to(batch.input_ids.device)
        depth = answers.shape[1]
        self._check_positions(self._longest(prefix, batch, [depth] * len(batch)), depth)
        batch = replace(batch, target_ids=batch.target_ids[:, :0], target_lengths=[0] * len(batch))
        groups = self.runner.groups(batch)
        if groups is None:
            return self._scores_of(prefix, batch, answers, exhaustive, mean)
        parts = [
            self._scores_of(prefix, batch.take(at), answers, exhaustive, mean) for at in groups
        ]
        return torch.cat(parts).index_select(0, _back_in_order(groups, self.device))

    def _scores_of(
        self, prefix: Prefix, batch: Batch, answers: Tensor, exhaustive: bool, mean: bool
    ) -> Tensor:
        first, follow = self._start(prefix, batch)
        at_once = packing.PACK_TOKENS if self.packs else 0
        how = {"exhaustive": exhaustive, "mean": mean, "at_once": at_once}
        return candidate_scores(first, answers, follow, self.pad_id, **how)

    def _start(self, prefix: Prefix, batch: Batch) -> tuple[Tensor, Follow]:
        return self.runner.start(prefix, batch)

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
        prefix, ends = self._as_prefix(prompts, batch), (frame or self.frame()).ends
        answers = self.generate_ids(prefix, batch, max_new_tokens, num_beams, ends)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def generate_ids(
        self,
        prefix: Prefix,
        batch: Batch,
        max_new_tokens: int,
        num_beams: int,
        ends: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """As :meth:`generate`: the ids of each answer before one of its ends."""
        if len(batch) == 0:
            return []
        ends = list(self.specials.ends if ends is None else ends)
        batch = batch.slice(0, len(batch))  # padding that none needs would count in windows
        longest = self._longest(prefix, batch, [max_new_tokens] * len(batch))
        self._check_positions(longest, max_new_tokens)
        groups = self.runner.groups(batch, longest)
        settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        settings["eos_token_id"] = ends
        made: list[list[int]] = [[]] * len(batch)
        for rows in groups or [list(range(len(batch)))]:
            part = batch if groups is None else batch.take(rows)
            for row, ids in zip(rows, self._generate(prefix, part, settings), strict=True):
                last = (at for at, token in enumerate(ids) if token in ends)
                made[row] = ids[: next(last, len(ids))]
        return made

    def _generate(self, prefix: Prefix, batch: Batch, settings: dict[str, Any]) -> list[list[int]]:
        return self.runner.generate(prefix, batch, settings).tolist()

    def _encode_candidates(self, candidates: tuple[str, ...], frame: Frame | None = None) -> Tensor:
        """Token ids (C, T) of answers, padded on the right with ``IGNORE``; kept for next time."""
        if not candidates:
            raise ValueError("score needs at least one candidate answer")
        if (candidates, frame) not in self._candidates:
            encoded = self.encode_targets(candidates, frame)
            depth = max(map(len, encoded))
            rows = [[*ids, *[IGNORE] * (depth - len(ids))] for ids in encoded]
            self._candidates[candidates, frame] = torch.tensor(rows)
        return self._candidates[candidates, frame]

    def _as_prefix(self, prompts: Tensor | Prefix, batch: Batch) -> Prefix:
        """The prefix of a bank, or the prefix that was given."""
        return self.prefix(prompts, batch.front) if isinstance(prompts, Tensor) else prompts

    def _check_prompts(self, prompts: Tensor) -> None:
        """Refuse what is not a bank of this model's width."""
        if prompts.dim() != 3 or prompts.shape[2] != self.hidden_size:
            raise ValueError(
                f"prompts have shape {tuple(prompts.shape)}; backbone {self.name!r} takes "
                f"(R, N, {self.hidden_size})"
            )

    def _longest(self, prefix: Prefix, batch: Batch, answers: Sequence[int]) -> int:
        """Positions of the longest row, its prompt included; in the encoder, without the answer."""
        if self.is_encoder_decoder:
            answers = [0] * len(batch)
        pairs = zip(batch.input_lengths, answers, strict=True)
        return self._virtual_tokens(prefix) + max((sum(pair) for pair in pairs), default=0)

    def _virtual_tokens(self, prefix: Prefix) -> int:
        """N of what :meth:`prefix` returned."""
        if self.is_encoder_decoder:
            return prefix[0].shape[1]
        return prefix[0].shape[-2]

    def _check_positions(self, *lengths: int) -> None:
        """Refuse rows that are longer than the model's positions."""
        if self.max_positions is not None and max(lengths) > self.max_positions:
            raise ValueError(
                f"rows of {max(lengths)} positions (prompt, input and answer) do not fit backbone "
                f"{self.name!r}, which has {self.max_positions}: lower max_input_length, "
                "num_virtual_tokens or max_new_tokens"
            )


def _back_in_order(groups: list[list[int]], device: torch.device) -> Tensor:
    """Where each row (B,) of a batch stands among the rows of groups, one behind the other."""
    place = {row: at for at, row in enumerate(row for rows in groups for row in rows)}
    return index_tensor([place[row] for row in range(len(place))], device)


def _target_places(batch: Batch) -> list[int]:
    """Places of the targets among the B * T places of ``target_ids``, row by row."""
    depth = batch.target_ids.shape[1]
    return [
        row * depth + at for row, count in enumerate(batch.target_lengths) for at in range(count)
    ]


def _at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
