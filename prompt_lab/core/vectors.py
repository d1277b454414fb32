"""Task prompt vectors: difference, scaled sums on an initial prompt, and expressions of them.

A task prompt vector is what tuning added to the initial prompt: tau = tuned - init (Belanec et al.
2024, arXiv 2408.01119, section 3.2). It applies to any initial prompt of the same backbone and
shape. Vectors and their sums are float64, and one rounding to float32 ends the arithmetic, so that
init + 1 * tau is the tuned prompt bit for bit (`task_vector` says when). Which prompts go together
is checked where their files are read (`prompt_lab.files.prompts`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_EXPRESSION = 100
"""Characters of an expression in a file's name; a longer one is cut there and gets a digest."""

_PART = re.compile(
    r"""\s*(?P<sign>[+-]?)\s*
    ((?P<factor>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(\s*\*\s*|\s+))?
    ((?P<name>[^\W\d]([\w.-]*\w)?)|'(?P<single>[^']+)'|"(?P<double>[^"]+)")\s*""",
    re.VERBOSE,
)


def task_vector(prompt: Tensor, init: Tensor) -> Tensor:
    """What tuning added to a prompt: tau = prompt - init (arXiv 2408.01119, equation 2).

    For float32 tensors ``add_vectors(init, task_vector(prompt, init)[None], [1])`` is ``prompt``
    bit for bit wherever |init| <= 2^27 |prompt|, element by element, and where prompt is 0 (which
    may lose its sign). Beyond that ratio the difference needs more than float64's 53 bits, and the
    result is within 2^-50 |init| of prompt.

    Args:
        prompt: (N, D) or (R, N, D), the tuned prompts.
        init: what they were tuned from, of the same shape.

    Returns:
        The vectors in float64, of the same shape.
    """
    return prompt.double() - init.double()


def add_vectors(
    init: Tensor, vectors: Tensor, factors: Sequence[float], scale: float = 1.0
) -> Tensor:
    """The prompt init + scale * sum over r of factors[r] * vectors[r], rounded once.

    Equations 3 and 4 of arXiv 2408.01119: factors of 1 give the sum, 1/R each the mean, and -1 the
    negation.

    Args:
        init: (N, D), any initial prompt, not only that of the vectors.
        vectors: (R, N, D), R at least 1.
        factors: R finite numbers.
        scale: lambda; 0 gives the bare initial prompt.

    Returns:
        (N, D) float32.

    Raises:
        ValueError: numbers too large for float32.
    """
    import torch

    each = torch.as_tensor(factors, dtype=torch.float64, device=vectors.device)
    total = (each[:, None, None] * vectors.double()).sum(0)
    prompt = (init.double() + scale * total).float()
    if not prompt.isfinite().all():
        raise ValueError(
            f"factors {each.tolist()} and scale {scale} make numbers too large for float32: give "
            "smaller ones"
        )
    return prompt


def parse_expression(text: str) -> dict[str, float]:
    """The factor of each name in a sum: ``a + 0.5 b - c``, ``- a``, ``0.5 * a``.

    Names begin with a letter and may hold digits and - . _ within, so a minus behind a name needs a
    space before it: ``glue-qnli - glue-mnli``. Other names go in quotes.

    Returns:
        Factors by name, in the order of their first places; those of a name that stands there
        several times are added.

    Raises:
        ValueError: another text, saying from where on; or factors that are not finite.
    """
    found: dict[str, float] = {}
    at = 0
    while at < len(text) or not found:
        part = _PART.match(text, at)
        if part is None or (found and not part["sign"]):
            rest = text[at:].strip() or "its end"
            raise ValueError(
                f"expression {text!r} cannot be read from {rest!r} on: give names with + or - "
                "between them and numbers before them, such as 'a + 0.5 b - c', odd names in quotes"
            )
        name = part["name"] or part["single"] or part["double"]
        factor = float(part["factor"] or 1) * (-1 if part["sign"] == "-" else 1)
        found[name] = found.get(name, 0.0) + factor
        if not math.isfinite(found[name]):
            raise ValueError(f"expression {text!r}: the factor of {name} is not finite")
        at = part.end()
    return found


def expression_name(factors: Mapping[str, float], scale: float = 1.0) -> str:
    """A scaled sum in letters, digits and - . _, as the start of file names."""
    words: list[str] = []
    for name, value in factors.items():
        words += ["minus"] if value < 0 else ["plus"] * bool(words)
        words += [f"{abs(value):g}".replace("+", "")] * (abs(value) != 1)
        words.append(re.sub(r"[^\w.-]+", "-", name))
    words += [f"times_{scale:g}".replace("+", "")] * (scale != 1)
    return shortened("_".join(words), LONGEST_EXPRESSION)


def shortened(name: str, longest: int) -> str:
    """A name for a file, cut with a digest of the whole where it is too long."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= longest else f"{name[:longest]}_{digest}"
