"""How alike the prompts of two tasks are: their subspaces, their rows, their numbers.

A tuned prompt (N, D) stands for its task, and each function compares all prompts of one bank with
all of another, (R, N, D) x (S, N, D) -> (R, S). What differs is what of a prompt counts:

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
Left out: neighbouring pairs of rows (the authors' "bigram") and counts of alike rows.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Direction = Literal["target", "source"]

ENERGY = 0.95
"""Share of the squared norm that a subspace keeps."""


def prompt_subspace(prompt: Tensor, *, energy: float = ENERGY, rank: int | None = None) -> Tensor:
    """The subspace that carries most of a prompt's squared norm.

    With singular values s_1 >= s_2 >= ..., k is the smallest number with
    s_1^2 + ... + s_k^2 >= energy * (s_1^2 + s_2^2 + ...), the rule of Saha et al. 2021, whose
    columns are rows here. Singular values that are rounding beside the largest count as 0. The
    order, the sign and a common factor of the rows do not matter. Where singular values k and k + 1
    are equal, the subspace is one of several.

    Args:
        prompt: (N, D), floating point.
        energy: share of the squared norm, above 0 and at most 1.
        rank: k; ``energy`` is then not used.

    Returns:
        (D, k) float64 with orthonormal columns.

    Raises:
        ValueError: not (N, D), NaN or infinite numbers, a prompt of zeros, an energy or a rank out
            of range, or a rank above the number of dimensions that the prompt spans.
    """
    if prompt.dim() != 2:
        raise ValueError(f"a prompt is (N, D), not {tuple(prompt.shape)}")
    return _bases(prompt.unsqueeze(0), energy, rank)[0]


def subspace_similarity(a: Tensor, b: Tensor) -> float:
    """Norm of the projection of one subspace on the other, ||A^T B||_F / sqrt(min(k, l)).

    It is symmetric and in [0, 1]: 1 where one subspace lies inside the other, 0 where they are
    orthogonal. It is the root mean square of the cosines of the min(k, l) principal angles. Two
    random subspaces have a mean squared similarity of max(k, l) / D.

    Lin et al. 2022 project a gradient on a subspace and compare norms; Qin, Li, Zhao and Joty 2023
    project a subspace, without saying in which norm and scale.

    Args:
        a: (D, k) with orthonormal columns, as from :func:`prompt_subspace`.
        b: (D, l), the same.

    Raises:
        ValueError: not two matrices of one height with at least one column, or columns that are not
            orthonormal.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or not a.numel() * b.numel():
        raise ValueError(
            f"bases of {tuple(a.shape)} and {tuple(b.shape)}: give (D, k) and (D, l) of one D"
        )
    a, b = a.double(), b.double()
    for basis in (a, b):
        unit = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        if not torch.allclose(basis.T @ basis, unit, rtol=0, atol=1e-4):
            raise ValueError(
                f"the columns of a basis of {tuple(basis.shape)} are not orthonormal: make it with "
                "prompt_subspace"
            )
    norm = (a.T @ b).norm() / min(a.shape[1], b.shape[1]) ** 0.5
    return min(float(norm), 1.0)


def subspace_similarities(
    targets: Tensor, sources: Tensor, *, energy: float = ENERGY, rank: int | None = None
) -> Tensor:
    """:func:`subspace_similarity` of every target with every source.

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D); the N may differ from that of the targets.
        energy: as in :func:`prompt_subspace`.
        rank: as in :func:`prompt_subspace`.

    Returns:
        (R, S) float64.

    Raises:
        ValueError: as :func:`prompt_subspace`, or prompts of two widths.
    """
    _check_pair(targets, sources)
    bases = _bases(sources, energy, rank)
    ranks = [basis.shape[1] for basis in bases]
    joined = torch.cat(bases, dim=1).T
    found = []
    for basis in _bases(targets, energy, rank):
        squares = (joined @ basis).square().sum(dim=1)
        sums = torch.stack([part.sum() for part in squares.split(ranks)])
        least = sums.new_tensor(ranks).clamp(max=basis.shape[1])
        found.append((sums / least).sqrt().clamp(max=1.0))
    return torch.stack(found)


def subspace_ranks(prompts: Tensor, *, energy: float = ENERGY, rank: int | None = None) -> Tensor:
    """How many dimensions the subspace of each prompt has, k.

    Args:
        prompts: (R, N, D), floating point.
        energy: as in :func:`prompt_subspace`.
        rank: as in :func:`prompt_subspace`.

    Returns:
        (R,) int64.

    Raises:
        ValueError: as :func:`prompt_subspace`.
    """
    _check_bank(prompts)
    return _ranks(torch.linalg.svdvals(prompts.double()), prompts, energy, rank)


def _bases(bank: Tensor, energy: float, rank: int | None) -> list[Tensor]:
    """Orthonormal bases (D, k), float64, of the prompts of a bank (R, N, D)."""
    _check_bank(bank)
    _, values, rows = torch.linalg.svd(bank.double(), full_matrices=False)
    ranks = _ranks(values, bank, energy, rank).tolist()
    return [own[:k].T for own, k in zip(rows, ranks, strict=True)]


def _ranks(values: Tensor, bank: Tensor, energy: float, rank: int | None) -> Tensor:
    """Ranks (R,) of the prompts of a bank (R, N, D) by their singular values (R, min(N, D))."""
    empty = ~bank.any(dim=2).any(dim=1)
    if empty.any():
        raise ValueError(
            f"{int(empty.sum())} of {len(bank)} prompts are all zeros and span nothing: leave them "
            "out"
        )
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}: give a share above 0 and at most 1")
    most = min(bank.shape[1:])
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(
            f"rank is {rank}: prompts of {bank.shape[1]} x {bank.shape[2]} allow 1 to {most}"
        )
    # As NumPy's matrix_rank; prompts come in float32, also where the tensor is of another type.
    rounding = min(torch.finfo(bank.dtype).eps, torch.finfo(torch.float32).eps)
    spans = values > values[:, :1] * max(bank.shape[1:]) * rounding
    if rank is not None:
        least = int(spans.sum(dim=1).min())
        if rank > least:
            raise ValueError(
                f"rank is {rank}, but a prompt spans only {least} dimensions: give at most {least}"
            )
        return torch.full_like(values[:, 0], rank, dtype=torch.int64)
    kept = (values * spans).square().cumsum(dim=1)
    return (kept < energy * kept[:, -1:]).sum(dim=1) + 1


# ---- rows and numbers ----------------------------------------------------------------------------


def feature_similarities(targets: Tensor, sources: Tensor, *, unit_rows: bool = False) -> Tensor:
    """FEATURE: cosine of the mean rows of every target with those of every source.

    Lin et al. 2024, equation 3, after Vu et al. 2022 (SPoT). The order of the rows and the size of
    a prompt do not matter.

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D); the N may differ from that of the targets.
        unit_rows: whether all rows have length 1 before the mean, as in the authors' code; by
            default they are taken as they are, as in the equation.

    Returns:
        (R, S) float64, from -1 to 1.

    Raises:
        ValueError: not two such banks of one width, NaN or infinite numbers, a prompt whose mean
            row is zero, or, with ``unit_rows``, a row of zeros.
    """
    _check_pair(targets, sources)
    ours, theirs = (_rows(bank, unit_rows).mean(dim=1) for bank in (targets, sources))
    return _cosines(ours, theirs, "mean rows")


def unigram_similarities(targets: Tensor, sources: Tensor, *, unit_rows: bool = False) -> Tensor:
    """UNIGRAM: cosine of the means over width, a number for each row, of targets and sources.

    Lin et al. 2024, section 6.1. Row i of one prompt is compared with row i of the other, so a new
    order of the rows of one of them matters.

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D).
        unit_rows: as in :func:`feature_similarities`.

    Returns:
        (R, S) float64, from -1 to 1.

    Raises:
        ValueError: as :func:`feature_similarities`, or prompts of two lengths.
    """
    _check_pair(targets, sources, one_length=True)
    ours, theirs = (_rows(bank, unit_rows).mean(dim=2) for bank in (targets, sources))
    return _cosines(ours, theirs, "means over width")


def max_similarities(
    targets: Tensor,
    sources: Tensor,
    *,
    over: Direction = "target",
    unit_rows: bool = True,
) -> Tensor:
    """MAX: the mean over rows of the largest cosine with a row of the other prompt.

    Lin et al. 2024, equation 4: each row of the target looks for the most alike row of the source,
    and the mean is over the target's rows. It is not symmetric; the authors' code has the mean over
    the source's rows, which is ``over="source"``. The order of the rows does not matter, and with
    ``unit_rows`` their sizes do not either.

    Rows are multiplied in float32 (float64 where a bank has it), one target at a time, so that
    memory stays near that of the banks.

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D); the N may differ from that of the targets.
        over: whose rows the mean is over, and look for the most alike one of the other.
        unit_rows: whether all rows have length 1 first, so that products are cosines; otherwise
            they are inner products, and long rows count more.

    Returns:
        (R, S) float64, from -1 to 1 for unit rows.

    Raises:
        ValueError: not two such banks of one width, NaN or infinite numbers, with ``unit_rows`` a
            row of zeros, or another ``over``.
    """
    if over not in get_args(Direction):
        raise ValueError(f"over is {over!r}; allowed: {', '.join(get_args(Direction))}")
    _check_pair(targets, sources)
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

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D).

    Returns:
        (R, S) float64, from -1 to 1.

    Raises:
        ValueError: not two such banks of one length and width, NaN or infinite numbers, or a prompt
            of zeros.
    """
    _check_pair(targets, sources, one_length=True)
    return _cosines(targets.double().flatten(1), sources.double().flatten(1), "prompts")


def frobenius_distances(targets: Tensor, sources: Tensor) -> Tensor:
    """Frobenius norm of the difference of every target and every source: a distance.

    Small ones are alike. The same numbers added to all prompts do not matter; sizes and the order
    of the rows do. Differences are taken before they are squared, so that equal prompts have
    distance 0.

    Args:
        targets: (R, N, D), floating point.
        sources: (S, N, D).

    Returns:
        (R, S) float64, at least 0.

    Raises:
        ValueError: not two such banks of one length and width, or NaN or infinite numbers.
    """
    _check_pair(targets, sources, one_length=True)
    ours, theirs = (bank.double().flatten(1) for bank in (targets, sources))
    return torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")


def _rows(bank: Tensor, unit: bool) -> Tensor:
    """A bank (R, N, D) in float64, with rows of length 1 where that is asked for."""
    bank = bank.double()
    if not unit:
        return bank
    lengths = bank.norm(dim=2, keepdim=True)
    if not lengths.all():
        raise ValueError(
            f"{int((lengths == 0).sum())} rows are zeros and have no direction: leave their "
            "prompts out, or take rows as they are"
        )
    return bank / lengths


def _cosines(targets: Tensor, sources: Tensor, what: str) -> Tensor:
    """Cosines (R, S) of vectors (R, W) and (S, W), float64."""
    units = []
    for vectors in (targets, sources):
        lengths = vectors.norm(dim=1, keepdim=True)
        if not lengths.all():
            raise ValueError(
                f"{int((lengths == 0).sum())} of {len(vectors)} {what} are zero and have no "
                "direction: leave these prompts out"
            )
        units.append(vectors / lengths)
    return (units[0] @ units[1].T).clamp(-1, 1)


# ---- checks --------------------------------------------------------------------------------------


def _check_pair(targets: Tensor, sources: Tensor, *, one_length: bool = False) -> None:
    """Refuse banks that cannot be compared."""
    for bank in (targets, sources):
        _check_bank(bank)
    if targets.shape[2] != sources.shape[2]:
        raise ValueError(
            f"targets of width {targets.shape[2]} and sources of width {sources.shape[2]}: only "
            "prompts of one backbone can be compared"
        )
    if one_length and targets.shape[1] != sources.shape[1]:
        raise ValueError(
            f"targets of {targets.shape[1]} rows and sources of {sources.shape[1]}: row is "
            "compared with row, so give prompts of one length"
        )


def _check_bank(bank: Tensor) -> None:
    """Refuse what is no bank of finite prompts."""
    if bank.dim() != 3 or not bank.numel() or not bank.is_floating_point():
        raise ValueError(
            f"prompts are (R, N, D) of floating point, none of them 0; here {tuple(bank.shape)} of "
            f"{bank.dtype}"
        )
    wrong = ~bank.isfinite().flatten(1).all(dim=1)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {len(bank)} prompts hold NaN or infinite numbers: leave them "
            "out"
        )
