"""Importance and recovery against brute force: remove channels, solve the least squares, compare the error."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_comp.core.gram import GramAccumulator, regularize
from optimum_comp.core.quadratic import (
    collinearity,
    eliminate,
    gram_form,
    group_importance,
    importance,
    mask_form,
    mask_gram,
    solve,
)
from optimum_comp.core.recovery import RECOVERIES, energy, recover
from optimum_comp.core.recovery import refit as refit_layer
from optimum_comp.core.selection import reduce_channels


RIDGE = 1e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(kind: str, channels: int = 6, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    """Calibration inputs `[tokens, channels]`, float64."""
    g = generator(seed)
    x = torch.randn(tokens, channels, generator=g, dtype=torch.float64)
    if kind == "rank-deficient":
        x = x[:, : channels // 2] @ torch.randn(channels // 2, channels, generator=g, dtype=torch.float64)
    if kind == "duplicated":
        x[:, 1] = x[:, 0]
        x[:, 4] = -2 * x[:, 3]
    if kind == "dead":
        x[:, 2] = 0
    return x


KINDS = ("random", "rank-deficient", "duplicated", "dead")


def problem_of(kind: str, seed: int = 0, d_out: int = 4, ridge: float = RIDGE):
    x = inputs_of(kind, seed=seed)
    weight = torch.randn(d_out, x.shape[1], generator=generator(seed + 1), dtype=torch.float64)
    return x, weight, x.T @ x, ridge


def refit(x: torch.Tensor, weight: torch.Tensor, kept: list[int], ridge: float) -> tuple[torch.Tensor, float]:
    """Least squares by an orthogonal factorisation, the ridge as extra rows: nothing of the package's algebra."""
    d = x.shape[1]
    scale = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, scale * torch.eye(d, dtype=x.dtype)])
    wanted = rows @ weight.T
    fitted = torch.linalg.lstsq(rows[:, kept], wanted, driver="gelsd").solution
    return fitted.T, float((wanted - rows[:, kept] @ fitted).square().sum())


def refit_mask(x: torch.Tensor, weight: torch.Tensor, kept: list[int], ridge: float) -> tuple[torch.Tensor, float]:
    """The same for a mask: one unknown a channel, outputs of all tokens stacked."""
    d = x.shape[1]
    columns = torch.stack([(x[:, [j]] @ weight[:, [j]].T).flatten() for j in range(d)], dim=1)
    scale = (ridge * columns.square().sum(0).mean()).sqrt()
    rows = torch.cat([columns, scale * torch.eye(d, dtype=x.dtype)])
    wanted = rows.sum(1, keepdim=True)
    mask = torch.linalg.lstsq(rows[:, kept], wanted, driver="gelsd").solution
    return mask.flatten(), float((wanted - rows[:, kept] @ mask).square().sum())


def others(d: int, *gone: int) -> list[int]:
    return [j for j in range(d) if j not in gone]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_gram_importance_is_the_error_after_removal_and_refit(kind, seed):
    x, weight, gram, ridge = problem_of(kind, seed)
    got = importance(gram_form(weight, regularize(gram, ridge)))
    want = torch.tensor([refit(x, weight, others(6, j), ridge)[1] for j in range(6)])
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_mask_importance_is_the_error_after_removal_and_mask_refit(kind, seed):
    x, weight, gram, ridge = problem_of(kind, seed)
    got = importance(mask_form(weight, regularize(mask_gram(weight, gram), ridge)))
    want = torch.tensor([refit_mask(x, weight, others(6, j), ridge)[1] for j in range(6)])
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_group_importance_is_the_error_after_removing_the_group(kind):
    x, weight, gram, ridge = problem_of(kind)
    for group in itertools.combinations(range(6), 2):
        got = group_importance(gram_form(weight, regularize(gram, ridge)), torch.tensor(group))
        assert got == pytest.approx(refit(x, weight, others(6, *group), ridge)[1], rel=1e-5, abs=1e-7)


def test_importance_is_energy_discounted_by_the_collinearity_index():
    _, weight, gram, ridge = problem_of("random")
    matrix = regularize(gram, ridge)
    energy = weight.square().sum(0) * matrix.diagonal()
    torch.testing.assert_close(importance(gram_form(weight, matrix)), energy / collinearity(matrix))


def test_collinearity_is_one_for_orthogonal_channels_and_large_for_duplicates():
    x = inputs_of("duplicated")
    index = collinearity(regularize(x.T @ x, 1e-9))
    # 4e8, by the ridge of 1e-9; and 1.03 of random channels that have no duplicate.
    assert index[[0, 1, 3, 4]].min() > 1e8
    assert index[[2, 5]].max() < 1.1
    torch.testing.assert_close(
        collinearity(torch.diag(torch.tensor([1.0, 5.0, 9.0]).double())), torch.ones(3).double()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_least_squares_recovery_equals_lstsq(kind, keep):
    x, weight, gram, ridge = problem_of(kind)
    kept = torch.randperm(6, generator=generator(keep))[:keep].sort().values
    want, floor = refit(x, weight, kept.tolist(), ridge)
    got = recover("least_squares", weight, gram, kept, ridge)
    assert ridge_error(x, weight, got, kept, ridge) == pytest.approx(floor, rel=1e-6, abs=1e-9)
    if kind == "random":
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def ridge_error(x, weight, repaired, kept, ridge) -> float:
    scale = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, scale * torch.eye(x.shape[1], dtype=x.dtype)])
    return float((rows @ weight.T - rows[:, kept] @ repaired.T).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_mask_recovery_equals_lstsq_over_masks(kind, keep):
    x, weight, gram, ridge = problem_of(kind)
    kept = torch.randperm(6, generator=generator(keep))[:keep].sort().values
    got = recover("mask", weight, gram, kept, ridge)
    mask, _ = refit_mask(x, weight, kept.tolist(), ridge)
    want = weight[:, kept] * mask
    torch.testing.assert_close(x[:, kept] @ got.T, x[:, kept] @ want.T, rtol=1e-4, atol=1e-4)


def relative_error(weight, repaired, gram, kept) -> float:
    """Squared difference that a removal makes to the outputs, over the squared outputs."""
    difference = weight.clone()
    difference[:, kept] -= repaired
    return energy(difference, gram) / energy(weight, gram)


@pytest.mark.parametrize("kind", KINDS)
def test_recoveries_are_ordered_by_their_freedom(kind):
    _, weight, gram, _ = problem_of(kind, seed=5)
    kept = torch.tensor([0, 2, 3])
    errors = [
        relative_error(weight, recover(n, weight, gram, kept, 1e-9), gram, kept)
        for n in ("least_squares", "mask", "none")
    ]
    assert errors[0] <= errors[1] + 1e-9 and errors[1] <= errors[2] + 1e-9


def test_relative_error_is_that_of_the_outputs():
    x, weight, gram, ridge = problem_of("random")
    kept = torch.tensor([1, 2, 5])
    repaired = recover("mask", weight, gram, kept, ridge)
    want = (x @ weight.T - x[:, kept] @ repaired.T).square().sum() / (x @ weight.T).square().sum()
    assert relative_error(weight, repaired, gram, kept) == pytest.approx(float(want))


def greedy_by_brute_force(cost, d: int, keep: int) -> list[int]:
    """Remove, one at a time, the channel whose loss leaves the smallest error of all the refits."""
    kept = list(range(d))
    while len(kept) > keep:
        kept.remove(min(kept, key=lambda j: cost([k for k in kept if k != j])))
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["gram", "mask"])
def test_elimination_one_at_a_time_is_exact_greedy(seed, form):
    x, weight, gram, ridge = problem_of("random", seed)
    fit = refit if form == "gram" else refit_mask
    matrix = regularize(gram, ridge) if form == "gram" else regularize(mask_gram(weight, gram), ridge)
    problem = gram_form(weight, matrix) if form == "gram" else mask_form(weight, matrix)
    for keep in (2, 4):
        want = greedy_by_brute_force(lambda kept: fit(x, weight, kept, ridge)[1], 6, keep)
        kept, scores, target, cost = eliminate(problem, keep, block_size=1)
        assert kept.tolist() == want
        torch.testing.assert_close(scores, importance(problem))
        torch.testing.assert_close(target, solve(problem, kept))
        assert cost == pytest.approx(fit(x, weight, want, ridge)[1], rel=1e-6)


def test_iterative_removal_keeps_one_of_two_duplicates_and_ranking_once_removes_both():
    x = inputs_of("random", channels=6, seed=3)
    x[:, 1] = x[:, 0]
    weight = torch.ones(3, 6, dtype=torch.float64)
    weight[:, :2] = 3.0
    problem = gram_form(weight, regularize(x.T @ x, 1e-8))
    iterative, once = (eliminate(problem, 4, block_size=size)[0].tolist() for size in (1, 6))
    assert len({0, 1} & set(iterative)) == 1
    assert not {0, 1} & set(once)
    # 0.018 times it.
    assert refit(x, weight, iterative, 1e-8)[1] < 0.04 * refit(x, weight, once, 1e-8)[1]


@given(
    d=st.integers(2, 12),
    data=st.data(),
    block=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    metric=st.sampled_from(["condition_gram", "condition_mask", "wanda", "magnitude", "random"]),
)
@settings(max_examples=60, deadline=None)
def test_any_metric_keeps_as_many_distinct_channels_as_asked(d, data, block, seed, metric):
    keep = data.draw(st.integers(1, d))
    g = generator(seed)
    x = torch.randn(3 * d, d, generator=g, dtype=torch.float64)
    weight = torch.randn(5, d, generator=g)
    settings = {"ridge": 1e-3, "block_size": block, "generator": generator(seed)}
    for name in RECOVERIES:
        found = reduce_channels(weight, x.T @ x, keep, metric=metric, recovery=name, **settings)
        kept, scores = found.kept, found.scores
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == keep
        assert scores.shape == (d,) and bool(torch.isfinite(scores).all())
        assert found.weight.shape == (5, keep) and bool(torch.isfinite(found.weight).all())


def test_elimination_beats_wanda_and_random_where_channels_are_collinear():
    g = generator(0)
    base = torch.randn(400, 8, generator=g, dtype=torch.float64)
    # Each channel twice, the second time in another scale: keeping one of each pair loses nothing.
    x = torch.cat([base, base * torch.linspace(0.5, 2, 8, dtype=torch.float64)], dim=1)
    weight = torch.randn(6, 16, generator=g, dtype=torch.float64)
    gram = x.T @ x
    errors = {}
    for metric in ("condition_gram", "wanda", "random"):
        settings = {"ridge": 1e-6, "block_size": 1, "generator": generator(0)}
        found = reduce_channels(weight, gram, 8, metric=metric, recovery="least_squares", **settings)
        errors[metric] = relative_error(weight, found.weight, gram, found.kept)
        assert found.error / energy(weight, gram) == pytest.approx(errors[metric], rel=1e-3, abs=1e-6)
    assert errors["condition_gram"] < 1e-6 < min(errors["wanda"], errors["random"])


def test_aiming_the_gram_form_equals_fitting_the_kept_channels_to_the_wanted_outputs():
    x, weight, gram, _ = problem_of("random")
    wanted = torch.randn(x.shape[0], 4, generator=generator(9), dtype=torch.float64)
    cross = (wanted - x @ weight.T).T @ x
    torch.testing.assert_close(
        refit_layer(weight, gram, cross, 1e-9), torch.linalg.lstsq(x, wanted).solution.T, rtol=1e-5, atol=1e-6
    )
    kept = torch.tensor([0, 3, 4])
    got = recover("least_squares", weight, gram, kept, 1e-9, cross)
    torch.testing.assert_close(got, torch.linalg.lstsq(x[:, kept], wanted).solution.T, rtol=1e-5, atol=1e-6)


def test_aiming_the_mask_form_equals_the_best_mask_for_the_wanted_outputs():
    x, weight, gram, _ = problem_of("random")
    wanted = x @ weight.T + 0.3 * torch.randn(x.shape[0], 4, generator=generator(9), dtype=torch.float64)
    cross = (wanted - x @ weight.T).T @ x
    kept = torch.tensor([0, 2, 3, 4])
    columns = torch.stack([(x[:, [j]] @ weight[:, [j]].T).flatten() for j in kept.tolist()], dim=1)
    mask = torch.linalg.lstsq(columns, wanted.flatten()[:, None]).solution.flatten()
    got = recover("mask", weight, gram, kept, 1e-9, cross)
    torch.testing.assert_close(got, weight[:, kept] * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["condition_gram", "condition_mask", "wanda"])
@pytest.mark.parametrize("recovery", ["least_squares", "mask"])
def test_one_elimination_chooses_and_repairs(metric, recovery):
    x, weight, gram, _ = problem_of("random")
    wanted = torch.randn(x.shape[0], 4, generator=generator(9), dtype=torch.float64)
    cross = (wanted - x @ weight.T).T @ x
    settings = {"metric": metric, "recovery": recovery, "ridge": 1e-3, "block_size": 1, "generator": generator(0)}
    found = reduce_channels(weight, gram.clone(), 3, cross=cross, **settings)
    want = recover(recovery, weight, gram, found.kept, 1e-3, cross)
    torch.testing.assert_close(found.weight, want)
    # In the memory of the Gram matrix: the same.
    inplace = reduce_channels(weight, gram.clone(), 3, cross=cross, overwrite=True, **settings)
    assert torch.equal(inplace.kept, found.kept) and torch.equal(inplace.weight, found.weight)


@pytest.mark.parametrize("recovery", ["least_squares", "mask"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_moment_of_whole_outputs_is_one_of_what_the_own_outputs_lack(recovery, share):
    x, weight, gram, _ = problem_of("random")
    wanted = torch.randn(x.shape[0], 4, generator=generator(9), dtype=torch.float64)
    kept = torch.tensor([0, 2, 3])
    lack = share * (wanted - x @ weight.T).T @ x
    whole = share * wanted.T @ x
    torch.testing.assert_close(
        recover(recovery, weight, gram, kept, 1e-2, whole, share), recover(recovery, weight, gram, kept, 1e-2, lack)
    )


def test_float32_keeps_what_float64_keeps_where_few_channels_carry_the_energy():
    g = generator(4)
    base = torch.randn(3000, 40, generator=g, dtype=torch.float64)
    x = base @ torch.randn(40, 64, generator=g, dtype=torch.float64) + 0.3 * torch.randn(
        3000, 64, generator=g, dtype=torch.float64
    )
    x[:, 5] *= 3000
    x[:, 17] *= 300
    weight = torch.randn(16, 64, generator=g, dtype=torch.float64)
    settings = {"metric": "condition_gram", "recovery": "least_squares", "ridge": 1e-3, "block_size": 4}
    found = [
        reduce_channels(weight.to(dtype), (x.T @ x).to(dtype), 48, generator=g, **settings)
        for dtype in (torch.float64, torch.float32)
    ]
    assert torch.equal(found[0].kept, found[1].kept)
    errors = [relative_error(weight, each.weight.double(), x.T @ x, each.kept) for each in found]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    d=st.integers(1, 17),
    blocks=st.integers(1, 20),
    weighted=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_gram_does_not_depend_on_batches_and_blocks(sizes, d, blocks, weighted):
    x = torch.randn(sum(sizes), d, generator=generator(d))
    weight = torch.rand(sum(sizes), generator=generator(1)) if weighted else None
    accumulator = GramAccumulator(d, blocks=blocks)
    start = 0
    for size in sizes:
        part = None if weight is None else weight[start : start + size]
        accumulator.update(x[start : start + size], part)
        start += size
    scaled = x.double() if weight is None else x.double() * weight.double().sqrt()[:, None]
    torch.testing.assert_close(accumulator.value(), scaled.T @ scaled, rtol=1e-4, atol=1e-4)
    assert accumulator.tokens == sum(sizes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_gram_refuses_what_is_not_finite(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    accumulator = GramAccumulator(4)
    accumulator.update(x)
    with pytest.raises(FloatingPointError):
        accumulator.value()


def test_gram_refuses_the_wrong_width():
    with pytest.raises(ValueError, match="5 channels"):
        GramAccumulator(4).update(torch.ones(2, 5))


def test_the_core_needs_no_transformers():
    code = (
        "import sys\n"
        "for name in ('transformers', 'optimum', 'onnxruntime'): sys.modules[name] = None\n"
        "import optimum_comp.core.gram, optimum_comp.core.quadratic, optimum_comp.core.selection\n"
        "import optimum_comp.core.recovery, optimum_comp.core.layer_scores, optimum_comp.core.allocation\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
