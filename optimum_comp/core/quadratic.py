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

All functions work in the dtype of the matrix. `eliminate` scales it to a unit diagonal first: a Cholesky factorisation
is then about as accurate as the best diagonal scaling allows (van der Sluis, 1969), which is what makes float32 safe
where a few channels carry nearly all of the energy.

Errors of the rows need not count alike: with a `root` `R: [r, rows]`, a channel is worth `‖R T*_:j‖² / [Q⁻¹]_jj`,
the squared error of `R T'`. In the gram form the re-fit of what stays is the same for every `R` of full rank, since
rows don't share columns; in the mask form they do, and `H = G ∘ (WᵀRᵀRW)` (see `recovery.problem_of`).

The optimum, its cost and the way both change when a channel goes are those of Optimal Brain Surgeon
(Hassibi & Stork, 1993). These formulas are this project's derivation; the COMP paper (arXiv 2501.15255) describes
the steps, not the equations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A quadratic problem; all tensors in the matrix's dtype.

    Attributes:
        target: what to reproduce, `[rows, d]`.
        matrix: positive definite, `[d, d]`.
        pull: what moves the unconstrained optimum to `target + pull · matrix⁻¹`, `[rows, d]`; `None` for nothing.
        root: by which the importance of a channel counts the rows' errors, `[r, rows]`; `None`: all alike.
    """

    target: Tensor
    matrix: Tensor
    pull: Tensor | None = None
    root: Tensor | None = None


class Elimination(NamedTuple):
    """What `eliminate` found.

    Attributes:
        kept: indices of the channels that stay, ascending, `[keep]`.
        scores: the `importance` of every channel, or unit, before anything was removed, `[d]`.
        target: the optimum on the kept channels, `[rows, keep]`: what `solve` would return.
        cost: squared error that the removal adds, `min_T' Σ_rows (T* − T')ᵀ Q (T* − T')`, every row counting alike.
    """

    kept: Tensor
    scores: Tensor
    target: Tensor
    cost: float


def gram_form(weight: Tensor, gram: Tensor, cross: Tensor | None = None) -> Problem:
    """Every kept column may be re-fitted.

    Args:
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, regularised.
        cross: cross moment `[d_out, d_in]` of what the output lacks with the inputs; `None` for nothing.
    """
    return Problem(weight.to(gram.dtype), gram, None if cross is None else cross.to(gram.dtype))


def mask_gram(weight: Tensor, gram: Tensor) -> Tensor:
    """`H = G ∘ (WᵀW)`, `[d_in, d_in]`: the quadratic form of the output error in a mask over input channels."""
    weight = weight.to(gram.dtype)
    return (weight.T @ weight).mul_(gram)


def mask_form(weight: Tensor, mask_matrix: Tensor, cross: Tensor | None = None) -> Problem:
    """Only a mask over the kept columns may be re-fitted.

    Args:
        weight: `[d_out, d_in]`.
        mask_matrix: `mask_gram`, regularised.
        cross: as for `gram_form`.
    """
    ones = mask_matrix.new_ones(1, weight.shape[1])
    diagonal = None if cross is None else (weight.to(ones) * cross.to(ones)).sum(0, keepdim=True)
    return Problem(ones, mask_matrix, diagonal)


def share_own(problem: Problem, share: float, ridge: float) -> Problem:
    """For a `pull` whose cross moment is that of whole outputs, and not of what the own ones lack.

    With `C = Σ_t r_t x_tᵀ` of wanted outputs `r`, scaled by a share `α`, what the own outputs lack has the moment
    `C − α T G`, `G = Q − λ̄I` being the matrix before it was regularised. So `T + (C − α T G) Q⁻¹` is
    `(1 − α) T + (C + α λ̄ T) Q⁻¹`, and neither the own outputs nor `T G` have to be computed.

    Args:
        problem: with a `pull`.
        share: α.
        ridge: λ̄, what was added to the diagonal.
    """
    if problem.pull is None or share == 0:
        return problem
    pull = problem.pull.add(problem.target, alpha=share * ridge)
    return problem._replace(target=(1 - share) * problem.target, pull=pull)


def optimum(problem: Problem) -> Tensor:
    """The unconstrained optimum `T* = T + P Q⁻¹`, `[rows, d]`."""
    if problem.pull is None:
        return problem.target
    return problem.target + torch.cholesky_solve(problem.pull.T, torch.linalg.cholesky(problem.matrix)).T


def inverse(matrix: Tensor, *, overwrite: bool = False) -> Tensor:
    """Inverse of a symmetric positive definite matrix through its Cholesky factor.

    The inverse itself is needed here, not only its action: its diagonal *is* the metric, and its Schur complement
    updates the metric when channels go.

    Args:
        matrix: `[d, d]`, contiguous.
        overwrite: compute it in the matrix's own memory, which for a wide layer is the largest there is.

    Raises:
        torch.linalg.LinAlgError: the matrix isn't positive definite (raise the ridge).
    """
    if not overwrite or matrix.device.type != "cpu":
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    columns = factor_in_place(matrix)
    return torch.cholesky_inverse(columns, out=columns)


def factor_in_place(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric positive definite matrix, in the matrix's own memory on a processor.

    Args:
        matrix: `[d, d]`, contiguous.

    Raises:
        torch.linalg.LinAlgError: it isn't positive definite (raise the ridge).
    """
    if matrix.device.type != "cpu":
        return torch.linalg.cholesky(matrix)
    # LAPACK counts by columns: a transposed view of the symmetric matrix is one that it can work in.
    columns = matrix.T
    torch.linalg.cholesky(columns, out=columns)
    return columns


def collinearity(matrix: Tensor) -> Tensor:
    """Collinearity index squared of each channel, `κ_j² = Q_jj [Q⁻¹]_jj ≥ 1`, `[d]`.

    1 where a channel is orthogonal to all others; grows without bound as the others can reproduce it.
    Source: G. W. Stewart, "Collinearity and least squares regression", Statistical Science 2(1), 1987.
    """
    return matrix.diagonal() * inverse(matrix).diagonal()


def importance(problem: Problem) -> Tensor:
    """Exact increase of the squared error when one channel goes and the others are re-fitted, `[d]`.

    `I_j = ‖T*_:j‖² / [Q⁻¹]_jj = ‖T*_:j‖² Q_jj / κ_j²`: energy discounted by the matrix condition. With a root, the
    increase of the error that it measures, `‖R T*_:j‖² / [Q⁻¹]_jj`.
    """
    return _measured(optimum(problem), problem.root).square().sum(0) / inverse(problem.matrix).diagonal()


def _measured(target: Tensor, root: Tensor | None) -> Tensor:
    return target if root is None else root @ target


def group_importance(problem: Problem, group: Tensor) -> float:
    """The same for channels that go together (an attention head): `tr(T*_P ([Q⁻¹]_PP)⁻¹ T*_Pᵀ)`.

    Args:
        problem: targets and matrix.
        group: indices of the channels, `[p]`.
    """
    block = inverse(problem.matrix)[group][:, group]
    target = _measured(optimum(problem)[:, group], problem.root)
    return float((target.T * torch.cholesky_solve(target.T, torch.linalg.cholesky(block))).sum())


def solve(problem: Problem, kept: Tensor) -> Tensor:
    """The optimum on the kept channels, `T* Q_:S (Q_SS)⁻¹`, `[rows, |S|]`."""
    factor = torch.linalg.cholesky(problem.matrix[kept][:, kept])
    wanted = problem.target @ problem.matrix[:, kept]
    if problem.pull is not None:
        wanted += problem.pull[:, kept]
    return torch.cholesky_solve(wanted.T, factor).T


class _Shrinking:
    """A problem from which channels go, scaled to a unit diagonal.

    After block `B` has gone, `T_q −= T_B ([Q⁻¹]_BB)⁻¹ [Q⁻¹]_Bq` is the re-fitted optimum and the Schur complement
    `[Q⁻¹]_qq − [Q⁻¹]_qB ([Q⁻¹]_BB)⁻¹ [Q⁻¹]_Bq` the inverse of the remaining `Q`.
    """

    def __init__(self, problem: Problem, *, overwrite: bool):
        self._scale = problem.matrix.diagonal().rsqrt()
        matrix = problem.matrix if overwrite else problem.matrix.clone()
        self.inverse = inverse(matrix.mul_(self._scale[:, None]).mul_(self._scale), overwrite=True)
        self.target = problem.target / self._scale
        if problem.pull is not None:
            self.target.addmm_(problem.pull * self._scale, self.inverse)
        # What importance is told from: the target itself, unless errors are measured otherwise.
        self._measured = _measured(self.target, problem.root)
        self.gone = torch.zeros(problem.matrix.shape[0], dtype=torch.bool, device=self.inverse.device)
        self._cost = 0.0

    def copy(self) -> _Shrinking:
        """The same, from which other channels can go."""
        other = copy.copy(self)
        other.inverse, other.target, other.gone = self.inverse.clone(), self.target.clone(), self.gone.clone()
        other._measured = other.target if self._measured is self.target else self._measured.clone()
        return other

    def importance(self) -> Tensor:
        """Of each channel, `[d]`."""
        # In exact arithmetic the diagonal of the inverse of a matrix with a unit diagonal is at least 1.
        return self._measured.square().sum(0) / self.inverse.diagonal().clamp_min(1)

    def unit_importance(self, channels: Tensor) -> Tensor:
        """Of units that haven't gone, with channels `[units, width]`: `tr(T_P ([Q⁻¹]_PP)⁻¹ T_Pᵀ)` each, `[units]`."""
        factors = torch.linalg.cholesky(self.inverse[channels[:, :, None], channels[:, None, :]])
        targets = self._measured.T[channels]
        return torch.linalg.solve_triangular(factors, targets, upper=False).square().sum((1, 2))

    def remove(self, block: Tensor) -> float:
        """Have channels go together; returns by how much the measured error grows."""
        self.gone[block] = True
        rows, out = self.inverse[block], self.target[:, block]
        factor = torch.linalg.cholesky(rows[:, block])
        added = measured = _quadratic(out, factor)
        self._cost += added
        transfer = torch.cholesky_solve(rows, factor)
        if self._measured is not self.target:
            gone = self._measured[:, block]
            measured = _quadratic(gone, factor)
            self._measured.addmm_(gone, transfer, alpha=-1)
        self.target.addmm_(out, transfer, alpha=-1)
        self.inverse.addmm_(rows.T, transfer, alpha=-1)
        return measured

    def remove_units(self, channels: Tensor, classes: Tensor, keep: int) -> float:
        """Have the least important units go, one at a time, until so many of each class are left.

        Units of which a channel has gone already aren't there any more.

        Args:
            channels: of each unit, `[units, width]`.
            classes: of each unit, `[units]`.
            keep: how many stay of each class.

        Returns:
            By how much the measured error grows.
        """
        there = ~self.gone[channels].any(1)
        channels, classes, grown = channels[there], classes[there], 0.0
        while True:
            sizes = torch.bincount(classes)
            removable = (sizes > keep)[classes]
            if not removable.any():
                return grown
            scores = self.unit_importance(channels).masked_fill(~removable, torch.inf)
            worst = int(scores.argmin())
            grown += self.remove(channels[worst])
            channels = torch.cat([channels[:worst], channels[worst + 1 :]])
            classes = torch.cat([classes[:worst], classes[worst + 1 :]])

    def result(self, scores: Tensor) -> Elimination:
        """What is left."""
        kept = torch.nonzero(~self.gone).flatten()
        return Elimination(kept, scores, self.target[:, kept] * self._scale[kept], self._cost)


def _quadratic(rows: Tensor, factor: Tensor) -> float:
    """`tr(T M⁻¹ Tᵀ)` of `T: [rows, p]` and the Cholesky factor of `M: [p, p]`."""
    return float((rows.T * torch.cholesky_solve(rows.T, factor)).sum())


def removal_costs(problem: Problem, keeps: Sequence[int]) -> list[float]:
    """What removing ever more channels costs, the others re-fitted: the measured error at each of several sizes.

    Channels go as in `eliminate`, a block at a time.

    Args:
        problem: targets and matrix; the matrix is overwritten.
        keeps: how many channels stay, descending, the first one all of them.

    Returns:
        `Σ_rows (R (T* − T'))ᵀ Q (R (T* − T'))` for each of `keeps`; 0 for the first.

    Raises:
        ValueError: the sizes don't descend from that of the problem to 1 or more.
    """
    size = problem.matrix.shape[0]
    if not keeps or keeps[0] != size or keeps[-1] < 1 or any(a <= b for a, b in pairwise(keeps)):
        raise ValueError(f"keeps={list(keeps)}: need sizes that descend from {size} to 1 or more.")
    left, costs = _Shrinking(problem, overwrite=True), [0.0]
    for before, after in pairwise(keeps):
        scores = left.importance().masked_fill(left.gone, torch.inf)
        costs.append(costs[-1] + left.remove(torch.topk(scores, before - after, largest=False).indices))
    return costs


def eliminate(problem: Problem, keep: int, block_size: int, *, overwrite: bool = False) -> Elimination:
    """Remove the least important channels, a block at a time, re-evaluating the others after each block.

    One-shot ranking (`block_size ≥ d − keep`) would remove both of two duplicates; this removes one. When the last
    block has gone, the target is the least-squares repair of what is left: nothing has to be solved for again.

    Args:
        problem: targets and matrix.
        keep: how many channels stay, `1 ≤ keep ≤ d`.
        block_size: channels removed between two evaluations, ≥ 1.
        overwrite: work in the matrix's own memory, and so destroy it: no second `[d, d]` matrix is made.
    """
    size = problem.matrix.shape[0]
    if not 1 <= keep <= size or block_size < 1:
        raise ValueError(f"keep={keep}, block_size={block_size}: need 1 <= keep <= {size} and block_size >= 1.")
    left = _Shrinking(problem, overwrite=overwrite)
    first = scores = left.importance()
    for remaining in range(size, keep, -block_size):
        scores = first if remaining == size else left.importance()
        count = min(block_size, remaining - keep)
        left.remove(torch.topk(scores.masked_fill(left.gone, torch.inf), count, largest=False).indices)
    return left.result(first)


def eliminate_units(
    problem: Problem, channels: Tensor, classes: Tensor, keep: int, *, overwrite: bool = False
) -> Elimination:
    """Remove the least important units, one at a time, re-evaluating the others after each.

    Args:
        problem: targets and matrix.
        channels: of each unit, `[units, width]`; a channel is of one unit.
        classes: which class each unit is of, `[units]`; from each class, units go until `keep` are left.
        keep: how many stay of each class, ≥ 1.
        overwrite: see `eliminate`.

    Returns:
        With the score of each unit, `[units]`, in place of each channel's.

    Raises:
        ValueError: a class has fewer units than are to stay.
    """
    sizes = torch.bincount(classes)
    if keep < 1 or int(sizes.min()) < keep:
        raise ValueError(f"keep={keep}: need 1 <= keep <= {int(sizes.min())}, the units of the smallest class.")
    left = _Shrinking(problem, overwrite=overwrite)
    first = left.unit_importance(channels)
    left.remove_units(channels, classes, keep)
    return left.result(first)


def units_removal_costs(
    problem: Problem, groups: tuple[Tensor, Tensor], heads: tuple[Tensor, Tensor], keeps: Sequence[tuple[int, int]]
) -> list[float]:
    """What removing groups of channels costs, and then units within those that stay, the others re-fitted.

    Both go as in `eliminate_units`.

    Args:
        problem: targets and matrix; the matrix is overwritten.
        groups: channels `[groups, width]` and classes `[groups]`.
        heads: the same of smaller units, each within a group.
        keeps: how many groups stay of each class, and how many heads of each class.

    Returns:
        The measured error, `Σ_rows (R (T* − T'))ᵀ Q (R (T* − T'))`, for each of `keeps`.
    """
    left, cost = _Shrinking(problem, overwrite=True), 0.0
    found = {}
    counts = sorted({many for many, _ in keeps}, reverse=True)
    for many in counts:
        cost += left.remove_units(*groups, many)
        # More groups are to go from here, and not from where heads have gone.
        branch, more = left if many == counts[-1] else left.copy(), cost
        for few in sorted({few for of, few in keeps if of == many}, reverse=True):
            more += branch.remove_units(*heads, few)
            found[many, few] = more
    return [found[each] for each in keeps]
