"""Closed-form repair of a dense layer after input channels were removed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from optimum_comp.core.gram import diagonal_shift, regularize
from optimum_comp.core.quadratic import Problem, gram_form, mask_form, mask_gram, optimum, share_own, solve


FORMS = {"condition_gram": "least_squares", "condition_mask": "mask"}
"""Forms of the matrix-condition metric, and the recovery whose re-fit each assumes."""


def problem_of(
    form: str,
    weight: Tensor,
    gram: Tensor,
    ridge: float,
    cross: Tensor | None = None,
    own_share: float = 0.0,
    *,
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
        overwrite: the problem's matrix may take the Gram matrix's memory.
    """
    if form == "condition_gram":
        matrix = gram if overwrite else gram.clone()
        shift = diagonal_shift(matrix, ridge)
        matrix.diagonal().add_(shift)
        return share_own(gram_form(weight, matrix, cross), own_share, shift)
    if form == "condition_mask":
        matrix = mask_gram(weight, gram)
        shift = diagonal_shift(matrix, ridge)
        matrix.diagonal().add_(shift)
        return share_own(mask_form(weight, matrix, cross), own_share, shift)
    raise ValueError(f"neuron metric {form!r} has no quadratic form; these have: {', '.join(FORMS)}.")


def _no_recovery(weight: Tensor, problem: Problem | None, kept: Tensor) -> Tensor:
    return weight[:, kept]


def _mask_tuning(weight: Tensor, problem: Problem | None, kept: Tensor) -> Tensor:
    return weight[:, kept] * solve(_given(problem), kept)


def _least_squares(weight: Tensor, problem: Problem | None, kept: Tensor) -> Tensor:
    return solve(_given(problem), kept)


def _given(problem: Problem | None) -> Problem:
    if problem is None:
        raise ValueError("this recovery solves a quadratic problem, and none was given.")
    return problem


RECOVERIES: dict[str, tuple[str | None, Callable[[Tensor, Problem | None, Tensor], Tensor]]] = {
    "least_squares": ("condition_gram", _least_squares),
    "mask": ("condition_mask", _mask_tuning),
    "none": (None, _no_recovery),
}
"""Form of the quadratic problem, and `(weight [d_out, d_in], problem, kept [|S|]) -> [d_out, |S|]`.

`least_squares` re-fits every kept column, `W_S ← T* Q_:S (Q_SS)⁻¹` (FASP's restoration, arXiv 2501.09412); `mask` one
factor for each of them, folded into it (the COMP paper's mask tuning); `none` keeps them as they are, and can't be
aimed at other outputs.
"""


def recover(
    name: str,
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    ridge: float,
    cross: Tensor | None = None,
    own_share: float = 0.0,
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
    """
    form, repair = RECOVERIES[name]
    weight = weight.to(gram.dtype)
    problem = None if form is None else problem_of(form, weight, gram, ridge, cross, own_share)
    return repair(weight, problem, kept)


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


def energy(weight: Tensor, gram: Tensor) -> float:
    """Squared output of a dense layer over all tokens, `tr(W G Wᵀ)`."""
    weight = weight.to(gram.dtype)
    return float((weight @ gram).mul_(weight).sum())


def relative_error(weight: Tensor, repaired: Tensor, gram: Tensor, kept: Tensor) -> float:
    """Squared difference that the removal makes to the layer's output, over the squared output.

    `‖XWᵀ − X_S W_Sᵀ‖² / ‖XWᵀ‖²`; what a repair aims at elsewhere counts as a difference too.

    Args:
        weight: `[d_out, d_in]` before.
        repaired: `[d_out, |S|]` after.
        gram: `[d_in, d_in]`, not regularised.
        kept: `[|S|]`.
    """
    difference = weight.to(gram.dtype, copy=True)
    difference[:, kept] -= repaired.to(gram.dtype)
    whole = energy(weight, gram)
    return energy(difference, gram) / whole if whole > 0 else 0.0
