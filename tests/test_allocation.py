from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from optimum_comp.core.allocation import Shape, allocate
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
    gone = plan.layers * shape.layer_parameters + (layers - plan.layers) * (width - plan.width) * 3 * hidden
    assert plan.sparsity == pytest.approx(gone / (layers * shape.layer_parameters))


@given(st.floats(0.76, 0.99))
def test_more_than_the_feed_forward_layers_hold_is_refused(sparsity):
    with pytest.raises(ValueError, match="raise layer_fraction"):
        allocate(SMOLLM2, sparsity, 0.0, 32, 28)


def test_more_layers_than_may_go_are_refused():
    with pytest.raises(ValueError, match="only 2 of 4 may go"):
        allocate(Shape(4, 1000, 100, 7), 0.9, 1.0, 1, 2)


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
