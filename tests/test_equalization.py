from __future__ import annotations

import pytest
import torch
from conftest import IDS, SIZES, TINY_CONFIGS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig

from optimum_comp import CompConfig, CompPruner
from optimum_comp.core.equalization import STRENGTHS, find_scales, room_of, rounding_noise
from optimum_comp.sweep.folding import multiplied


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


def is_lossless(weight: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Which rows come back if they are multiplied by a power of two and by its inverse, and stay finite."""
    factors = torch.exp2(exponents.double())
    there = multiplied(weight, [(0, factors)])
    return (torch.isfinite(there) & (multiplied(there, [(0, 1 / factors)]) == weight)).all(1)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    scale=st.integers(-24, 15),
    spread=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_the_room_of_a_weight_is_just_what_loses_nothing(dtype, scale, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    exponents = scale - spread * torch.rand(8, 5, generator=generator)
    weight = (torch.randn(8, 5, generator=generator) * torch.exp2(exponents)).clamp(-6e4, 6e4).to(dtype)
    weight[0] = 0
    weight[1, 1:] = 0
    least, most = room_of(weight)
    assert bool(((least <= 0) & (most >= 0)).all())
    for exponent in range(-12, 13):
        inside = (least <= exponent) & (exponent <= most)
        assert torch.equal(is_lossless(weight, torch.full((8,), exponent)), inside)
    if dtype != torch.float16:
        assert bool((least == -12).all() and (most == 12).all())


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("streamed", [True, False])
def test_in_float16_a_fold_neither_loses_bits_nor_overflows(name, streamed, tmp_path):
    """Small weights have bits in float16's last places, large ones are near its end."""
    model = outliers(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("fc1.weight", "up_proj.weight")):
                parameter *= 1e-4
            if key.endswith(("fc2.weight", "down_proj.weight")):
                parameter *= 2e5
    model.half().save_pretrained(tmp_path / "dense")
    written = {}
    for equalize in (False, True):
        folder = tmp_path / "dense"
        given_model = folder if streamed else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        pruner = CompPruner.from_pretrained(given_model)
        pruner.prune(CompConfig(**CONFIG, equalize=equalize), TOKENS)
        pruner.save_pretrained(tmp_path / str(equalize))
        written[equalize] = load_file(tmp_path / str(equalize) / "model.safetensors")
    changed = 0
    for key, plain in written[False].items():
        even, plain = written[True][key].double(), plain.double()
        assert bool(even.isfinite().all()), key
        # Zero in one is zero in the other, and all else is a power of two apart.
        assert torch.equal(even == 0, plain == 0), key
        exponents = (even / plain)[plain != 0].abs().log2()
        assert torch.equal(exponents, exponents.round()), key
        changed += int((exponents != 0).sum())
    assert changed > 0


def in_half_precision(config, dtype):
    """A pruner of a model that computes in half precision, as on a GPU."""
    torch.manual_seed(0)
    pruner = CompPruner.from_pretrained(AutoModelForCausalLM.from_config(config).to(dtype).eval())
    pruner._source.compute_dtype = dtype
    return pruner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folds_are_measured_finer_than_half_precision(dtype, caplog):
    """GELU passes no scales on, which bfloat16's rounding would hide."""
    pruner = in_half_precision(OPTConfig(**SIZES, **IDS, ffn_dim=96, activation_function="gelu"), dtype)
    caplog.set_level("WARNING", "transformers")
    pruner.prune(CompConfig(**CONFIG, equalize=True), TOKENS)
    assert "don't allow it: fc1 -> fc2" in caplog.text.replace("\n", " ")
    assert {parameter.dtype for parameter in pruner.model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_behind_the_residual_stream_is_not_taken_for_rounding(dtype, caplog):
    config = OPTConfig(**SIZES, **IDS, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False)
    pruner = in_half_precision(config, dtype)
    with torch.no_grad():
        for layer in pruner.layers:
            layer.fc2.weight *= 0.5
    caplog.set_level("WARNING", "transformers")
    pruner.prune(CompConfig(**CONFIG), TOKENS)
    assert "A norm follows the residual stream" in caplog.text
