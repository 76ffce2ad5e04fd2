"""Closed-form repair of a dense layer after input channels were removed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from optimum_comp.core.gram import regularize
from optimum_comp.core.quadratic import gram_form, mask_form, mask_gram, solve


Recovery = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def no_recovery(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, cross: Tensor | None = None) -> Tensor:
    """The kept columns as they are, `[d_out, |S|]`."""
    return weight.double()[:, kept]


def mask_tuning(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, cross: Tensor | None = None) -> Tensor:
    """One factor for each kept column, `m = (H_SS)⁻¹ H_S,: 1`, folded into it, `[d_out, |S|]`."""
    mask = solve(mask_form(weight, regularize(mask_gram(weight, gram), ridge), cross), kept)
    return weight.double()[:, kept] * mask


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, cross: Tensor | None = None) -> Tensor:
    """Every kept column re-fitted, `W_S ← W G_:S (G_SS)⁻¹`, `[d_out, |S|]` (FASP's restoration, arXiv 2501.09412)."""
    return solve(gram_form(weight, regularize(gram, ridge), cross), kept)


RECOVERIES: dict[str, Recovery] = {"least_squares": least_squares, "mask": mask_tuning, "none": no_recovery}
"""`(weight [d_out, d_in], gram [d_in, d_in], kept [|S|], ridge, cross [d_out, d_in]) -> [d_out, |S|]`, float64.

`cross` aims the repair at other outputs than the layer's own (see `quadratic`); `none` can't be aimed.
"""


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
        `[d_out, d_in]`, float64.
    """
    return gram_form(weight, regularize(gram, ridge), cross).target


def relative_error(weight: Tensor, repaired: Tensor, gram: Tensor, kept: Tensor) -> float:
    """Squared difference that the removal makes to the layer's output, over the squared output.

    `‖XWᵀ − X_S W_Sᵀ‖² / ‖XWᵀ‖²`; what a repair aims at elsewhere counts as a difference too.

    Args:
        weight: `[d_out, d_in]` before.
        repaired: `[d_out, |S|]` after.
        gram: `[d_in, d_in]`, not regularised.
        kept: `[|S|]`.
    """
    whole = weight.double()
    difference = whole.clone()
    difference[:, kept] -= repaired.double()
    energy = float(((whole @ gram) * whole).sum())
    return float(((difference @ gram) * difference).sum()) / energy if energy > 0 else 0.0
