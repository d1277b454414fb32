"""How alike the prompts of two tasks are: their subspaces, their rows, their numbers.

A tuned prompt (N, D) stands for its task, and each function compares all prompts of one bank with
all of another: targets (R, N, D) x sources (S, N, D) -> (R, S) float64. Both are of one width D,
and where row is compared with row (UNIGRAM, cosine, Frobenius) of one length N. Other sizes, and
rows or prompts without a direction where one is needed, are a ValueError. What of a prompt counts:

- subspace: which directions its rows span;
- FEATURE: the mean of its rows; UNIGRAM: the mean of each row's numbers;
- MAX: for each row the most alike row of the other prompt;
- cosine and Frobenius: all its numbers, each at its place. The cosine of mean-pooled prompts is
  FEATURE.

**Subspace.** The subspace of a prompt is spanned by the right singular vectors that carry most of
its squared norm, and two subspaces are compared by the norm of the projection of one on the other.
Meta prompt tuning (Qin, Li, Zhao and Joty 2023, appendices A.6 and A.7) chooses source tasks so; it
takes the subspace from Saha et al. 2021 (GPM, arXiv 2103.09762) and the norm of the projection from
Lin et al. 2022 (TRGP, arXiv 2202.02931). The paper leaves open the rank of a subspace, the norm,
and how it is scaled. Here the rank is the smallest that keeps a share of the squared norm (GPM's
rule) or a given one, and the norm is the Frobenius norm, scaled to [0, 1] by what it can be at
most. The paper's figures, 0.768 for similar and 0.306 for dissimilar tasks, lie in that range but
need not be on the same scale. Such a similarity says something only beside that of unrelated
prompts: two random subspaces of k and l of D dimensions have a mean squared similarity of max(k, l)
/ D, so for 100 rows of width 1024 (up to 100 dimensions) about 0.3 is chance. Rows are not centred.

**FEATURE, UNIGRAM, MAX** are those of Lin et al. 2024, "Exploring the Effectiveness and Consistency
of Task Selection in Intermediate-Task Transfer Learning", equations 3 and 4. Their code gives all
rows length 1 first, also for FEATURE and UNIGRAM, where the equations do not; and its MAX takes the
mean over the rows of the source, where equation 4 takes it over those of the target. The defaults
here follow the equations.

Prompts that were tuned from one initial prompt share what training left of it, in every measure.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Direction = Literal["target", "source"]

ENERGY = 0.95
"""Share of the squared norm that a subspace keeps."""


# ---- subspaces -----------------------------------------------------------------------------------


def subspaces(bank: Tensor, *, energy: float = ENERGY, rank: int | None = None) -> list[Tensor]:
    """The subspace that carries most of the squared norm of each prompt.

    With singular values s_1 >= s_2 >= ..., k is the smallest number with
    s_1^2 + ... + s_k^2 >= energy * (s_1^2 + s_2^2 + ...), the rule of Saha et al. 2021, whose
    columns are rows here. Singular values that are rounding beside the largest count as 0. The
    order, the sign and a common factor of the rows do not matter. Where singular values k and k + 1
    are equal, the subspace is one of several.

    Args:
        bank: (R, N, D), floating point.
        energy: share of the squared norm, above 0 and at most 1.
        rank: k; ``energy`` is then not used.

    Returns:
        For each prompt (D, k) float64 with orthonormal columns.

    Raises:
        ValueError: a prompt of zeros, an energy or a rank out of range, or a rank above the number
            of dimensions that a prompt spans.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}: give a share above 0 and at most 1")
    if zeros := int((~bank.flatten(1).any(dim=1)).sum()):
        raise ValueError(f"{zeros} of {len(bank)} prompts are all zeros and span nothing")
    _, values, rows = torch.linalg.svd(bank.double(), full_matrices=False)
    # As NumPy's matrix_rank; prompts come in float32, also where the tensor is of another type.
    rounding = min(torch.finfo(bank.dtype).eps, torch.finfo(torch.float32).eps)
    spans = values > values[:, :1] * max(bank.shape[1:]) * rounding
    kept, least = (values * spans).square().cumsum(dim=1), int(spans.sum(dim=1).min())
    if rank is not None and not 1 <= rank <= least:
        raise ValueError(
            f"rank is {rank}, but a prompt spans {least} dimensions: give 1 to {least}"
        )
    ranks = ((kept < energy * kept[:, -1:]).sum(dim=1) + 1).tolist()
    if rank is not None:
        ranks = [rank] * len(bank)
    return [own[:k].T for own, k in zip(rows, ranks, strict=True)]


def subspace_similarities(
    targets: Tensor, sources: Tensor, *, energy: float = ENERGY, rank: int | None = None
) -> Tensor:
    """Norm of the projection of one subspace on the other, ||A^T B||_F / sqrt(min(k, l)).

    It is symmetric and in [0, 1]: 1 where one subspace lies inside the other, 0 where they are
    orthogonal. It is the root mean square of the cosines of the min(k, l) principal angles.

    Lin et al. 2022 project a gradient on a subspace and compare norms; Qin, Li, Zhao and Joty 2023
    project a subspace, without saying in which norm and scale. Flags and errors: `subspaces`.
    """
    _check_sizes(targets, sources)
    bases = subspaces(sources, energy=energy, rank=rank)
    ranks = [basis.shape[1] for basis in bases]
    joined = torch.cat(bases, dim=1).T
    found = []
    for basis in subspaces(targets, energy=energy, rank=rank):
        squares = (joined @ basis).square().sum(dim=1)
        sums = torch.stack([part.sum() for part in squares.split(ranks)])
        found.append((sums / sums.new_tensor(ranks).clamp(max=basis.shape[1])).sqrt())
    return torch.stack(found).clamp(max=1)


# ---- rows and numbers ----------------------------------------------------------------------------


def feature_similarities(targets: Tensor, sources: Tensor, *, unit_rows: bool = False) -> Tensor:
    """FEATURE: cosine of the mean rows of every target with those of every source.

    Lin et al. 2024, equation 3, after Vu et al. 2022 (SPoT). The order of the rows and the size of
    a prompt do not matter. With ``unit_rows`` all rows have length 1 before the mean, as in the
    authors' code; by default they are taken as they are, as in the equation.
    """
    _check_sizes(targets, sources)
    ours, theirs = (_rows(bank, unit_rows).mean(dim=1) for bank in (targets, sources))
    return _cosines(ours, theirs, "mean rows")


def unigram_similarities(targets: Tensor, sources: Tensor, *, unit_rows: bool = False) -> Tensor:
    """UNIGRAM: cosine of the means over width, a number for each row, of targets and sources.

    Lin et al. 2024, section 6.1. Row i of one prompt is compared with row i of the other, so a new
    order of the rows of one of them matters. ``unit_rows`` as in `feature_similarities`.
    """
    _check_sizes(targets, sources, one_length=True)
    ours, theirs = (_rows(bank, unit_rows).mean(dim=2) for bank in (targets, sources))
    return _cosines(ours, theirs, "means over width")


def max_similarities(
    targets: Tensor, sources: Tensor, *, over: Direction = "target", unit_rows: bool = True
) -> Tensor:
    """MAX: the mean over rows of the largest cosine with a row of the other prompt.

    Lin et al. 2024, equation 4: each row of the target looks for the most alike row of the source,
    and the mean is over the target's rows. It is not symmetric; the authors' code has the mean over
    the source's rows, which is ``over="source"``. The order of the rows does not matter, and with
    ``unit_rows`` their sizes do not either.

    Without ``unit_rows`` products are inner products instead of cosines, and long rows count more.
    Rows are multiplied in float32 (float64 where a bank has it), one target at a time, so that
    memory stays near that of the banks.
    """
    if over not in get_args(Direction):
        raise ValueError(f"over is {over!r}; allowed: {', '.join(get_args(Direction))}")
    _check_sizes(targets, sources)
    wide = torch.promote_types(targets.dtype, sources.dtype) == torch.float64
    kind = torch.float64 if wide else torch.float32
    ours, theirs = (_rows(bank, unit_rows).to(kind) for bank in (targets, sources))
    joined = theirs.flatten(0, 1).T
    found = []
    for target in ours:
        products = (target @ joined).unflatten(1, theirs.shape[:2])  # (N, S, N of the sources)
        largest = products.amax(dim=2 if over == "target" else 0)
        found.append(largest.double().mean(dim=0 if over == "target" else 1))
    similarities = torch.stack(found)
    return similarities.clamp(-1, 1) if unit_rows else similarities


def cosine_similarities(targets: Tensor, sources: Tensor) -> Tensor:
    """Cosine of all N x D numbers of every target with those of every source.

    The size of a prompt does not matter; the order of its rows does.
    """
    _check_sizes(targets, sources, one_length=True)
    return _cosines(targets.double().flatten(1), sources.double().flatten(1), "prompts")


def frobenius_distances(targets: Tensor, sources: Tensor) -> Tensor:
    """Frobenius norm of the difference of every target and every source: a distance.

    Small ones are alike. The same numbers added to all prompts do not matter; sizes and the order
    of the rows do. Differences are taken before they are squared, so that equal prompts have
    distance 0.
    """
    _check_sizes(targets, sources, one_length=True)
    ours, theirs = (bank.double().flatten(1) for bank in (targets, sources))
    return torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")


def _rows(bank: Tensor, unit: bool) -> Tensor:
    return _units(bank.double(), "rows") if unit else bank.double()


def _cosines(targets: Tensor, sources: Tensor, what: str) -> Tensor:
    return (_units(targets, what) @ _units(sources, what).T).clamp(-1, 1)


def _units(vectors: Tensor, what: str) -> Tensor:
    lengths = vectors.norm(dim=-1, keepdim=True)
    if wrong := int((~lengths.isfinite() | (lengths == 0)).sum()):
        raise ValueError(
            f"{wrong} {what} are zero or not finite and have no direction: leave their prompts out"
        )
    return vectors / lengths


def _check_sizes(targets: Tensor, sources: Tensor, *, one_length: bool = False) -> None:
    (ours, width), (theirs, other) = targets.shape[1:], sources.shape[1:]
    if width != other:
        raise ValueError(
            f"targets of width {width} and sources of width {other}: only prompts of one backbone "
            "can be compared"
        )
    if one_length and ours != theirs:
        raise ValueError(
            f"targets of {ours} rows and sources of {theirs}: row is compared with row, so give "
            "prompts of one length"
        )
