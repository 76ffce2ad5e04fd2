"""Moving the range of activations into weights, so that both survive 8 bits; pure tensor mathematics.

A layer that computes `(x / s) (W diag(s))ᵀ` in place of `x Wᵀ` computes the same, if what makes `x` is divided by `s`.
Where a few channels of `x` are far larger than the rest, one scale for all of them loses the rest; a good `s` evens
them out without making the weight's own channels as uneven. That is SmoothQuant (Xiao et al., arXiv 2211.10438) with
`s_j = a_j^α / w_j^(1−α)`, `a_j` and `w_j` the largest absolute values of channel `j`. Here `α` isn't a constant: it is
the one with the least expected rounding noise, and `s` is rounded to powers of two and kept within the room that the
weights have (see `room_of`), so that folding it in changes no mantissa of any weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


STRENGTHS = tuple(strength / 10 for strength in range(11))
"""The `α` that are tried, beside leaving everything as it is."""

_DIGITS = 53
"""Of a float64, which holds every value of every other dtype."""

_VALUES_AT_A_TIME = 2**20
"""Of a weight whose room is looked for, so that what is worked out in between takes some ten megabytes each."""

_RANGE = 12
"""Scales are within `2^±12`."""

Room = tuple[Tensor, Tensor]
"""For each channel, the least and the largest exponent of two that it may be multiplied by; zero is between them."""


def rounding_noise(scales: Tensor, largest: Tensor, energy: Tensor, tokens: int, weight: Tensor) -> float:
    """Expected squared error of a dense layer's output in 8 bits, summed over tokens.

    Rounding to a step `Δ` adds noise of variance `Δ² / 12`. Activations have one step for all channels,
    `Δ = 2 max_j (a_j / s_j) / 255`, and each channel's noise goes through its column of the weight; a weight's row `i`
    has the step `max_j |W_ij| s_j / 127`, and its noise is multiplied by the activations:
    `T Δ²/12 Σ_ij (W_ij s_j)² + Σ_i Δ_i²/12 Σ_j E_j / s_j²`.

    Args:
        scales: `s`, `[d_in]`.
        largest: `a`, `[d_in]`.
        energy: `E_j = Σ_t x_tj²`, `[d_in]`.
        tokens: `T`.
        weight: `[d_out, d_in]`.
    """
    scaled = weight * scales
    step = 2 * (largest / scales).amax() / 255
    steps = scaled.abs().amax(1) / 127
    inputs = tokens * step.square() * scaled.square().sum()
    weights = steps.square().sum() * (energy / scales.square()).sum()
    return float(inputs + weights) / 12


def find_scales(
    largest: Tensor,
    energy: Tensor,
    tokens: int,
    weight: Tensor,
    owner: Tensor | None = None,
    room: Room | None = None,
) -> tuple[Tensor, float | None]:
    """The scales with the least rounding noise, and their strength.

    Args:
        largest: largest absolute value of each channel of the layer's input, `[d_in]`.
        energy: sum of its squares over the tokens, `[d_in]`.
        tokens: how many.
        weight: of the layer, or of several that read the same input, one below the other, `[d_out, d_in]`.
        owner: which of the producer's channels each input channel is a copy of, `[d_in]`; copies share a scale.
            `None`: each is one of its own.
        room: of each of the producer's channels.

    Returns:
        One power of two for each of the producer's channels, and `α`; ones and `None` if nothing is better.
    """
    largest, energy, weight = largest.double(), energy.double(), weight.double()
    owner = torch.arange(len(largest), device=largest.device) if owner is None else owner
    count = int(owner.max()) + 1
    none = largest.new_zeros(count)
    activations = none.scatter_reduce(0, owner, largest, "amax")
    weights = none.scatter_reduce(0, owner, weight.abs().amax(0), "amax")
    used = (activations > 0) & (weights > 0)
    best = torch.ones_like(none)
    strength, least = None, rounding_noise(best[owner], largest, energy, tokens, weight)
    if not used.any():
        return best, strength
    for candidate in STRENGTHS:
        exponents = candidate * activations.log2() - (1 - candidate) * weights.log2()
        exponents = torch.where(used, exponents, torch.zeros_like(exponents))
        exponents = torch.where(used, exponents - exponents[used].median(), exponents)
        exponents = exponents.round().clamp(-_RANGE, _RANGE)
        scales = torch.exp2(exponents if room is None else exponents.clamp(*room))
        noise = rounding_noise(scales[owner], largest, energy, tokens, weight)
        if noise < least:
            best, strength, least = scales, candidate, noise
    return best, strength


def room_of(weight: Tensor) -> Room:
    """Which powers of two the rows of a weight can be multiplied by with nothing lost, in the weight's own dtype.

    A power of two changes no mantissa, but a value that becomes subnormal loses its last bits, and one that is too
    large becomes infinite. In float16 both are near: it has no exponents beyond `2^−14` and `2^15`.

    Args:
        weight: `[channels, n]`, finite.
    """
    kind = torch.finfo(weight.dtype)
    # In exponents of two: the smallest step between values, and what all values are below.
    step, top = round(math.log2(kind.tiny * kind.eps)), math.frexp(kind.max)[1]
    digits_of, none_down, none_up = torch.tensor((_DIGITS, -_RANGE, top - _RANGE), device=weight.device)
    least, most = [], []
    for rows in weight.split(max(1, _VALUES_AT_A_TIME // max(1, weight.shape[1]))):
        mantissas, exponents = torch.frexp(rows.double())
        # As an integer, whose lowest set bit is the last one that counts.
        digits = torch.ldexp(mantissas, digits_of).to(torch.int64)
        _, places = torch.frexp((digits & -digits).double())
        last, used = exponents - _DIGITS + places - 1, digits != 0
        least.append((step - last).where(used, none_down).amax(1))
        most.append(top - exponents.where(used, none_up).amax(1))
    return torch.cat(least).clamp(-_RANGE, 0).double(), torch.cat(most).clamp(0, _RANGE).double()
