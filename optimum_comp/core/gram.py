"""Streamed second moments of a dense layer's inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GramAccumulator:
    """Sums `G = Σ_t w_t x_t x_tᵀ` over batches of inputs; the inputs themselves are never kept.

    Products are formed in float32 and added up in `dtype`. Only the upper block triangle is multiplied, since `G`
    is symmetric.

    Args:
        size: number of input channels `d_in` of the dense layer.
        device: where the sum lives.
        blocks: number of column blocks of the triangle; 1 multiplies the full square.
        dtype: of the sum.
    """

    def __init__(
        self, size: int, device: torch.device | str = "cpu", blocks: int = 4, dtype: torch.dtype = torch.float64
    ):
        if size < 1:
            raise ValueError(f"size={size}: a Gram matrix needs at least one channel.")
        self.size = size
        self.tokens = 0
        self.sum = torch.zeros(size, size, dtype=dtype, device=device)
        step = -(-size // max(1, min(blocks, size)))
        self._starts = range(0, size, step)
        self._step = step

    def update(self, inputs: Tensor, token_weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: `[..., d_in]`, any floating dtype.
            token_weight: `[...]`, non-negative weight of each token's squared error; `None` weighs all alike.

        Raises:
            ValueError: the last dimension isn't `d_in`.
        """
        if inputs.shape[-1] != self.size:
            raise ValueError(f"inputs have {inputs.shape[-1]} channels, the Gram matrix {self.size}.")
        x = inputs.detach().reshape(-1, self.size).to(device=self.sum.device, dtype=torch.float32)
        self.tokens += x.shape[0]
        if token_weight is not None:
            x = x * token_weight.reshape(-1, 1).to(x).sqrt()
        for start in self._starts:
            rows = slice(start, start + self._step)
            _add_product(self.sum[rows, start:], x[:, rows].T, x[:, start:])

    def value(self) -> Tensor:
        """The Gram matrix, `[d_in, d_in]`, symmetric; the accumulator's own memory, so the sum ends here.

        Raises:
            FloatingPointError: an input was NaN or infinite, or its square overflows float32.
        """
        # Any of them is one of its channel's square too.
        if not torch.isfinite(self.sum.diagonal()).all():
            raise FloatingPointError("NaN or infinity in the inputs of the Gram matrix.")
        for start in self._starts:
            rows = slice(start, start + self._step)
            self.sum[rows, rows] = torch.triu(self.sum[rows, rows]) + torch.triu(self.sum[rows, rows], 1).T
            self.sum[start + self._step :, rows] = self.sum[rows, start + self._step :].T
        return self.sum


def add_cross_moment(total: Tensor, outputs: Tensor, inputs: Tensor) -> None:
    """Add `Σ_t y_t x_tᵀ` over the tokens of `y: [..., d_out]` and `x: [..., d_in]` to `total: [d_out, d_in]`.

    The product is formed in float32 and added in the dtype of `total`.
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    _add_product(total, outputs.reshape(-1, outputs.shape[-1]).float().T, flat)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def diagonal_shift(gram: Tensor, ridge: float) -> float:
    """`λ mean(diag G)`: what `regularize` adds to the diagonal.

    Raises:
        FloatingPointError: the matrix holds NaN or infinity.
    """
    # A NaN or an infinity anywhere in a matrix of second moments is one on the diagonal too.
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    if not math.isfinite(mean):
        raise FloatingPointError("NaN or infinity in the Gram matrix.")
    # An all-zero matrix (inputs that are always zero) still has to be invertible.
    return ridge * max(mean, torch.finfo(torch.float32).tiny ** 0.5)


def regularize(gram: Tensor, ridge: float) -> Tensor:
    """Return `G + λ mean(diag G) I`.

    Solving any of this package's least-squares problems with the regularised Gram matrix is the same as solving it
    with `G` under a ridge penalty that pulls towards the *unmodified* weight: the penalty's right-hand side
    `λ W_S` is just what the extra diagonal contributes to `W G_:S`.

    Args:
        gram: `[d, d]`, symmetric positive semi-definite.
        ridge: λ > 0, dimensionless.

    Raises:
        FloatingPointError: the matrix holds NaN or infinity.
    """
    regularized = gram.clone()
    regularized.diagonal().add_(diagonal_shift(gram, ridge))
    return regularized
