"""Meta-gradients against the unrolled graph, central differences, and closed forms.

The unrolled graph differentiates through all inner steps at once with PyTorch's own bookkeeping.
Central differences differentiate the whole meta-loss, inner loop included. T5's norm and BLOOM's
softmax compute in float32 whatever the dtype, which limits both: for central differences T5 gets a
norm that keeps float64.

The controlled problem is quadratic, so that all that an algorithm converges to has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DECODER_ONLY, HIDDEN, KINDS, make_model, make_tokenizer
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import BankObjective, bank_product
from prompt_lab.core.batch import Batch
from prompt_lab.core.forward import twice_differentiable
from prompt_lab.core.meta_gradient import (
    InnerConfig,
    MetaGradient,
    adapt,
    maml,
    multitask,
    reptile,
)

M, N = 3, 4
WHOLE, SMALL = 4096, 30
"""Tokens of a forward pass: all rows in one, or a row or two."""

INNER = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"name": "adam"},
    "shared": {"learned": "shared"},
    "per_token": {"learned": "per_token", "momentum": 0.5},
}
RATE = {"t5": 0.01, "mt5": 0.001}  # random T5s are sharp
"""Inner learning rates at which ten steps stay within bounds; 0.05 for other models."""

_TEXTS = ("the small red house", "a dog and a cat ran", "yes no maybe", "she likes to read books")
_ANSWERS = ("yes", "no maybe", "positive", "negative yes")


def make_rows(backbone: Backbone, seed: int, rows: int = 6) -> Batch:
    """Rows of all episodes, two each, of different lengths."""
    texts = [_TEXTS[(at + seed) % 4] for at in range(rows)]
    answers = [_ANSWERS[(at + 2 * seed) % 4] for at in range(rows)]
    return backbone.batch(texts, answers, [at % M for at in range(rows)])


def start(seed: int = 0) -> Tensor:
    """Prompts (M, N, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(M, N, HIDDEN, generator=generator, dtype=torch.float64)


def make_rate(kind: str, inner: InnerConfig) -> Tensor:
    """The inner learning rate, differing from token to token where it is per token."""
    value = torch.tensor(RATE.get(kind, 0.05), dtype=torch.float64)
    if inner.learned != "per_token":
        return value
    return value * torch.linspace(0.5, 1.5, N, dtype=torch.float64)[:, None]


def rows_of(backbone: Backbone, steps: int) -> tuple[list[Batch], Batch]:
    """Support rows of each inner step, and query rows."""
    return [make_rows(backbone, step) for step in range(steps)], make_rows(backbone, 77)


def loss_of(backbone: Backbone, prompts: Tensor, batch: Batch) -> Tensor:
    """Sum over episodes of their weighted losses."""
    return (backbone.loss(prompts, batch) * batch.weight).sum()


def unrolled(
    backbone: Backbone,
    prompts: Tensor,
    support: list[Batch],
    query: Batch,
    inner: InnerConfig,
    rate: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query loss by one graph over all inner steps: prompts' and rate's."""
    leaf, rate = prompts.clone().requires_grad_(), rate.clone().requires_grad_()
    moved, state = leaf, inner.start(leaf)
    with twice_differentiable():
        for step, batch in enumerate(support):
            loss = loss_of(backbone, moved, batch)
            (gradient,) = torch.autograd.grad(loss, moved, create_graph=True)
            change, state = inner.update(step, gradient, state, rate)
            moved = moved + change
        loss = loss_of(backbone, moved, query)
    made, of_rate = torch.autograd.grad(loss, [leaf, rate])
    return made, of_rate


def ours(
    backbone: Backbone,
    prompts: Tensor,
    support: list[Batch],
    query: Batch,
    inner: InnerConfig,
    rate: Tensor,
    tokens: int = WHOLE,
    depth: int | None = None,
) -> MetaGradient:
    """The meta-gradient of MAML by micro-batches of so many tokens."""
    objective = partial(BankObjective, backbone, tokens_per_forward=tokens)
    return maml(prompts, [objective(b) for b in support], objective(query), inner, rate, depth)


def error(made: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return float((made - expected).norm() / expected.norm())


class PlainNorm(torch.nn.Module):
    """T5's norm in the dtype of what it is given."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalise by the root mean square."""
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.fixture(scope="module")
def eager() -> Callable[[str], Backbone]:
    """Factory of float64 backbones whose attention is the same in all passes."""
    made: dict[str, Backbone] = {}

    def get(kind: str) -> Backbone:
        if kind not in made:
            model = make_model(kind, torch.float64)
            model.set_attn_implementation("eager")
            made[kind] = Backbone(model, make_tokenizer(kind), f"tiny-{kind}")
        return made[kind]

    return get


@pytest.fixture(scope="module")
def smooth() -> Callable[[str], Backbone]:
    """Factory of float64 backbones without kinks or float32 within: mT5 (gated GELU) and GPT-2."""

    def get(kind: str) -> Backbone:
        model = make_model("mt5" if kind == "t5" else kind, torch.float64)
        for module in model.modules():
            for name, child in module.named_children():
                if type(child).__name__.endswith("LayerNorm") and kind == "t5":
                    setattr(module, name, PlainNorm(child.weight, child.variance_epsilon))
        for weight in model.parameters():
            weight.data *= 0.4  # gentle enough that differences of 1e-5 are small
        return Backbone(model, make_tokenizer("mt5" if kind == "t5" else kind), kind)

    return get


# ---- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_adjoint_equals_the_unrolled_graph(
    kind: str, name: str, steps: int, eager: Callable[[str], Backbone]
) -> None:
    backbone = eager(kind)
    inner = InnerConfig(steps=steps, **INNER[name])  # type: ignore[arg-type]
    given = (backbone, start(), *rows_of(backbone, steps), inner, make_rate(kind, inner))
    expected, of_rate = unrolled(*given)
    found = ours(*given)
    assert error(found.gradient, expected) <= 1e-8
    if inner.learned == "fixed":
        assert found.rate_gradient is None
    else:
        assert found.rate_gradient is not None
        assert found.rate_gradient.shape == of_rate.shape
        assert error(found.rate_gradient, of_rate) <= 1e-8
    if steps > 1 and name != "adam":
        assert error(found.gradient, ours(*given, depth=0).gradient) > 1e-3  # it matters here


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("t5", "gpt2")])
def test_the_adjoint_equals_the_unrolled_graph_on_other_models(
    kind: str, eager: Callable[[str], Backbone]
) -> None:
    backbone, inner = eager(kind), InnerConfig(steps=3, momentum=0.9)
    given = (backbone, start(), *rows_of(backbone, 3), inner, make_rate(kind, inner))
    assert error(ours(*given).gradient, unrolled(*given)[0]) <= 1e-8


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "qwen2_window"])
def test_micro_batches_and_fused_attention_leave_the_meta_gradient(
    kind: str, backbone: Callable[..., Backbone]
) -> None:
    """Attention by ``sdpa`` is fused in the first-order passes and plain in Hessian products.

    GPT-2 and BART compute all in float64; the others norms or softmax in float32.
    """
    model, inner = backbone(kind, torch.float64), InnerConfig(steps=3)
    given = (model, start(), *rows_of(model, 3), inner, make_rate(kind, inner))
    expected = unrolled(*given)[0]
    bound = 1e-10 if kind in ("gpt2", "bart") else 1e-5
    for tokens in (WHOLE, SMALL):
        assert error(ours(*given, tokens=tokens).gradient, expected) <= bound


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_adjoint_equals_central_differences(
    kind: str, momentum: float, steps: int, smooth: Callable[[str], Backbone]
) -> None:
    """Of the meta-loss, along four random directions."""
    backbone, inner = smooth(kind), InnerConfig(steps=steps, momentum=momentum)
    rate = torch.tensor(0.3, dtype=torch.float64)
    support, query = rows_of(backbone, steps)
    found = ours(backbone, start(), support, query, inner, rate)
    objectives = [BankObjective(backbone, batch, WHOLE) for batch in support]
    generator = torch.Generator().manual_seed(3)

    def meta_loss(prompts: Tensor) -> float:
        """The query loss after the inner loop."""
        adapted = adapt(prompts, objectives, inner, rate).prompts(-1)
        with torch.no_grad():
            return float(loss_of(backbone, adapted, query))

    for _ in range(4):
        way = torch.randn(M, N, HIDDEN, generator=generator, dtype=torch.float64)
        eps = 1e-5
        slope = (meta_loss(start() + eps * way) - meta_loss(start() - eps * way)) / (2 * eps)
        expected = float((found.gradient * way).sum())
        size = float(found.gradient.norm() * way.norm() / way.numel() ** 0.5)
        assert abs(slope - expected) <= 1e-6 * size
    assert float(found.second_order.mean()) > 1e-2


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_bank_of_episodes_equals_a_loop_over_them(
    kind: str, eager: Callable[[str], Backbone]
) -> None:
    backbone, inner = eager(kind), InnerConfig(steps=3, momentum=0.5, learned="shared")
    rate = make_rate(kind, inner)
    support, query = rows_of(backbone, 3)
    together = ours(backbone, start(), support, query, inner, rate)
    of_rate = torch.zeros_like(rate)
    for episode in range(M):
        own = [_only(backbone, batch, episode) for batch in (*support, query)]
        alone = ours(backbone, start()[episode][None], own[:-1], own[-1], inner, rate)
        assert error(alone.gradient[0], together.gradient[episode]) <= 1e-8
        torch.testing.assert_close(alone.losses[0], together.losses[episode])
        torch.testing.assert_close(alone.moved[0], together.moved[episode])
        torch.testing.assert_close(alone.second_order[0], together.second_order[episode])
        torch.testing.assert_close(alone.support_losses[:, 0], together.support_losses[:, episode])
        assert alone.rate_gradient is not None
        of_rate += alone.rate_gradient
    assert together.rate_gradient is not None
    assert error(of_rate, together.rate_gradient) <= 1e-8


def _only(backbone: Backbone, batch: Batch, episode: int) -> Batch:
    """The rows of one episode, as a batch under prompt 0."""
    at = [row for row, prompt in enumerate(batch.prompts) if prompt == episode]
    parts = [batch.slice(row, row + 1) for row in at]
    texts, answers = [], []
    for part in parts:
        texts.append(backbone.tokenizer.decode(part.input_ids[0], skip_special_tokens=True))
        answers.append(backbone.tokenizer.decode(part.target_ids[0], skip_special_tokens=True))
    return backbone.batch(texts, [answer.strip() for answer in answers])


# ---- the algorithms' formulas --------------------------------------------------------------------


class Quadratic:
    """Losses 1/2 (x - c)' diag(a) (x - c) of M prompts; Hessian diag(a)."""

    def __init__(self, curvature: Tensor, centre: Tensor) -> None:
        self.curvature, self.centre = curvature, centre

    def gradient(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (M,) and gradient (M, N, D)."""
        apart = prompts - self.centre
        return 0.5 * (self.curvature * apart * apart).sum((1, 2)), self.curvature * apart

    def product(self, prompts: Tensor, vector: Tensor) -> Tensor:
        """Hessian times vector."""
        return self.curvature * vector


def quadratic(seed: int = 0) -> Quadratic:
    """M tasks of different curvatures, 0.2 to 1.8, and centres."""
    generator = torch.Generator().manual_seed(seed)
    curvature = 0.2 + 1.6 * torch.rand(M, N, 2, generator=generator, dtype=torch.float64)
    return Quadratic(curvature, torch.randn(M, N, 2, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, None])
def test_truncated_depth_takes_the_hessians_of_the_last_steps(depth: int | None) -> None:
    """Reference: v times (1 - rate a) for each step that is differentiated through."""
    task, rate = quadratic(), torch.tensor(0.3, dtype=torch.float64)
    x = torch.zeros_like(task.centre)
    found = maml(x, [task] * 3, task, InnerConfig(steps=3), rate, depth)
    adapted = task.centre + (1 - rate * task.curvature) ** 3 * (x - task.centre)
    v = task.curvature * (adapted - task.centre)
    expected = (1 - rate * task.curvature) ** (3 if depth is None else depth) * v
    torch.testing.assert_close(found.gradient, expected)
    share = (expected - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.second_order, share)


def test_fomaml_is_the_query_gradient_at_the_adapted_prompts() -> None:
    support, query, rate = quadratic(0), quadratic(1), torch.tensor(0.3, dtype=torch.float64)
    x = torch.zeros_like(query.centre)
    found = maml(x, [support] * 2, query, InnerConfig(steps=2), rate, depth=0)
    x = x - rate * support.curvature * (x - support.centre)
    x = x - rate * support.curvature * (x - support.centre)
    losses, gradient = query.gradient(x)
    torch.testing.assert_close(found.gradient, gradient)
    torch.testing.assert_close(found.losses, losses)
    assert not found.second_order.any()


def test_a_step_along_reptiles_gradient_moves_towards_the_adapted_prompts() -> None:
    """Nichol et al.: x + e (mean of adapted - x)."""
    task, rate = quadratic(), torch.tensor(0.3, dtype=torch.float64)
    x = torch.ones_like(task.centre)
    found = reptile(x, [task] * 4, InnerConfig(steps=4), rate)
    adapted = task.centre + (1 - rate * task.curvature) ** 4 * (x - task.centre)
    stepped = x[0] - 0.25 * found.gradient.mean(0)
    torch.testing.assert_close(stepped, x[0] + 0.25 * (adapted.mean(0) - x[0]))


def test_multitask_learning_is_the_mean_of_the_gradients_at_the_start() -> None:
    support, query = quadratic(0), quadratic(1)
    x = torch.ones_like(query.centre)
    found = multitask(x, [support, query])
    mean = (support.curvature * (x - support.centre) + query.curvature * (x - query.centre)) / 2
    torch.testing.assert_close(found.gradient, mean)
    losses = (support.gradient(x)[0] + query.gradient(x)[0]) / 2
    torch.testing.assert_close(found.losses, losses)
    assert not found.moved.any()


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({}, partial(torch.optim.SGD, lr=0.1)),
        ({"momentum": 0.9}, partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        ({"name": "adam"}, partial(torch.optim.Adam, lr=0.1)),
        (
            {"name": "adam", "betas": (0.5, 0.9), "eps": 0.1},
            partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9), eps=0.1),
        ),
    ],
)
def test_inner_optimizers_follow_those_of_pytorch(values: dict[str, Any], reference: Any) -> None:
    task, inner = quadratic(), InnerConfig(steps=10, **values)
    x = torch.zeros_like(task.centre)
    found = adapt(x, [task] * 10, inner, torch.tensor(0.1, dtype=torch.float64)).prompts(-1)
    leaf = torch.nn.Parameter(x.clone())
    optimizer = reference([leaf])
    for _ in range(10):
        leaf.grad = task.gradient(leaf.detach())[1]
        optimizer.step()
    torch.testing.assert_close(found, leaf.detach(), rtol=1e-10, atol=1e-12)


def test_adam_can_be_differentiated_where_the_gradient_is_zero() -> None:
    """A prompt without support rows has no gradient; its meta-gradient is the query's."""
    support = Quadratic(torch.zeros(M, N, 2, dtype=torch.float64), torch.zeros(M, N, 2))
    query = quadratic()
    x = torch.ones_like(query.centre)
    inner, rate = InnerConfig(steps=2, name="adam"), torch.tensor(0.1, dtype=torch.float64)
    found = maml(x, [support] * 2, query, inner, rate)
    torch.testing.assert_close(found.gradient, query.gradient(x)[1])


def test_small_inner_steps_are_not_lost_to_rounding() -> None:
    """The paper's 3e-5 in float32: the displacement keeps six digits, a difference one or two."""
    rate, inner = torch.tensor(3e-5), InnerConfig(steps=3)
    x = 10 * torch.randn(M, N, 2, generator=torch.Generator().manual_seed(1))
    task = Quadratic(quadratic().curvature, x.double() + 0.1 * quadratic().centre)
    single = Quadratic(task.curvature.float(), task.centre.float())
    expected = reptile(x.double(), [task] * 3, inner, rate).gradient
    kept = reptile(x, [single] * 3, inner, rate).gradient.double()
    difference = (x - adapt(x, [single] * 3, inner, rate).prompts(-1)).double()
    assert error(kept, expected) < 1e-4  # of the centre, which float32 rounds too
    assert error(difference, expected) > 0.01


def test_non_finite_episodes_are_told_apart() -> None:
    task, rate = quadratic(), torch.tensor(0.3, dtype=torch.float64)
    x = torch.zeros_like(task.centre)
    x[1, 0, 0] = torch.inf
    found = maml(x, [task] * 2, task, InnerConfig(steps=2), rate)
    assert found.finite().tolist() == [True, False, True]


# ---- where second order matters ------------------------------------------------------------------


def test_on_tasks_of_different_curvature_each_algorithm_has_its_own_fixed_point() -> None:
    """Quadratic tasks, rate x curvature up to 0.9 x 2: the closed form of each, and their order.

    With m = 1 - rate a, an inner loop of K steps leaves m^K of the distance to a task's centre.
    All gradients are sums over tasks of w (x - c), number by number, with w = a m^2K for MAML,
    a m^K for FoMAML, 1 - m^K for Reptile and a for multi-task learning, so each converges to the
    mean of the centres with its own weights. The loss after adaptation is what MAML descends: it
    is lowest there, and here next come FoMAML, Reptile and multi-task learning. Weights of FoMAML
    may be negative where a rate overshoots (m < 0, K odd), so K is even.
    """
    task, steps = quadratic(5), 2
    rate = torch.tensor(0.9, dtype=torch.float64)
    inner, a, c = InnerConfig(steps=steps), task.curvature, task.centre
    left = (1 - rate * a) ** steps
    weights = {"maml": a * left**2, "fomaml": a * left, "reptile": 1 - left, "multitask": a}
    algorithms: dict[str, Callable[[Tensor], MetaGradient]] = {
        "maml": lambda x: maml(x, [task] * steps, task, inner, rate),
        "fomaml": lambda x: maml(x, [task] * steps, task, inner, rate, depth=0),
        "reptile": lambda x: reptile(x, [task] * steps, inner, rate),
        "multitask": lambda x: multitask(x, [task]),
    }
    losses = {}
    for name, algorithm in algorithms.items():
        zero = torch.zeros(N, 2, dtype=torch.float64)
        at_zero, at_one = (
            algorithm(x.expand(M, -1, -1)).gradient.mean(0) for x in (zero, zero + 1)
        )
        x = -at_zero / (at_one - at_zero)  # where it vanishes, since it is affine in each number
        assert bool((at_one > at_zero).all())  # so that descent goes there
        weight = weights[name]
        torch.testing.assert_close(x, (weight * c).sum(0) / weight.sum(0))
        losses[name] = float(algorithms["maml"](x.expand(M, -1, -1)).losses.sum())
    assert list(losses) == sorted(losses, key=lambda name: losses[name])
    assert losses["multitask"] > 1.2 * losses["maml"]


# ---- Hessian products and settings ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DECODER_ONLY, "bart"])
def test_a_bank_product_equals_the_products_of_single_prompts(
    kind: str, eager: Callable[[str], Backbone]
) -> None:
    """By PyTorch's own ``vhp``; a prompt without rows has none."""
    backbone = eager(kind)
    batch = make_rows(backbone, 1, rows=2)  # prompts 0 and 1
    generator = torch.Generator().manual_seed(4)
    vector = torch.randn(M, N, HIDDEN, generator=generator, dtype=torch.float64)
    found = bank_product(backbone, start(), vector, batch, SMALL)
    expected = torch.autograd.functional.vhp(
        lambda prompts: loss_of(backbone, prompts, batch), start(), vector
    )[1]
    assert error(found, expected) < 1e-8
    assert not found[2].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "inner.steps is 0: give at least 1"),
        ({"name": "adamw"}, r"inner.name is 'adamw'; allowed: \('sgd', 'adam'\)"),
        ({"learned": "yes"}, "inner.learned is 'yes'; allowed"),
        ({"learning_rate": 0.0}, "inner.learning_rate is 0.0: give a positive number"),
        ({"learning_rate": float("nan")}, "inner.learning_rate is nan"),
        ({"momentum": 1.0}, "inner.momentum is 1.0: give 0 up to below 1"),
        ({"momentum": 0.9, "name": "adam"}, "inner.momentum is of sgd; adam has inner.betas"),
    ],
)
def test_bad_settings_of_the_inner_loop_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InnerConfig(**values)
