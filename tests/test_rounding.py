from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_comp.core.assignment import Choice, upgrades
from optimum_comp.core.rounding import compensated, nearest, rounding_error


def layer(rows: int, width: int, seed: int = 0, tokens: int = 400):
    """A weight, and the Gram matrix of correlated inputs with outliers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs[:, 0] *= 10
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), inputs.T @ inputs


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
def test_codes_are_in_range_and_stand_for_the_weight(rows, width, bits, block, seed):
    weight, gram = layer(rows, width, seed)
    for blocks in (nearest(weight, bits, block), compensated(weight, gram, bits, block)):
        assert blocks.codes.dtype == torch.uint8
        assert blocks.codes.shape[1] == -(-width // block) * block
        assert blocks.scales.shape == (rows, blocks.codes.shape[1] // block)
        assert blocks.block_size == block
        assert blocks.weight().shape == weight.shape
        middle = 2 ** (bits - 1)
        # -128 overflows on some processors.
        assert int(blocks.codes.min()) >= (1 if bits == 8 else 0)
        assert int(blocks.codes.max()) < 2 * middle
        # What pads the last block is zero.
        assert bool((blocks.codes[:, width:] == middle).all())
        assert torch.isfinite(blocks.scales).all()


def test_nearest_is_within_half_a_step():
    weight, _ = layer(5, 64)
    blocks = nearest(weight, 8, 32)
    steps = blocks.scales.abs().repeat_interleave(32, 1)
    inside = weight.abs() <= 127 * steps
    assert bool(((blocks.weight() - weight).abs()[inside] <= 0.5001 * steps[inside]).all())
    assert inside.float().mean() > 0.9


def test_compensation_is_close_to_the_best_codes():
    # Four weights of one row, 4 bits, no outlier: all 16^4 codes can be tried at the scale that was found.
    weight, gram = layer(1, 4, seed=5)
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(4, dtype=gram.dtype)
    blocks = compensated(weight, gram, 4, 16)
    scale = blocks.scales[0, 0]
    best = min(
        rounding_error(weight, scale * torch.tensor([codes], dtype=torch.float64), gram)
        for codes in itertools.product(range(-8, 8), repeat=4)
    )
    found = rounding_error(weight, blocks.weight(), gram)
    plain = rounding_error(weight, nearest(weight, 4, 16).weight(), gram)
    assert best <= found <= plain
    assert found <= 3 * best


@pytest.mark.parametrize("bits", [4, 8])
def test_compensation_halves_the_error_of_the_output(bits):
    weight, gram = layer(48, 96, tokens=1000)
    error = rounding_error(weight, compensated(weight, gram, bits, 32).weight(), gram)
    assert error < 0.5 * rounding_error(weight, nearest(weight, bits, 32).weight(), gram)


def test_scales_are_the_best_for_their_codes():
    weight, gram = layer(3, 64)
    blocks = compensated(weight, gram, 4, 32, ridge=1e-9)
    least = rounding_error(weight, blocks.weight(), gram)
    for row, block, factor in itertools.product(range(3), range(2), (0.99, 1.01)):
        scales = blocks.scales.clone()
        scales[row, block] *= factor
        assert rounding_error(weight, blocks._replace(scales=scales).weight(), gram) >= least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_rounded_a_few_at_a_time_to_the_same(dtype, monkeypatch):
    """A row of a 7B model's down-projection has normal equations of 0.5 MB; all 4096 would take 1.9 GB at once."""
    weight, gram = (each.to(dtype) for each in layer(37, 96))
    whole = compensated(weight, gram, 4, 16), nearest(weight, 4, 16)
    largest = 0
    solve = torch.linalg.solve_ex

    def watched(normal, right):
        nonlocal largest
        largest = max(largest, normal.numel() * normal.itemsize)
        return solve(normal, right)

    monkeypatch.setattr(torch.linalg, "solve_ex", watched)
    limit = 5 * 2 * 6**2 * weight.itemsize
    monkeypatch.setattr("optimum_comp.core.rounding._WORKING_BYTES", limit)
    parts = compensated(weight, gram, 4, 16), nearest(weight, 4, 16)
    assert 0 < largest <= limit // 2
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(one.scales, other.scales, rtol=1e-12 if dtype == torch.float64 else 1e-4, atol=0)
    assert torch.equal(whole[1].scales, parts[1].scales)


def test_what_cannot_be_rounded_is_refused():
    weight, gram = layer(2, 16)
    gram[3, 3] = torch.nan
    with pytest.raises(FloatingPointError):
        compensated(weight, gram, 4, 16)


def test_zeros_stay_zeros():
    weight, gram = layer(2, 40)
    weight[:, :32] = 0
    for blocks in (nearest(weight, 4, 32), compensated(weight, gram, 4, 32)):
        assert bool((blocks.weight()[:, :32] == 0).all())


choices = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=3), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(choices)
def test_every_step_loses_least_for_its_size(given_choices):
    groups = {}
    for number, options in enumerate(given_choices):
        # Growing size; loss as it comes.
        total, made = 0.0, []
        for size, loss in options:
            total += size
            made.append(Choice(total, float(loss)))
        groups[str(number)] = made
    steps = upgrades(groups)
    every = [
        (sum(groups[name][pick].size for name, pick in zip(groups, picks, strict=True)),
         sum(groups[name][pick].loss for name, pick in zip(groups, picks, strict=True)))
        for picks in itertools.product(*(range(len(options)) for options in groups.values()))
    ]  # fmt: skip
    for step in steps:
        assert step.loss <= min(loss for size, loss in every if size <= step.size) + 1e-9
    losses = [step.loss for step in steps]
    assert losses == sorted(losses, reverse=True)
    if steps:
        assert steps[-1].loss == pytest.approx(min(loss for _, loss in every))
