"""How much goes where: a requested sparsity, split into layers, attention and neurons, before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """What the allocation has to know of a model.

    Attributes:
        num_layers: decoder layers.
        layer_parameters: parameters of one decoder layer, all of it.
        width: neurons of one layer's FFN.
        neuron_parameters: parameters that go with one neuron; 0 if neurons may not go.
        groups: key-value groups of one layer.
        group_parameters: parameters that go with one group and its query heads; 0 if groups may not go.
        group_heads: query heads of a group.
        head_parameters: parameters that go with one query head; 0 if heads may not go.
    """

    num_layers: int
    layer_parameters: int
    width: int
    neuron_parameters: int
    groups: int = 1
    group_parameters: int = 0
    group_heads: int = 1
    head_parameters: int = 0


@dataclass(frozen=True)
class Allocation:
    """What to remove.

    Attributes:
        layers: number of whole decoder layers that go.
        units: axis -> how many units of it stay in each remaining layer; neurons always, others if some go.
        parameters: how many go in all, after rounding.
        sparsity: their share of the decoder-layer parameters.
    """

    layers: int
    units: dict[str, int] = field(hash=False)
    parameters: int
    sparsity: float

    @property
    def width(self) -> int:
        """Neurons that stay in each remaining layer."""
        return self.units["ffn"]


def allocate(
    shape: Shape,
    sparsity: float,
    layer_fraction: float,
    round_to: int,
    max_layers: int,
    attention_fraction: float = 0.0,
) -> Allocation:
    """Turn a sparsity into a number of layers, and one size of each kind for all remaining layers.

    Whole layers take `layer_fraction` of the parameters to remove, rounded down to whole layers; attention takes
    `attention_fraction`, rounded down to whole key-value groups and, for what is left of it, one query head of each
    group at a time; neurons take the rest. The width is rounded *down* to a multiple of `round_to`, so that at least
    what was asked for is removed; a width that needs no change stays as it is. Where neurons may not go, attention
    takes all that layers don't, rounded up.

    Args:
        shape: the model.
        sparsity: share of decoder-layer parameters to remove, in (0, 1).
        layer_fraction: in [0, 1].
        round_to: the width becomes a multiple of this.
        max_layers: how many layers may go at most (the rest is protected).
        attention_fraction: in [0, 1].

    Raises:
        ValueError: the sparsity can't be reached; says what can be.
    """
    per_layer = shape.layer_parameters
    total = shape.num_layers * per_layer
    wanted = sparsity * total
    layers = math.floor(layer_fraction * wanted / per_layer + 1e-9)
    if shape.neuron_parameters == 0 and shape.group_parameters == 0 and shape.head_parameters == 0:
        # Nothing else may go: whole layers are rounded up.
        layers = math.ceil(layer_fraction * wanted / per_layer - 1e-9)
    if layers > max_layers:
        raise ValueError(
            f"sparsity={sparsity:g} with layer_fraction={layer_fraction:g} removes {layers} layers, but only "
            f"{max_layers} of {shape.num_layers} may go; lower one of the two or protect fewer layers."
        )
    remaining = shape.num_layers - layers
    rest = (wanted - layers * per_layer) / remaining
    if shape.neuron_parameters:
        gone, units = _attention(shape, attention_fraction * wanted / remaining, upwards=False)
    else:
        gone, units = _attention(shape, rest, upwards=True)
    neurons = max(0.0, (rest - gone) / shape.neuron_parameters) if shape.neuron_parameters else 0.0
    width = shape.width
    if neurons > 1e-9:
        width = math.floor((shape.width - neurons + 1e-9) / round_to) * round_to
    ffn = (shape.width - width) * shape.neuron_parameters
    removed = layers * per_layer + remaining * (gone + ffn)
    if width < round_to or removed < wanted * (1 - 1e-9) - 1e-6:
        narrowest = (shape.width - round_to) * shape.neuron_parameters
        reachable = (layers * per_layer + remaining * (gone + narrowest)) / total
        held = (
            f"leaves no neuron in the feed-forward layers: they hold "
            f"{shape.width * shape.neuron_parameters / per_layer:.0%} of a decoder layer. With round_to={round_to} and"
            if shape.neuron_parameters
            else "can't be reached: with"
        )
        raise ValueError(
            f"sparsity={sparsity:g} {held} {layers} whole layers removed at most {reachable:.3f} can go; lower it or "
            "raise layer_fraction."
        )
    return Allocation(layers=layers, units={"ffn": width, **units}, parameters=removed, sparsity=removed / total)


def _attention(shape: Shape, budget: float, *, upwards: bool) -> tuple[int, dict[str, int]]:
    """Parameters of a layer's attention that go for a budget, and units of each axis that stay."""
    groups = group_heads = 0
    if shape.group_parameters:
        groups = min(shape.groups - 1, math.floor(budget / shape.group_parameters + 1e-9))
    left = budget - groups * shape.group_parameters
    # As many query heads go from every group that stays.
    step = (shape.groups - groups) * shape.head_parameters
    if step:
        exact = left / step
        group_heads = min(shape.group_heads - 1, math.ceil(exact - 1e-9) if upwards else math.floor(exact + 1e-9))
    elif upwards and left > 1e-9 and groups < shape.groups - 1 and shape.group_parameters:
        groups += 1
    gone = groups * shape.group_parameters + group_heads * step
    units = {}
    if groups:
        units["kv"] = shape.groups - groups
    if group_heads:
        units["heads"] = (shape.groups - groups) * (shape.group_heads - group_heads)
    return gone, units
