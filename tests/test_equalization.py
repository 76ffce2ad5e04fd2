from __future__ import annotations

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner
from optimum_comp.core.equalization import STRENGTHS, find_scales, rounding_noise


TOKENS = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(3))
CONFIG = {"sparsity": 0.2, "num_samples": 6, "sequence_length": 24, "round_to": 4}


def quantized(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (values / step).round() * step


def problem(outlier: float):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    inputs[:, 3] *= outlier
    weight = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    return inputs, weight


def actual_noise(inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> float:
    inputs, scaled = inputs / scales, weight * scales
    rounded = quantized(inputs, 2 * inputs.abs().max() / 255)
    rounded_weight = quantized(scaled, scaled.abs().amax(1, keepdim=True) / 127)
    return float((rounded @ rounded_weight.T - inputs @ scaled.T).square().sum())


@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_expected_noise_is_what_rounding_does(outlier):
    inputs, weight = problem(outlier)
    largest, energy = inputs.abs().amax(0), inputs.square().sum(0)
    scales, _ = find_scales(largest, energy, len(inputs), weight)
    for tried in (torch.ones(24, dtype=torch.float64), scales):
        expected = rounding_noise(tried, largest, energy, len(inputs), weight)
        assert actual_noise(inputs, weight, tried) == pytest.approx(expected, rel=0.3)


def test_scales_take_outliers_out():
    inputs, weight = problem(100.0)
    scales, strength = find_scales(inputs.abs().amax(0), inputs.square().sum(0), len(inputs), weight)
    assert strength in STRENGTHS
    assert torch.equal(scales.log2(), scales.log2().round())
    assert scales[3] > 4 * scales.median()
    even = actual_noise(inputs, weight, torch.ones_like(scales))
    assert actual_noise(inputs, weight, scales) < even / 10


def test_nothing_is_done_where_nothing_is_better():
    # One channel alone: a scale changes neither its step nor that of the weight.
    scales, strength = find_scales(torch.tensor([3.0]), torch.tensor([9.0]), 1, torch.tensor([[2.0]]))
    assert strength is None
    assert scales.tolist() == [1.0]
    # Channels that are never used don't make it NaN.
    scales, _ = find_scales(torch.zeros(4), torch.zeros(4), 8, torch.randn(3, 4))
    assert torch.equal(scales, torch.ones_like(scales))


def test_copies_of_a_channel_share_its_scale():
    inputs, weight = problem(50.0)
    owner = torch.arange(12).repeat(2)
    scales, _ = find_scales(inputs.abs().amax(0), inputs.square().sum(0), len(inputs), weight, owner)
    assert scales.shape == (12,)
    assert scales[3] == scales.max()


def outliers(name: str):
    """A tiny model whose activations have channels far larger than the rest, as real ones do."""
    model = tiny_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("layernorm.weight", "layer_norm.weight")):
                parameter[::8] *= 30
            if key.endswith(("up_proj.weight", "fc1.weight", "v_proj.weight")):
                parameter[::8] *= 30
    return model


def peaks(model) -> dict[str, float]:
    """Largest over median channel maximum of each dense layer's input."""
    found = {}

    def hook(name):
        def look(module, args):
            largest = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)
            found[name] = float(largest.max() / largest.median())

        return look

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for each in hooks:
        each.remove()
    return found


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("streamed", [True, False])
def test_equalized_computes_the_same_and_is_even(name, streamed, tmp_path):
    outliers(name).save_pretrained(tmp_path / "dense")
    made = {}
    for equalize in (False, True):
        given = tmp_path / "dense" if streamed else AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        pruner = CompPruner.from_pretrained(given)
        pruner.prune(CompConfig(**CONFIG, equalize=equalize), TOKENS)
        pruner.save_pretrained(tmp_path / str(equalize))
        made[equalize] = AutoModelForCausalLM.from_pretrained(tmp_path / str(equalize))
    with torch.no_grad():
        plain, even = (made[key](input_ids=TOKENS).logits for key in (False, True))
    torch.testing.assert_close(even, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)
    before, after = peaks(made[False]), peaks(made[True])
    assert any(after[key] < before[key] / 2 for key in before)
    assert sum(after.values()) < sum(before.values())
