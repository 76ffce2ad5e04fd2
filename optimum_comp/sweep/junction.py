"""How what a dense layer computes reaches the residual stream, and what its repair has to be weighted by for that."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.families import Axis, Family


class Junction:
    """`residual + m · norm(W x + b)`; without a norm, `residual + m · b + m · W x`.

    A norm behind the dense layer is, for one token, a number: `norm(z)_i = γ_i s z_i`. With `s` held at what the dense
    weight gives, fitting the residual stream is least squares in `diag(γ) W`, each token weighted by `s²`: repair,
    alignment and bridge stay closed forms.

    Args:
        family: the family.
        config: the model's.
        axis: which dense layer: the axis' consumer.
        layer: the decoder layer, its weights at hand; a copy of the norm is kept.
    """

    def __init__(self, family: Family, config: Any, axis: Axis, layer: nn.Module):
        self.multiplier = float(getattr(config, family.multiplier)) if family.multiplier else 1.0
        self.norm: nn.Module | None = None
        self._bias: Tensor | None = None
        self._gains: Tensor | None = None
        if axis.norm:
            self.norm = copy.deepcopy(layer.get_submodule(axis.norm))
            weight = axis.consumer.matrix(layer)
            bias = getattr(axis.consumer.module(layer), "bias", None)
            self._bias = None if bias is None else bias.detach()
            # Of a constant vector, a norm of this kind makes its gains; it is large for the norm's epsilon to vanish.
            self._gains = self.norm(weight.new_full((weight.shape[0],), 1e3)).detach()

    def contribution(self, output: Tensor) -> Tensor:
        """What reaches the residual stream of `W x: [..., d_out]`."""
        if self.norm is not None:
            output = self.norm(output if self._bias is None else output + self._bias)
        return output if self.multiplier == 1.0 else self.multiplier * output

    def token_scales(self, output: Tensor) -> Tensor | None:
        """`s` of each token for `W x: [..., d_out]`, `[...]`; `None` without a norm."""
        if self.norm is None or self._gains is None:
            return None
        output = output if self._bias is None else output + self._bias
        normed, plain = self.norm(output).float(), (self._gains * output).float()
        energy = plain.square().sum(-1)
        return torch.where(energy > 0, normed.square().sum(-1) / energy, energy).sqrt()

    def target(self, lacking: Tensor, scales: Tensor | None) -> Tensor:
        """What the cross moment with the inputs is taken of, for the residual stream to gain `lacking: [..., d_out]`.

        Without a norm that is `lacking / m`. Behind a norm, with token weights `s²`, the target of `diag(γ) W x` is to
        move by `lacking / (m s)`, and the moment is of `s lacking / m`. But the norm gives all outputs one length:
        what a channel gains, all others pay for, and one with a small `γ` has to change much to gain little. So each
        channel's move is regularised as all are, `Σ γ_i² (δ_i − lacking_i / γ_i)² + mean(γ²) Σ δ_i²`, which leaves
        `γ_i² / (γ_i² + mean(γ²))` of it.

        Args:
            lacking: what is to be gained; behind a norm, beyond what is there.
            scales: `s` of each token, `[...]`; `None` without a norm.
        """
        if self.multiplier != 1.0:
            lacking = lacking / self.multiplier
        if scales is None or self._gains is None:
            return lacking
        squares = self._gains.square()
        return scales[..., None] * (squares / (squares + squares.mean())) * lacking

    def gained(self, weight: Tensor) -> Tensor:
        """`diag(γ) W`, `[d_out, d_in]`."""
        return weight if self._gains is None else self._safe_gains().to(weight)[:, None] * weight

    def ungained(self, weight: Tensor) -> Tensor:
        """`W` from `diag(γ) W`."""
        return weight if self._gains is None else weight / self._safe_gains().to(weight)[:, None]

    def _safe_gains(self) -> Tensor:
        assert self._gains is not None
        # A channel that the norm shuts off says nothing of its row, which is repaired like the others.
        least = 1e-4 * self._gains.abs().max().clamp_min(1e-30)
        return torch.where(self._gains.abs() < least, least, self._gains)
