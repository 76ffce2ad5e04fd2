"""Folding equalization scales into a decoder layer: where they go, what they need, and whether it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.core.equalization import Room, find_scales, room_of
from optimum_comp.core.surgery import Counts
from optimum_comp.families import KV, Fold, Slot


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
    weights = {fold: fold.consumers[0].matrix(layer) for fold in folds}
    return {fold: InputRange.empty(weight.shape[1], weight.device) for fold, weight in weights.items()}


@contextlib.contextmanager
def watching(layer: nn.Module, ranges: Mapping[Fold, InputRange]) -> Iterator[None]:
    """Add what goes into each fold's consumers meanwhile."""
    with contextlib.ExitStack() as stack:
        for fold, seen in ranges.items():

            def look(_: nn.Module, args: tuple[Tensor, ...], seen: InputRange = seen) -> None:
                seen.update(args[0])

            hook = fold.consumers[0].module(layer).register_forward_pre_hook(look)
            stack.callback(hook.remove)
        yield


def layer_factors(
    layer: nn.Module, counts: Counts, folds: Mapping[Fold, InputRange], tokens: int, stored: torch.dtype
) -> Factors:
    """Factors for a layer's parameters that even out what goes into its dense layers.

    Args:
        layer: with its weights.
        counts: its units of each kind.
        folds: what goes into the consumers of each.
        tokens: how many tokens that was.
        stored: dtype of the weights that the factors are for.
    """
    found: Factors = {}
    for fold, seen in folds.items():
        weight = torch.cat([slot.matrix(layer).detach() for slot in fold.consumers])
        owner = channel_owners(layer, counts, fold)
        room = meeting(
            producers_room(layer, counts, fold, found, stored), consumers_room(layer, fold, found, stored, owner)
        )
        scales, _ = find_scales(seen.largest, seen.energy, tokens, weight, owner, room)
        for name, factors in fold_factors(layer, counts, fold, scales, owner).items():
            found.setdefault(name, []).extend(factors)
    return found


def channel_owners(layer: nn.Module, counts: Counts, fold: Fold) -> Tensor:
    """Which of the producer's channels each of the consumer's input channels is a copy of, `[d_in]`.

    Under grouped-query attention, the query heads of a group read the same value head.
    """
    weight = fold.consumers[0].matrix(layer)
    produced, consumed = _channels(layer, counts, fold.producers[0]), weight.shape[1]
    own = torch.arange(produced)
    if produced != consumed:
        own = own.view(counts[KV], 1, -1).expand(-1, consumed // produced, -1).flatten()
    return own.to(weight.device)


def _channels(layer: nn.Module, counts: Counts, producer: Slot) -> int:
    """How many output channels of a norm or dense layer are meant."""
    weight: Tensor = producer.module(layer).weight
    size = weight.shape[producer.rows if weight.dim() > 1 else 0]
    meant = producer.rows_meant(size, counts)
    return meant.stop - meant.start


def fold_factors(layer: nn.Module, counts: Counts, fold: Fold, scales: Tensor, owner: Tensor | None = None) -> Factors:
    """The factors of one fold: producers' channels `/ s`, consumers' columns `· s`; none where all are one.

    Args:
        layer: to say which biases there are; its sizes don't matter.
        counts: units of each kind that `scales` are for.
        fold: the fold.
        scales: `s` of each of the producer's channels.
        owner: see `channel_owners`; `None` if nothing is copied.
    """
    if bool((scales == 1).all()):
        return {}
    found: Factors = {}
    for slot in fold.producers:
        factors = 1 / scales
        if slot.part:
            size = len(scales) // counts[slot.kind_meant] * sum(counts[kind] for kind in slot.kinds)
            factors = scales.new_ones(size)
            factors[slot.rows_meant(size, counts)] = 1 / scales
        for kind in ("weight", "bias"):
            value = getattr(slot.module(layer), kind, None)
            if value is not None:
                found[f"{slot.path}.{kind}"] = [(slot.rows if value.dim() > 1 else 0, factors)]
    for slot in fold.consumers:
        found[f"{slot.path}.weight"] = [(slot.columns, scales if owner is None else scales[owner])]
    return found


def producers_room(layer: nn.Module, counts: Counts, fold: Fold, before: Factors, stored: torch.dtype) -> Room:
    """Exponents that the scales of a fold may have for its producers, which are divided by them, to lose nothing.

    Args:
        layer: with its weights.
        counts: its units of each kind.
        fold: the fold.
        before: factors that the layer's parameters are multiplied by first.
        stored: dtype of the weights that they are for.
    """
    room: Room | None = None
    for slot in fold.producers:
        for kind in ("weight", "bias"):
            value = getattr(slot.module(layer), kind, None)
            if value is None:
                continue
            value = multiplied(value.detach().to(stored), before.get(f"{slot.path}.{kind}", []))
            rows = slot.turned(value) if value.dim() > 1 else value[:, None]
            least, most = room_of(rows[slot.rows_meant(len(rows), counts)])
            room = meeting(room, (-most, -least))
    assert room is not None
    return room


def consumers_room(layer: nn.Module, fold: Fold, before: Factors, stored: torch.dtype, owner: Tensor) -> Room:
    """The same for its consumers, whose columns are multiplied by the scales.

    Args:
        layer: with its weights.
        fold: the fold.
        before: factors that the layer's parameters are multiplied by first.
        stored: dtype of the weights that they are for.
        owner: see `channel_owners`.
    """
    room: Room | None = None
    for slot in fold.consumers:
        value = multiplied(slot.module(layer).weight.detach().to(stored), before.get(f"{slot.path}.weight", []))
        room = meeting(room, room_of(slot.turned(value).T))
    assert room is not None
    least, most = room
    none = least.new_zeros(int(owner.max()) + 1)
    # Copies share a scale.
    return (
        none.scatter_reduce(0, owner, least, "amax", include_self=False),
        none.scatter_reduce(0, owner, most, "amin", include_self=False),
    )


def meeting(room: Room | None, other: Room) -> Room:
    """What both allow."""
    return other if room is None else (torch.maximum(room[0], other[0]), torch.minimum(room[1], other[1]))


def multiplied(value: Tensor, factors: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A parameter times its factors, in its own dtype; exact, since they are powers of two within its room."""
    for dimension, factor in factors:
        shape = [1] * value.dim()
        shape[dimension] = -1
        value = value * factor.to(value).view(shape)
    return value


def holding_folds(layer: nn.Module, counts: Counts, folds: Sequence[Fold], run: Any) -> list[Fold]:
    """Those folds that leave the layer's output as it is.

    Measured on random scales, not declared: whether a norm comes before or after, whether an activation function
    passes scales on, and what else reads a channel differs by config.

    Args:
        layer: with its weights, which are as before afterwards.
        counts: its units of each kind.
        folds: to be tried; the layer has all of their parts.
        run: gives the layer's output, `[batch, length, hidden]`, in float32 or better: rounded to half precision, what
            a fold does wrong doesn't show.
    """
    expected = run()
    held: list[Fold] = []
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        channels = _channels(layer, counts, fold.producers[0])
        device = expected.device
        scales = torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).double()).to(device)
        factors = fold_factors(layer, counts, fold, scales, channel_owners(layer, counts, fold))
        originals = {name: layer.get_parameter(name).data for name in factors}
        for name, value in originals.items():
            layer.get_parameter(name).data = multiplied(value, factors[name])
        difference = float((run() - expected).abs().max())
        for name, value in originals.items():
            layer.get_parameter(name).data = value
        tolerance = 256 * torch.finfo(expected.dtype).eps
        if difference <= tolerance * float(expected.abs().max().clamp_min(1.0)):
            held.append(fold)
    return held
