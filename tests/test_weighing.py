"""Layers, attention and neurons on one scale: what goes is what costs least."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_blocks
from tiny_families import tiny_family
from torch.nn import functional

from optimum_comp import CompConfig, CompPruner
from optimum_comp.report.explain import Run, explain_pruning, pruning_text
from optimum_comp.sweep.weighing import _Bridge


OPEN = {"layer_fraction": "auto", "attention_fraction": "auto", "axes": ["ffn", "kv", "heads"], "round_to": 8}
ADAPTIVE = {"allocation": "adaptive"}
SIZE = {"num_samples": 16, "sequence_length": 32}


class Plain:
    """A junction without a norm."""

    multiplier = 2.0

    @staticmethod
    def target(lacking, scales):
        return lacking / 2.0


def test_what_a_bridge_leaves_is_the_least_squares_error():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 40, 7, generator=generator, dtype=torch.float64)
    added = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64) + inputs @ torch.ones(7, 5).double()
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    bridge = _Bridge(5, 7, torch.device("cpu"), torch.float64, has_norm=False)
    for number in range(3):
        rows = slice(number, number + 1)
        bridge.update(Plain, added[rows], inputs[rows], None)
    flat, wanted = inputs.reshape(-1, 7), added.reshape(-1, 5)
    fitted = torch.linalg.lstsq(2.0 * flat, wanted).solution
    left = ((wanted - 2.0 * flat @ fitted) @ root.T).square().sum()
    # Products are formed in float32.
    assert bridge.error(root, Plain, flat.T @ flat, 1e-12) == pytest.approx(float(left), rel=1e-4)
    assert bridge.error(root) == pytest.approx(float((wanted @ root.T).square().sum()), rel=1e-4)


def idle_layer(name: str, index: int):
    """A model one of whose layers does next to nothing."""
    model = tiny_family(name)
    layer = model.model.layers[index]
    with torch.no_grad():
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if hasattr(layer, "post_feedforward_layernorm"):
                # Its gains are 1 more.
                getattr(layer, norm).weight.fill_(-0.999)
        if not hasattr(layer, "post_feedforward_layernorm"):
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    return model


def divergence(model, other) -> float:
    tokens = tiny_blocks(4, seed=5)
    with torch.no_grad():
        wanted, found = (each(tokens).logits.log_softmax(-1) for each in (model, other))
    return float(functional.kl_div(found, wanted, log_target=True, reduction="sum")) / tokens.numel()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_layer_that_does_nothing_goes_first(name):
    model = idle_layer(name, 2)
    left = {}
    for shares in (OPEN, {"layer_fraction": 0.0, "attention_fraction": 0.0, "round_to": 8}):
        pruner = CompPruner.from_pretrained(copy.deepcopy(model))
        report = pruner.prune(CompConfig(sparsity=0.27, allocation="adaptive", **SIZE, **shares), tiny_blocks())
        assert report.achieved_sparsity >= 0.27
        left[bool(report.weighed)] = divergence(model, pruner.model)
        if shares is not OPEN:
            assert report.removed_layers == []
            continue
        assert report.removed_layers == [2] and report.units["kv"][0] == report.units["kv"][1]
        tried = [each for each in report.weighed if each["divergence"] is not None]
        assert min(tried, key=lambda each: each["divergence"])["layers"] == 1 and tried[0]["layers"] == 0
        assert min(report.layer_scores) == report.layer_scores[2]
        explained = " ".join(pruning_text("out", explain_pruning(Run.finished(report, pruner.config))).split())
        assert "Layer 2 went: score" in explained and "splits; what each was expected to cost" in explained
        assert len(report.widths) == len(report.expected_costs) == 3
    assert left[True] < left[False]


def test_heads_that_do_nothing_go_first():
    model = tiny_family("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            # Two query heads share a group of 16 channels.
            layer.self_attn.o_proj.weight[:, :32].mul_(1e-3)
    pruner = CompPruner.from_pretrained(copy.deepcopy(model))
    report = pruner.prune(CompConfig(sparsity=0.3, **SIZE, **OPEN, **ADAPTIVE), tiny_blocks())
    assert report.units["kv"] == [2, 1] and report.removed_layers == []
    assert all(layer.decision("kv").kept == [1] for layer in report.layers)
    explained = pruning_text("out", explain_pruning(Run.finished(report, pruner.config)))
    assert "None went: what else could go was cheaper." in explained


def test_what_is_not_weighed_is_not_shared_out():
    config = CompConfig(sparsity=0.2, **SIZE, **OPEN)
    pruner = CompPruner.from_pretrained(tiny_family("llama"))
    report = pruner.prune(config, tiny_blocks())
    assert (report.removed_layers, report.weighed, report.layer_scores) == ([], [], [])
    assert report.units["kv"][0] == report.units["kv"][1]


def test_where_gradients_overflow_neurons_take_all(monkeypatch):
    monkeypatch.setattr("optimum_comp.sweep.pruning.output_moments", lambda *args: False)
    report = CompPruner.from_pretrained(tiny_family("llama")).prune(
        CompConfig(sparsity=0.2, **SIZE, **OPEN, **ADAPTIVE), tiny_blocks()
    )
    assert report.removed_layers == [] and report.weighed == [] and len(set(report.widths)) == 1


def test_one_sample_can_not_be_fitted_and_measured_on():
    model = idle_layer("llama", 2)
    config = CompConfig(sparsity=0.27, num_samples=1, sequence_length=32, **OPEN, **ADAPTIVE)
    report = CompPruner.from_pretrained(model).prune(config, tiny_blocks(1))
    costs = [each["cost"] for each in report.weighed]
    assert min(cost for cost in costs if cost is not None) < costs[0]
    assert report.removed_layers == [] and {each["divergence"] for each in report.weighed} == {None}
