"""What a tuned prompt says: nearest vocabulary tokens, drift, spread of repeated runs, transfer.

The questions are those of Dayton, O'Rahilly and Werner, "Interpreting Prompt-Tuning Across
SuperGLUE Tasks" (sections 5 and 6): which tokens the rows of a prompt are nearest to, which tokens
of its initial prompt are still there, how far repeated runs of a task lie apart, and whether
prompts that lie near each other serve each other's tasks. The paper leaves open how the norm and
the variance of its table 1 are defined, how prompts of 12 to 20 rows are subtracted, and how strong
the correlation is; here each is a formula, and unequal lengths are refused.

Everything works on tensors alone. A vocabulary is gone through in chunks, in float64, so that the
memory needed beside the table is small. Left out: what tokens are called, files and pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Measure = Literal["cosine", "l2", "dot"]
Rank = Literal["spearman", "kendall"]

CHUNK = 8192
"""Rows of the vocabulary at a time."""

_MARGIN = 16
"""Candidates beyond the k nearest that are scored again, so that equal rows score the same."""

_ROUNDING = 1e-12
"""Share of a score, or of a correlation, by which equal ones may differ."""

_HALF_ULP = 2.0**-8
"""How far a number may move when it is rounded to bfloat16, as a share of it (an upper bound)."""


class Nearest(NamedTuple):
    """The nearest tokens of each row of a prompt, the nearest first.

    Attributes:
        ids: (N, k) int64, rows of the vocabulary.
        scores: (N, k) float64: cosines, Euclidean distances, or inner products.
    """

    ids: Tensor
    scores: Tensor


class Drift(NamedTuple):
    """How far each row of a prompt has moved.

    Attributes:
        l2: (N,) float64, Euclidean distance to the initial row.
        cosine: (N,) float64, cosine with the initial row; NaN where either is zero.
    """

    l2: Tensor
    cosine: Tensor


# ---- nearest tokens ------------------------------------------------------------------------------


def nearest_tokens(
    prompt: Tensor,
    table: Tensor,
    measure: Measure = "cosine",
    k: int = 5,
    chunk: int = CHUNK,
    *,
    ids: Tensor | None = None,
) -> Nearest:
    """The k tokens that each row of a prompt is nearest to (section 5.1 of the paper: cosine).

    "cosine" has no regard to lengths; "l2" is the smallest Euclidean distance; "dot" the largest
    inner product, which favours tokens with long embeddings. A row of zeros has cosine 0 with all.
    Of tokens with equal scores the one with the lower id comes first. Beside the table, about
    10 (D + 2 N) chunk bytes are needed.

    Args:
        prompt: (N, D), floating point.
        table: (V, D) embeddings of the vocabulary, floating point of any precision.
        measure: what "near" means.
        k: how many.
        chunk: rows of the table at a time; changes memory and time only.
        ids: the rows of the table that may be found, each once; all without it.

    Returns:
        Ids and scores (N, k).

    Raises:
        ValueError: shapes that do not fit, NaN or infinite numbers, an unknown measure, ids that
            the table lacks or twice, a k or chunk out of range.
    """
    rows, allowed = _checked(prompt, table, measure, chunk, ids)
    if not 1 <= k <= len(allowed):
        raise ValueError(f"k is {k}: give 1 to {len(allowed)}, the number of tokens to choose from")
    kept = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    scores = kept.double()
    for part, found in _closeness(rows, table, measure, chunk, allowed):
        scores = torch.cat([scores, found], dim=1)
        kept = torch.cat([kept, part.expand(len(rows), -1)], dim=1)
        places = _largest(scores, k + _MARGIN)
        scores, kept = scores.gather(1, places), kept.gather(1, places)
    best = [
        _order(_scores(row, table[own].double(), measure), measure, k)
        for row, own in zip(rows, kept, strict=True)
    ]
    places = torch.stack([order for order, _ in best])
    return Nearest(kept.gather(1, places), torch.stack([values for _, values in best]))


def initial_tokens(
    init: Tensor, table: Tensor, chunk: int = CHUNK, *, ids: Tensor | None = None
) -> Tensor:
    """The token that each row of an initial prompt is the embedding of.

    A row is a token's where it equals a row of the table, up to a rounding to bfloat16: backbones
    in half precision make initial prompts of rounded rows.

    Args:
        init: (N, D), floating point.
        table: as in :func:`nearest_tokens`.
        chunk: as in :func:`nearest_tokens`.
        ids: as in :func:`nearest_tokens`.

    Returns:
        (N,) int64; of equal rows of the table the first, and -1 where there is none, as for a
        prompt that starts from noise or from another prompt.

    Raises:
        ValueError: as :func:`nearest_tokens`.
    """
    nearest = nearest_tokens(init, table, "l2", 1, chunk, ids=ids).ids[:, 0]
    found = table[nearest].double()
    is_equal = ((init.double() - found).abs() <= _HALF_ULP * found.abs()).all(dim=1)
    return torch.where(is_equal, nearest, -1)


def surviving(initial: Tensor, nearest: Nearest) -> Tensor:
    """Whether the initial token of each row is still the one that the tuned row is nearest to.

    Args:
        initial: (N,) of :func:`initial_tokens`.
        nearest: of the tuned prompt.

    Returns:
        (N,) bool; False for rows without an initial token.
    """
    return (initial >= 0) & (nearest.ids[:, 0] == initial)


def token_ranks(
    prompt: Tensor,
    tokens: Tensor,
    table: Tensor,
    measure: Measure = "cosine",
    chunk: int = CHUNK,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Which place a given token has among all tokens, by nearness to each row; 1 is the nearest.

    Args:
        prompt: (N, D).
        tokens: (N,) a token for each row, negative for none.
        table: as in :func:`nearest_tokens`.
        measure: as in :func:`nearest_tokens`.
        chunk: as in :func:`nearest_tokens`.
        ids: as in :func:`nearest_tokens`.

    Returns:
        (N,) int64, 1 to the number of tokens; 0 for rows without a token.

    Raises:
        ValueError: as :func:`nearest_tokens`, or tokens that are not among the ids.
    """
    rows, allowed = _checked(prompt, table, measure, chunk, ids)
    if tokens.shape != rows.shape[:1] or not torch.isin(tokens[tokens >= 0], allowed).all():
        raise ValueError(
            f"tokens are {tuple(tokens.shape)} for {len(rows)} rows: give each row one of the ids "
            "to choose from, or -1"
        )
    own = table[tokens.clamp(min=0)].double()
    limit = _as_closeness(rows, own, measure)[:, None]
    slack = _ROUNDING * (rows.norm(dim=1) * own.norm(dim=1) + own.square().sum(1))[:, None]
    if measure == "cosine":
        slack = torch.full_like(slack, _ROUNDING)
    ranks = torch.ones_like(tokens)
    for part, found in _closeness(rows, table, measure, chunk, allowed):
        is_tied = (found - limit).abs() <= slack
        is_nearer = (found > limit) & ~is_tied
        ranks += (is_nearer | (is_tied & (part < tokens[:, None]))).sum(dim=1)
    return torch.where(tokens >= 0, ranks, 0)


def _checked(
    prompt: Tensor, table: Tensor, measure: str, chunk: int, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows in float64 and the ids to choose from in rising order; refuses what does not fit."""
    if prompt.dim() != 2 or table.dim() != 2 or prompt.shape[1] != table.shape[1]:
        raise ValueError(
            f"prompt {tuple(prompt.shape)} and table {tuple(table.shape)}: give (N, D) and (V, D) "
            "of one backbone"
        )
    _check_numbers("the prompt", prompt)
    if measure not in get_args(Measure):
        raise ValueError(f"measure is {measure!r}; allowed: {', '.join(get_args(Measure))}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give 1 or more rows")
    if ids is None:
        return prompt.double(), torch.arange(len(table), device=prompt.device)
    allowed = ids.to(prompt.device).unique()
    if len(allowed) != len(ids) or (allowed[:1] < 0).any() or (allowed >= len(table)).any():
        raise ValueError(f"ids must be different rows of the table, 0 to {len(table) - 1}")
    return prompt.double(), allowed


def _check_numbers(what: str, tensor: Tensor) -> None:
    """Refuse an empty tensor, integers, NaN and infinity."""
    if not tensor.numel() or not tensor.is_floating_point():
        raise ValueError(f"{what} is {tuple(tensor.shape)} of {tensor.dtype}: give some floats")
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinite numbers: leave it out or tune it again")


def _closeness(
    rows: Tensor, table: Tensor, measure: str, chunk: int, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of ids (c,), and how close their tokens are to the rows (N, c): higher is nearer.

    The squared distance to row a is |a|^2 - (2ab - |b|^2), and |a|^2 is the same for all tokens.
    """
    lengths = rows.norm(dim=1, keepdim=True)
    space = rows.new_empty(min(chunk, len(ids)), rows.shape[1])
    for part in ids.split(chunk):
        # A slice is a view; indexing would copy the chunk before it is converted.
        is_run = int(part[-1] - part[0]) == len(part) - 1
        own = space[: len(part)]
        own.copy_(table[int(part[0]) : int(part[-1]) + 1] if is_run else table[part])
        found = rows @ own.T
        if measure == "cosine":
            found /= (lengths * own.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
        elif measure == "l2":
            found = found.mul_(2).sub_(own.square_().sum(dim=1))
        if not found.isfinite().all():
            raise ValueError("the table holds NaN or infinite numbers: load the backbone again")
        yield part, found


def _as_closeness(rows: Tensor, tokens: Tensor, measure: str) -> Tensor:
    """As :func:`_closeness`, of each row with its own token: (N, D) and (N, D) give (N,)."""
    products = (rows * tokens).sum(dim=1)
    if measure == "cosine":
        norms = rows.norm(dim=1) * tokens.norm(dim=1)
        return products / norms.clamp(min=torch.finfo(torch.float64).tiny)
    return 2 * products - tokens.square().sum(dim=1) if measure == "l2" else products


def _scores(row: Tensor, tokens: Tensor, measure: str) -> Tensor:
    """Scores (c,) of one row (D,) with some tokens (c, D); equal tokens have equal scores."""
    if measure == "l2":
        return (tokens - row).square().sum(dim=1).sqrt()
    return _as_closeness(row.expand_as(tokens), tokens, measure)


def _order(scores: Tensor, measure: str, k: int) -> tuple[Tensor, Tensor]:
    """Places and scores of the k nearest, the nearest first and of equal ones the first."""
    values, places = scores.sort(stable=True, descending=measure != "l2")
    return places[:k], values[:k]


def _largest(values: Tensor, k: int) -> Tensor:
    """Places (N, k) of the k largest values of each row, in rising order; of equal ones the first.

    All places where there are no more than k.
    """
    if values.shape[1] <= k:
        return torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
    top = values.topk(k, dim=1)
    least = top.values[:, -1:]
    if int((values >= least).sum()) == top.indices.numel():  # no ties at the edge
        return top.indices.sort(dim=1).values
    is_above, is_tied = values > least, values == least
    room = k - is_above.sum(dim=1, keepdim=True)
    chosen = is_above | (is_tied & (is_tied.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), k)


# ---- drift and norms -----------------------------------------------------------------------------


def row_drift(prompt: Tensor, init: Tensor) -> Drift:
    """How far each row of a prompt is from the row it started as.

    Args:
        prompt: (N, D), the tuned prompt.
        init: (N, D), what it was tuned from.

    Raises:
        ValueError: not two (N, D) of one shape, NaN or infinite numbers.
    """
    if prompt.dim() != 2 or prompt.shape != init.shape:
        raise ValueError(
            f"prompt {tuple(prompt.shape)} and init {tuple(init.shape)}: give two (N, D) of one "
            "shape"
        )
    _check_numbers("the prompt", prompt)
    _check_numbers("the initial prompt", init)
    tuned, start = prompt.double(), init.double()
    cosine = (tuned * start).sum(dim=1) / (tuned.norm(dim=1) * start.norm(dim=1))
    return Drift((tuned - start).norm(dim=1), cosine.clamp(-1, 1))


def row_norms(table: Tensor, ids: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """Euclidean norms of the rows of a prompt or a vocabulary.

    Args:
        table: (V, D), floating point.
        ids: rows to take; all without it.
        chunk: rows at a time.

    Returns:
        (V,) or as many as ids, float64.
    """
    if ids is None:
        ids = torch.arange(len(table), device=table.device)
    return torch.cat([table[part].double().norm(dim=1) for part in ids.split(chunk)])


# ---- distances and spread ------------------------------------------------------------------------


def frobenius_distances(prompts: Sequence[Tensor] | Tensor) -> Tensor:
    """||A - B||_F of every two prompts; lower is more alike (section 5.3 of the paper).

    Args:
        prompts: R prompts (N, D), or a bank (R, N, D).

    Returns:
        (R, R) float64, symmetric, zeros on the diagonal.

    Raises:
        ValueError: no prompts, prompts of different widths or lengths, NaN or infinite numbers.
    """
    _check_prompts(prompts)
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"prompts of {', '.join(map(str, lengths))} rows have no Frobenius distance: compare "
            "prompts of one length, tune them again with one number of virtual tokens, or compare "
            "their mean rows, which all have one shape"
        )
    return _distances(torch.stack([prompt.double().flatten() for prompt in prompts]))


def mean_row_distances(prompts: Sequence[Tensor] | Tensor) -> Tensor:
    """Euclidean distance between the mean rows of every two prompts, whatever their lengths.

    It does not see what rows do to one another: shuffled rows have the same mean.

    Args:
        prompts: R prompts (N, D), where N may differ.

    Returns:
        (R, R) float64, symmetric, zeros on the diagonal.

    Raises:
        ValueError: no prompts, prompts of different widths, NaN or infinite numbers.
    """
    _check_prompts(prompts)
    return _distances(torch.stack([prompt.double().mean(dim=0) for prompt in prompts]))


def _check_prompts(prompts: Sequence[Tensor] | Tensor) -> None:
    """Refuse what are not prompts of one backbone."""
    if not len(prompts) or any(prompt.dim() != 2 for prompt in prompts):
        raise ValueError("give one or more prompts (N, D)")
    for at, prompt in enumerate(prompts):
        _check_numbers(f"prompt {at}", prompt)
    widths = sorted({prompt.shape[1] for prompt in prompts})
    if len(widths) > 1:
        raise ValueError(
            f"prompts of widths {', '.join(map(str, widths))}: only prompts of one backbone can be "
            "compared"
        )


def _distances(points: Tensor) -> Tensor:
    """Euclidean distances (R, R) of points (R, P), by differences: exact where they are near."""
    return torch.stack([(points - point).norm(dim=1) for point in points])


@dataclass(frozen=True)
class Spread:
    """How far the runs of one group lie apart.

    Variances have ddof 1; NaN stands where there are too few values.

    Attributes:
        group: its name, such as a task.
        runs: number of prompts.
        norm_mean: mean Frobenius norm of its prompts.
        norm_variance: variance of these norms.
        within_mean: mean distance between two of its prompts.
        within_variance: variance of these distances.
        within_pairs: number of pairs of its prompts.
        between_mean: mean distance between one of its prompts and one of another group.
        between_variance: variance of these distances.
        between_pairs: number of such pairs.
    """

    group: str
    runs: int
    norm_mean: float
    norm_variance: float
    within_mean: float
    within_variance: float
    within_pairs: int
    between_mean: float
    between_variance: float
    between_pairs: int


def spread_of_runs(
    prompts: Sequence[Tensor] | Tensor, distances: Tensor, groups: Sequence[str]
) -> list[Spread]:
    """Mean and variance of norms and distances of repeated runs (table 1 of the paper).

    Args:
        prompts: R prompts (N, D).
        distances: (R, R), as from :func:`frobenius_distances`.
        groups: (R,) the group of each prompt, such as its task.

    Returns:
        One for each group, in the order of first places.

    Raises:
        ValueError: not one group and one row of distances for each prompt.
    """
    _check_groups(distances, groups)
    if len(prompts) != len(groups):
        raise ValueError(f"{len(prompts)} prompts and {len(groups)} groups: give each prompt one")
    norms = torch.stack([prompt.double().norm() for prompt in prompts])
    found = []
    for group, places in _places(groups).items():
        others = torch.tensor([at for at in range(len(groups)) if groups[at] != group])
        own = torch.tensor(places)
        above = torch.triu_indices(len(own), len(own), offset=1)
        within = distances[own][:, own][above[0], above[1]]
        between = distances[own][:, others.long()].flatten()
        found.append(
            Spread(
                group,
                len(own),
                *_mean_and_variance(norms[own]),
                *_mean_and_variance(within),
                len(within),
                *_mean_and_variance(between),
                len(between),
            )
        )
    return found


def group_distances(distances: Tensor, groups: Sequence[str]) -> tuple[list[str], Tensor]:
    """Mean distance between the prompts of every two groups.

    Args:
        distances: (R, R).
        groups: (R,) the group of each prompt.

    Returns:
        The G groups in the order of first places, and (G, G) float64; on the diagonal the mean over
        pairs of different prompts of a group, NaN where it has one.

    Raises:
        ValueError: not one row of distances for each group.
    """
    _check_groups(distances, groups)
    places = _places(groups)
    means = torch.full((len(places), len(places)), math.nan, dtype=torch.float64)
    for row, own in enumerate(places.values()):
        for column, other in enumerate(places.values()):
            total = distances[own][:, other].double().sum()
            count = len(own) * (len(other) - (row == column))
            if count:
                means[row, column] = total / count
    return list(places), means


def _check_groups(distances: Tensor, groups: Sequence[str]) -> None:
    """Refuse a matrix that is not of these prompts."""
    if distances.shape != (len(groups), len(groups)) or not len(groups):
        raise ValueError(
            f"distances are {tuple(distances.shape)} for {len(groups)} groups: give (R, R) and a "
            "group for each of R prompts"
        )


def _places(groups: Sequence[str]) -> dict[str, list[int]]:
    """The places of each group."""
    places: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        places.setdefault(group, []).append(at)
    return places


def _mean_and_variance(values: Tensor) -> tuple[float, float]:
    """Mean and variance (ddof 1) of some numbers, NaN where there are too few."""
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.var()) if len(values) > 1 else math.nan


# ---- distance and transfer -----------------------------------------------------------------------


@dataclass(frozen=True)
class RankCorrelation:
    """A rank correlation of two matrices with its permutation test.

    Attributes:
        coefficient: Spearman's rho or Kendall's tau-b; NaN with a reason.
        p: two-sided p-value; NaN with a reason.
        cells: number of cells off the diagonal that both matrices have.
        permutations: number of permutations beside the given order.
        is_exhaustive: whether these are all there are.
        method: "spearman" or "kendall".
        reason: why there is no coefficient; empty where there is one.
    """

    coefficient: float
    p: float
    cells: int
    permutations: int
    is_exhaustive: bool
    method: Rank
    reason: str = ""


def rank_correlation(
    distances: Tensor,
    other: Tensor,
    method: Rank = "spearman",
    permutations: int = 999,
    seed: int = 0,
) -> RankCorrelation:
    """Rank correlation of two matrices off their diagonals, with Mantel's permutation test.

    The cells of a matrix are not independent, as each task stands in many of them, so an ordinary
    p-value would be too small. Mantel (1967) permutes the tasks of one matrix, rows and columns
    together: p = (b + 1) / (m + 1), where b of m permutations have a coefficient at least as far
    from zero. Where the tasks have no more than m + 1 orders, each of the others is taken once,
    and p cannot be below 1 / T!. The paper (section 6.3) sees a trend, without a coefficient.

    Args:
        distances: (T, T), complete off its diagonal.
        other: (T, T), such as the transfer from task to task; need not be symmetric, and cells that
            are NaN are left out.
        method: SciPy's ``spearmanr`` or ``kendalltau``.
        permutations: m, how many at most.
        seed: of random permutations.

    Returns:
        The coefficient and its p-value; with a reason instead where there are fewer than three
        tasks or three cells, or where one of the two is constant.

    Raises:
        ValueError: not two square matrices of one size, distances that are not finite, an unknown
            method, or no permutations.
    """
    import numpy as np

    first, second = (np.asarray(m.double().cpu()) for m in (distances, other))
    _check_matrices(first, second, method, permutations)
    size = len(first)
    cells = np.nonzero(~np.eye(size, dtype=bool) & np.isfinite(second))
    values = second[cells]
    reason = _why_no_rank(size, first[~np.eye(size, dtype=bool)], values)
    if reason:
        return RankCorrelation(math.nan, math.nan, len(values), 0, False, method, reason)
    coefficient = _coefficient(method)
    given = coefficient(first[cells], values)
    orders, is_exhaustive = _orders(size, permutations, seed)
    made = np.array([coefficient(first[np.ix_(o, o)][cells], values) for o in orders])
    # A permutation that makes the cells in question constant has no coefficient: it counts as 0.
    extreme = int((np.abs(np.nan_to_num(made)) >= abs(given) - _ROUNDING).sum())
    p = (extreme + 1) / (len(made) + 1) if math.isfinite(given) else math.nan
    reason = "" if math.isfinite(given) else "the distances of the known cells are all equal"
    return RankCorrelation(given, p, len(values), len(made), is_exhaustive, method, reason)


def _check_matrices(
    first: NDArray[Any], second: NDArray[Any], method: str, permutations: int
) -> None:
    """Refuse matrices that cannot be compared."""
    import numpy as np

    if first.ndim != 2 or first.shape != second.shape or first.shape[0] != first.shape[1]:
        raise ValueError(
            f"matrices of {first.shape} and {second.shape}: give two of (T, T), tasks in one order"
        )
    if not np.isfinite(first[~np.eye(len(first), dtype=bool)]).all():
        raise ValueError("the distances hold NaN or infinite numbers off the diagonal")
    if method not in get_args(Rank):
        raise ValueError(f"method is {method!r}; allowed: {', '.join(get_args(Rank))}")
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}: give 1 or more")


def _why_no_rank(size: int, distances: NDArray[Any], values: NDArray[Any]) -> str:
    """Why there is no rank correlation; empty where there is one."""
    if size < 3:
        return "fewer than three tasks"
    if len(values) < 3:
        return "fewer than three cells off the diagonal"
    for what, numbers in (("distances", distances), ("values", values)):
        if numbers.max() == numbers.min():
            return f"the {what} off the diagonal are all equal"
    return ""


def _coefficient(method: str) -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """The function of two rows of numbers that a method is."""
    import numpy as np
    from scipy.stats import kendalltau, spearmanr

    function: Any = spearmanr if method == "spearman" else kendalltau

    def quiet(a: NDArray[Any], b: NDArray[Any]) -> float:
        """The coefficient; NaN, without a warning, where a row is constant."""
        return math.nan if np.ptp(a) == 0 else float(function(a, b).statistic)

    return quiet


def _orders(size: int, permutations: int, seed: int) -> tuple[list[NDArray[Any]], bool]:
    """Permutations of so many places: all but the given order where they are few enough."""
    import numpy as np

    if math.factorial(size) - 1 <= permutations:
        every = itertools.permutations(range(size))
        return [np.array(order) for order in itertools.islice(every, 1, None)], True
    generator = np.random.default_rng(seed)
    return [generator.permutation(size) for _ in range(permutations)], False
