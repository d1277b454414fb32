"""What the benchmarks run: random models of given sizes, random rows, and PEFT on the same weights.

All is made in the process and seeded, without files from outside. Weights are as transformers
initialises them for a configuration, prompts are rows of the embedding table. The time of a step
does not depend on what a model has learned; that of generation does (see ``answers.py``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from conftest import make_tokenizer

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE, Batch, make_batch

Row = tuple[list[int], list[int]]
VOCABULARY = {"gpt2": 50257, "bloom": 100_000, "llama": 32_000, "qwen2": 32_000, "t5": 32128}
_FIRST_ID = 10  # ids below may be special


@dataclass(frozen=True)
class Size:
    """Layers (of the encoder and again of the decoder, for T5), width, heads, and vocabulary."""

    layers: int
    width: int
    heads: int
    vocabulary: int | None = None  # None: as published for the kind
    feed_forward: int | None = None  # None: four times the width


TINY = Size(2, 64, 4, 256)
DECODER = {"quick": TINY, "cpu": Size(6, 512, 8), "cuda": Size(24, 1024, 16)}  # gpt2-medium
T5 = {"quick": TINY, "cpu": Size(8, 512, 8), "cuda": Size(12, 768, 12)}  # t5-base


def make_config(kind: str, size: Size) -> Any:
    """The configuration of an architecture; Llama and Qwen2 have a quarter as many KV heads."""
    import transformers as hf

    vocabulary, width = size.vocabulary or VOCABULARY[kind], size.width
    inner = size.feed_forward or 4 * width
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": size.layers}
    llama |= {"num_attention_heads": size.heads, "num_key_value_heads": size.heads // 4}
    if kind == "gpt2":
        return hf.GPT2Config(n_embd=width, n_layer=size.layers, n_head=size.heads, **common)
    if kind == "bloom":
        return hf.BloomConfig(hidden_size=width, n_layer=size.layers, n_head=size.heads, **common)
    if kind == "t5":
        t5 = {"d_model": width, "d_ff": inner, "num_layers": size.layers, "num_heads": size.heads}
        t5 |= {"d_kv": width // size.heads, "decoder_start_token_id": 0}
        return hf.T5Config(**t5, **common)
    return (hf.LlamaConfig if kind == "llama" else hf.Qwen2Config)(**llama, **common)


def make_model(
    kind: str, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A random model in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    maker = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return maker.from_config(make_config(kind, size), dtype=dtype).to(device).eval()


def make_backbone(model: Any) -> Backbone:
    """Our side of a model; the tokenizer is small and only used where candidates are texts."""
    kind = model.config.model_type
    return Backbone(model, make_tokenizer(kind), f"random-{kind}")


def make_prompts(backbone: Backbone, runs: int, count: int, seed: int = 1) -> Tensor:
    """A bank (R, N, D), float32: rows of the embedding table."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(_FIRST_ID, vocabulary, (runs, count), generator=generator)
    return backbone.embed(ids.to(backbone.device)).detach().float().clone()


def make_rows(backbone: Backbone, lengths: list[int], seed: int = 2) -> list[Row]:
    """Rows of random ids: inputs of the given lengths, targets of 2 to 4 tokens."""
    rng = np.random.default_rng(seed)
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]

    def draw(count: int) -> list[int]:
        return rng.integers(_FIRST_ID, vocabulary, count).tolist()

    return [(draw(length), draw(int(rng.integers(2, 5)))) for length in lengths]


def uniform_lengths(count: int, low: int, high: int, seed: int = 3) -> list[int]:
    """``count`` lengths from ``low`` to ``high``, one of which is ``high``."""
    drawn = np.random.default_rng(seed).integers(low, high + 1, count - 1)
    return [*drawn.tolist(), high]


def task_lengths(count: int, median: float = 35, seed: int = 4, low: int = 10, high: int = 128):
    """``count`` lengths as few-shot tasks have them: log-normal, clipped."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(median), 0.6, count)).round()
    return drawn.clip(low, high).astype(int).tolist()


def our_batch(backbone: Backbone, groups: list[list[Row]]) -> Batch:
    """The rows of R prompts as one batch, each row weighted by its share of its prompt's tokens.

    So the loss of a prompt is the mean over tokens, as PEFT's is.
    """
    rows = [row for group in groups for row in group]
    tokens = [sum(len(target) for _, target in group) for group in groups]
    prompts = [r for r, group in enumerate(groups) for _ in group]
    return make_batch(
        [inputs for inputs, _ in rows],
        [target for _, target in rows],
        prompts,
        pad_id=backbone.pad_id,
        left_padded=not backbone.is_encoder_decoder,
        weight=[len(target) / tokens[r] for (_, target), r in zip(rows, prompts, strict=True)],
    ).to(backbone.device)


def peft_inputs(backbone: Backbone, rows: list[Row]) -> dict[str, Tensor]:
    """The rows as PEFT's users pad them for training: on the right."""
    if backbone.is_encoder_decoder:
        ids, labels = [inputs for inputs, _ in rows], [target for _, target in rows]
    else:
        ids = [inputs + target for inputs, target in rows]
        labels = [[IGNORE] * len(inputs) + target for inputs, target in rows]
    padded = {
        "input_ids": pad(ids, backbone.pad_id),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "labels": pad(labels, IGNORE),
    }
    return {name: value.to(backbone.device) for name, value in padded.items()}


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Lists of ids as one (B, longest) tensor."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor(
        [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]
    )


def peft_model(backbone: Backbone, prompt: Tensor) -> tuple[Any, Tensor]:
    """The same weights under PEFT with a prompt (N, D), and PEFT's parameter that holds it.

    PEFT's default for encoder-decoder models is a parameter of 2 N rows; the first N are used.
    """
    from peft import PromptTuningConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if backbone.is_encoder_decoder else "CAUSAL_LM"
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=len(prompt))
    model = get_peft_model(backbone.model, config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.dtype == torch.float32
    weight.data[: len(prompt)] = prompt
    return model, weight
