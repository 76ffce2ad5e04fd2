"""One quadratic problem behind both forms of the matrix-condition metric and both recoveries.

Removing input channels of a dense layer and re-fitting the rest is

    minimise over T'   Σ_rows (T − T')ᵀ Q (T − T')   with  T' zero outside the kept channels S

with a positive definite `Q: [d, d]` and targets `T: [rows, d]`. Two choices matter here:

| form | `T` | `Q` | what may be re-fitted | recovery it matches |
| --- | --- | --- | --- | --- |
| `gram` | the weight `W` | `G = XᵀX` | every kept column of `W` | `least_squares` |
| `mask` | a row of ones | `H = G ∘ (WᵀW)` | one scalar for each kept column | `mask` |

The second holds because `‖X Wᵀ − X diag(m) Wᵀ‖² = (1−m)ᵀ H (1−m)`; `H` is positive semi-definite by Schur's product
theorem.

Either form can be aimed at other outputs than the dense layer's own: with `C = Σ_t r_t x_tᵀ`, the cross moment of what
the output lacks with the inputs, the unconstrained optimum moves from `T` to `T + C Q⁻¹` (gram form) or
`T + diag(WᵀC)ᵀ Q⁻¹` (mask form), and all else stays: the residual of a least-squares fit is orthogonal to every
channel, so fitting kept channels to the new outputs or to that optimum is the same.

The optimum, its cost and the way both change when a channel goes are those of Optimal Brain Surgeon
(Hassibi & Stork, 1993). These formulas are this project's derivation; the COMP paper (arXiv 2501.15255) describes
the steps, not the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Targets `[rows, d]` and positive definite matrix `[d, d]`, both float64."""

    target: Tensor
    matrix: Tensor


def gram_form(weight: Tensor, gram: Tensor, cross: Tensor | None = None) -> Problem:
    """Every kept column may be re-fitted.

    Args:
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, regularised.
        cross: cross moment `[d_out, d_in]` of what the output lacks with the inputs; `None` for nothing.
    """
    return Problem(_aimed(weight.double(), gram, cross), gram)


def mask_gram(weight: Tensor, gram: Tensor) -> Tensor:
    """`H = G ∘ (WᵀW)`, `[d_in, d_in]`: the quadratic form of the output error in a mask over input channels."""
    weight = weight.double()
    return gram * (weight.T @ weight)


def mask_form(weight: Tensor, mask_matrix: Tensor, cross: Tensor | None = None) -> Problem:
    """Only a mask over the kept columns may be re-fitted.

    Args:
        weight: `[d_out, d_in]`.
        mask_matrix: `mask_gram`, regularised.
        cross: as for `gram_form`.
    """
    ones = torch.ones(1, weight.shape[1], dtype=torch.float64, device=weight.device)
    diagonal = None if cross is None else (weight.double() * cross).sum(0, keepdim=True)
    return Problem(_aimed(ones, mask_matrix, diagonal), mask_matrix)


def _aimed(target: Tensor, matrix: Tensor, cross: Tensor | None) -> Tensor:
    if cross is None:
        return target
    return target + torch.cholesky_solve(cross.double().T, torch.linalg.cholesky(matrix)).T


def inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix through its Cholesky factor, float64.

    The inverse itself is needed here, not only its action: its diagonal *is* the metric, and its Schur complement
    updates the metric when channels go.

    Raises:
        torch.linalg.LinAlgError: the matrix isn't positive definite (raise the ridge).
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def collinearity(matrix: Tensor) -> Tensor:
    """Collinearity index squared of each channel, `κ_j² = Q_jj [Q⁻¹]_jj ≥ 1`, `[d]`.

    1 where a channel is orthogonal to all others; grows without bound as the others can reproduce it.
    Source: G. W. Stewart, "Collinearity and least squares regression", Statistical Science 2(1), 1987.
    """
    return matrix.diagonal() * inverse(matrix).diagonal()


def importance(problem: Problem) -> Tensor:
    """Exact increase of the squared error when one channel goes and the others are re-fitted, `[d]`.

    `I_j = ‖T_:j‖² / [Q⁻¹]_jj = ‖T_:j‖² Q_jj / κ_j²`: energy discounted by the matrix condition.
    """
    return problem.target.square().sum(0) / inverse(problem.matrix).diagonal()


def group_importance(problem: Problem, group: Tensor) -> float:
    """The same for channels that go together (an attention head): `tr(T_P ([Q⁻¹]_PP)⁻¹ T_Pᵀ)`.

    Args:
        problem: targets and matrix.
        group: indices of the channels, `[p]`.
    """
    block = inverse(problem.matrix)[group][:, group]
    target = problem.target[:, group]
    return float((target.T * torch.cholesky_solve(target.T, torch.linalg.cholesky(block))).sum())


def solve(problem: Problem, kept: Tensor) -> Tensor:
    """The optimum on the kept channels, `T Q_:S (Q_SS)⁻¹`, `[rows, |S|]`."""
    factor = torch.linalg.cholesky(problem.matrix[kept][:, kept])
    return torch.cholesky_solve((problem.target @ problem.matrix[:, kept]).T, factor).T


def eliminate(problem: Problem, keep: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Remove the least important channels, a block at a time, re-evaluating the others after each block.

    After block `B` has gone, `T_q −= T_B ([Q⁻¹]_BB)⁻¹ [Q⁻¹]_Bq` is the re-fitted optimum and the Schur complement
    `[Q⁻¹]_qq − [Q⁻¹]_qB ([Q⁻¹]_BB)⁻¹ [Q⁻¹]_Bq` the inverse of the remaining `Q`. One-shot ranking
    (`block_size ≥ d − keep`) would remove both of two duplicates; this removes one.

    Args:
        problem: targets and matrix.
        keep: how many channels stay, `1 ≤ keep ≤ d`.
        block_size: channels removed between two evaluations, ≥ 1.

    Returns:
        Indices of the kept channels, ascending, `[keep]`; and every channel's `importance` before anything was
        removed, `[d]`.
    """
    size = problem.matrix.shape[0]
    if not 1 <= keep <= size or block_size < 1:
        raise ValueError(f"keep={keep}, block_size={block_size}: need 1 <= keep <= {size} and block_size >= 1.")
    active = torch.arange(size, device=problem.matrix.device)
    target, inv = problem.target, inverse(problem.matrix)
    first = scores = target.square().sum(0) / inv.diagonal()
    while active.numel() > keep:
        count = min(block_size, active.numel() - keep)
        stays = torch.ones_like(active, dtype=torch.bool)
        stays[torch.topk(scores, count, largest=False).indices] = False
        goes = ~stays
        cross = inv[goes][:, stays]
        transfer = torch.cholesky_solve(cross, torch.linalg.cholesky(inv[goes][:, goes]))
        target = target[:, stays] - target[:, goes] @ transfer
        inv = inv[stays][:, stays] - cross.T @ transfer
        active = active[stays]
        scores = target.square().sum(0) / inv.diagonal()
    return active, first
