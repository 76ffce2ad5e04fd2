"""Rounding a dense layer's weight to a few bits, in blocks that share a scale; pure tensor mathematics.

A weight `W: [d_out, d_in]` becomes `codes ∘ scales`: each row is cut into blocks of consecutive input channels, and a
block has one scale, which half precision holds, as it is stored. The squared error of the output over the calibration
tokens is `tr(E G Eᵀ)` with `E = W − Q` and `G = XᵀX`, so what one channel's rounding does wrong, the channels after it
can make good:

1. Optimal Brain Surgeon's update, column by column: after column `j` is rounded, its error `e_j` is spread over the
   columns that follow by `−e_j [U]_j,: / U_jj`, `U` the upper Cholesky factor of `(G + λ̄I)⁻¹`. That is GPTQ (Frantar
   et al., arXiv 2210.17323).
2. For the codes found, the best scales of a row are a least-squares problem with as many unknowns as the row has
   blocks: minimise `(w − D s)ᵀ G (w − D s)`, where `D: [d_in, blocks]` holds each block's codes in its column. Its
   normal equations are this project's own few lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimum_comp.core.gram import regularize
from optimum_comp.core.quadratic import inverse


_RATIOS = torch.linspace(0.5, 1.0, 21)
"""Shares of the largest weight of a block that are tried as the end of its range."""

_EXACT = 2**-20
"""Relative error that storing `codes ∘ scales` in float32 leaves, with room."""

_HALF = 2**-11
"""Relative error that half precision leaves at most, but for numbers that are too large or too small for it."""

_INSIDE = 0.49
"""How far from a code, in scales, what is rounded to it is put at most."""

_WORKING_BYTES = 2**28
"""What is worked out in between for some of a weight's rows; of a whole matrix it can be many times its size."""


class Blocks(NamedTuple):
    """A rounded weight: `weight[i, j] = (codes[i, j] − 2^(bits−1)) · scales[i, j // block_size]`.

    Attributes:
        codes: `[d_out, blocks · block_size]`, uint8; columns past `d_in` hold the code of zero.
        scales: `[d_out, blocks]`; may be negative.
        bits: 4 or 8.
        width: `d_in`.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    width: int

    @property
    def block_size(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def weight(self) -> Tensor:
        """What the codes stand for, `[d_out, d_in]`."""
        signed = self.codes.to(self.scales) - 2 ** (self.bits - 1)
        return (signed * self.scales.repeat_interleave(self.block_size, 1))[:, : self.width]


def nearest(weight: Tensor, bits: int, block_size: int) -> Blocks:
    """Round each weight to the nearest code, with the scale of each block that loses least.

    Args:
        weight: `[d_out, d_in]`.
        bits: 4 or 8.
        block_size: weights that share a scale; the last block is padded with zeros.
    """
    codes, scales = [], []
    for rows in weight.split(_rows_at_a_time(4 * weight.shape[1] * weight.itemsize)):
        blocks = _padded(rows, block_size).unflatten(1, (-1, block_size))
        scale = _best_scales(blocks, torch.ones_like(blocks[:1]), bits)
        codes.append(_codes(blocks, scale, bits).flatten(1).add(2 ** (bits - 1)).to(torch.uint8))
        scales.append(scale.squeeze(-1))
    return Blocks(torch.cat(codes), torch.cat(scales), bits, weight.shape[1])


def compensated(weight: Tensor, gram: Tensor, bits: int, block_size: int, ridge: float = 0.01) -> Blocks:
    """Round so that the layer's output changes least; see the module's description.

    Args:
        weight: `[d_out, d_in]`.
        gram: `[d_in, d_in]`, not regularised.
        bits: 4 or 8.
        block_size: weights that share a scale; the last block is padded with zeros.
        ridge: λ of `regularize`.

    Raises:
        FloatingPointError: the Gram matrix holds NaN or infinity.
        torch.linalg.LinAlgError: it can't be inverted (raise the ridge).
    """
    rows, width = weight.shape
    weight = weight.to(gram.dtype)
    matrix = regularize(gram, ridge)
    factor = torch.linalg.cholesky(inverse(matrix), upper=True)
    left = _padded(weight, block_size)
    count = left.shape[1] // block_size
    codes = torch.zeros_like(left)
    scales = left.new_ones(rows, count)
    for number in range(count):
        start, stop = number * block_size, min((number + 1) * block_size, width)
        block = left[:, start : start + block_size].clone()
        # What an error in a channel costs once those behind it have made good what they can.
        price = block.new_zeros(1, block_size)
        price[:, : stop - start] = factor.diagonal()[start:stop].square().reciprocal()
        scale = _best_scales(block[:, None], price[:, None], bits)[:, 0]
        errors = block.new_zeros(rows, stop - start)
        for column in range(stop - start):
            place = start + column
            code = _codes(block[:, column : column + 1], scale, bits)
            codes[:, place : place + 1] = code
            error = (block[:, column] - (code * scale)[:, 0]) / factor[place, place]
            block[:, column : stop - start] -= torch.outer(error, factor[place, place:stop])
            errors[:, column] = error
        scales[:, number : number + 1] = scale
        left[:, stop:width] -= errors @ factor[start:stop, stop:]
    # As many rows' normal equations as there is room for, and their factors.
    step = _rows_at_a_time(2 * count**2 * left.itemsize)
    refitted = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        refitted.append(_refit_scales(weight[part], matrix, codes[part], scales[part], block_size))
    scales = torch.cat(refitted)
    return Blocks(codes.add(2 ** (bits - 1)).to(torch.uint8), scales, bits, width)


def within_its_codes(weight: Tensor, blocks: Blocks) -> Tensor:
    """The values nearest to a weight that rounding to the nearest takes for given codes, `[d_out, d_in]`.

    Args:
        weight: `[d_out, d_in]`.
        blocks: its codes and scales.
    """
    codes = blocks.codes.to(weight) - 2 ** (blocks.bits - 1)
    scales = blocks.scales.to(weight).repeat_interleave(blocks.block_size, 1)
    place = torch.where(scales == 0, 0, _padded(weight, blocks.block_size) / scales)
    found: Tensor = torch.minimum(torch.maximum(place, codes - _INSIDE), codes + _INSIDE) * scales
    return found[:, : blocks.width]


def straight_through(weight: Tensor, scales: Tensor, bits: int, block_size: int) -> Tensor:
    """A weight rounded to the nearest codes, through which gradients pass as if it weren't.

    The straight-through estimator (Bengio et al., arXiv 1308.3432).

    Args:
        weight: `[d_out, d_in]`.
        scales: `[d_out, blocks]`.
        bits: 4 or 8.
        block_size: weights that share a scale.
    """
    found: Tensor = _StraightThrough.apply(weight, scales, bits, block_size)
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, bits: int, block_size: int) -> Tensor:
        low, high = _limits(bits)
        blocks = _padded(weight, block_size).unflatten(1, (-1, block_size))
        scale = scales[..., None]
        # As `_codes`, but for ties: this is done to all weights at every step, and a product is twice as fast.
        codes = (blocks * torch.where(scale == 0, 0, scale.reciprocal())).round_().clamp_(low, high)
        return codes.mul_(scale).flatten(1)[:, : weight.shape[1]]

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None, None]:
        return above[0], None, None, None


def on_grid(weight: Tensor, bits: int, block_size: int) -> Blocks | None:
    """The codes and scales of a weight that is rounded already, whatever its scales were; `None` if it isn't.

    A block that was made as `codes ∘ scale` has its largest entry at `scale` times a whole number up to 2^(bits−1), so
    that number, and the sign, are all that has to be found. Where several fit, one whose scale half precision holds.

    Args:
        weight: `[d_out, d_in]`, in float32.
        bits: 4; of 8, too many grids fit by chance.
        block_size: weights that share a scale; the last block is padded with zeros.
    """
    found = []
    # A few rows first: nearly always they say already that it isn't.
    for rows in (weight[:8], *weight[8:].split(_rows_at_a_time(8 * weight.shape[1] * weight.itemsize))):
        part = _on_grid(rows, bits, block_size)
        if part is None:
            return None
        found.append(part)
    codes, scales = torch.cat([part.codes for part in found]), torch.cat([part.scales for part in found])
    return Blocks(codes, scales, bits, weight.shape[1])


def _on_grid(weight: Tensor, bits: int, block_size: int) -> Blocks | None:
    blocks = _padded(weight, block_size).unflatten(1, (-1, block_size))
    place = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, place)
    scales = torch.zeros_like(largest)
    is_open = largest != 0
    low, high = _limits(bits)
    candidates = [*range(1, high + 1), *range(-1, low - 1, -1)]
    for is_half, code in [(True, code) for code in candidates] + [(False, code) for code in candidates]:
        if not is_open.any():
            break
        scale = largest / code
        error = (blocks - _codes(blocks, scale, bits) * scale).abs().amax(-1, keepdim=True)
        fits = is_open & (error <= _EXACT * largest.abs())
        if is_half:
            fits &= scale == _stored(scale)
        scales = torch.where(fits, scale, scales)
        is_open &= ~fits
    if is_open.any():
        return None
    codes = _codes(blocks, scales, bits).flatten(1).add(2 ** (bits - 1)).to(torch.uint8)
    return Blocks(codes, scales.squeeze(-1), bits, weight.shape[1])


def rounding_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Squared change of the layer's output over the calibration tokens, `tr(E G Eᵀ)`.

    Args:
        weight: `[d_out, d_in]`.
        rounded: `[d_out, d_in]`.
        gram: `[d_in, d_in]`.
    """
    difference = weight.to(gram.dtype) - rounded.to(gram.dtype)
    return float(((difference @ gram) * difference).sum())


def _rows_at_a_time(row: int) -> int:
    """How many rows are worked on together that take so many bytes each."""
    return max(1, _WORKING_BYTES // max(1, row))


def _padded(weight: Tensor, block_size: int) -> Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % block_size))


def _limits(bits: int) -> tuple[int, int]:
    """The codes that are used. Of 8 bits, −128 is left out: some processors' kernels overflow on it."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Signed codes, in the dtype of the values; of a scale of zero, zeros."""
    low, high = _limits(bits)
    return torch.where(scales == 0, 0, values / scales).round_().clamp_(low, high)


def _best_scales(blocks: Tensor, price: Tensor, bits: int) -> Tensor:
    """The scale of each block that loses least, `[d_out, blocks, 1]`.

    Tried are several ends of the range, and both signs: there is one more negative code than positive ones.

    Args:
        blocks: `[d_out, blocks, block_size]`.
        price: of a squared error in each place, broadcast to `blocks`.
        bits: 4 or 8.
    """
    low, high = _limits(bits)
    largest = blocks.abs().amax(-1, keepdim=True)
    best, least = _stored(largest / high), None
    for sign in (1, -1) if -low > high else (1,):
        for ratio in _RATIOS.tolist():
            scale = _stored(sign * ratio * largest / -low)
            loss = ((blocks - _codes(blocks, scale, bits) * scale).square_() * price).sum(-1, keepdim=True)
            if least is None:
                best, least = scale, loss
            else:
                best = torch.where(loss < least, scale, best)
                least = torch.minimum(loss, least)
    return best


def _refit_scales(weight: Tensor, matrix: Tensor, codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """The scales that change the output least, given the codes, `[d_out, blocks]`."""
    rows, width = weight.shape
    count = scales.shape[1]
    codes = codes[:, :width]
    normal = weight.new_zeros(rows, count, count)
    starts = range(0, width, block_size)
    for number, start in enumerate(starts):
        block = slice(start, start + block_size)
        product = torch.nn.functional.pad((codes[:, block] @ matrix[block]) * codes, (0, -width % block_size))
        normal[:, number] = product.unflatten(1, (-1, block_size)).sum(-1)
    wanted = torch.nn.functional.pad((weight @ matrix) * codes, (0, -width % block_size))
    right = wanted.unflatten(1, (-1, block_size)).sum(-1)
    # A block without any code but zero leaves an empty row; it keeps its scale.
    empty = normal.diagonal(dim1=1, dim2=2) <= 0
    normal.diagonal(dim1=1, dim2=2).add_(empty)
    right = torch.where(empty, scales, right)
    solved, failed = torch.linalg.solve_ex(normal, right)
    return _stored(torch.where((failed == 0)[:, None] & solved.isfinite().all(-1, keepdim=True), solved, scales))


def _stored(scales: Tensor) -> Tensor:
    """The nearest scales in half precision, which is what a model's file holds; those that it can't hold stay."""
    half = scales.half().to(scales)
    return torch.where((half - scales).abs() <= _HALF * scales.abs(), half, scales)
