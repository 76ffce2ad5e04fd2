from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from optimum_comp.core.allocation import Knapsack, Shape, allocate, alternatives, sizes_to_try, steps_of
from optimum_comp.core.layer_scores import least_important


SMOLLM2 = Shape(num_layers=30, layer_parameters=3_540_096, width=1536, neuron_parameters=3 * 576)


def test_neurons_take_all_by_default_and_at_least_what_was_asked_goes():
    plan = allocate(SMOLLM2, 0.2, 0.0, 32, 28)
    assert (plan.layers, plan.width) == (0, 1120)
    assert plan.sparsity == pytest.approx(416 * 1728 / 3_540_096)


def test_whole_layers_take_their_share():
    plan = allocate(SMOLLM2, 0.2, 1.0, 32, 28)
    assert (plan.layers, plan.width, plan.sparsity) == (6, 1536, pytest.approx(0.2))


@given(
    sparsity=st.floats(0.01, 0.95),
    fraction=st.floats(0, 1),
    round_to=st.sampled_from([1, 8, 32, 64]),
    layers=st.integers(1, 40),
    width=st.integers(64, 4096),
    hidden=st.integers(16, 512),
)
def test_the_plan_keeps_its_promise_or_says_why_not(sparsity, fraction, round_to, layers, width, hidden):
    shape = Shape(layers, 4 * hidden * hidden + 3 * hidden * width, width, 3 * hidden)
    try:
        plan = allocate(shape, sparsity, fraction, round_to, max(0, layers - 2))
    except ValueError as error:
        assert "sparsity=" in str(error)
        return
    assert plan.sparsity >= sparsity - 1e-6
    assert plan.width == width or plan.width % round_to == 0
    assert 0 < plan.width <= width
    # Never more than one rounding step too much.
    step = round_to * shape.neuron_parameters / shape.layer_parameters
    assert plan.sparsity <= sparsity + step + 1e-6
    assert sum(entry.taken_parameters for entry in plan.ledger) == plan.parameters
    gone = plan.layers * shape.layer_parameters + (layers - plan.layers) * (width - plan.width) * 3 * hidden
    assert plan.sparsity == pytest.approx(gone / (layers * shape.layer_parameters))


@given(st.floats(0.76, 0.99))
def test_more_than_the_feed_forward_layers_hold_is_refused(sparsity):
    with pytest.raises(ValueError, match="raise layer_fraction"):
        allocate(SMOLLM2, sparsity, 0.0, 32, 28)


def test_more_layers_than_may_go_are_refused():
    with pytest.raises(ValueError, match="only 2 of 4 may go"):
        allocate(Shape(4, 1000, 100, 7), 0.9, 1.0, 1, 2)


ATTENTION = {"groups": 3, "group_parameters": 245_760, "group_heads": 3, "head_parameters": 73_728}


def shape_with(axes: tuple[str, ...]) -> Shape:
    """SmolLM2-135M's, of which only some may go."""
    return Shape(
        num_layers=30,
        layer_parameters=3_540_096,
        width=1536,
        neuron_parameters=1728 if "ffn" in axes else 0,
        groups=3,
        group_parameters=ATTENTION["group_parameters"] if "kv" in axes else 0,
        group_heads=3,
        head_parameters=ATTENTION["head_parameters"] if "heads" in axes else 0,
    )


@given(
    sparsity=st.floats(0.01, 0.9),
    layers=st.floats(0, 1),
    attention=st.floats(0, 1),
    axes=st.sampled_from(
        [("ffn",), ("ffn", "kv"), ("ffn", "heads"), ("ffn", "kv", "heads"), ("kv", "heads"), ("kv",)]
    ),
    round_to=st.sampled_from([1, 32, 64]),
)
def test_the_ledger_adds_up_to_what_goes(sparsity, layers, attention, axes, round_to):
    shape = shape_with(axes)
    try:
        plan = allocate(shape, sparsity, layers, round_to, 28, min(attention, 1 - layers))
    except ValueError:
        return
    taken = {entry.axis: entry for entry in plan.ledger}
    assert len(taken) == len(plan.ledger)
    assert sum(entry.taken_parameters for entry in plan.ledger) == plan.parameters
    assert taken["layers"].taken_units == plan.layers if "layers" in taken else plan.layers == 0
    before = {"ffn": 1536, "kv": 3, "heads": 3 * plan.units.get("kv", 3)}
    for axis, there in before.items():
        gone = there - plan.units.get(axis, there)
        assert gone == (taken[axis].taken_units if axis in taken else 0)
    for entry in plan.ledger:
        assert entry.wanted_parameters >= 0 and entry.reason.endswith(".")
        if entry.taken_units < entry.wanted_units - 0.01:
            assert "rounded down" in entry.reason or "has to stay" in entry.reason


def test_the_ledger_says_what_rounding_did():
    (neurons,) = allocate(SMOLLM2, 0.2, 0.0, 32, 28).ledger
    assert (neurons.axis, neurons.taken_units, neurons.taken_parameters) == ("ffn", 416, 30 * 416 * 1728)
    assert neurons.wanted_units == pytest.approx(0.2 * 3_540_096 / 1728)
    assert neurons.wanted_parameters == pytest.approx(0.2 * 30 * 3_540_096)
    assert "409.73 neurons of 1,728 in each of 30 layers" in neurons.reason
    assert "1126.27 of 1536 would stay, rounded down to a multiple of 32: 1120." in neurons.reason
    layers, _ = allocate(SMOLLM2, 0.2, 0.3, 32, 28).ledger
    assert layers.wanted_units == pytest.approx(1.8) and layers.taken_units == 1
    assert "1.80 layers of 3,540,096, rounded down to whole layers: 1." in layers.reason


def test_the_ledger_says_where_a_share_is_too_small_for_anything():
    groups, heads, _ = allocate(shape_with(("ffn", "kv", "heads")), 0.2, 0.0, 32, 28, 0.1).ledger
    for entry in (groups, heads):
        assert entry.taken_units == entry.taken_parameters == 0
        assert "less than one, rounded down to nothing" in entry.reason
    groups, _ = allocate(shape_with(("ffn",)), 0.2, 0.0, 32, 28, 0.1).ledger
    assert "nothing of it can go here: neurons take it" in groups.reason
    assert groups.wanted_parameters == pytest.approx(0.1 * 0.2 * 30 * 3_540_096)


def test_the_ledger_says_where_attention_is_rounded_up_and_what_has_to_stay():
    (groups,) = allocate(shape_with(("kv",)), 0.1, 0.0, 32, 28).ledger
    assert groups.taken_units == 2 and "rounded up to whole groups: 2" in groups.reason
    groups, heads, _ = allocate(shape_with(("ffn", "kv", "heads")), 0.3, 0.0, 32, 28, 1.0).ledger
    assert groups.taken_units == 2 and "one group has to stay: 2" in groups.reason
    assert heads.taken_units == 2 and "one query head has to stay: 2" in heads.reason


@given(st.lists(st.floats(0, 2), min_size=1, max_size=20), st.data())
def test_the_lowest_unprotected_scores_go(scores, data):
    protected = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    count = data.draw(st.integers(0, len(scores)))
    assume(count <= len(scores) - len(protected))
    gone = least_important(scores, count, protected)
    assert len(gone) == count and not set(gone) & protected and gone == sorted(gone)
    stays = [s for i, s in enumerate(scores) if i not in gone and i not in protected]
    assert not gone or not stays or max(scores[i] for i in gone) <= min(stays)


def test_too_many_protected_layers_are_refused():
    with pytest.raises(ValueError, match="not protected"):
        least_important([0.1, 0.2], 2, {0})


@given(
    costs=st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=4),
    gone=st.lists(st.floats(0, 10) | st.just(float("inf")), min_size=4, max_size=4),
    count=st.integers(0, 3),
    width=st.integers(13, 16),
    room=st.integers(1, 17),
)
def test_what_goes_costs_least_of_all_that_keeps_to_the_budget(costs, gone, count, width, room):
    sizes = sizes_to_try(width, 4, 4)
    assert sizes == [width, 12, 8, 4]
    # The widest is no multiple, and counts as the next one.
    weights = steps_of(sizes, 4)
    assert weights == [4, 3, 2, 1]
    layers = range(len(costs))
    possible = []
    for removed in itertools.combinations(layers, min(count, len(costs))):
        if len(removed) != count or any(b - a == 1 for a, b in itertools.pairwise(removed)):
            continue
        left = [layer for layer in layers if layer not in removed]
        for choice in itertools.product(range(4), repeat=len(left)):
            if sum(weights[number] for number in choice) <= room:
                cost = sum(costs[layer][number] for layer, number in zip(left, choice, strict=True))
                possible.append(cost + sum(gone[layer] for layer in removed))
    # One program answers for every number of layers and every budget below its own.
    knapsack = Knapsack(weights, costs, gone[: len(costs)], count + 1, room + 2)
    found = knapsack.cheapest(count, room)
    if not possible or min(possible) == float("inf"):
        assert found is None
        return
    assert found.cost == pytest.approx(min(possible))
    assert len(found.removed) == count and all(b - a > 1 for a, b in itertools.pairwise(found.removed))
    assert sum(weights[number] for number in found.numbers) <= room
    left = [layer for layer in layers if layer not in found.removed]
    assert found.costs == tuple(costs[layer][number] for layer, number in zip(left, found.numbers, strict=True))
    assert found.cost == pytest.approx(sum(found.costs) + sum(gone[layer] for layer in found.removed))


@given(
    sparsity=st.floats(0.01, 0.9),
    axes=st.sampled_from([("ffn",), ("ffn", "kv"), ("ffn", "heads"), ("ffn", "kv", "heads"), ("kv", "heads")]),
    layers=st.none() | st.floats(0, 0.5),
    attention=st.none() | st.floats(0, 0.5),
)
def test_every_split_keeps_to_the_budget_and_differs_from_the_others(sparsity, axes, layers, attention):
    shape = shape_with(axes)
    try:
        found = alternatives(shape, sparsity, layers, 32, 28, attention)
    except ValueError as error:
        assert "sparsity=" in str(error)
        return
    assert len({(plan.layers, *sorted(plan.units.items())) for plan in found}) == len(found)
    for plan in found:
        assert plan.sparsity >= sparsity - 1e-6 and plan.layers <= 14
        assert sum(entry.taken_parameters for entry in plan.ledger) == plan.parameters
        assert sum(entry.taken_units for entry in plan.ledger if entry.axis == "layers") == plan.layers
    if layers is not None and attention is not None:
        assert found == [allocate(shape, sparsity, layers, 32, 28, attention)]


@given(width=st.integers(1, 200), least=st.integers(0, 200), step=st.sampled_from([1, 8, 32]))
def test_sizes_to_try_descend_from_all_of_a_layer(width, least, step):
    sizes = sizes_to_try(width, least, step)
    assert sizes[0] == width and all(a > b for a, b in itertools.pairwise(sizes))
    assert all(size % step == 0 and size > 0 for size in sizes[1:])
    assert len(sizes) == 1 or sizes[-1] <= max(least, step)
