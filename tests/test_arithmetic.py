"""Task prompt vectors: exact in float32, by the formula, and expressions that Python confirms."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from prompt_lab.core.arithmetic import apply_vector, combine, parse_expression, task_vector
from torch import Tensor

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


# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_init_plus_its_vector_is_the_tuned_prompt_bit_for_bit(scale):
    init, tuned = draw(3, N, D), draw(3, N, D, seed=1, scale=scale)
    back = apply_vector(init, task_vector(tuned, init))
    assert back.dtype == torch.float32
    assert bits(back).equal(bits(tuned))
    combined = combine(task_vector(tuned, init), [0, 1, 0])
    assert bits(apply_vector(init[1], combined)).equal(bits(tuned[1]))


def test_float32_throughout_would_not_give_the_tuned_prompt_back():
    """Why the vectors are float64."""
    init, tuned = draw(64, 64), draw(64, 64, seed=1)
    assert not (init + (tuned - init)).equal(tuned)


def test_the_round_trip_is_exact_for_all_exponents_up_to_the_ratio_it_names():
    """100,000 pairs over float32's whole range, subnormals too; init is cut to 2^27 |prompt|."""
    tuned, init = any_floats(100_000, -149, 127, seed=2), any_floats(100_000, -149, 127, seed=3)
    most = (tuned.double().abs() * 2**27).clamp(max=torch.finfo(torch.float32).max)
    init = init.sign() * torch.minimum(init.double().abs(), most).float()
    assert (init.double().abs() == tuned.double().abs() * 2**27).sum() > 1000  # the limit itself
    assert bits(apply_vector(init, task_vector(tuned, init))).equal(bits(tuned))


def test_beyond_the_ratio_the_error_stays_below_what_it_names():
    tuned, init = any_floats(100_000, -149, 127, seed=4), any_floats(100_000, -149, 127, seed=5)
    beyond = init.double().abs() > 2**27 * tuned.double().abs()
    tuned, init = tuned[beyond][:, None], init[beyond][:, None]
    back = apply_vector(init, task_vector(tuned, init))
    assert not back.equal(tuned)
    assert ((back.double() - tuned.double()).abs() <= 2**-50 * init.double().abs()).all()


def test_zeros_come_back_as_zeros():
    init = draw(N, D)
    for zero in (torch.zeros(N, D), -torch.zeros(N, D)):
        assert apply_vector(init, task_vector(zero, init)).equal(torch.zeros(N, D))
        assert apply_vector(zero, task_vector(init, zero)).equal(init)


def test_scale_0_is_the_bare_init_and_the_vector_of_no_change_is_0():
    init, tuned = draw(N, D), draw(N, D, seed=1)
    assert apply_vector(init, task_vector(tuned, init), scale=0).equal(init)
    assert not task_vector(init, init).any()


def test_a_combination_is_the_formula_in_rational_numbers():
    """Reference: Python's fractions, rounded once to float32."""
    tuned, init, other = draw(3, N, D, scale=3), draw(3, N, D, seed=1), draw(N, D, seed=2)
    factors, scale = [0.3, -1.7, 2.0], 0.35
    found = apply_vector(other, combine(task_vector(tuned, init), factors), scale)
    for n in range(N):
        for d in range(D):
            parts = [
                Fraction(factor) * (Fraction(t[n, d].item()) - Fraction(i[n, d].item()))
                for factor, t, i in zip(factors, tuned, init, strict=True)
            ]
            exact = Fraction(other[n, d].item()) + Fraction(scale) * sum(parts)
            assert found[n, d].item() == np.float32(float(exact))


def test_sum_mean_and_negation_are_coefficients():
    vectors = draw(4, N, D).double()
    assert combine(vectors, [1] * 4).equal(vectors.sum(0))
    torch.testing.assert_close(combine(vectors, [0.25] * 4), vectors.mean(0), rtol=1e-14, atol=0)
    assert combine(vectors[:1], torch.tensor([-1.0])).equal(-vectors[0])
    assert combine(vectors.float(), [1, 0, 0, 0]).dtype == torch.float64


def test_a_vector_applies_to_a_bank_and_a_bank_of_vectors_to_one_init():
    init, vectors = draw(N, D), draw(3, N, D, seed=1).double()
    on_one = apply_vector(init, vectors, 0.5)
    on_bank = apply_vector(init.expand(3, N, D), vectors, 0.5)
    assert on_one.equal(on_bank)
    for r in range(3):
        assert on_one[r].equal(apply_vector(init, vectors[r], 0.5))
        assert apply_vector(init.expand(3, N, D), vectors[r], 0.5)[0].equal(on_one[r])


def test_vectors_of_one_init_move_any_other_by_as_much():
    """Cross-initialisation: the difference that was made is the vector."""
    init, tuned, other = draw(N, D), draw(N, D, seed=1), draw(N, D, seed=2)
    moved = apply_vector(other, task_vector(tuned, init))
    torch.testing.assert_close(moved - other, tuned - init, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: task_vector(draw(N, D), draw(4, D)), "prompt is 5 x 8 and init is 4 x 8"),
        (lambda: task_vector(draw(D), draw(D)), "prompt is 8 of torch.float32: give floats"),
        (lambda: task_vector(draw(N, D).long(), draw(N, D)), "prompt is 5 x 8 of torch.int64"),
        (lambda: combine(draw(3, N, D), [1, 2]), "vectors are 3 x 5 x 8 and coefficients 2"),
        (lambda: combine(draw(N, D), [1] * N), "vectors are 5 x 8 and coefficients 5"),
        (lambda: combine(draw(0, N, D), []), "R at least 1"),
        (lambda: combine(draw(2, N, D), [1, float("nan")]), "give finite numbers"),
        (lambda: apply_vector(draw(N, D), draw(N, 9)), "init is 5 x 8 and vector is 5 x 9"),
        (lambda: apply_vector(draw(2, N, D), draw(3, N, D)), "of two banks, R must agree"),
        (lambda: apply_vector(draw(1, 1, N, D), draw(N, D)), "give floats, (N, D) or (R, N, D)"),
        (lambda: apply_vector(draw(N, D), draw(N, D), float("inf")), "scale is inf: give a finite"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


# ---- expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "coefficients"),
    [
        ("qnli", {"qnli": 1}),
        ("qnli + mnli", {"qnli": 1, "mnli": 1}),
        ("- sst2", {"sst2": -1}),
        ("-sst2+mnli", {"sst2": -1, "mnli": 1}),
        ("0.5 * qnli + .5*mnli", {"qnli": 0.5, "mnli": 0.5}),
        ("1e-3*a - 2.*b", {"a": 1e-3, "b": -2}),
        ("mean(qnli, mnli)", {"qnli": 0.5, "mnli": 0.5}),
        ("mean(a)", {"a": 1}),
        ("2 * (a - b)", {"a": 2, "b": -2}),
        ("a - (b - c)", {"a": 1, "b": -1, "c": 1}),
        ("2 * -3 * a", {"a": -6}),
        ("a + - b", {"a": 1, "b": -1}),
        ("-2 * a + b", {"a": -2, "b": 1}),
        ("mean(a + b, 2 * c) - a", {"a": -0.5, "b": 0.5, "c": 1}),
        ("a + a", {"a": 2}),
        ("a - a", {"a": 0}),
        ("  a\n+\tb ", {"a": 1, "b": 1}),
        ("glue-qnli - glue-mnli", {"glue-qnli": 1, "glue-mnli": -1}),
        ("glue-qnli -glue-mnli", {"glue-qnli": 1, "glue-mnli": -1}),
        ("a- b", {"a": 1, "b": -1}),
        ("a.b_c-2 + _d", {"a.b_c-2": 1, "_d": 1}),
        ("mean + means", {"mean": 1, "means": 1}),
        ("""'3d task' - "mean" + "it's" """, {"3d task": 1, "mean": -1, "it's": 1}),
    ],
)
def test_expressions_mean_what_they_say(text, coefficients):
    found = parse_expression(text)
    assert found == coefficients
    assert list(found) == list(coefficients)  # the order of their first places
    assert all(isinstance(value, float) for value in found.values())


def test_random_expressions_agree_with_pythons_own_arithmetic():
    """Reference: eval, with unit vectors as names."""
    rng = random.Random(0)
    names = ["a", "b", "c", "d"]
    unit = {name: np.eye(4)[at] for at, name in enumerate(names)}

    def part(depth: int) -> str:
        """A random part of an expression."""
        kind = rng.randrange(5 if depth else 1)
        number = rng.choice(["2", "0.5", "1e-1", ".25", "3."])
        return [
            lambda: rng.choice(names),
            lambda: f"{number} * {part(depth - 1)}",
            lambda: f"-{part(depth - 1)}",
            lambda: f"({total(depth - 1)})",
            lambda: f"mean({', '.join(total(depth - 1) for _ in range(rng.randint(1, 3)))})",
        ][kind]()

    def total(depth: int) -> str:
        """A random sum."""
        parts = [part(depth) for _ in range(rng.randint(1, 3))]
        return "".join(f"{rng.choice('+-') if at else ''} {p} " for at, p in enumerate(parts))

    for _ in range(300):
        text = total(3)
        python = eval(text, {**unit, "mean": lambda *given: sum(given) / len(given)})
        found = parse_expression(text)
        np.testing.assert_allclose([found.get(name, 0) for name in names], python, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the expression is empty: give names of tasks"),
        (" \n", "the expression is empty"),
        ("qnli +", "expression 'qnli +', at its end: a name is expected here"),
        ("qnli / 2", "at character 6, '/': there is no division: write 0.5 * qnli"),
        ("a * b", "at character 3, '*': * stands between a number and what it scales"),
        ("a * 2", "* stands between a number and what it scales, as in 0.5 * qnli"),
        ("2 * 3", "at its end: write * after the number 3"),
        ("2 a", "at character 3, 'a': write * after the number 2"),
        ("3d-task", "at character 2, 'd-task': write * after the number 3, or quotes around"),
        ("a b", "at character 3, 'b': + or - is expected between two names"),
        ("a, b", "at character 2, ',': + or - is expected"),
        ("(a", "at its end: a ) is missing here"),
        ("mean(a b)", "at character 8, 'b': a ) is missing here"),
        ("mean()", "at character 6, ')': a name is missing before it, or no ( is open"),
        ("mean(a,)", "at character 8, ')': a name is missing before it"),
        ("a)", "at character 2, ')': a name is missing before it, or no ( is open"),
        ("a + 'b", 'at character 5, "\'": the quote does not end'),
        ("''", "nothing stands within it"),
        ("a ^ 2", "at character 3, '^': + or - is expected"),
        ("$a", "at character 1, '$': a name is expected here"),
        ("a \N{MINUS SIGN} b", "at character 3, '\N{MINUS SIGN}': + or - is expected"),
        ("nan * a", "at character 5, '*': * stands between a number"),
        ("1e999 * a", "the coefficient of a is not finite"),
        ("1e308 * 10 * a - 1e308 * 10 * a", "the coefficient of a is not finite"),
        ("(" * 5000 + "a", "too many brackets or signs in one another"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_expression(text)
