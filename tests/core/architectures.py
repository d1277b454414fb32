"""Tiny random models of many architectures, from transformers' own configs.

Windows, where a type has them, see 8 positions, which the tests' rows exceed; one of two layers has
one where layers may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from conftest import BOS_ID, EOS_ID, HIDDEN, PAD_ID, POSITIONS, make_tokenizer
from torch import nn

from prompt_lab.core.backbone import Backbone

_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_HEADS = _LLAMA | {"head_dim": 8}
_WINDOW: dict[str, Any] = {"sliding_window": 8}
_MIXED = _WINDOW | {"layer_types": ["full_attention", "sliding_attention"]}
_SECOND = _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
_GPT: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_FALCON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
}
_T5: dict[str, Any] = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 2,
    "decoder_start_token_id": PAD_ID,
}
_BART: dict[str, Any] = {
    "d_model": HIDDEN,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": EOS_ID,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_LED = {key: value for key, value in _BART.items() if key != "max_position_embeddings"}

DECODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: hf.GPT2Config(**_GPT), "causal"),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**_LLAMA), "causal"),
    "gptj": (lambda: hf.GPTJConfig(**_GPT, rotary_dim=4), "causal"),
    "gpt_neo": (
        lambda: hf.GPTNeoConfig(
            hidden_size=HIDDEN,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
        ),
        "lengths",
    ),
    "opt": (
        lambda: hf.OPTConfig(**_LLAMA, ffn_dim=48, word_embed_proj_dim=HIDDEN),
        "causal",
    ),
    "bloom": (lambda: hf.BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=4), "rows"),
    "llama": (lambda: hf.LlamaConfig(**_LLAMA), "causal"),
    "mistral": (lambda: hf.MistralConfig(**_LLAMA, **_WINDOW), "window"),
    "mixtral": (lambda: hf.MixtralConfig(**_LLAMA, **_WINDOW, num_local_experts=3), "window"),
    "qwen2": (lambda: hf.Qwen2Config(**_LLAMA, **_SECOND), "kinds"),
    "qwen3": (lambda: hf.Qwen3Config(**_HEADS, **_SECOND), "kinds"),
    "gemma": (lambda: hf.GemmaConfig(**_HEADS), "causal"),
    "gemma2": (lambda: hf.Gemma2Config(**_HEADS, **_MIXED), "kinds"),
    "gemma3_text": (lambda: hf.Gemma3TextConfig(**_HEADS, **_MIXED), "kinds"),
    "phi": (lambda: hf.PhiConfig(**_LLAMA), "causal"),
    "phi3": (lambda: hf.Phi3Config(**_LLAMA, **_WINDOW, pad_token_id=PAD_ID), "window"),
    "olmo2": (lambda: hf.Olmo2Config(**_LLAMA), "causal"),
    "olmo3": (lambda: hf.Olmo3Config(**_LLAMA, **_MIXED), "kinds"),
    "stablelm": (lambda: hf.StableLmConfig(**_LLAMA), "causal"),
    "smollm3": (lambda: hf.SmolLM3Config(**_LLAMA, pad_token_id=PAD_ID), "causal"),
    "granite": (
        lambda: hf.GraniteConfig(**_LLAMA, logits_scaling=3.0, embedding_multiplier=2.0),
        "causal",
    ),
    "cohere": (lambda: hf.CohereConfig(**_LLAMA, logit_scale=0.2), "causal"),
    "cohere2": (lambda: hf.Cohere2Config(**_LLAMA, **_MIXED, logit_scale=0.2), "kinds"),
    "falcon": (lambda: hf.FalconConfig(**_FALCON), "causal"),
    "falcon alibi": (lambda: hf.FalconConfig(**_FALCON, alibi=True), "rows"),
    "starcoder2": (lambda: hf.Starcoder2Config(**_LLAMA, **_WINDOW), "window"),
    "exaone4": (lambda: hf.Exaone4Config(**_LLAMA, **_MIXED), "kinds"),
    "mpt": (
        lambda: hf.MptConfig(d_model=HIDDEN, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
        "lengths",
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3Config(
            **(_LLAMA | {"num_key_value_heads": 4}),
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
            **{"qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
        ),
        "causal",
    ),
}
"""Decoder-only types: a config, and the way that the self-check finds."""

ENCODER_DECODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (lambda: hf.T5Config(**_T5), "rows"),
    "mt5": (lambda: hf.MT5Config(**_T5, feed_forward_proj="gated-gelu"), "rows"),
    "umt5": (lambda: hf.UMT5Config(**_T5), "rows"),
    "bart": (lambda: hf.BartConfig(**_BART, scale_embedding=True), "rows"),
    "mbart": (lambda: hf.MBartConfig(**_BART), "rows"),
    "pegasus": (lambda: hf.PegasusConfig(**_BART), "rows"),
    "marian": (lambda: hf.MarianConfig(**_BART), "rows"),
    "m2m_100": (lambda: hf.M2M100Config(**_BART), "rows"),
    "blenderbot": (lambda: hf.BlenderbotConfig(**_BART), "rows"),
    "longt5": (lambda: hf.LongT5Config(**_T5, local_radius=7), "lengths"),
    "led": (
        lambda: hf.LEDConfig(
            **_LED,
            max_encoder_position_embeddings=POSITIONS,
            max_decoder_position_embeddings=POSITIONS,
            attention_window=8,
        ),
        "lengths",
    ),
}
"""Encoder-decoder types, likewise."""

NAMES = (*DECODERS, *ENCODER_DECODERS)


def make(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Backbone:
    """A random backbone of a type; matrices are normal with standard deviation 0.3.

    Args:
        name: one of ``NAMES``.
        dtype: of the weights.
        settings: put over those of the config.
    """
    seq2seq = name in ENCODER_DECODERS
    config = (ENCODER_DECODERS if seq2seq else DECODERS)[name][0]()
    tokenizer = make_tokenizer("t5" if seq2seq else "gpt2")
    ids = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    sizes = {"vocab_size": len(tokenizer)}
    if hasattr(config, "decoder_vocab_size"):
        sizes["decoder_vocab_size"] = len(tokenizer)
    for key, value in {**sizes, **ids, **settings}.items():
        setattr(config, key, value)
    maker: Any = hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = maker.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return Backbone(model.to(dtype), tokenizer, f"tiny {name}")
