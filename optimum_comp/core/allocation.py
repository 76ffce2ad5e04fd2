"""How much goes where: a requested sparsity, split into layers, attention and neurons, before any work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


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
class Entry:
    """What was to go of one kind of unit, and what does.

    Attributes:
        axis: `layers`, `kv`, `heads` or `ffn`.
        wanted_units: how many would be just its part of the budget; in each remaining layer, or of whole layers.
        wanted_parameters: that part, in all layers.
        taken_units: how many go, after rounding.
        taken_parameters: what goes with them, in all layers.
        reason: how the one became the other, in a sentence.
    """

    axis: str
    wanted_units: float
    wanted_parameters: float
    taken_units: int
    taken_parameters: int
    reason: str


@dataclass(frozen=True)
class Allocation:
    """What to remove.

    Attributes:
        layers: number of whole decoder layers that go.
        units: axis -> how many units of it stay in each remaining layer; neurons always, others if some go.
        parameters: how many go in all, after rounding.
        sparsity: their share of the decoder-layer parameters.
        ledger: an entry for each kind of unit that has a part of the budget, in the order in which they take theirs.
    """

    layers: int
    units: dict[str, int] = field(hash=False)
    parameters: int
    sparsity: float
    ledger: tuple[Entry, ...] = ()

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
    *,
    layers: int | None = None,
    attention: tuple[int, int] | None = None,
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
        layers: how many go, whatever `layer_fraction` says.
        attention: how many key-value groups of a layer go, and how many query heads of each group that stays, whatever
            `attention_fraction` says.

    Raises:
        ValueError: the sparsity can't be reached; says what can be.
    """
    per_layer = shape.layer_parameters
    total = shape.num_layers * per_layer
    wanted = sparsity * total
    exact_layers = layer_fraction * wanted / per_layer if layers is None else float(layers)
    is_weighed = layers is not None
    # Where nothing else may go, whole layers are rounded up.
    only_layers = shape.neuron_parameters == 0 and shape.group_parameters == 0 and shape.head_parameters == 0
    layers = math.ceil(exact_layers - 1e-9) if only_layers else math.floor(exact_layers + 1e-9)
    if layers > max_layers:
        raise ValueError(
            f"sparsity={sparsity:g} with layer_fraction={layer_fraction:g} removes {layers} layers, but only "
            f"{max_layers} of {shape.num_layers} may go; lower one of the two or protect fewer layers."
        )
    remaining = shape.num_layers - layers
    rest = (wanted - layers * per_layer) / remaining
    ledger = []
    if is_weighed and layers:
        ledger.append(_weighed("layers", layers, per_layer, 1))
    elif layer_fraction and not is_weighed:
        reason = (
            f"{layer_fraction:.4g} of the budget is {exact_layers * per_layer:,.0f} parameters: {exact_layers:.2f} "
            f"layers of {per_layer:,}{_whole(exact_layers, layers, shape.num_layers, 'layer')}."
        )
        ledger.append(Entry("layers", exact_layers, exact_layers * per_layer, layers, layers * per_layer, reason))
    if attention is not None:
        gone, units, entries = _given_attention(shape, attention, remaining)
    elif shape.neuron_parameters:
        share = attention_fraction * wanted / remaining
        gone, units, entries = _attention(shape, share, remaining, "attention's share", upwards=False)
        if share and not entries:
            reason = "attention has a share, and nothing of it can go here: neurons take it."
            entries = [Entry("kv", 0.0, share * remaining, 0, 0, reason)]
    else:
        gone, units, entries = _attention(shape, rest, remaining, "what layers leave", upwards=True)
    ledger += entries
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
    if shape.neuron_parameters:
        ledger.append(_neurons(shape, neurons, width, remaining, round_to))
    return Allocation(
        layers=layers,
        units={"ffn": width, **units},
        parameters=removed,
        sparsity=removed / total,
        ledger=tuple(ledger),
    )


def alternatives(
    shape: Shape,
    sparsity: float,
    layer_fraction: float | None,
    round_to: int,
    max_layers: int,
    attention_fraction: float | None,
) -> list[Allocation]:
    """Every split of a sparsity into layers, attention and neurons, where that is left open.

    Args:
        shape: see `allocate`, as for all others.
        sparsity: see there.
        layer_fraction: `None` for every number of layers of which no two need be neighbours.
        round_to: see there.
        max_layers: see there.
        attention_fraction: `None` for every number of groups and heads.

    Returns:
        Those that can be, first what takes fewest whole layers and least of attention; one if nothing is open.

    Raises:
        ValueError: there is none; what `allocate` says where neurons take all.
    """
    # Without neurons, attention takes what layers leave.
    open_layers, open_attention = layer_fraction is None, attention_fraction is None and shape.neuron_parameters > 0
    counts: list[int | None] = [None]
    if open_layers:
        counts = list(range(min(max_layers, (shape.num_layers - 1) // 2) + 1))
    attentions: list[tuple[int, int] | None] = [None]
    if open_attention:
        attentions = [
            (groups, heads)
            for groups in range(shape.groups if shape.group_parameters else 1)
            for heads in range(shape.group_heads if shape.head_parameters else 1)
        ]
    found: list[Allocation] = []
    refusal: ValueError | None = None
    wanted = sparsity * shape.num_layers * shape.layer_parameters
    for layers in counts:
        for attention in attentions:
            taken = 0 if layers is None else layers * shape.layer_parameters
            if attention is not None:
                taken += (shape.num_layers - (layers or 0)) * _attention_parameters(shape, attention)
            if taken > wanted and (layers or attention not in (None, (0, 0))):
                continue
            try:
                split = allocate(
                    shape,
                    sparsity,
                    layer_fraction or 0.0,
                    round_to,
                    max_layers,
                    attention_fraction or 0.0,
                    layers=layers,
                    attention=attention,
                )
            except ValueError as error:
                refusal = refusal or error
                continue
            found.append(split)
    if not found:
        assert refusal is not None
        raise refusal
    return found


def uneven(shape: Shape, allocation: Allocation, widths: Sequence[int]) -> Allocation:
    """An allocation with a width for each layer that stays, in place of one for all.

    Args:
        shape: the model.
        allocation: with the width of all.
        widths: of the layers that stay.

    Returns:
        In its `units`, the width that every layer's matrices have room for.
    """
    before = len(widths) * (shape.width - allocation.width) * shape.neuron_parameters
    taken = sum(shape.width - width for width in widths)
    removed = allocation.parameters - before + taken * shape.neuron_parameters
    *others, entry = allocation.ledger
    least, most, mean = min(widths), max(widths), sum(widths) / len(widths)
    reason = f"{entry.reason} By what they cost, {least} to {most} stay in a layer, {mean:.0f} on average."
    taken_units = round(taken / len(widths))
    neurons = replace(entry, taken_units=taken_units, taken_parameters=taken * shape.neuron_parameters, reason=reason)
    return Allocation(
        layers=allocation.layers,
        units={**allocation.units, "ffn": most},
        parameters=removed,
        sparsity=removed / (shape.num_layers * shape.layer_parameters),
        ledger=(*others, neurons),
    )


def sizes_to_try(width: int, least: int, step: int) -> list[int]:
    """Sizes that a layer may have: all of it, and multiples of a step, descending to the first at `least` or below.

    Args:
        width: units of the layer.
        least: that are to stay, about.
        step: units between two sizes.
    """
    bottom = max(1, least // step)
    top = (width - 1) // step
    return [width, *(step * number for number in range(top, bottom - 1, -1))]


@dataclass(frozen=True)
class Choice:
    """What goes from where, so that it costs least.

    Attributes:
        removed: whole layers that go, ascending.
        numbers: which size each of the others gets.
        costs: of each of the others, at that size.
        cost: of all together.
    """

    removed: tuple[int, ...]
    numbers: tuple[int, ...]
    costs: tuple[float, ...]
    cost: float


class Knapsack:
    """Whole layers to remove, and one of several sizes for each other, so that all together cost least.

    A multiple-choice knapsack, by dynamic programming over the layers (Bellman): the least cost of the first layers
    within every budget, with every number of layers removed. Costs needn't be convex; they are taken to add up. So no
    two neighbours go: what removing both costs isn't the sum, since each is bridged by the layer before it.

    Args:
        weights: of each size.
        sized: of each layer, what it costs at each of the sizes.
        gone: of each layer, what removing it costs; infinite if it may not go.
        most: layers that may go, at most.
        room: that the weights of those which stay may add up to, at most.
    """

    def __init__(
        self,
        weights: Sequence[int],
        sized: Sequence[Sequence[float]],
        gone: Sequence[float],
        most: int,
        room: int,
    ):
        self._weights, self._sized = weights, sized
        blocked = torch.full((most + 1, room + 1), torch.inf, dtype=torch.float64)
        # Behind a layer that stays, and behind one that went: at first neither has happened, and the first may go.
        stays, went = blocked.clone(), blocked.clone()
        stays[0] = 0.0
        self._steps: list[tuple[Tensor, Tensor]] = []
        for of_layer, of_removal in zip(sized, gone, strict=True):
            after_removal = went < stays
            before = torch.where(after_removal, went, stays)
            options = torch.full((len(weights), *before.shape), torch.inf, dtype=torch.float64)
            for number, (weight, cost) in enumerate(zip(weights, of_layer, strict=True)):
                if weight <= room:
                    options[number, :, weight:] = before[:, : room + 1 - weight] + cost
            went = blocked.clone()
            went[1:] = stays[:-1] + of_removal
            stays, numbers = options.min(0)
            self._steps.append((numbers, after_removal))
        self._stays, self._went = stays, went

    def cheapest(self, count: int, room: int) -> Choice | None:
        """The exact optimum with so many layers removed, within a budget; `None` if nothing keeps to it."""
        after_removal, after_other = float(self._went[count, room]), float(self._stays[count, room])
        cost, goes = min(after_removal, after_other), after_removal < after_other
        if math.isinf(cost):
            return None
        removed, found, costs = [], [], []
        for layer in reversed(range(len(self._sized))):
            numbers, follows_removal = self._steps[layer]
            if goes:
                removed.append(layer)
                count, goes = count - 1, False
                continue
            number = int(numbers[count, room])
            found.append(number)
            costs.append(self._sized[layer][number])
            room -= self._weights[number]
            goes = bool(follows_removal[count, room])
        return Choice(tuple(removed[::-1]), tuple(found[::-1]), tuple(costs[::-1]), cost)


def steps_of(sizes: Sequence[int], step: int) -> list[int]:
    """Sizes in steps: the first, which may be no multiple, counts as the next one, so that a budget holds in any case.

    Args:
        sizes: that a layer may have, descending; all but the first are multiples of `step`.
        step: units between two sizes.
    """
    return [-(-size // step) for size in sizes]


def _neurons(shape: Shape, exact: float, width: int, layers: int, round_to: int) -> Entry:
    """What neurons take in each of so many layers."""
    each, wanted = shape.neuron_parameters, exact * shape.neuron_parameters * layers
    to = f"a multiple of {round_to}" if round_to > 1 else "whole neurons"
    reason = (
        f"what is left is {wanted:,.0f} parameters: {exact:.2f} neurons of {each:,} in each of {layers} layers. "
        f"{shape.width - exact:.2f} of {shape.width} would stay"
        f"{_rounded(shape.width - exact, width, to)}."
        if exact > 1e-9
        else "nothing is left for neurons to take."
    )
    gone = shape.width - width
    return Entry("ffn", exact, wanted, gone, gone * each * layers, reason)


def _rounded(exact: float, taken: int, to: str) -> str:
    """How a number of units became a whole one, as the end of a sentence."""
    if abs(exact - taken) < 5e-3:
        return ""
    return f", rounded {'up' if taken > exact else 'down'} to {to}: {taken}"


def _attention(
    shape: Shape, budget: float, layers: int, whose: str, *, upwards: bool
) -> tuple[int, dict[str, int], list[Entry]]:
    """Parameters of a layer's attention that go for a budget, units of each axis that stay, and entries.

    Args:
        shape: the model.
        budget: parameters of one layer.
        layers: how many stay.
        whose: the budget is, in words.
        upwards: nothing else can take what rounding down leaves.
    """
    groups = group_heads = 0
    exact_groups = budget / shape.group_parameters if shape.group_parameters else 0.0
    if shape.group_parameters:
        groups = min(shape.groups - 1, math.floor(exact_groups + 1e-9))
    left = budget - groups * shape.group_parameters
    # As many query heads go from every group that stays.
    step = (shape.groups - groups) * shape.head_parameters
    exact_heads = left / step if step else 0.0
    if step:
        rounded = math.ceil(exact_heads - 1e-9) if upwards else math.floor(exact_heads + 1e-9)
        group_heads = min(shape.group_heads - 1, rounded)
    elif upwards and left > 1e-9 and groups < shape.groups - 1 and shape.group_parameters:
        groups += 1
    gone = groups * shape.group_parameters + group_heads * step
    entries = []
    if shape.group_parameters and budget > 1e-9:
        reason = (
            f"{whose} is {budget:,.0f} parameters of each of {layers} layers: {exact_groups:.2f} key-value groups of "
            f"{shape.group_parameters:,} with their query heads{_whole(exact_groups, groups, shape.groups, 'group')}."
        )
        entries.append(_entry("kv", exact_groups, shape.group_parameters, groups, layers, reason))
    if step and left > 1e-9:
        whose = "what groups leave" if shape.group_parameters else whose
        stay = shape.groups - groups
        reason = (
            f"{whose} is {left:,.0f} parameters of each of {layers} layers: {exact_heads:.2f} query heads of "
            f"{shape.head_parameters:,} in each of {stay} groups"
            f"{_whole(exact_heads, group_heads, shape.group_heads, 'query head')}."
        )
        entries.append(_entry("heads", exact_heads * stay, shape.head_parameters, group_heads * stay, layers, reason))
    units = {}
    if groups:
        units["kv"] = shape.groups - groups
    if group_heads:
        units["heads"] = (shape.groups - groups) * (shape.group_heads - group_heads)
    return gone, units, entries


def _attention_parameters(shape: Shape, attention: tuple[int, int]) -> int:
    """That go from a layer with so many groups, and so many heads of each other group."""
    groups, heads = attention
    return groups * shape.group_parameters + heads * (shape.groups - groups) * shape.head_parameters


def _given_attention(shape: Shape, attention: tuple[int, int], layers: int) -> tuple[int, dict[str, int], list[Entry]]:
    """What `_attention` gives, of numbers that are settled."""
    groups, heads = attention
    stay = shape.groups - groups
    units, entries = {}, []
    if groups:
        units["kv"] = stay
        entries.append(_weighed("kv", groups, shape.group_parameters, layers))
    if heads:
        units["heads"] = stay * (shape.group_heads - heads)
        entries.append(_weighed("heads", heads * stay, shape.head_parameters, layers))
    return _attention_parameters(shape, attention), units, entries


def _weighed(axis: str, taken: int, each: int, layers: int) -> Entry:
    """An entry for what goes because it costs less than what else could."""
    what = {"layers": "whole layers", "kv": "key-value groups with their query heads", "heads": "query heads"}[axis]
    where = "" if axis == "layers" else " of each layer that stays"
    reason = f"{taken} {what}{where}: with them, what goes in all was expected to cost least."
    return Entry(axis, float(taken), float(taken * each * layers), taken, taken * each * layers, reason)


def _entry(axis: str, wanted: float, each: int, taken: int, layers: int, reason: str) -> Entry:
    """An entry for units of `each` parameters in so many layers."""
    return Entry(axis, wanted, wanted * each * layers, taken, taken * each * layers, reason)


def _whole(exact: float, taken: int, there: int, unit: str) -> str:
    """How a number of layers, groups or heads became a whole one, as the end of a sentence."""
    if taken == there - 1 and exact >= taken + 1 - 1e-9:
        return f", and one {unit} has to stay: {taken}"
    if taken == 0 and exact > 1e-9:
        return ", less than one, rounded down to nothing"
    return _rounded(exact, taken, f"whole {unit}s")
