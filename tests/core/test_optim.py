"""Optimizers over a bank, run by run against PyTorch's and transformers' own on single prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from prompt_lab.core.optim import (
    BankOptimizer,
    OptimConfig,
    adamw_with_warmup,
)

RATES = [0.3, 0.05, 1.0, 0.001]
STEPS = 20
SHAPE = (4, 6, 5)


def start(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Parameters of the bank before the first step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """A gradient of the bank for every step; their sizes differ by run and step."""
    generator = torch.Generator().manual_seed(2)
    size = torch.tensor([0.1, 1.0, 3.0, 30.0]).view(-1, *[1] * (len(shape) - 1))
    return [
        size * (1 + step % 3) * torch.randn(shape, generator=generator) for step in range(STEPS)
    ]


def build(
    config: OptimConfig, value: Tensor, rates: list[float] | None = None, total: int = STEPS
) -> tuple[torch.nn.Parameter, Tensor, BankOptimizer]:
    """A bank's parameter, its mask of active runs, and its optimizer."""
    parameter = torch.nn.Parameter(value.clone())
    active = torch.ones(len(value), dtype=torch.bool)
    optimizer = config.build([parameter], RATES if rates is None else rates, active, total)
    return parameter, active, optimizer


def train_bank(config: OptimConfig, value: Tensor, given: list[Tensor]) -> Tensor:
    """The bank after one step per gradient."""
    parameter, _, optimizer = build(config, value)
    for gradient in given:
        parameter.grad = gradient.to(value.dtype)
        optimizer.step()
    return parameter.detach()


def train_alone(
    config: OptimConfig, value: Tensor, given: list[Tensor], rate: float, total: int = STEPS
) -> Tensor:
    """One run under the reference optimizer, clipped and scheduled by others' code."""
    from transformers import get_scheduler
    from transformers.optimization import Adafactor

    parameter = torch.nn.Parameter(value.clone())
    common: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        reference: Any = torch.optim.AdamW(
            [parameter], betas=config.betas, eps=config.eps, **common
        )
    elif config.name == "sgd":
        reference = torch.optim.SGD([parameter], **common)
    else:
        flags = ("scale_parameter", "relative_step", "warmup_init")
        reference = Adafactor([parameter], **dict.fromkeys(flags, False), **common)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule = get_scheduler(name, reference, config.warmup_steps, total)
    for gradient in given:
        parameter.grad = gradient.to(value.dtype).clone()
        if config.clip is not None:
            clip_grad_norm_([parameter], config.clip)
        reference.step()
        schedule.step()
    return parameter.detach()


CASES = [
    {},
    {"weight_decay": 0.1},
    {"clip": 1.0},
    {"schedule": "constant", "warmup_steps": 5},
    {"schedule": "linear"},
    {"schedule": "linear", "warmup_steps": 5, "clip": 0.5},
    {"schedule": "cosine"},
    {"schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.01},
]


@pytest.mark.parametrize("shape", [SHAPE, (4, 7)], ids=["prompts", "vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_every_run_follows_the_reference_optimizer(
    name: str, case: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """PyTorch's AdamW, transformers' Adafactor and ``get_scheduler``, ``clip_grad_norm_``.

    Within rounding of the values, which are up to 3, at each step.
    """
    config = OptimConfig(name=name, **case)  # type: ignore[arg-type]
    rounding = STEPS * {torch.float32: 2e-7, torch.float64: 1e-15}[dtype]
    value, given = start(shape, dtype), gradients(shape)
    bank = train_bank(config, value, given)
    for run, rate in enumerate(RATES):
        alone = train_alone(config, value[run], [g[run] for g in given], rate)
        moved = (alone - value[run]).abs().max()
        assert moved > 0.1 * rate
        assert (bank[run] - alone).abs().max() <= 2 * torch.finfo(dtype).eps * moved + rounding


LONG = 100


@pytest.mark.parametrize(("decay", "warmup"), [(0.0, 0), (0.1, 0), (0.0, 10), (0.1, 10)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_hundred_steps_are_the_references_but_for_rounding(
    name: str, schedule: Any, decay: float, warmup: int
) -> None:
    """Of runs that rest in between, too, and as exact as the reference in float32.

    Relative to the prompt, in float64: at most 1e-12 from the reference (1e-15 is seen). In
    float32: at most 1e-6 from the reference in float64 (4e-7 is seen; PyTorch's AdamW itself is up
    to 2e-6 from it, since it rounds the factor of weight decay).
    """
    config = OptimConfig(name=name, weight_decay=decay, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(2, 6, 5, generator=generator) for _ in range(LONG + 10)]
    value = torch.randn(2, 6, 5, generator=generator)
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        parameter, active, optimizer = build(config, value.to(dtype), [0.3, 0.001], LONG)
        for step, gradient in enumerate(given):
            active.copy_(torch.tensor([not 40 <= step < 50, step < LONG]))
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        for run, seen in enumerate((given[:40] + given[50:], given[:LONG])):
            seen, rate = [gradient[run] for gradient in seen], (0.3, 0.001)[run]
            alone = train_alone(config, value[run].double(), seen, rate, LONG)
            assert (parameter[run] - alone).norm() <= most * alone.norm()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_steps_beyond_the_budget_and_any_table_are_the_references(name: str) -> None:
    """2,100 steps of a budget of 10, half of them after a resume; the learning rate is constant."""
    config = OptimConfig(name=name)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(1, 2, 2, generator=generator) for _ in range(2100)]
    value = torch.zeros(1, 2, 2, dtype=torch.float64)
    parameter, _, optimizer = build(config, value, [0.01], 10)
    for step, gradient in enumerate(given):
        if step == 1050:
            state = torch.load(_stored(optimizer.state_dict()), weights_only=True)
            parameter, _, optimizer = build(config, parameter.detach(), [0.01], 10)
            optimizer.load_state_dict(state)
        parameter.grad = gradient.double()
        optimizer.step()
    alone = train_alone(config, value[0], [gradient[0] for gradient in given], 0.01)
    assert (parameter[0] - alone).norm() <= 1e-12 * alone.norm()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_device_without_float64_is_never_given_any(name: str) -> None:
    """The device is ``meta``, watched as an Apple GPU would refuse."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        """Fails where a tensor of the device is float64."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.device.type == "meta":
                assert made.dtype != torch.float64, func
            return made

    parameter = torch.nn.Parameter(start().to("meta"))
    active = torch.ones(len(parameter), dtype=torch.bool, device="meta")
    config = OptimConfig(name=name, weight_decay=0.1, schedule="cosine", warmup_steps=2, clip=1.0)  # type: ignore[arg-type]
    with Refuse():
        optimizer = config.build([parameter], RATES, active, STEPS)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_resting_run_moves_neither_parameter_nor_state(name: str) -> None:
    """It rests bit for bit, weight decay and NaN gradients included, and others do not notice."""
    config = OptimConfig(name=name, weight_decay=0.1, schedule="linear", clip=1.0)  # type: ignore[arg-type]
    value, given = start(), gradients()
    parameter, active, optimizer = build(config, value)
    for step, gradient in enumerate(given):
        if step == 8:
            active[1] = False
            before = {k: v[1].clone() for k, v in optimizer.state[parameter].items()}
            rested = parameter.detach()[1].clone()
        parameter.grad = gradient.clone()
        if step >= 8:
            parameter.grad[1] = torch.nan
        optimizer.step()
    assert torch.equal(parameter.detach()[1], rested)
    assert set(before) >= {"step"}
    for key, kept in before.items():
        assert torch.equal(optimizer.state[parameter][key][1], kept), key
    undisturbed = train_bank(config, value, given)
    others = [0, 2, 3]
    assert torch.equal(parameter.detach()[others], undisturbed[others])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_state_survives_saving_and_loading(name: str) -> None:
    """Interrupted after 7 steps and resumed in new objects, bit for bit; runs at unequal steps."""
    config = OptimConfig(name=name, schedule="linear", warmup_steps=4)  # type: ignore[arg-type]
    value, given = start(), gradients()
    whole, active, optimizer = build(config, value)
    for step, gradient in enumerate(given):
        active[1] = step != 3
        whole.grad = gradient.clone()
        optimizer.step()
        if step == 6:
            state, middle = optimizer.state_dict(), whole.detach().clone()
            state = torch.load(_stored(state), weights_only=True)
    resumed, _, second = build(config, middle)
    second.load_state_dict(state)
    for gradient in given[7:]:
        resumed.grad = gradient.clone()
        second.step()
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_state_from_the_host_is_taken_to_the_device_of_the_parameter(name: str) -> None:
    """The device is ``meta``, which refuses tensors of the host as a GPU does."""
    config, value = OptimConfig(name=name), start()  # type: ignore[arg-type]
    first, _, optimizer = build(config, value)
    first.grad = torch.zeros_like(first)
    optimizer.step()
    there = torch.nn.Parameter(value.to("meta"))
    active = torch.ones(len(value), dtype=torch.bool, device="meta")
    second = config.build([there], [0.1] * len(value), active, 10)
    second.load_state_dict(torch.load(_stored(optimizer.state_dict()), weights_only=True))
    assert {tensor.device.type for tensor in second.state[there].values()} == {"meta"}
    there.grad = torch.zeros_like(there)
    second.step()


def _stored(state: dict[str, Any]) -> Any:
    """A state as a checkpoint holds it."""
    from io import BytesIO

    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_the_optimizer_holds_the_given_parameters_only() -> None:
    parameter, _, optimizer = build(OptimConfig(), start())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is parameter


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lion"}, r"optim.name is 'lion'; allowed: \('adamw', 'adafactor', 'sgd'\)"),
        ({"schedule": "step"}, "optim.schedule is 'step'; allowed"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"weight_decay": float("nan")}, "must not be negative"),
        ({"betas": (0.9, 1.0)}, r"optim.betas is \(0.9, 1.0\) .*: give betas from 0 up to below 1"),
        ({"eps": -1e-8}, "an eps that is not negative"),
        ({"clip": 0.0}, "optim.clip is 0.0: give a positive norm"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_a_bank_needs_a_positive_learning_rate_for_each_run() -> None:
    with pytest.raises(ValueError, match="2 learning rates for a bank of 4 runs"):
        build(OptimConfig(), start(), [0.1, 0.2])
    for wrong in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="learning rates must be positive"):
            build(OptimConfig(), start(), [0.1, 0.2, 0.3, wrong])


def test_a_factor_changes_the_learning_rate_of_one_parameter() -> None:
    first, second = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    active = torch.ones(len(first), dtype=torch.bool)
    optimizer = OptimConfig(name="sgd").build([first, second], RATES, active, STEPS, [1.0, 0.1])
    for parameter in (first, second):
        parameter.grad = gradients()[0]
    optimizer.step()
    moved, less = (start() - parameter.detach() for parameter in (first, second))
    torch.testing.assert_close(less, 0.1 * moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("warmup", "rise"), [(0.0, 1), (0.3, 6), (1.0, STEPS)])
def test_adamw_with_warmup_follows_torchs_adamw_at_rates_by_interpolation(
    warmup: float, rise: int
) -> None:
    """Reference: ``torch.optim.AdamW`` whose rates NumPy interpolates between the corners."""
    peaks = (0.3, 0.01)
    ours = [torch.nn.Parameter(start()) for _ in peaks]
    groups = [{"params": [own], "lr": peak} for own, peak in zip(ours, peaks, strict=True)]
    made = adamw_with_warmup(groups, warmup, STEPS)
    theirs = [torch.nn.Parameter(start()) for _ in peaks]
    references = [torch.optim.AdamW([own], weight_decay=0.0) for own in theirs]
    for step, gradient in enumerate(gradients()):
        share = np.interp(step, [-1, rise - 1, rise, STEPS], [0, 1, 1, 0])
        for peak, reference in zip(peaks, references, strict=True):
            reference.param_groups[0]["lr"] = peak * share
        for parameter in (*ours, *theirs):
            parameter.grad = gradient.clone()
        for optimizer in (made["optimizer"], *references):
            optimizer.step()
        made["lr_scheduler"]["scheduler"].step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
    assert made["lr_scheduler"]["interval"] == "step"
    assert [group["lr"] for group in made["optimizer"].param_groups] == [0, 0]
