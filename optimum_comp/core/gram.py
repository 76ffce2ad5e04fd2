"""Streamed second moments of a dense layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class GramAccumulator:
    """Sums `G = Σ_t w_t x_t x_tᵀ` over batches of inputs; the inputs themselves are never kept.

    Products are formed in float32 and added up in float64. Only the upper block triangle is multiplied, since `G`
    is symmetric.

    Args:
        size: number of input channels `d_in` of the dense layer.
        device: where the sum lives.
        blocks: number of column blocks of the triangle; 1 multiplies the full square.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", blocks: int = 4):
        if size < 1:
            raise ValueError(f"size={size}: a Gram matrix needs at least one channel.")
        self.size = size
        self.tokens = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
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
            FloatingPointError: an input is NaN or infinite.
        """
        if inputs.shape[-1] != self.size:
            raise ValueError(f"inputs have {inputs.shape[-1]} channels, the Gram matrix {self.size}.")
        x = inputs.detach().reshape(-1, self.size).to(device=self._sum.device, dtype=torch.float32)
        self.tokens += x.shape[0]
        if token_weight is not None:
            x = x * token_weight.reshape(-1, 1).to(x).sqrt()
        # A NaN or an infinity anywhere in x makes its column's energy non-finite.
        if not torch.isfinite(torch.linalg.vector_norm(x, dim=0)).all():
            raise FloatingPointError("NaN or infinity in the inputs of the Gram matrix.")
        for start in self._starts:
            rows = slice(start, start + self._step)
            self._sum[rows, start:] += x[:, rows].T @ x[:, start:]

    def value(self) -> Tensor:
        """The Gram matrix, `[d_in, d_in]`, float64, symmetric."""
        upper = torch.triu(self._sum)
        return upper + torch.triu(upper, diagonal=1).T


def cross_moment(outputs: Tensor, inputs: Tensor) -> Tensor:
    """`Σ_t y_t x_tᵀ` over all tokens, `[d_out, d_in]`, float64, of `y: [..., d_out]` and `x: [..., d_in]`."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    return (outputs.reshape(-1, outputs.shape[-1]).float().T @ flat).double()


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
    diagonal = gram.diagonal()
    if not torch.isfinite(gram).all():
        raise FloatingPointError("NaN or infinity in the Gram matrix.")
    # An all-zero matrix (inputs that are always zero) still has to be invertible.
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    return gram + torch.diag_embed(ridge * mean.expand_as(diagonal))
