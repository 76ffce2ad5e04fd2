"""How much goes where: a requested sparsity, split into whole layers and neurons, before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the allocation has to know of a model.

    Attributes:
        num_layers: decoder layers.
        layer_parameters: parameters of one decoder layer, all of it.
        width: neurons of one layer's FFN.
        neuron_parameters: parameters that go with one neuron.
    """

    num_layers: int
    layer_parameters: int
    width: int
    neuron_parameters: int


@dataclass(frozen=True)
class Allocation:
    """What to remove.

    Attributes:
        layers: number of whole decoder layers that go.
        width: neurons that stay in each remaining layer.
        parameters: how many go in all, after rounding.
        sparsity: their share of the decoder-layer parameters.
    """

    layers: int
    width: int
    parameters: int
    sparsity: float


def allocate(shape: Shape, sparsity: float, layer_fraction: float, round_to: int, max_layers: int) -> Allocation:
    """Turn a sparsity into a number of layers and one FFN width for all remaining layers.

    Whole layers take `layer_fraction` of the parameters to remove, rounded down to whole layers; neurons take the
    rest. The width is rounded *down* to a multiple of `round_to`, so that at least what was asked for is removed;
    a width that needs no change stays as it is.

    Args:
        shape: the model.
        sparsity: share of decoder-layer parameters to remove, in (0, 1).
        layer_fraction: in [0, 1].
        round_to: the width becomes a multiple of this.
        max_layers: how many layers may go at most (the rest is protected).

    Raises:
        ValueError: the sparsity can't be reached; says what can be.
    """
    per_layer = shape.layer_parameters
    total = shape.num_layers * per_layer
    wanted = sparsity * total
    layers = math.floor(layer_fraction * wanted / per_layer + 1e-9)
    if layers > max_layers:
        raise ValueError(
            f"sparsity={sparsity:g} with layer_fraction={layer_fraction:g} removes {layers} layers, but only "
            f"{max_layers} of {shape.num_layers} may go; lower one of the two or protect fewer layers."
        )
    remaining = shape.num_layers - layers
    neurons = max(0.0, (wanted - layers * per_layer) / (remaining * shape.neuron_parameters))
    width = shape.width
    if neurons > 1e-9:
        width = math.floor((shape.width - neurons + 1e-9) / round_to) * round_to
    if width < round_to:
        reachable = (layers * per_layer + remaining * (shape.width - round_to) * shape.neuron_parameters) / total
        raise ValueError(
            f"sparsity={sparsity:g} leaves no neuron in the feed-forward layers: they hold "
            f"{shape.width * shape.neuron_parameters / per_layer:.0%} of a decoder layer. With round_to={round_to} "
            f"and {layers} whole layers removed at most {reachable:.3f} can go; lower it or raise layer_fraction."
        )
    removed = layers * per_layer + remaining * (shape.width - width) * shape.neuron_parameters
    return Allocation(layers=layers, width=width, parameters=removed, sparsity=removed / total)
