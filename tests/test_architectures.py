"""Every type of model against plain transformers: a row alone, its prompt in front of it.

The table of types is ``architectures.py``; ``tests/README.md`` names them for readers.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import DECODERS, ENCODER_DECODERS, NAMES, make
from conftest import make_tokenizer
from test_backbone import CANDIDATES, TARGETS, TEXTS, greedy, naive_logits, relative

from prompt_lab.core import self_check
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_product
from prompt_lab.core.decoder import Decoder

INDEX = [0, 1, 0, 0]
WIDER = {"longt5": 3, "t5": 3, "mt5": 3, "umt5": 3}  # unscaled attention rounds more


@cache
def model_of(name: str) -> Backbone:
    return make(name)


def bank(model: Backbone, count: int = 5) -> torch.Tensor:
    """Two random prompts of the embeddings' scale."""
    draw = torch.Generator().manual_seed(3)
    return 0.5 * torch.randn(2, count, model.hidden_size, generator=draw)


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_finds_the_fastest_exact_way(name):
    known = {**DECODERS, **ENCODER_DECODERS}
    assert model_of(name).runner.way == known[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_scores_equal_plain_prepending(name):
    """Rows of unequal length, longer than the windows, three of them in one pack."""
    model = model_of(name)
    prompts = bank(model).requires_grad_()
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.loss(prompts, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), prompts)
    inputs, targets = model.encode_inputs(TEXTS), model.encode_targets(TARGETS)
    rows = []
    for i in batch.rows:
        logits = naive_logits(model, prompts[INDEX[i]], inputs[i], targets[i]).log_softmax(-1)
        rows.append(-logits[range(len(targets[i])), targets[i]].mean())
    expected = torch.stack(rows)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prompts)
    assert (losses - expected).abs().max() <= 1e-5
    assert relative(gradient, expected_gradient) <= 1e-5 * WIDER.get(name, 1)
    scores = model.score(prompts, batch, CANDIDATES)
    answers = model.encode_targets(CANDIDATES)
    with torch.no_grad():
        for row, i in enumerate(batch.rows):
            for column, ids in enumerate(answers):
                logits = naive_logits(model, prompts[INDEX[i]], inputs[i], ids).log_softmax(-1)
                assert scores[row, column].item() == pytest.approx(
                    logits[range(len(ids)), ids].sum().item(), abs=1e-4
                )
    assert model.choose(prompts, batch, CANDIDATES) == scores.argmax(1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_equal_a_greedy_loop(name):
    model = model_of(name)
    prompts = bank(model)
    batch = model.batch(TEXTS, None, INDEX)
    end = model.specials.end
    expected = [greedy(model, prompts[INDEX[i]], TEXTS[i], 6, end) for i in batch.rows]
    assert model.generate(prompts, batch, 6) == expected


@pytest.mark.parametrize("name", DECODERS)
def test_packs_of_many_rows_equal_rows_alone(name, monkeypatch):
    """Packs cut at a bound, several prompts, twenty rows; and Hessian products."""
    model = model_of(name)
    monkeypatch.setattr("prompt_lab.core.decoder.PACK_TOKENS", 30)
    prompts = bank(model)
    index = [i % 2 for i in range(12)]
    texts = [TEXTS[i % 4] + " dog" * (i % 3) for i in range(12)]
    targets = [TARGETS[i % 3] for i in range(12)]
    batch = model.batch(texts, targets, index)
    losses = model.loss(prompts, batch)
    alone = [model.loss(prompts, batch.slice(at, at + 1)) for at in range(12)]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-5, atol=1e-5)
    if model.model.config._attn_implementation == "sdpa":
        vector = bank(model, 5).flip(0)
        whole = bank_product(model, prompts, vector, batch, 10_000)
        parts = bank_product(model, prompts, vector, batch, 1)
        assert relative(whole, parts) <= 1e-4


def test_a_state_in_place_of_keys_and_values_is_refused():
    from transformers import AutoModelForCausalLM, MambaConfig

    tokenizer = make_tokenizer("gpt2")
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="'mamba', which carries a state in place of keys and val"):
        Backbone(AutoModelForCausalLM.from_config(config), tokenizer, "tiny")


def test_a_model_that_sees_what_comes_after_is_refused():
    from transformers import AutoModelForCausalLM, BertConfig

    tokenizer = make_tokenizer("gpt2")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    with pytest.raises(ValueError, match=r"\(bert\) predicts a token from those that come after"):
        Backbone(AutoModelForCausalLM.from_config(config), tokenizer, "tiny")


def test_a_model_that_passes_in_no_way_is_refused_with_the_differences(monkeypatch):
    monkeypatch.setattr(self_check, "_known", {})
    known = Decoder.target_logits
    monkeypatch.setattr(Decoder, "target_logits", lambda *given: 1.1 * known(*given))
    said = r"\(llama\) gives other results .*causal: losses \[.*\] instead of \[.*lengths: losses"
    with pytest.raises(ValueError, match=said):
        make("llama")


def test_the_self_check_leaves_the_model_and_the_random_numbers(monkeypatch):
    monkeypatch.setattr(self_check, "_known", {})
    torch.manual_seed(0)
    expected = torch.rand(3)
    made = make("mistral")
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    torch.manual_seed(0)
    monkeypatch.setattr(self_check, "_known", {})
    self_check.choose_way(made)
    assert torch.equal(torch.rand(3), expected)
    assert made.model.config.sliding_window == 8
    assert all(torch.equal(weight, before[name]) for name, weight in made.model.named_parameters())
    assert all(weight.grad is None for weight in made.model.parameters())


def test_windows_wider_than_the_rows_of_the_check_are_found_all_the_same(monkeypatch):
    """A window of 32, which no row of the check reaches, still is in the mask."""
    monkeypatch.setattr(self_check, "_known", {})
    model = make("mistral", sliding_window=32)
    assert model.runner.way == "window"
    assert model.model.config.sliding_window == 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "bart"])
def test_the_self_check_passes_in_other_precisions(name, dtype):
    known = {**DECODERS, **ENCODER_DECODERS}
    assert make(name, dtype).runner.way == known[name][1]
