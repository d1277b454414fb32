"""Task prompt vectors: exact in float32, by the formula, and expressions that Python confirms."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from prompt_lab.core.vectors import add_vectors, parse_expression, task_vector

N, D = 5, 8


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, seeded."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_floats(count: int, low: int, high: int, seed: int) -> Tensor:
    """Float32 numbers of both signs, random in all 24 bits, with exponents from low to high."""
    rng = np.random.default_rng(seed)
    mantissa = 1 + rng.integers(0, 2**23, count) / 2**23
    values = rng.choice([-1, 1], count) * np.ldexp(mantissa, rng.integers(low, high, count))
    return torch.from_numpy(values.astype(np.float32))[:, None]


def bits(tensor: Tensor) -> Tensor:
    """The bits of float32 numbers, which tell signs of zero and all else apart."""
    return tensor.view(torch.int32)


def back(tuned: Tensor, init: Tensor, scale: float = 1.0) -> Tensor:
    """The prompt that a vector gives on its own initial prompt."""
    return add_vectors(init, task_vector(tuned, init)[None], [1], scale)


# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_init_plus_its_vector_is_the_tuned_prompt_bit_for_bit(scale):
    init, tuned = draw(3, N, D), draw(3, N, D, seed=1, scale=scale)
    found = add_vectors(init[1], task_vector(tuned, init), [0, 1, 0])
    assert found.dtype == torch.float32
    assert bits(found).equal(bits(tuned[1]))


def test_beyond_the_ratio_the_error_stays_below_what_it_names():
    tuned, init = any_floats(100_000, -149, 127, seed=4), any_floats(100_000, -149, 127, seed=5)
    beyond = init.double().abs() > 2**27 * tuned.double().abs()
    tuned, init = tuned[beyond][:, None], init[beyond][:, None]
    found = back(tuned, init)
    assert not found.equal(tuned)
    assert ((found.double() - tuned.double()).abs() <= 2**-50 * init.double().abs()).all()


def test_zeros_come_back_as_zeros_and_scale_0_is_the_bare_init():
    init = draw(N, D)
    for zero in (torch.zeros(N, D), -torch.zeros(N, D)):
        assert back(zero, init).equal(torch.zeros(N, D))
        assert back(init, zero).equal(init)
    assert back(draw(N, D, seed=1), init, scale=0).equal(init)
    assert not task_vector(init, init).any()


def test_a_sum_is_the_formula_in_rational_numbers():
    """Reference: Python's fractions, rounded once to float32; on another initial prompt."""
    tuned, init, other = draw(3, N, D, scale=3), draw(3, N, D, seed=1), draw(N, D, seed=2)
    factors, scale = [0.3, -1.7, 2.0], 0.35
    found = add_vectors(other, task_vector(tuned, init), factors, scale)
    for n in range(N):
        for d in range(D):
            parts = [
                Fraction(factor) * (Fraction(t[n, d].item()) - Fraction(i[n, d].item()))
                for factor, t, i in zip(factors, tuned, init, strict=True)
            ]
            exact = Fraction(other[n, d].item()) + Fraction(scale) * sum(parts)
            assert found[n, d].item() == np.float32(float(exact))


def test_numbers_too_large_for_float32_are_refused():
    with pytest.raises(ValueError, match=r"scale 1e\+39 make numbers too large for float32"):
        add_vectors(draw(N, D), draw(1, N, D), [1], 1e39)


# ---- expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("qnli", {"qnli": 1}),
        ("a + 0.5 b - c", {"a": 1, "b": 0.5, "c": -1}),
        ("- sst2", {"sst2": -1}),
        ("-sst2+mnli", {"sst2": -1, "mnli": 1}),
        ("0.5 * qnli + .5*mnli", {"qnli": 0.5, "mnli": 0.5}),
        ("1e-3*a - 2.*b", {"a": 1e-3, "b": -2}),
        ("-2 * a + b", {"a": -2, "b": 1}),
        ("a + a", {"a": 2}),
        ("a - a", {"a": 0}),
        ("  a\n+\tb ", {"a": 1, "b": 1}),
        ("glue-qnli - glue-mnli", {"glue-qnli": 1, "glue-mnli": -1}),
        ("glue-qnli -glue-mnli", {"glue-qnli": 1, "glue-mnli": -1}),
        ("a- b", {"a": 1, "b": -1}),
        ("2 e5 + 1e5 a", {"e5": 2, "a": 1e5}),
        ("a.b_c-2 + _d", {"a.b_c-2": 1, "_d": 1}),
        ("""'3d task' - 2 "mean" + "it's" """, {"3d task": 1, "mean": -2, "it's": 1}),
    ],
)
def test_expressions_mean_what_they_say(text, factors):
    found = parse_expression(text)
    assert found == factors
    assert list(found) == list(factors)  # the order of their first places
    assert all(isinstance(value, float) for value in found.values())


def test_random_expressions_agree_with_pythons_own_arithmetic():
    """Reference: eval, with unit vectors as names."""
    rng = random.Random(0)
    unit = {name: np.eye(4)[at] for at, name in enumerate("abcd")}
    for _ in range(200):
        text = rng.choice(["", "- ", "+"])
        for at in range(rng.randint(1, 6)):
            number = rng.choice(["", "2*", "0.5 * ", "1e-1*", ".25 *", "3. * "])
            text += rng.choice([" + ", " - "]) * (at > 0) + number + rng.choice("abcd")
        found = parse_expression(text)
        expected = eval(text, unit)
        np.testing.assert_allclose([found.get(name, 0) for name in "abcd"], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("", "its end"),
        (" \n", "its end"),
        ("qnli +", "+"),
        ("qnli / 2", "/ 2"),
        ("a * 2", "* 2"),
        ("2 * 3", "2 * 3"),
        ("3d-task", "3d-task"),
        ("a b", "b"),
        ("a, b", ", b"),
        ("mean(a, b)", "(a, b)"),
        ("2 * (a - b)", "2 * (a - b)"),
        ("a + - b", "+ - b"),
        ("a + 'b", "+ 'b"),
        ("''", "''"),
        ("$a", "$a"),
        ("a \N{MINUS SIGN} b", "\N{MINUS SIGN} b"),
        ("(" * 5000 + "a", "((("),
    ],
)
def test_what_cannot_be_read_is_refused_from_its_place_on(text, rest):
    with pytest.raises(ValueError, match=re.escape(f"cannot be read from {rest!r}"[:-1])):
        parse_expression(text)


@pytest.mark.parametrize("text", ["1e999 * a", "1e308 a + 1e308 a"])
def test_factors_that_are_not_finite_are_refused(text):
    with pytest.raises(ValueError, match="the factor of a is not finite"):
        parse_expression(text)
