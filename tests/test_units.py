"""Units larger than a neuron: which go, what is left of parameters, and norms behind what is repaired."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import tiny_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import tiny_family

from optimum_comp import CompConfig, CompPruner
from optimum_comp.core.allocation import Shape, allocate
from optimum_comp.core.quadratic import (
    Problem,
    eliminate,
    eliminate_units,
    group_importance,
    solve,
    units_removal_costs,
)
from optimum_comp.core.recovery import foreseeable
from optimum_comp.core.selection import SCORES, Units, reduce_channels
from optimum_comp.core.surgery import Layout, channels_of, cut, shape_after
from optimum_comp.families import FFN, HEADS, KV, family_of
from optimum_comp.families.cutting import Cut, cut_layer, cut_meanwhile
from optimum_comp.sweep.junction import Junction
from optimum_comp.sweep.moments import units_of


def problem_of(channels: int, rows: int = 5, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * channels, channels, generator=generator, dtype=torch.float64)
    # Partners that can stand in for each other.
    inputs[:, 1::2] += 0.9 * inputs[:, ::2]
    target = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return Problem(target, inputs.T @ inputs + 1e-3 * torch.eye(channels, dtype=torch.float64))


def exact_cost(problem: Problem, kept: torch.Tensor) -> float:
    """Squared error that is left after the best re-fit."""
    difference = problem.target.clone()
    difference[:, kept] -= solve(problem, kept)
    return float((difference @ problem.matrix * difference).sum())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_unit_that_goes_first_is_the_one_that_costs_least(width):
    problem = problem_of(6 * width)
    channels = torch.arange(6 * width).view(6, width)
    everything = torch.arange(6 * width)
    costs = [exact_cost(problem, everything[~torch.isin(everything, unit)]) for unit in channels]
    found = eliminate_units(problem, channels, torch.zeros(6, dtype=torch.long), 5)
    torch.testing.assert_close(found.scores, torch.tensor(costs, dtype=torch.float64))
    torch.testing.assert_close(
        found.scores, torch.tensor([group_importance(problem, unit) for unit in channels]).double()
    )
    gone = everything[~torch.isin(everything, found.kept)]
    assert torch.equal(gone, channels[int(torch.tensor(costs).argmin())])
    assert found.cost == pytest.approx(min(costs))
    torch.testing.assert_close(found.target, solve(problem, found.kept))


def test_what_is_left_is_the_exact_optimum_and_near_the_best_of_all_choices():
    problem = problem_of(12, seed=3)
    channels, classes = torch.arange(12).view(6, 2), torch.zeros(6, dtype=torch.long)
    found = eliminate_units(problem, channels, classes, 3)
    assert found.cost == pytest.approx(exact_cost(problem, found.kept))
    torch.testing.assert_close(found.target, solve(problem, found.kept))
    every = [exact_cost(problem, channels[list(units)].flatten()) for units in itertools.combinations(range(6), 3)]
    assert min(every) <= found.cost + 1e-9 and found.cost <= sorted(every)[len(every) // 10]


def test_units_of_one_channel_are_channels():
    problem = problem_of(10)
    one = eliminate(problem, 4, 1)
    other = eliminate_units(problem, torch.arange(10).view(10, 1), torch.zeros(10, dtype=torch.long), 4)
    assert torch.equal(one.kept, other.kept)
    torch.testing.assert_close(one.target, other.target)
    torch.testing.assert_close(one.scores, other.scores)
    assert one.cost == pytest.approx(other.cost)


@pytest.mark.parametrize("metric", ["condition_gram", "condition_mask", *SCORES])
@pytest.mark.parametrize("recovery", ["least_squares", "mask", "none"])
def test_as_many_stay_of_every_class(metric, recovery):
    problem = problem_of(24)
    units = Units(torch.arange(24).view(8, 3), torch.arange(8) // 4)
    found = reduce_channels(
        problem.target,
        problem.matrix,
        2,
        metric=metric,
        recovery=recovery,
        ridge=1e-6,
        block_size=32,
        generator=torch.Generator().manual_seed(0),
        units=units,
    )
    left = found.kept.view(-1, 3)[:, 0] // 3
    assert torch.equal(found.kept, channels_of(left, 3))
    assert (left // 4).bincount().tolist() == [2, 2]
    assert found.scores.shape == (8,) and found.weight.shape == (5, 12)


def test_too_few_units_are_refused():
    with pytest.raises(ValueError, match="keep=3: need 1 <= keep <= 2"):
        eliminate_units(problem_of(8), torch.arange(8).view(4, 2), torch.tensor([0, 0, 1, 1]), 3)


def test_what_units_cost_is_the_error_of_what_is_left_of_them():
    problem, channels = problem_of(24, seed=1), torch.arange(24)
    groups = channels.view(3, 8), torch.zeros(3, dtype=torch.long)
    heads = channels.view(12, 2), torch.arange(12) // 4
    keeps = [(3, 4), (3, 2), (2, 4), (1, 4), (2, 1), (1, 3)]
    want = []
    for many, few in keeps:
        left = eliminate_units(problem, *groups, many).kept
        rest = problem._replace(target=solve(problem, left), matrix=problem.matrix[left][:, left])
        units = torch.arange(len(left)).view(-1, 2), torch.arange(len(left) // 2) // 4
        want.append(exact_cost(problem, left[eliminate_units(rest, *units, few).kept]))
    found = units_removal_costs(problem._replace(matrix=problem.matrix.clone()), groups, heads, keeps)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(want))
    assert found[0] == 0


@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    width=st.integers(1, 5),
    neurons=st.integers(1, 9),
    other=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_fused_parts_are_cut_where_they_lie(heads, groups, width, neurons, other, data):
    counts = {HEADS: heads * groups, KV: groups, FFN: neurons}
    units = {
        kind: torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
        for kind, count in counts.items()
    }
    parts = [
        torch.randn(counts[HEADS] * width, other),
        torch.randn(groups * width, other),
        torch.randn(groups * width, other),
    ]
    fused = torch.cat(parts)
    layout = [Layout(0, (HEADS, KV, KV))]
    kinds = (HEADS, KV, KV)
    expected = torch.cat(
        [
            part.view(counts[kind], width, other)[units[kind]].flatten(0, 1)
            for part, kind in zip(parts, kinds, strict=True)
        ]
    )
    kept = {kind: units[kind] for kind in (HEADS, KV)}
    assert torch.equal(cut(fused, layout, counts, kept), expected)
    after = {kind: len(there) for kind, there in kept.items()}
    assert shape_after(fused.shape, layout, counts, after) == expected.shape
    # The other way round, as Conv1D has it; and what isn't named stays.
    assert torch.equal(cut(fused.T, [Layout(1, kinds)], counts, kept), expected.T)
    assert cut(fused, layout, counts, {FFN: units[FFN]}) is fused


def test_what_is_not_made_of_such_units_is_refused():
    with pytest.raises(ValueError, match="a dimension of 10 isn't made of 4 heads"):
        cut(torch.zeros(10, 2), [Layout(0, (HEADS,))], {HEADS: 4}, {HEADS: torch.tensor([0])})


def test_a_layer_that_is_cut_for_a_while_is_whole_again_afterwards():
    model = tiny_family("phi3")
    family, config = family_of(model.config), model.config
    layer = family.get_layers(model)[1]
    counts = family.counts(config, layer)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    hidden = torch.randn(1, 6, 64)
    rope = model.model.rotary_emb(hidden, torch.arange(6)[None])
    call = {"position_embeddings": rope, "attention_mask": None}
    output = layer(hidden, **call)
    cuts = [Cut(family.axis(KV), counts, {KV: torch.tensor([1]), HEADS: torch.tensor([2, 3])})]
    with pytest.raises(ZeroDivisionError), cut_meanwhile(family, config, layer, cuts):
        assert layer.self_attn.qkv_proj.weight.shape == (80, 64) and config.num_attention_heads == 2
        small = layer(hidden, **call)
        raise ZeroDivisionError
    assert config.num_attention_heads == 4 and layer.self_attn.num_key_value_heads == 2
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    torch.testing.assert_close(_first(layer(hidden, **call)), _first(output))
    cut_layer(family, config, layer, cuts)
    config.num_attention_heads = 2
    torch.testing.assert_close(_first(layer(hidden, **call)), _first(small))


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def junction_of(name: str, *, biased: bool = False):
    model = tiny_family(name)
    family = family_of(model.config)
    layer = family.get_layers(model)[0].double()
    slot = family.ffn.consumer
    if biased:
        slot.module(layer).bias = torch.nn.Parameter(torch.randn(64, dtype=torch.float64))
    return Junction(family, model.config, family.ffn, layer), slot.matrix(layer).detach(), slot.module(layer).bias


@pytest.mark.parametrize("name", ["granite", "llama"])
def test_the_residual_stream_is_fitted_through_the_multiplier(name):
    junction, _, _ = junction_of(name)
    inputs, lacking = torch.randn(400, 96, dtype=torch.float64), torch.randn(400, 64, dtype=torch.float64)
    cross = junction.target(lacking, None).T @ inputs
    fitted = torch.linalg.solve(inputs.T @ inputs, cross.T).T
    by_hand = torch.linalg.lstsq(junction.multiplier * inputs, lacking).solution.T
    torch.testing.assert_close(fitted, by_hand)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_is_a_number_for_each_token(name, biased):
    junction, weight, bias = junction_of(name, biased=biased)
    inputs = torch.randn(400, 96, dtype=torch.float64)
    output = inputs @ weight.T
    scales = junction.token_scales(output).double()
    gains = junction.gained(torch.ones(64, 1, dtype=torch.float64))[:, 0]
    z = output + bias if biased else output
    torch.testing.assert_close(gains * scales[:, None] * z, junction.contribution(output), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(junction.ungained(junction.gained(weight)), weight)

    # With scales held, fewer channels are re-fitted for the stream by the weighted moments as they are by hand.
    kept = torch.arange(0, 96, 2)
    gram = (inputs * scales[:, None].square()).T @ inputs
    gained = junction.gained(weight)
    fitted = junction.ungained((gained @ gram)[:, kept] @ torch.linalg.inv(gram[kept][:, kept]))
    for row in (0, 31, 63):
        factor = gains[row] * scales[:, None]
        by_hand = torch.linalg.lstsq(factor * inputs[:, kept], factor * output[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(fitted[row], by_hand, rtol=1e-6, atol=1e-8)


def test_what_is_aimed_at_behind_a_norm_is_regularised_by_channel():
    junction, _, _ = junction_of("gemma3")
    gains = torch.logspace(-2, 2, 64, dtype=torch.float64)
    junction._gains = gains
    scales, lacking = torch.rand(40, dtype=torch.float64) + 0.5, torch.randn(40, 64, dtype=torch.float64)
    # What the dense layer's output, without gains, is to move by.
    moves = junction.target(lacking, scales) / (scales[:, None].square() * gains)

    def cost(moves):
        missed = (gains * scales[:, None] * moves - lacking).square().sum()
        return missed + gains.square().mean() * (scales[:, None] * moves).square().sum()

    best = cost(moves)
    generator = torch.Generator().manual_seed(0)
    for step in (1e-3, 0.1, 1.0):
        assert best < cost(moves + step * torch.randn(40, 64, generator=generator, dtype=torch.float64))


def test_only_what_inputs_foretell_is_aimed_at():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 500, 40, generator=generator, dtype=torch.float64)
    law = torch.randn(40, generator=generator, dtype=torch.float64)
    wanted = torch.randn(2, 500, 3, generator=generator, dtype=torch.float64)
    wanted[..., 0] = inputs @ law
    wanted[..., 1] = 0
    halves = tuple(wanted[half].T @ inputs[half] for half in (0, 1))
    gram = sum(part.T @ part for part in inputs)
    left = foreseeable(halves, gram, 1e-6)
    whole = halves[0] + halves[1]
    torch.testing.assert_close(left[0], whole[0], rtol=0.1, atol=0)
    assert bool((left[1] == 0).all())
    # Noise: nearly all that a fit to it would do is left undone; 0.016 of it is done.
    assert left[2].norm() < 0.05 * whole[2].norm()


def deviation(name: str, **fields) -> float:
    """Mean squared difference from the dense model's logits, on text that was not calibrated on."""
    prompt = tiny_blocks(8, 32, seed=77)

    def sharp():
        model = tiny_family(name)
        for key, parameter in model.named_parameters():
            if "proj" in key:
                parameter.data.mul_(4)
        return model

    with torch.no_grad():
        want = sharp()(prompt).logits
        pruner = CompPruner.from_pretrained(sharp())
        # Random weights have no loss to speak of; what is compared here are errors as they are.
        settings = {
            "sparsity": 0.25,
            "num_samples": 64,
            "sequence_length": 32,
            "round_to": 8,
            "error_norm": "euclidean",
        }
        pruner.prune(CompConfig(**{**settings, **fields}), tiny_blocks(64, 32))
        return float((pruner.model(prompt).logits - want).square().mean())


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_alignment_and_bridges_earn_their_place_behind_a_norm(name):
    assert deviation(name, alignment=0.5) < deviation(name, alignment=0.0)
    layers = {"layer_fraction": 1.0, "alignment": 0.0}
    assert deviation(name, **layers, bridge=True) < deviation(name, **layers, bridge=False)


def test_repair_and_metric_earn_their_place_in_attention():
    fields = {"sparsity": 0.13, "axes": ["heads"]}
    best = deviation("llama", **fields)
    assert best < deviation("llama", **fields, recovery="none")
    assert best <= deviation("llama", **fields, recovery="mask")


def test_units_of_heads_and_groups():
    groups = units_of(KV, {HEADS: 6, KV: 3}, 24)
    assert groups.channels.tolist() == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert groups.classes.tolist() == [0, 0, 0]
    heads = units_of(HEADS, {HEADS: 6, KV: 3}, 24)
    assert heads.channels.shape == (6, 4) and heads.classes.tolist() == [0, 0, 1, 1, 2, 2]


SHAPE = Shape(
    num_layers=30,
    layer_parameters=3_540_096,
    width=1536,
    neuron_parameters=3 * 576,
    groups=3,
    group_parameters=294_912,
    group_heads=3,
    head_parameters=73_728,
)


def test_attention_takes_whole_groups_then_a_head_of_each():
    assert allocate(SHAPE, 0.3, 0.0, 32, 28, 0.27).units == {"ffn": 1024, "heads": 6}
    assert allocate(SHAPE, 0.3, 0.0, 32, 28, 0.28).units == {"ffn": 1088, "kv": 2}
    assert allocate(SHAPE, 0.3, 0.0, 32, 28, 0.42).units == {"ffn": 1152, "kv": 2, "heads": 4}
    assert allocate(SHAPE, 0.3, 0.0, 32, 28, 0.1).units == {"ffn": 896}


@given(
    sparsity=st.floats(0.01, 0.6),
    fraction=st.floats(0, 1),
    layers=st.floats(0, 1),
    groups=st.integers(1, 8),
    heads=st.integers(1, 4),
    neurons=st.booleans(),
    within=st.booleans(),
    whole=st.booleans(),
)
def test_at_least_what_was_asked_goes_or_it_is_said_why_not(
    sparsity, fraction, layers, groups, heads, neurons, within, whole
):
    head = 4096
    attention = groups * heads * head + 2 * groups * 2048
    shape = Shape(
        num_layers=12,
        layer_parameters=attention + 512 * 192,
        width=512,
        neuron_parameters=192 * neurons,
        groups=groups,
        group_parameters=(heads * head + 4096) * whole,
        group_heads=heads,
        head_parameters=head * within,
    )
    fraction = min(fraction, 1 - layers)
    try:
        plan = allocate(shape, sparsity, layers, 8, 10, fraction)
    except ValueError as error:
        assert "sparsity=" in str(error)
        return
    assert plan.sparsity >= sparsity - 1e-6
    left = plan.units.get("kv", groups)
    assert 1 <= left <= groups and plan.units.get("heads", left * heads) % left == 0
    gone = (groups - left) * (heads * head + 4096) + (left * heads - plan.units.get("heads", left * heads)) * head
    gone += (512 - plan.width) * 192
    assert plan.parameters == plan.layers * shape.layer_parameters + (12 - plan.layers) * gone
