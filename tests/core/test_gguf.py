"""A GGUF file is a backbone: its weights and tokens are those of the model it was written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import BOS, EOS, PAD, UNK, make_backbone, make_model, make_tokenizer

from prompt_lab.core import pretrained
from prompt_lab.core.backbone import Backbone

TEXTS = ["the small red house", "a dog and a cat"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
WEIGHTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, kind: str = "llama", packed: bool = False) -> Path:
    """The tiny Llama as llama.cpp keeps it, ``packed`` with matrices in blocks of eight bits."""
    model, rules = make_model("llama"), make_tokenizer("llama").backend_tokenizer.to_str()
    config, bpe = model.config, json.loads(rules)["model"]
    file = gguf.GGUFWriter(path, kind)
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    words = sorted(bpe["vocab"], key=bpe["vocab"].get)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(words)
    file.add_token_types([3 if word in (PAD, BOS, EOS, UNK) else 1 for word in words])
    file.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(3)
    file.add_add_bos_token(True)
    file.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        found = weight.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            few = "k_proj" in name
            found = halves(found, config.num_key_value_heads if few else config.num_attention_heads)
        own = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"} | {
            "lm_head": "output"
        }
        stem = name.removesuffix(".weight")
        if stem not in own:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            own[stem] = f"blk.{layer}.{WEIGHTS[part]}"
        kept = {}
        if packed and found.ndim == 2 and found.shape[1] % 32 == 0:
            kept = {"raw_dtype": gguf.GGMLQuantizationType.Q8_0}
            found = gguf.quantize(found, gguf.GGMLQuantizationType.Q8_0)
        file.add_tensor(f"{own[stem]}.weight", np.ascontiguousarray(found), **kept)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_file_gives_the_model_it_was_written_from(tmp_path: Path) -> None:
    """References: the model itself, its digest, and its tokenizer."""
    found, own = Backbone.load(str(write(tmp_path / "tiny.gguf"))), make_backbone("llama")
    for (name, weight), (other, expected) in zip(
        found.model.named_parameters(), own.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, expected)
    assert found.digest == own.digest
    assert found.specials == own.specials
    assert found.encode_inputs(TEXTS) == own.encode_inputs(TEXTS)
    prompt = torch.randn(1, 4, own.hidden_size, generator=torch.Generator().manual_seed(0))
    answers = [model.generate(prompt, model.batch(TEXTS), 6) for model in (found, own)]
    assert answers[0] == answers[1]
    chat = found.frame("chat")
    expected = "user: the small red house</s>assistant: "
    (ids,) = found.encode_inputs(TEXTS[:1], chat)
    assert found.tokenizer.decode(ids) + " " == expected  # the space begins the answer


def test_blocks_of_eight_bits_are_unpacked(tmp_path: Path) -> None:
    """Reference: the reader of the package gguf, for the embeddings."""
    path = write(tmp_path / "tiny.gguf", packed=True)
    found, own = Backbone.load(str(path), "bfloat16"), make_backbone("llama")
    stored = next(one for one in gguf.GGUFReader(path).tensors if one.name == "token_embd.weight")
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    weight: Any = found.model.get_input_embeddings().weight
    assert torch.equal(weight, expected.bfloat16())
    assert 0 < (weight - own.model.get_input_embeddings().weight).abs().max() < 0.02
    loss = found.loss(torch.zeros(1, 2, found.hidden_size), found.batch(TEXTS, ["yes", "no"]))
    assert loss.isfinite().all()


def test_what_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown, junk = write(tmp_path / "odd.gguf", "mystery"), tmp_path / "junk.gguf"
    junk.write_bytes(b"not one" * 99)
    for path, reason in (
        (unknown, "transformers cannot read .*architecture mystery is not supported yet"),
        (junk, "does not start with the GGUF magic bytes"),
        (tmp_path / "none.gguf", "there is no such file in its folder"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            Backbone.load(str(path))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"which the packages gguf and accelerate read: install"):
        Backbone.load(str(unknown))
