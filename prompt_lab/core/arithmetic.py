"""Task prompt vectors: difference, sum, scale and application, and expressions of them.

A task prompt vector is what tuning added to the initial prompt: tau = tuned - init (Belanec et al.
2024, arXiv 2408.01119, section 3.2). It applies to any initial prompt of the same backbone and
shape. Vectors and their sums are float64, and one rounding to float32 ends the arithmetic, so that
init + 1 * tau is the tuned prompt bit for bit (`task_vector` says when). Left out: which prompts
may be combined, which is for those who read their files to check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def task_vector(prompt: Tensor, init: Tensor) -> Tensor:
    """What tuning added to a prompt: tau = prompt - init (arXiv 2408.01119, equation 2).

    For float32 tensors ``apply_vector(init, task_vector(prompt, init))`` is ``prompt`` bit for bit
    wherever |init| <= 2^27 |prompt|, element by element, and where prompt is 0 (which may lose its
    sign). Beyond that ratio the difference needs more than float64's 53 bits, and the result is
    within 2^-50 |init| of prompt.

    Args:
        prompt: (N, D) or (R, N, D), the tuned prompts.
        init: what they were tuned from, of the same shape.

    Returns:
        The vectors in float64, of the same shape.

    Raises:
        ValueError: different shapes, other dimensions, or tensors that are not floats.
    """
    _check_tensor("prompt", prompt)
    _check_tensor("init", init)
    if prompt.shape != init.shape:
        raise ValueError(f"prompt is {_size(prompt)} and init is {_size(init)}: give one shape")
    return prompt.double() - init.double()


def combine(vectors: Tensor, coefficients: Sequence[float] | Tensor) -> Tensor:
    """The sum of scaled vectors: sum over r of coefficients[r] * vectors[r].

    All ones give the sum (arXiv 2408.01119, equation 4), 1/R each the mean, and -1 the negation.

    Args:
        vectors: (R, N, D).
        coefficients: (R,).

    Returns:
        (N, D) float64.

    Raises:
        ValueError: vectors of other dimensions, or not one finite coefficient for each.
    """
    import torch

    _check_tensor("vectors", vectors)
    factors = torch.as_tensor(coefficients, dtype=torch.float64, device=vectors.device)
    if vectors.dim() != 3 or factors.shape != vectors.shape[:1] or not len(factors):
        raise ValueError(
            f"vectors are {_size(vectors)} and coefficients {_size(factors)}: give (R, N, D) and "
            "(R,), R at least 1"
        )
    if not factors.isfinite().all():
        raise ValueError(f"coefficients are {factors.tolist()}: give finite numbers")
    return (factors[:, None, None] * vectors.double()).sum(0)


def apply_vector(init: Tensor, vector: Tensor, scale: float = 1.0) -> Tensor:
    """The prompt init + scale * vector (arXiv 2408.01119, equation 3), rounded once.

    Args:
        init: (N, D) or (R, N, D), any initial prompts, not only those of the vector.
        vector: (N, D) or (R, N, D); one of the two may be a bank and the other a single one.
        scale: lambda; 0 gives the bare initial prompts.

    Returns:
        (N, D), or (R, N, D) where either is a bank, float32.

    Raises:
        ValueError: shapes that do not fit, or a scale that is not finite.
    """
    _check_tensor("init", init)
    _check_tensor("vector", vector)
    is_bank = init.dim() == vector.dim() == 3
    if init.shape[-2:] != vector.shape[-2:] or (is_bank and len(init) != len(vector)):
        raise ValueError(
            f"init is {_size(init)} and vector is {_size(vector)}: N, D and, of two banks, R must "
            "agree"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: give a finite number")
    return (init.double() + scale * vector.double()).float()


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what is not a prompt or a bank of prompts."""
    if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {_size(tensor)} of {tensor.dtype}: give floats, (N, D) or (R, N, D)"
        )


def _size(tensor: Tensor) -> str:
    """A tensor's shape in words."""
    return " x ".join(map(str, tensor.shape)) or "a single number"


# ---- expressions ---------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[^\W\d](?:[\w.-]*\w)?)   # a sign at the end is not part of a name
    |(?P<quoted>'[^']+'|"[^"]+")
    |(?P<mark>\S)
    |(?P<end>$))""",
    re.VERBOSE,
)
_HINTS = {
    "*": "* stands between a number and what it scales, as in 0.5 * qnli",
    "/": "there is no division: write 0.5 * qnli",
    ")": "a name is missing before it, or no ( is open",
    "'": "the quote does not end, or nothing stands within it",
    '"': "the quote does not end, or nothing stands within it",
}


class _Token(NamedTuple):
    """A word of an expression: its kind, its text, and where it begins, counted from 1."""

    kind: str
    text: str
    at: int


def parse_expression(text: str) -> dict[str, float]:
    """The coefficient of each name in a sum of scaled vectors.

    ``qnli + mnli``, ``- sst2``, ``0.5 * qnli + 0.5 * mnli``, ``mean(qnli, mnli)``,
    ``2 * (qnli - mnli)``. Names begin with a letter and may hold digits and - . _ within, so a
    minus behind a name needs a space before it: ``glue-qnli - glue-mnli``. Other names, and the
    name mean before a bracket, go in quotes.

    ::

        sum  = part (("+" | "-") part)*
        part = ("+" | "-") part | number "*" part | "(" sum ")" | name
             | "mean" "(" sum ("," sum)* ")"

    Returns:
        Coefficients by name, in the order of their first places; those of a name that stands there
        several times are added.

    Raises:
        ValueError: another text, saying at which character; or coefficients that are not finite.
    """
    if not text.strip():
        raise ValueError("the expression is empty: give names of tasks, such as 'qnli + mnli'")
    parser = _Parser(text)
    try:
        found = parser.sum()
    except RecursionError:
        raise ValueError("the expression has too many brackets or signs in one another") from None
    parser.expect("end", "+ or - is expected between two names")
    wrong = [name for name, value in found.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"expression {text!r}: the coefficient of {wrong[0]} is not finite")
    return found


class _Parser:
    """A parser by recursive descent, one method for each rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            word = match[kind]
            self.tokens.append(
                _Token(word if kind == "mark" else kind, word, match.start(kind) + 1)
            )

    def sum(self) -> dict[str, float]:
        """Parts with signs between them."""
        total = self.part()
        while self.tokens[0].kind in ("+", "-"):
            sign = -1.0 if self.take().kind == "-" else 1.0
            total = _added(total, self.part(), sign)
        return total

    def part(self) -> dict[str, float]:
        """A name or a bracket, with what stands before it."""
        token = self.take()
        if token.kind in ("+", "-"):
            return _added({}, self.part(), -1.0 if token.kind == "-" else 1.0)
        if token.kind == "number":
            self.expect("*", f"write * after the number {token.text}, or quotes around an odd name")
            return _added({}, self.part(), float(token.text))
        if token.kind == "(":
            inner = self.sum()
            self.expect(")", "a ) is missing here")
            return inner
        if token.kind == "name" and token.text == "mean" and self.tokens[0].kind == "(":
            return self.mean()
        if token.kind == "name":
            return {token.text: 1.0}
        if token.kind == "quoted":
            return {token.text[1:-1]: 1.0}
        raise self.error(token, "a name is expected here")

    def mean(self) -> dict[str, float]:
        """The brackets of a mean, with sums between commas."""
        parts = []
        while not parts or self.tokens[0].kind == ",":
            self.take()
            parts.append(self.sum())
        self.expect(")", "a ) is missing here")
        total: dict[str, float] = {}
        for part in parts:
            total = _added(total, part, 1 / len(parts))
        return total

    def take(self) -> _Token:
        """The next word, which is passed; the last one stays."""
        return self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]

    def expect(self, kind: str, what: str) -> None:
        """Pass a word that must be of this kind."""
        token = self.take()
        if token.kind != kind:
            raise self.error(token, what)

    def error(self, token: _Token, what: str) -> ValueError:
        """What is wrong, and where."""
        place = f"character {token.at}, {token.text!r}" if token.text else "its end"
        what = _HINTS.get(token.text, what)
        return ValueError(f"expression {self.text!r}, at {place}: {what}")


def _added(
    total: Mapping[str, float], part: Mapping[str, float], factor: float
) -> dict[str, float]:
    """One sum of coefficients and another, scaled."""
    names = dict.fromkeys([*total, *part])
    return {name: total.get(name, 0.0) + factor * part.get(name, 0.0) for name in names}
