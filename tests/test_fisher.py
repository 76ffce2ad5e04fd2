"""Errors measured by what they cost in loss: the metric against brute force, the gradients against autograd's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import tiny_blocks, tiny_model
from tiny_families import tiny_family
from torch.nn import functional

from optimum_comp import CompConfig, CompPruner
from optimum_comp.checkpoint.opening import open_source
from optimum_comp.checkpoint.source import ResidentModel
from optimum_comp.core.fisher import root_of
from optimum_comp.core.gram import regularize
from optimum_comp.core.quadratic import gram_form, group_importance, importance, removal_costs
from optimum_comp.core.recovery import problem_of, recover
from optimum_comp.core.selection import reduce_channels
from optimum_comp.families import family_of
from optimum_comp.families.cutting import drop_dead_units
from optimum_comp.report.explain import Run, explain_pruning, pruning_text
from optimum_comp.sweep.fisher import FISHER_SAMPLES, STATE_DTYPE, draw, fisher_rows, output_moments
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.states import ActivationStore


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d: int = 6, outputs: int = 4):
    """Inputs, weight and a root that thinks little of most directions."""
    x, weight = drawn(40, d), drawn(outputs, d, seed=1)
    gradients = drawn(50, outputs, seed=2) * torch.tensor([3.0, 1.0, 0.1, 0.01], dtype=torch.float64)
    return x, weight, root_of(gradients.T @ gradients)


def measured_error(x, weight, kept, root) -> float:
    """Of the outputs after the best re-fit, which no root changes, by an orthogonal factorisation."""
    wanted = x @ weight.T
    fitted = torch.linalg.lstsq(x[:, kept], wanted).solution
    return float(((wanted - x[:, kept] @ fitted) @ root.T).square().sum())


def test_the_root_is_the_moment_scaled_to_a_mean_of_one():
    moment = drawn(9, 5).T @ drawn(9, 5)
    root = root_of(moment)
    want = moment / moment.diagonal().mean()
    torch.testing.assert_close(root.T @ root, want + 1e-3 * torch.eye(5, dtype=torch.float64))
    assert torch.equal(root, root.triu())
    assert root_of(torch.zeros(5, 5)) is None
    with pytest.raises(FloatingPointError, match="gradients"):
        root_of(torch.full((5, 5), torch.nan))


def test_importance_is_the_measured_error_after_removal_and_refit():
    x, weight, root = problem()
    given = gram_form(weight, regularize(x.T @ x, 1e-10))._replace(root=root)
    want = [measured_error(x, weight, [k for k in range(6) if k != j], root) for j in range(6)]
    torch.testing.assert_close(importance(given), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    for group in itertools.combinations(range(6), 2):
        kept = [k for k in range(6) if k not in group]
        got = group_importance(given, torch.tensor(group))
        assert got == pytest.approx(measured_error(x, weight, kept, root), rel=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_elimination_goes_by_the_measured_error_and_repairs_as_without_it(overwrite):
    x, weight, root = problem(d=10)
    settings = {"metric": "condition_gram", "recovery": "least_squares", "ridge": 1e-10, "block_size": 1}
    found = reduce_channels(
        weight, x.T @ x, 6, root=root, overwrite=overwrite, generator=torch.Generator(), **settings
    )
    kept = list(range(10))
    while len(kept) > 6:
        kept.remove(min(kept, key=lambda j: measured_error(x, weight, [k for k in kept if k != j], root)))
    assert found.kept.tolist() == kept
    plain = reduce_channels(weight, x.T @ x, 6, generator=torch.Generator(), **settings)
    assert plain.kept.tolist() != kept
    want = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(found.weight, want, rtol=1e-6, atol=1e-8)
    assert found.error == pytest.approx(float((x @ weight.T - x[:, kept] @ want.T).square().sum()), rel=1e-6)


def test_the_best_mask_is_the_one_of_the_measured_outputs():
    x, weight, root = problem()
    wanted = x @ weight.T + 0.3 * drawn(40, 4, seed=3)
    kept = torch.tensor([0, 2, 3, 5])
    columns = torch.stack([(x[:, [j]] @ weight[:, [j]].T @ root.T).flatten() for j in kept.tolist()], dim=1)
    mask = torch.linalg.lstsq(columns, (wanted @ root.T).flatten()[:, None]).solution.flatten()
    got = recover("mask", weight, x.T @ x, kept, 1e-10, (wanted - x @ weight.T).T @ x, root=root)
    torch.testing.assert_close(got, weight[:, kept] * mask, rtol=1e-6, atol=1e-8)
    form = problem_of("condition_mask", weight, x.T @ x, 1e-10, root=root)
    dropped = torch.cat([columns, (x[:, [1]] @ weight[:, [1]].T @ root.T).flatten()[:, None]], dim=1)
    torch.testing.assert_close(form.matrix[kept][:, [1]], dropped[:, :4].T @ dropped[:, 4:], rtol=1e-6, atol=1e-8)


def test_tokens_are_drawn_by_their_chances():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    found = draw(chances.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert found.shape == (40_000, 1)
    counts = torch.bincount(found[:, 0], minlength=7)
    # Five standard deviations of the most frequent one's.
    assert (counts[chances == 0] == 0).all() and (counts / 40_000 - chances).abs().max() < 0.0125
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="NaN or infinity"):
            draw(torch.tensor([[0.5, wrong, 0.5]]), torch.Generator())


def by_autograd(model, tokens: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The same through the whole model at once, with the same draws."""
    layers = family_of(model.config).get_layers(model)
    behind: list[torch.Tensor] = []

    def keep(_, __, output):
        state = output[0] if isinstance(output, tuple) else output
        state.retain_grad()
        behind.append(state)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    moments = [torch.zeros(model.config.hidden_size, model.config.hidden_size) for _ in layers]
    for row, sample in enumerate(tokens):
        behind.clear()
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(1_000_003 * seed + row)
        labels = draw(torch.softmax(logits.detach(), -1), generator)[:, 0]
        functional.cross_entropy(logits, labels, reduction="sum").backward()
        for moment, state in zip(moments, behind, strict=True):
            moment += state.grad[0].T @ state.grad[0]
    for hook in hooks:
        hook.remove()
    return moments


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "opt", "opt-post-norm"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_layer_at_a_time_finds_what_autograd_finds_at_once(name, streamed, tmp_path, monkeypatch):
    # So that only the order of sums differs.
    monkeypatch.setattr("optimum_comp.sweep.fisher.STATE_DTYPE", torch.float32)
    model, tokens = tiny_model(name), tiny_blocks(3)
    want = by_autograd(model, tokens, seed=5)
    if streamed:
        model.save_pretrained(tmp_path / "model")
        source = open_source(str(tmp_path / "model"), model.config, torch.device("cpu"), {}, {})
    else:
        source = ResidentModel(model, family_of(model.config))
    hidden, layers, ranks = model.config.hidden_size, model.config.num_hidden_layers, Ranks()
    with torch.no_grad():
        runner = LayerRunner(source, tokens[:1], torch.float32)
        states = ActivationStore((layers + 1) * 3, 32, hidden, torch.float32, tmp_path / "trace")
        moments = ActivationStore(layers, hidden, hidden, torch.float32)
        assert output_moments(runner, tokens, ranks, states, moments, 5)
    for index, moment in enumerate(want):
        got = moments.read(slice(index, index + 1), torch.device("cpu"), torch.float32)[0]
        torch.testing.assert_close(got, moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max()))


def test_samples_are_spread_over_all_and_shared_by_all_processes():
    alone = Ranks()
    assert fisher_rows(64, alone) == list(range(0, 64, 64 // FISHER_SAMPLES))
    assert fisher_rows(3, alone) == [0, 1, 2]
    ranks = []
    for number in range(3):
        each = Ranks()
        each.rank, each.size = number, 3
        ranks.append(each)
    assert sorted(row for each in ranks for row in fisher_rows(64, each)) == fisher_rows(64, alone)
    assert STATE_DTYPE is torch.bfloat16


def test_the_norm_decides_what_goes_and_can_be_had_without():
    reports = {}
    for norm in ("fisher", "euclidean"):
        pruner = CompPruner.from_pretrained(tiny_model("llama"))
        reports[norm] = pruner.prune(CompConfig(num_samples=16, sequence_length=32, error_norm=norm), tiny_blocks())
    kept = {norm: [layer.decisions[0].kept for layer in report.layers] for norm, report in reports.items()}
    assert kept["fisher"] != kept["euclidean"]
    assert "gradients" in reports["fisher"].timings and "gradients" not in reports["euclidean"].timings
    with pytest.raises(ValueError, match="error_norm"):
        CompConfig(error_norm="manhattan")
    assert not CompConfig(neuron_metric="wanda").needs_fisher
    assert CompConfig(neuron_metric="wanda", recovery="mask").needs_fisher
    assert not CompConfig.from_preset("fasp").needs_fisher


def test_removal_costs_are_the_measured_errors_of_what_is_left():
    x, weight, root = problem()
    given = gram_form(weight, regularize(x.T @ x, 1e-10))._replace(root=root)
    kept, want = list(range(6)), [0.0]
    for _ in range(3):
        # One at a time: the one that adds least to what has gone already.
        kept = min(([k for k in kept if k != j] for j in kept), key=lambda rest: measured_error(x, weight, rest, root))
        want.append(measured_error(x, weight, kept, root))
    costs = removal_costs(given._replace(matrix=given.matrix.clone()), [6, 5, 4, 3])
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(want), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="descend"):
        removal_costs(given, [5, 4])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_adaptive_widths_cost_less_than_uniform_ones(name, tmp_path):
    model = uneven_layers(name)
    results = {}
    for allocation in ("uniform", "adaptive"):
        pruner = CompPruner.from_pretrained(uneven_layers(name))
        shares = {"layer_fraction": 0.0, "attention_fraction": 0.0}
        config = CompConfig(
            sparsity=0.3, allocation=allocation, round_to=8, num_samples=16, sequence_length=32, **shares
        )
        pruner.prune(config, tiny_blocks())
        results[allocation] = pruner
    uniform, adaptive = (results[each].report for each in ("uniform", "adaptive"))
    assert len(set(uniform.widths)) == 1 < len(set(adaptive.widths))
    # The layer that does next to nothing gives most; the budget is kept all the same.
    assert adaptive.widths[1] == min(adaptive.widths) and adaptive.achieved_sparsity >= 0.3
    assert adaptive.parameters_after <= uniform.parameters_after
    assert len(adaptive.expected_costs) == 4 and min(adaptive.expected_costs) >= 0
    explained = pruning_text("out", explain_pruning(Run.finished(adaptive, results["adaptive"].config)))
    explained = " ".join(explained.split())
    assert "nats a token in all were expected" in explained and "stay in a layer" in explained
    tokens = tiny_blocks(4, seed=5)
    with torch.no_grad():
        wanted = model(tokens).logits.log_softmax(-1)
        left = {}
        for each, pruner in results.items():
            found = pruner.model(tokens).logits.log_softmax(-1)
            left[each] = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert left["adaptive"] < left["uniform"]
    config = results["adaptive"].model.config
    assert config.comp_widths == adaptive.widths and config.intermediate_size == max(adaptive.widths)
    layers = results["adaptive"].layers
    for layer, width in zip(layers, adaptive.widths, strict=True):
        assert layer.mlp.down_proj.weight.shape[1] == max(adaptive.widths)
        assert not layer.mlp.down_proj.weight[:, width:].any() and not layer.mlp.up_proj.weight[width:].any()
        assert layer.mlp.down_proj.weight[:, :width].any(0).all()


def uneven_layers(name: str):
    """A model whose second layer's neurons do next to nothing."""
    model = tiny_family(name)
    layer = model.model.layers[1]
    with torch.no_grad():
        if hasattr(layer, "post_feedforward_layernorm"):
            # Its gains are 1 more.
            layer.post_feedforward_layernorm.weight.fill_(-0.99)
        else:
            layer.mlp.up_proj.weight.mul_(1e-2)
    return model


def test_a_dead_neuron_is_dropped_and_the_model_computes_the_same():
    model, tokens = tiny_model("llama"), tiny_blocks(2)
    family = family_of(model.config)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:70] = 0
        model.model.layers[2].mlp.down_proj.weight[:, :] = 0
        wanted = model(tokens).logits
        assert drop_dead_units(family, model) == [32, 96, 32, 96]
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=0, atol=1e-6)
