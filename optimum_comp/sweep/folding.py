"""Folding equalization scales into a decoder layer: where they go, what they need, and whether it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.core.equalization import find_scales
from optimum_comp.families import Fold


Factors = dict[str, list[tuple[int, Tensor]]]
"""Name of a layer's parameter -> dimensions and the factors that it is multiplied by along them."""


@dataclass
class InputRange:
    """What a dense layer's input looked like.

    Attributes:
        largest: largest absolute value of each channel, `[d_in]`.
        energy: sum of squares of each channel, `[d_in]`.
    """

    largest: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> InputRange:
        """Of no token."""
        nothing = torch.zeros(channels, device=device)
        return cls(nothing, nothing.double())

    def update(self, inputs: Tensor) -> None:
        """Add a batch `[..., d_in]`."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.largest = torch.maximum(self.largest, flat.abs().amax(0))
        self.energy = self.energy + flat.square().sum(0, dtype=torch.float64)


def unseen(layer: nn.Module, folds: Sequence[Fold]) -> dict[Fold, InputRange]:
    """Ranges of what goes into each fold's consumers, before any token."""
    weights = {fold: _part(layer, fold.consumers[0]).weight for fold in folds}
    return {fold: InputRange.empty(weight.shape[1], weight.device) for fold, weight in weights.items()}


@contextlib.contextmanager
def watching(layer: nn.Module, ranges: Mapping[Fold, InputRange]) -> Iterator[None]:
    """Add what goes into each fold's consumers meanwhile."""
    with contextlib.ExitStack() as stack:
        for fold, seen in ranges.items():

            def look(_: nn.Module, args: tuple[Tensor, ...], seen: InputRange = seen) -> None:
                seen.update(args[0])

            hook = _part(layer, fold.consumers[0]).register_forward_pre_hook(look)
            stack.callback(hook.remove)
        yield


def layer_factors(layer: nn.Module, folds: Mapping[Fold, InputRange], tokens: int) -> Factors:
    """Factors for a layer's parameters that even out what goes into its dense layers.

    Args:
        layer: with its weights.
        folds: what goes into the consumers of each.
        tokens: how many tokens that was.
    """
    found: Factors = {}
    for fold, seen in folds.items():
        weight = torch.cat([_part(layer, path).weight.detach() for path in fold.consumers])
        owner = channel_owners(layer, fold)
        scales, _ = find_scales(seen.largest, seen.energy, tokens, weight, owner)
        for name, factors in fold_factors(layer, fold, scales, owner).items():
            found.setdefault(name, []).extend(factors)
    return found


def channel_owners(layer: nn.Module, fold: Fold) -> Tensor:
    """Which of the producer's channels each of the consumer's input channels is a copy of, `[d_in]`.

    Under grouped-query attention, the query heads of a group read the same value head.
    """
    produced = _part(layer, fold.producers[0]).weight.shape[0]
    consumed = _part(layer, fold.consumers[0]).weight.shape[1]
    own = torch.arange(produced)
    if produced != consumed:
        head: int = _part(layer, fold.producers[0].rpartition(".")[0]).head_dim
        own = own.view(-1, 1, head).expand(-1, consumed // produced, -1).flatten()
    return own.to(_part(layer, fold.consumers[0]).weight.device)


def fold_factors(layer: nn.Module, fold: Fold, scales: Tensor, owner: Tensor | None = None) -> Factors:
    """The factors of one fold: producers' channels `/ s`, consumers' columns `· s`; none where all are one.

    Args:
        layer: to say which biases there are.
        fold: the fold.
        scales: `s` of each of the producer's channels.
        owner: see `channel_owners`; `None` if nothing is copied.
    """
    if bool((scales == 1).all()):
        return {}
    found: Factors = {}
    for path in fold.producers:
        for kind in ("weight", "bias"):
            if getattr(_part(layer, path), kind, None) is not None:
                found[f"{path}.{kind}"] = [(0, 1 / scales)]
    for path in fold.consumers:
        found[f"{path}.weight"] = [(1, scales if owner is None else scales[owner])]
    return found


def _part(layer: nn.Module, path: str) -> Any:
    """A norm or a dense layer."""
    return layer.get_submodule(path)


def multiplied(value: Tensor, factors: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A parameter times its factors, in its own dtype; exact, since they are powers of two."""
    for dimension, factor in factors:
        shape = [1] * value.dim()
        shape[dimension] = -1
        value = (value.double() * factor.to(value.device, torch.float64).view(shape)).to(value.dtype)
    return value


def holding_folds(layer: nn.Module, folds: Sequence[Fold], run: Any) -> list[Fold]:
    """Those folds that leave the layer's output as it is.

    Measured on random scales, not declared: whether a norm comes before or after, whether an activation function
    passes scales on, and what else reads a channel differs by config.

    Args:
        layer: with its weights, which are as before afterwards.
        folds: to be tried.
        run: gives the layer's output, `[batch, length, hidden]`.
    """
    expected = run()
    held = []
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        channels = _part(layer, fold.producers[0]).weight.shape[0]
        device = expected.device
        scales = torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).double()).to(device)
        factors = fold_factors(layer, fold, scales, channel_owners(layer, fold))
        originals = {name: layer.get_parameter(name).data for name in factors}
        for name, value in originals.items():
            layer.get_parameter(name).data = multiplied(value, factors[name])
        difference = float((run().float() - expected.float()).abs().max())
        for name, value in originals.items():
            layer.get_parameter(name).data = value
        tolerance = 256 * torch.finfo(expected.dtype).eps
        if difference <= tolerance * float(expected.float().abs().max().clamp_min(1.0)):
            held.append(fold)
    return held
