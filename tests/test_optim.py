"""Optimizers over a bank, run by run against PyTorch's and transformers' own on single prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from prompt_lab.optim import (
    BankOptimizer,
    OptimConfig,
    adamw_with_warmup,
    check_warmup_and_clip,
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


def train_alone(config: OptimConfig, value: Tensor, given: list[Tensor], rate: float) -> Tensor:
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
    schedule = get_scheduler(name, reference, config.warmup_steps, STEPS)
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

    Within 1e-5 of what a run moved (bias corrections are float32), and 2e-7 a step where values of
    up to 3 are rounded: float32 parameters, or weight decay, whose factor is float32.
    """
    config = OptimConfig(name=name, **case)  # type: ignore[arg-type]
    rounding = 2e-7 * STEPS if dtype == torch.float32 or config.weight_decay else 0.0
    value, given = start(shape, dtype), gradients(shape)
    bank = train_bank(config, value, given)
    for run, rate in enumerate(RATES):
        alone = train_alone(config, value[run], [g[run] for g in given], rate)
        moved = (alone - value[run]).abs().max()
        assert moved > 0.1 * rate
        assert (bank[run] - alone).abs().max() <= 1e-5 * moved + rounding


def test_betas_and_eps_are_those_of_adamw() -> None:
    config = OptimConfig(betas=(0.5, 0.9), eps=0.1)
    value, given = start(), gradients()
    bank = train_bank(config, value, given)
    for run, rate in enumerate(RATES):
        alone = train_alone(config, value[run], [g[run] for g in given], rate)
        assert (bank[run] - alone).abs().max() <= 1e-5 * rate * STEPS


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_run_in_a_bank_equals_the_run_in_a_bank_of_one(name: str) -> None:
    """Bit for bit: no arithmetic crosses runs."""
    config = OptimConfig(name=name, clip=1.0, schedule="cosine", weight_decay=0.1)  # type: ignore[arg-type]
    value, given = start(), gradients()
    bank = train_bank(config, value, given)
    for run, rate in enumerate(RATES):
        parameter, _, optimizer = build(config, value[run : run + 1], [rate])
        for gradient in given:
            parameter.grad = gradient[run : run + 1]
            optimizer.step()
        assert torch.equal(parameter.detach()[0], bank[run])


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
def test_a_run_that_rested_goes_on_where_it_was(name: str) -> None:
    """Reference: the run that never saw the steps it slept through."""
    config = OptimConfig(name=name, schedule="cosine", warmup_steps=3)  # type: ignore[arg-type]
    value, given = start(), gradients()
    parameter, active, optimizer = build(config, value)
    for step, gradient in enumerate(given):
        active[2] = not 4 <= step < 9
        parameter.grad = gradient.clone()
        optimizer.step()
    awake = train_bank(config, value, given[:4] + given[9:])
    assert torch.equal(parameter.detach()[2], awake[2])


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


def test_float64_banks_stay_in_float64() -> None:
    """Parameters and moments; the numbers of a run, such as its learning rate, are float32."""
    for name in ("adamw", "adafactor"):
        config = OptimConfig(name=name)  # type: ignore[arg-type]
        value = start(dtype=torch.float64)
        parameter, _, optimizer = build(config, value)
        parameter.grad = gradients()[0].double()
        optimizer.step()
        assert parameter.dtype == torch.float64
        state = optimizer.state[parameter]
        assert {v.dtype for k, v in state.items() if k != "step"} == {torch.float64}
        alone = train_alone(config, value[0], [gradients()[0][0]], RATES[0])
        assert (parameter[0] - alone).abs().max() <= 1e-5


def test_a_parameter_without_gradient_rests() -> None:
    parameter, _, optimizer = build(OptimConfig(), start())
    optimizer.step()
    assert torch.equal(parameter, start())
    assert not optimizer.state[parameter]


def test_a_step_returns_what_its_closure_returns() -> None:
    """Lightning hands the loss over in this way."""
    parameter, _, optimizer = build(OptimConfig(), start())

    def closure() -> float:
        loss = parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[0] == pytest.approx(start().square().sum().item())
    assert losses[2] < losses[0]  # type: ignore[operator]


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


def test_a_bad_share_of_warmup_or_clip_is_refused() -> None:
    check_warmup_and_clip(0.0, None)
    check_warmup_and_clip(1.0, 0.1)
    for warmup in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"model.warmup is .*: give a share of the steps"):
            check_warmup_and_clip(warmup, None)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"model.clip is .*: give a positive norm, or null"):
            check_warmup_and_clip(0.1, clip)
