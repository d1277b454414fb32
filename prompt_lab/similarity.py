"""How alike the prompts of two tasks are, by the subspaces that their rows span.

A tuned prompt (N, D) stands for its task. Its subspace is spanned by the right singular vectors of
the prompt that carry most of its squared norm, and two subspaces are compared by the norm of the
projection of one on the other. Meta prompt tuning (Qin, Li, Zhao and Joty 2023, appendices A.6 and
A.7) chooses source tasks so; it takes the subspace from Saha et al. 2021 (GPM, arXiv 2103.09762)
and the norm of the projection from Lin et al. 2022 (TRGP, arXiv 2202.02931).

The paper leaves open the rank of a subspace, the norm, and how it is scaled. Here the rank is the
smallest that keeps a share of the squared norm (GPM's rule) or a given one, and the norm is the
Frobenius norm, scaled to [0, 1] by what it can be at most. The paper's figures, 0.768 for similar
and 0.306 for dissimilar tasks, lie in that range but need not be on the same scale.

A similarity says something only beside that of unrelated prompts: two random subspaces of k and l
of D dimensions have a mean squared similarity of max(k, l) / D, so for 100 rows of width 1024 (up
to 100 dimensions) about 0.3 is chance. Prompts that were tuned from one initial prompt share what
training left of it.

Rows are not centred. Left out: similarities of rows or of their means, which know where a prompt
lies and not only which directions it spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    for bank in (targets, sources):
        _check_bank(bank)
    if targets.shape[2] != sources.shape[2]:
        raise ValueError(
            f"targets of width {targets.shape[2]} and sources of width {sources.shape[2]}: only "
            "prompts of one backbone can be compared"
        )
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


def _check_bank(bank: Tensor) -> None:
    """Refuse what has no subspaces."""
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
    empty = ~bank.any(dim=2).any(dim=1)
    if empty.any():
        raise ValueError(
            f"{int(empty.sum())} of {len(bank)} prompts are all zeros and span nothing: leave them "
            "out"
        )
