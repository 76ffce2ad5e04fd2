"""What an error in a layer's output costs: the output factor of the Fisher information.

The loss grows with an error `e` in what a layer adds to the residual stream by `½ eᵀ F e`, to second order and
averaged over tokens, where `F = E[g gᵀ]` is the second moment of the loss's gradient `g` there, with next tokens drawn
from the model's own predictions. It is one of the two factors of K-FAC (Martens & Grosse, arXiv 1503.05671); the Gram
matrix of a dense layer's inputs is the other one. LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244) prunes by
both. Here `F` says which channel goes; what stays is re-fitted as without it, since the optimum is the same (see
`core.quadratic`).
"""

from __future__ import annotations

import torch
from torch import Tensor


_FLOOR = 1e-3
"""Share of the mean diagonal that is added to it: directions that no gradient had are cheap, not free."""


def root_of(moment: Tensor) -> Tensor | None:
    """`R` with `RᵀR = F / mean(diag F)`, its diagonal raised a little, upper triangular, `[d, d]`.

    Args:
        moment: `F`, or any multiple of it, `[d, d]`.

    Returns:
        `None` where there is no gradient at all: then nothing tells one error from another.

    Raises:
        FloatingPointError: the moment holds NaN or infinity.
    """
    mean = moment.diagonal().mean()
    if not torch.isfinite(mean):
        raise FloatingPointError("NaN or infinity in the gradients of the loss.")
    if mean <= 0:
        return None
    scaled = moment / mean
    scaled.diagonal().add_(_FLOOR)
    return torch.linalg.cholesky(scaled, upper=True)
