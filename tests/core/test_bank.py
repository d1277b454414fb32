"""A bank's step: its gradient in micro-batches, and a bank of runs against single runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import HIDDEN, make_backbone, make_tokenizer
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes, bank_gradient, with_gradient
from prompt_lab.core.batch import Batch, make_batch
from prompt_lab.core.forward import PlainAttention
from prompt_lab.core.optim import OptimConfig

Factory = Callable[..., Backbone]

TEXTS = [
    "the small dog",
    "a cat ran over the red field and no sea",
    "no",
    "she likes long books",
    "the red house stands",
    "yes",
]
TARGETS = ["yes", "no way", "maybe positive yes", "no", "acceptable", "a dog"]
INDEX = [0, 4, 1, 4, 1, 0]  # prompts 2, 3 and 5 have no rows
WEIGHT = [0.5, 0.25, 1.0, 0.25, 0.125, 2.0]
RUNS, COUNT = 6, 4


def bank(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (0.5 * torch.randn(RUNS, COUNT, HIDDEN, generator=generator)).to(dtype).requires_grad_()


def weighted_batch(model: Backbone, rows: list[int] | None = None) -> Batch:
    """The rows above, or some of them, with their weights."""
    rows = list(range(len(TEXTS))) if rows is None else rows
    return make_batch(
        model.encode_inputs([TEXTS[i] for i in rows]),
        model.encode_targets([TARGETS[i] for i in rows]),
        [INDEX[i] for i in rows],
        pad_id=model.pad_id,
        left_padded=not model.is_encoder_decoder,
        weight=[WEIGHT[i] for i in rows],
        rows=rows,
    )


def naive(model: Backbone, prompts: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Losses (R,) and gradient by autograd of the weighted sum over rows that are run alone."""
    losses = torch.zeros(RUNS, dtype=prompts.dtype)
    for row, (index, weight) in enumerate(zip(INDEX, WEIGHT, strict=True)):
        loss = model.loss(prompts, weighted_batch(model, [row]), smoothing)
        losses = losses.index_add(0, torch.tensor([index]), weight * loss)
    (gradient,) = torch.autograd.grad(losses.sum(), prompts)
    return losses.detach(), gradient


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    assert found.dtype == expected.dtype
    assert ((found - expected).norm() / expected.norm()).item() <= limit


@pytest.mark.parametrize("tokens", [1, 9, 30, 10**6])
@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "bloom", "llama"])
def test_the_gradient_of_a_bank_equals_autograd_of_the_plain_sum(
    backbone: Factory, kind: str, tokens: int
) -> None:
    """From one row a pass to all rows in one; prompts of a bank that fit no single pass, too."""
    model, prompts = backbone(kind), bank()
    losses, gradient = bank_gradient(model, prompts, weighted_batch(model), tokens)
    expected_losses, expected_gradient = naive(model, prompts)
    assert_close(losses, expected_losses, 1e-5)
    assert_close(gradient, expected_gradient, 3e-5 if kind == "t5" else 1e-5)
    idle = [2, 3, 5]
    assert losses[idle].tolist() == [0, 0, 0]
    assert gradient[idle].abs().max() == 0
    assert not losses.requires_grad
    assert not gradient.requires_grad


@pytest.mark.parametrize("tokens", [20, 10**6])
@pytest.mark.parametrize(("kind", "limit"), [("t5", 1e-12), ("gpt2", 1e-12), ("llama", 1e-6)])
def test_a_bank_in_float64_is_float64_from_end_to_end(
    backbone: Factory, kind: str, limit: float, tokens: int
) -> None:
    """Llama's norms are float32 within transformers."""
    model, prompts = backbone(kind, torch.float64), bank(torch.float64)
    losses, gradient = bank_gradient(model, prompts, weighted_batch(model), tokens, 0.1)
    expected_losses, expected_gradient = naive(model, prompts, 0.1)
    assert_close(losses, expected_losses, limit)
    assert_close(gradient, expected_gradient, limit)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_batch_of_no_rows_has_no_gradient(backbone: Factory, kind: str) -> None:
    """So a rank without rows takes part in a step."""
    model = backbone(kind)
    losses, gradient = bank_gradient(model, bank(), weighted_batch(model, []), 30)
    assert losses.tolist() == [0] * RUNS
    assert gradient.shape == (RUNS, COUNT, HIDDEN)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_prefixes_are_computed_once_and_held_while_they_are_used(
    backbone: Factory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the prefix of exactly the prompts that a batch names."""
    model, prompts = backbone(kind), bank().detach()
    run: list[int] = []
    plain = model.prefix
    monkeypatch.setattr(model, "prefix", lambda some, _: run.append(len(some)) or plain(some))
    prefixes = Prefixes(model, prompts)
    for used in ([0], [0], [0, 1, 2], [2, 1], [5, 2], [0]):
        found = prefixes.of(used)
        assert [len(part) for part in found] == [len(used)] * len(found)
        for part, expected in zip(found, plain(prompts[used]), strict=True):
            assert torch.allclose(part, expected, atol=1e-5)
    assert run == [1, 2, 1, 1]  # 0; 1 and 2; 5; 0 again, which the bank had left behind


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_step_repeats_bit_for_bit_on_two_threads(backbone: Factory, kind: str) -> None:
    """Decision 3: gathering prompts must not make the backward pass depend on the threads.

    The gather of 40 rows of 32 virtual tokens is large enough for PyTorch to share it out.
    """
    model = backbone(kind)
    prompts = torch.randn(2, 32, HIDDEN, generator=torch.Generator().manual_seed(2))
    texts = ["no", "a", "dog", "cat", "the", "sea", "red", "by"] * 5
    batch = model.batch(texts, texts[::-1], [row // 4 % 2 for row in range(40)])
    first = bank_gradient(model, prompts, batch, 10**6)
    for _ in range(10):
        again = bank_gradient(model, prompts, batch, 10**6)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


# ---- equality 1 ---------------------------------------------------------------------------------

Tokens = tuple[list[list[int]], list[list[int]]]
RATES, SIZES = [0.3, 0.1, 0.03, 0.003], [1, 2, 4, 3]


def tiny_gpt2() -> Backbone:
    """One layer of GPT-2 in float64, small enough for hundreds of steps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer("gpt2")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return Backbone(model.double(), tokenizer)


def rows_of_step(model: Backbone, tokens: Tokens, runs: list[int], step: int) -> Batch:
    """The batch of a step: the next rows of every run, numbered from 0 in the bank."""
    inputs, targets = tokens
    picked = [
        (place, (step * SIZES[run] + k) % len(TEXTS), 1 / SIZES[run])
        for place, run in enumerate(runs)
        for k in range(SIZES[run])
    ]
    return make_batch(
        [inputs[row] for _, row, _ in picked],
        [targets[row] for _, row, _ in picked],
        [place for place, _, _ in picked],
        pad_id=model.pad_id,
        left_padded=True,
        weight=[weight for _, _, weight in picked],
    )


def train(model: Backbone, runs: list[int], name: str, steps: int, per_forward: int) -> Tensor:
    """Prompts of some of the runs after all steps, trained side by side."""
    inputs = [model.cut_input(ids, 8) for ids in model.encode_inputs(TEXTS)]
    tokens = inputs, model.encode_targets(TARGETS)
    generator = torch.Generator().manual_seed(0)
    start = 0.3 * torch.randn(len(RATES), 2, 16, generator=generator, dtype=torch.float64)
    prompts = torch.nn.Parameter(start[runs])
    config = OptimConfig(name=name, schedule="linear", warmup_steps=20, clip=1.0)  # type: ignore[arg-type]
    active = torch.ones(len(runs), dtype=torch.bool)
    optimizer = config.build([prompts], [RATES[run] for run in runs], active, steps)
    for step in range(steps):
        batch = rows_of_step(model, tokens, runs, step)
        losses, gradient = bank_gradient(model, prompts, batch, per_forward)
        prompts.grad = None
        with_gradient(losses.sum(), prompts, gradient).backward()
        optimizer.step()
    return prompts.detach()


@pytest.mark.parametrize(("name", "steps"), [("adamw", 300), ("adafactor", 60)])
def test_a_bank_of_runs_follows_its_runs_trained_alone(name: str, steps: int) -> None:
    """Equality 1: 300 steps in float64, four learning rates and batch sizes."""
    model = tiny_gpt2()
    together = train(model, [0, 1, 2, 3], name, steps, per_forward=60)
    for run in range(len(RATES)):
        (alone,) = train(model, [run], name, steps, per_forward=10**6)
        assert (together[run] - alone).abs().max() <= 1e-9


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_compiled_model_gives_the_same_gradient_from_few_graphs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths and numbers of rows differ; at most 8 graphs, no graph break, no code generated.

    One layer, since tracing takes most of the time.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make_backbone(kind), make_backbone(kind)
    for module in [*plain.model.modules(), *compiled.model.modules()]:
        for name in ("h", "block"):
            if hasattr(module, name):
                del getattr(module, name)[1:]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled.compile_training()
    prompts = bank().detach()
    for rows, words in ((6, 1), (5, 3), (4, 12))[: 2 if kind == "t5" else 3]:
        texts = [f"{'a cat ' * words} {i}" for i in range(rows)]
        batch = plain.batch(texts, TARGETS[:rows], INDEX[:rows])
        found = bank_gradient(compiled, prompts, batch, 100)
        expected = bank_gradient(plain, prompts, batch, 100)
        assert_close(found[0], expected[0], 1e-5)
        assert_close(found[1], expected[1], 3e-5)
        assert compiled.generate(prompts, batch, 3) == plain.generate(prompts, batch, 3)
    assert counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize("kind", ["mask", "bool", "causal", "grouped"])
def test_attention_that_is_written_out_is_that_of_float32(named: bool, kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    heads = (4, 2, 2) if kind == "grouped" else (3, 3, 3)
    parts = [torch.randn(2, one, 5, 8, generator=draw).bfloat16() for one in heads]
    mask = torch.zeros(2, 1, 5, 5).bfloat16().index_fill(3, torch.tensor([4]), -1e30)
    given = {"bool": mask == 0, "causal": None}.get(kind, mask)
    more = {"causal": {"is_causal": True}, "grouped": {"enable_gqa": True}}.get(kind, {})
    attend = torch.nn.functional.scaled_dot_product_attention
    with PlainAttention():
        names = dict(zip(("query", "key", "value", "attn_mask"), (*parts, given), strict=True))
        found = attend(**names, **more) if named else attend(*parts, given, **more)
        assert torch.ones(2).bfloat16().sum().dtype == torch.bfloat16  # nothing else is touched
    wide = given.float() if given is mask else given
    expected = attend(*(part.float() for part in parts), wide, **more)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, 0.02)
