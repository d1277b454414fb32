"""Every type of model against plain transformers: a row alone, its prompt in front of it.

The table of types is ``architectures.py``; ``tests/README.md`` names them for readers.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DECODERS, ENCODER_DECODERS, NAMES, make
from conftest import HIDDEN, make_data, make_method, make_tokenizer, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PromptTuningConfig, get_peft_model
from test_backbone import CANDIDATES, TARGETS, TEXTS, greedy, naive_logits, relative

from prompt_lab.core import self_check
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_product
from prompt_lab.core.batch import IGNORE
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


@pytest.mark.parametrize(
    "make_prefix",
    [Backbone.prefix_for, lambda model, bank, batch: model.prefix(bank)],
    ids=["one pass", "keys and values"],
)
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_scores_equal_plain_prepending(name, make_prefix):
    """Rows of unequal length, longer than the windows, three of them in one pack."""
    model = model_of(name)
    prompts = bank(model).requires_grad_()
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.row_losses(make_prefix(model, prompts, batch), batch)
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
    monkeypatch.setattr("prompt_lab.core.packing.PACK_TOKENS", 30)
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


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_those_of_peft(name):
    """One row, so that PEFT has nothing to pad."""
    model = model_of(name)
    kind = "SEQ_2_SEQ_LM" if model.is_encoder_decoder else "CAUSAL_LM"
    config = PromptTuningConfig(
        task_type=kind,
        num_virtual_tokens=5,
        num_transformer_submodules=1,
        token_dim=HIDDEN,
        num_attention_heads=4,
        num_layers=2,
    )
    peft: Any = get_peft_model(make(name).model, config).eval()
    prompts = bank(model)
    peft.prompt_encoder["default"].embedding.weight.data[:] = prompts[0]
    (ids,), (target,) = model.encode_inputs(TEXTS[:1]), model.encode_targets(TARGETS[:1])
    joined = ids if model.is_encoder_decoder else ids + target
    labels = target if model.is_encoder_decoder else [IGNORE] * len(ids) + target
    with torch.no_grad():
        theirs = peft(
            input_ids=torch.tensor([joined]),
            attention_mask=torch.ones(1, len(joined), dtype=torch.long),
            labels=torch.tensor([labels]),
        ).loss
        ours = model.loss(prompts, model.batch(TEXTS[:1], TARGETS[:1]))
    assert ours.item() == pytest.approx(theirs.item(), abs=2e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mpt", "pegasus"])
def test_a_fit_resumes_to_the_bit(name, fewshot_root, tmp_path):
    """A bank of two runs, interrupted between a step and its evaluation; and a test of it."""
    model = model_of(name)

    def fit(folder, **given):
        method = make_method(model, learning_rate=[0.1, 0.03], batch_size=4)
        saved = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=4, save_top_k=-1)
        made = make_trainer(folder, 6, 2, callbacks=[saved], enable_checkpointing=True)
        data = make_data(fewshot_root, ["glue-sst2"], [13])
        made.fit(method, datamodule=data, **given)
        made.test(method, datamodule=data, verbose=False)
        return (folder / "predictions.jsonl").read_bytes(), method.bank().detach()

    whole = fit(tmp_path / "whole")
    saved = next(iter((tmp_path / "ckpt").glob("step=4*.ckpt")))
    resumed = fit(tmp_path / "resumed", ckpt_path=saved, weights_only=True)
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])


def test_the_readme_names_every_type():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\S.*?) +\| `(\w+)` +\|", text, re.MULTILINE))
    assert table == {name: way for name, (_, way) in {**DECODERS, **ENCODER_DECODERS}.items()}


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


@pytest.mark.parametrize(
    ("kinds", "run"), [("ssfssf", {0, 1, 2, 3}), ("fffffs", {*range(6)}), ("ffffff", {0, 1})]
)
def test_the_self_check_runs_the_first_layers_of_each_kind(monkeypatch, kinds, run):
    """And one behind them; the model has all of its layers again."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    made = make("gemma3_text", num_hidden_layers=6, layer_types=[names[kind] for kind in kinds])
    layers, ran = list(made.model.model.layers), set()
    for at, layer in enumerate(layers):
        layer.register_forward_hook(lambda *given, at=at: ran.add(at))
    monkeypatch.setattr(self_check, "_known", {})
    self_check.choose_way(made)
    assert (made.runner.way, ran) == ("kinds", run)
    assert list(made.model.model.layers) == layers


def test_a_model_that_does_not_run_without_its_last_layers_is_checked_whole(monkeypatch):
    monkeypatch.setattr(self_check, "_known", {})
    made = make("llama", num_hidden_layers=3)
    inner = made.model.model
    forward = inner.forward
    monkeypatch.setattr(inner, "forward", lambda **given: inner.layers[2] and forward(**given))
    monkeypatch.setattr(self_check, "_known", {})
    self_check.choose_way(made)
    assert made.runner.way == "causal"


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
