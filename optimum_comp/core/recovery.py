"""Closed-form repair of a dense layer after input channels were removed."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_comp.core.gram import diagonal_shift, regularize
from optimum_comp.core.quadratic import Problem, gram_form, mask_form, mask_gram, optimum, share_own, solve


RECOVERIES: dict[str, str | None] = {
    "least_squares": "condition_gram",
    "mask": "condition_mask",
    "none": None,
}
"""Recoveries, and the form of the quadratic problem that each solves.

`least_squares` re-fits every kept column, `W_S ← T* Q_:S (Q_SS)⁻¹` (FASP's restoration, arXiv 2501.09412); `mask` one
factor for each of them, folded into it (the COMP paper's mask tuning); `none` keeps them as they are, and can't be
aimed at other outputs.
"""

_ROWS = 256
"""Of a Gram matrix, that are copied at a time."""

FORMS = {form: name for name, form in RECOVERIES.items() if form is not None}
"""Forms of the matrix-condition metric, and the recovery whose re-fit each assumes."""


def problem_of(
    form: str,
    weight: Tensor,
    gram: Tensor,
    ridge: float,
    cross: Tensor | None = None,
    own_share: float = 0.0,
    *,
    root: Tensor | None = None,
    overwrite: bool = False,
) -> Problem:
    """The regularised quadratic problem that a form of the metric and its recovery stand for.

    Args:
        form: a name in `FORMS`.
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, not regularised.
        ridge: λ of `regularize`.
        cross: cross moment `[d_out, d_in]` of what the output is to gain with the inputs; `None` for nothing.
        own_share: how much of the layer's own outputs `cross` holds (see `share_own`).
        root: `R: [d_out, d_out]`, by which errors in the output are measured, as `‖R e‖²`; `None`: as `‖e‖²`.
        overwrite: the problem's matrix may take the Gram matrix's memory.
    """
    if form == "condition_gram":
        problem = gram_form(weight, gram if overwrite else gram.clone(), cross)._replace(root=root)
    elif form == "condition_mask":
        # A mask has one row, which all outputs share: how they are measured is a part of the matrix.
        if root is not None:
            weight, cross = root @ weight.to(root), None if cross is None else root @ cross.to(root)
        problem = mask_form(weight, mask_gram(weight, gram), cross)
    else:
        raise ValueError(f"neuron metric {form!r} has no quadratic form; these have: {', '.join(FORMS)}.")
    shift = diagonal_shift(problem.matrix, ridge)
    problem.matrix.diagonal().add_(shift)
    return share_own(problem, own_share, shift)


def weight_of(form: str, columns: Tensor, solution: Tensor) -> Tensor:
    """The repaired weight that a solution of a form's problem stands for, `[d_out, |S|]`.

    Args:
        form: a name in `FORMS`.
        columns: kept columns of the weight, `[d_out, |S|]`.
        solution: the optimum on them, `[rows, |S|]`.
    """
    return solution if form == "condition_gram" else columns * solution


def recover(
    name: str,
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    ridge: float,
    cross: Tensor | None = None,
    own_share: float = 0.0,
    root: Tensor | None = None,
) -> Tensor:
    """Repair a dense layer whose input channels `kept: [|S|]` stay, `[d_out, |S|]`, in the Gram matrix's dtype.

    Args:
        name: in `RECOVERIES`.
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, not regularised.
        kept: `[|S|]`.
        ridge: λ of `regularize`.
        cross: see `problem_of`.
        own_share: see `problem_of`.
        root: see `problem_of`.
    """
    form, weight = RECOVERIES[name], weight.to(gram.dtype)
    if form is None:
        return weight[:, kept]
    problem = problem_of(form, weight, gram, ridge, cross, own_share, root=root)
    return weight_of(form, weight[:, kept], solve(problem, kept))


def refit(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Re-fit a whole dense layer to other outputs than its own: the bridge over removed layers.

    `W ← W + C (G + λ̄ I)⁻¹`, equal to fitting the wanted outputs under a ridge that pulls towards `W`. Source of the
    idea: ReplaceMe, arXiv 2505.02819.

    Args:
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, not regularised.
        cross: cross moment `[d_out, d_in]` of what the output lacks with the inputs.
        ridge: λ of `regularize`.

    Returns:
        `[d_out, d_in]`, in the Gram matrix's dtype.
    """
    return optimum(gram_form(weight, regularize(gram, ridge), cross))


def foreseeable(cross: tuple[Tensor, Tensor], gram: Tensor, ridge: float) -> Tensor:
    """A cross moment of which, in each row, only the share is left that inputs foretell on other tokens, too.

    Fitting a row to what is mostly noise adds noise: some `d_in / tokens` of its energy. With the fits `X_A`, `X_B` to
    each half of the tokens, the share of a fit that is best on the other half is
    `φ = (X_A · C_B + X_B · C_A) / ½ (X_A G X_Aᵀ + X_B G X_Bᵀ)`, kept within [0, 1].

    Args:
        cross: moments `[d_out, d_in]` of two halves of the tokens.
        gram: second moments of all inputs, `[d_in, d_in]`, not regularised.
        ridge: λ of `regularize`.

    Returns:
        `φ (C_A + C_B)`, `[d_out, d_in]`.
    """
    factor = torch.linalg.cholesky(regularize(gram, ridge))
    fits = [2 * torch.cholesky_solve(half.T, factor).T for half in cross]
    gained = (fits[0] * cross[1]).sum(1) + (fits[1] * cross[0]).sum(1)
    spent = (((fits[0] @ gram) * fits[0]).sum(1) + ((fits[1] @ gram) * fits[1]).sum(1)) / 2
    share = torch.where(spent > 0, gained / spent, spent).clamp(0, 1)
    return share[:, None] * (cross[0] + cross[1])


def energy(weight: Tensor, gram: Tensor) -> float:
    """Squared output of a dense layer over all tokens, `tr(W G Wᵀ)`."""
    weight = weight.to(gram.dtype)
    return float((weight @ gram).mul_(weight).sum())


def energy_of_kept(weight: Tensor, gram: Tensor, kept: Tensor) -> float:
    """Squared output of a dense layer that reads some channels alone, `tr(W G_SS Wᵀ)`; to float32's precision.

    Some rows of the Gram matrix are copied at a time, never all of `G_SS`; and each product of two channels, which
    stands on both sides of its diagonal, is formed once.

    Args:
        weight: `[d_out, |S|]`.
        gram: `[d_in, d_in]`.
        kept: `[|S|]`.
    """
    weight = weight.float()
    total = 0.0
    for start in range(0, len(kept), _ROWS):
        part = gram[kept[start : start + _ROWS]][:, kept[start:]].float()
        part[:, _ROWS:] *= 2
        total += float((weight[:, start:] @ part.T).mul_(weight[:, start : start + _ROWS]).sum(dtype=torch.float64))
    return max(total, 0.0)
