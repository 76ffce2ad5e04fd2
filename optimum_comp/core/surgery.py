"""The only place that cuts parameters: which of a dimension's channels stay when units go.

A dimension is a row of *parts* (a fused projection has several), a part is a row of *units* of one kind (neurons,
query heads, key-value heads), and every unit in a dimension has as many channels as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


Counts = Mapping[str, int]
"""Kind of unit -> how many there are."""

Kept = Mapping[str, Tensor]
"""Kind of unit -> indices of those that stay, ascending. All of a kind that isn't there stay."""


@dataclass(frozen=True)
class Layout:
    """How one dimension of a parameter is laid out.

    Attributes:
        dim: the dimension.
        kinds: the kind of unit of each part, in order.
    """

    dim: int
    kinds: tuple[str, ...]

    def unit_width(self, size: int, counts: Counts) -> int:
        """Channels of a unit in a dimension of this size.

        Raises:
            ValueError: the units don't divide it.
        """
        units = sum(counts[kind] for kind in self.kinds)
        if units == 0 or size % units:
            raise ValueError(
                f"a dimension of {size} isn't made of {' + '.join(f'{counts[kind]} {kind}' for kind in self.kinds)}."
            )
        return size // units

    def parts(self, size: int, counts: Counts) -> list[slice]:
        """Where each part lies in a dimension of this size.

        Raises:
            ValueError: see `unit_width`.
        """
        width = self.unit_width(size, counts)
        ends = [0, *accumulate(width * counts[kind] for kind in self.kinds)]
        return [slice(start, end) for start, end in pairwise(ends)]

    def kept_channels(self, size: int, counts: Counts, kept: Kept) -> Tensor:
        """Indices of the channels that stay in a dimension of this size.

        Raises:
            ValueError: see `unit_width`.
        """
        width = self.unit_width(size, counts)
        parts = []
        for part, kind in zip(self.parts(size, counts), self.kinds, strict=True):
            units = kept[kind].cpu() if kind in kept else torch.arange(counts[kind])
            parts.append(part.start + channels_of(units, width))
        return torch.cat(parts)

    def size_after(self, size: int, counts: Counts, kept: Counts) -> int:
        """The dimension's size with so many units of each kind left (`counts` of those that aren't named)."""
        return self.unit_width(size, counts) * sum(kept.get(kind, counts[kind]) for kind in self.kinds)


def channels_of(units: Tensor, width: int) -> Tensor:
    """Channels of several units of the same width, in their order, `[len(units) * width]`."""
    return units if width == 1 else (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def cut(value: Tensor, layouts: Sequence[Layout], counts: Counts, kept: Kept) -> Tensor:
    """A parameter without the units that go.

    Args:
        value: the parameter.
        layouts: of its dimensions that are made of units.
        counts: units before.
        kept: units that stay.

    Raises:
        ValueError: a dimension isn't made of such units.
    """
    for layout in layouts:
        if any(kind in kept for kind in layout.kinds):
            channels = layout.kept_channels(value.shape[layout.dim], counts, kept)
            value = value.index_select(layout.dim, channels.to(value.device))
    return value


def fill(value: Tensor, layouts: Sequence[Layout], counts: Counts, after: Counts) -> Tensor:
    """A parameter with units of zeros behind those of its kinds, part by part; `cut` would remove them again.

    Args:
        value: the parameter.
        layouts: of its dimensions that are made of units.
        counts: units that it has.
        after: units that it is to have, of the kinds that grow.

    Raises:
        ValueError: a dimension isn't made of such units.
    """
    for layout in layouts:
        if any(after.get(kind, counts[kind]) != counts[kind] for kind in layout.kinds):
            size = layout.size_after(value.shape[layout.dim], counts, after)
            there = {kind: torch.arange(counts[kind]) for kind in layout.kinds}
            channels = layout.kept_channels(size, {**counts, **after}, there).to(value.device)
            shape = list(value.shape)
            shape[layout.dim] = size
            value = value.new_zeros(shape).index_copy_(layout.dim, channels, value)
    return value


def shape_after(shape: Sequence[int], layouts: Sequence[Layout], counts: Counts, after: Counts) -> tuple[int, ...]:
    """The shape that `cut` would leave, from numbers of units alone.

    Raises:
        ValueError: a dimension isn't made of such units.
    """
    sizes = list(shape)
    for layout in layouts:
        sizes[layout.dim] = layout.size_after(sizes[layout.dim], counts, after)
    return tuple(sizes)
