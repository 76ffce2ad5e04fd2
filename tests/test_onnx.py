from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, TINY_CONFIGS, need_onnx, tiny_model
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging as progress


need_onnx()

import onnx  # noqa: E402
from exports import exporter, outlier_model  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from optimum.onnxruntime import ORTConfig, ORTModelForCausalLM, ORTQuantizer  # noqa: E402
from optimum.onnxruntime.configuration import AutoQuantizationConfig  # noqa: E402

from optimum_comp.onnx import quantization  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.parity import PREFILL, require_close  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402
from optimum_comp.onnx.recipes import RECIPES  # noqa: E402
from optimum_comp.onnx.runtime import load_onnx, multiplies_8_bits  # noqa: E402


TIED = ["llama", "opt", "opt-post-norm"]
FAMILIES = [*TINY_CONFIGS, "llama-odd"]

# Relative errors of the centred logits. The models have outliers in their keys, as real ones do: quantizing the
# products of activations makes the error 0.16 to 0.28 (see test_bound_sees_quantized_attention), a mistake in the
# wiring about 1. Ours is up to 0.035 (int8) and 0.056 (int8-dynamic).
# With queries, keys and values in 4 bits as well (int4-small), they are up to 0.41 off; a mistake is still about 1.
BOUNDS = {"int8": 0.05, "int8-dynamic": 0.08, "int4-small": 0.6}
# Of 4 bits, as it is, and with what has 8 bits for good reason at 4 as well: queries, keys and values (of the OPTs and
# of int4 of llama-odd the head, where that matters more). The bound is between them.
FOUR_BITS = {
    "llama": {"int4": (0.174, 0.251), "int4-hqq": (0.218, 0.281), "int4-rtn": (0.199, 0.277)},
    "llama-untied": {"int4": (0.081, 0.129), "int4-hqq": (0.135, 0.168), "int4-rtn": (0.140, 0.163)},
    "mistral": {"int4": (0.162, 0.261), "int4-hqq": (0.172, 0.250), "int4-rtn": (0.201, 0.292)},
    "qwen2": {"int4": (0.153, 0.213), "int4-hqq": (0.162, 0.239), "int4-rtn": (0.191, 0.264)},
    "opt": {"int4": (0.061, 0.080), "int4-hqq": (0.093, 0.108), "int4-rtn": (0.113, 0.152)},
    "opt-post-norm": {"int4": (0.040, 0.053), "int4-hqq": (0.066, 0.075), "int4-rtn": (0.108, 0.139)},
    "llama-odd": {"int4": (0.109, 0.124), "int4-hqq": (0.113, 0.166), "int4-rtn": (0.118, 0.165)},
}
TOKENS = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exporter(tmp_path_factory, outlier_model)


@pytest.fixture(scope="module")
def quantized(exported, tmp_path_factory):
    """Report of a family and a recipe, quantized once."""
    made = {}

    def get(name: str, recipe: str):
        if (name, recipe) not in made:
            output = tmp_path_factory.mktemp(name) / recipe
            made[name, recipe] = quantize_onnx(exported(name).folder, output, recipe=recipe, tokens=TOKENS)
        return made[name, recipe]

    return get


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = (x - x.mean(-1, keepdim=True) for x in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


def bound(name: str, recipe: str) -> float:
    if recipe in BOUNDS:
        return BOUNDS[recipe]
    right, wrong = FOUR_BITS[name][recipe]
    # Nearer to what is wrong: kernels of other processors round otherwise, by some percent.
    return right + 0.75 * (wrong - right)


def graph_of(folder: Path):
    return onnx.load(folder / "model.onnx").graph


def activation_products(folder: Path) -> set[str]:
    """Names of MatMuls that multiply no weight."""
    graph = graph_of(folder)
    constant = {tensor.name for tensor in graph.initializer}
    constant |= {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in constant}
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in constant}


@pytest.mark.parametrize("name", FAMILIES)
def test_export_computes_what_pytorch_computes(name, exported):
    folder, report = exported(name).folder, exported(name).report
    # At most 2e-6; the export itself refuses more than 1e-3.
    assert 0 < report.max_difference_prefill < 1e-5
    assert 0 < report.max_difference_cached < 1e-5
    assert report.size_bytes == (folder / "model.onnx").stat().st_size
    # On other tokens and another length than the export's own check.
    expected = logits(exported(name).model)
    torch.testing.assert_close(logits(load_onnx(folder, threads=1)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_is_close_and_keeps_attention_in_float(name, recipe, exported, quantized):
    folder = exported(name).folder
    report = quantized(name, recipe)
    error = relative_error(logits(load_onnx(report.output, threads=1)), logits(load_onnx(folder, threads=1)))
    assert error < bound(name, recipe)

    products = activation_products(folder)
    assert len(products) >= 2 * SIZES["num_hidden_layers"]
    graph = graph_of(report.output)
    # Every product of activations is left, and no other MatMul or Gemm.
    assert {node.name for node in graph.node if node.op_type in ("MatMul", "Gemm")} == products
    # No weight is left in float, nor there twice.
    assert not [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 2048]
    parameters = sum(p.numel() for p in exported(name).model.parameters())
    stored = sum(len(t.raw_data) for t in graph.initializer if t.data_type in (2, 3))
    padded = recipe != "int8-dynamic" and name == "llama-odd"
    assert stored < parameters * (2 if padded else 1.05)
    # -128 overflows on old Arm cores.
    signed = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert all(weights.min(initial=0) > -128 for weights in signed)


def test_bound_sees_quantized_attention(exported, tmp_path):
    for name in ("llama", "qwen2"):
        folder = exported(name).folder
        config = AutoQuantizationConfig.arm64(is_static=False, per_channel=True)
        ORTQuantizer.from_pretrained(folder).quantize(config, tmp_path / name, file_suffix=None)
        stock = logits(load_onnx(tmp_path / name, threads=1))
        error = relative_error(stock, logits(load_onnx(folder, threads=1)))
        assert error > max(BOUNDS["int8"], BOUNDS["int8-dynamic"])


@pytest.mark.parametrize("recipe", ["int4", "int4-hqq", "int4-rtn"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_bound_sees_queries_in_4_bits(name, recipe, exported, tmp_path, monkeypatch):
    folder = exported(name).folder
    monkeypatch.setitem(RECIPES, recipe, dataclasses.replace(RECIPES[recipe], attention=None))
    report = quantize_onnx(folder, tmp_path / "out", recipe=recipe, tokens=TOKENS)
    error = relative_error(logits(load_onnx(report.output, threads=1)), logits(load_onnx(folder, threads=1)))
    assert error > bound(name, recipe)


@pytest.mark.parametrize("name", TIED)
def test_tied_embedding_is_stored_once(name, quantized):
    graph = graph_of(quantized(name, "int8").output)
    (lookup,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    (head,) = (node for node in graph.node if node.op_type == "MatMulNBits" and node.input[1] == lookup.input[0])
    blocks = next(tensor for tensor in graph.initializer if tensor.name == head.input[1])
    assert blocks.dims[0] == TINY_CONFIGS[name]().vocab_size


def test_counts(quantized):
    layers = SIZES["num_hidden_layers"]
    weights, products = 7 * layers + 1, 2 * layers + 1
    # Queries, keys and values are one product, and gate and up projection.
    assert quantized("llama", "int8").nodes == {
        "MatMulNBits": weights - 3 * layers,
        "GatherBlockQuantized": 1,
        "MatMul (float)": products,
    }
    assert quantized("llama", "int8-dynamic").nodes == {
        "MatMulNBits": layers,
        "MatMulInteger": weights - layers,
        "Gather (8-bit)": 1,
        "MatMul (float)": products,
    }
    report = quantized("llama", "int8")
    assert report.size_bytes < report.size_bytes_before


@pytest.mark.parametrize("recipe", RECIPES)
def test_folder_is_complete_and_runs_silently(recipe, tiny_folder, tmp_path, capfd):
    settings = tiny_folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{ "a_key_of_my_own": 1,', 1))
    export_onnx(tiny_folder, tmp_path / "onnx")
    progress.disable_progress_bar()
    try:
        quantize_onnx(tmp_path / "onnx", tmp_path / "out", recipe=recipe, tokens=TOKENS)
    finally:
        progress.enable_progress_bar()

    for folder in (tmp_path / "onnx", tmp_path / "out"):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    for folder in (tmp_path / "onnx", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
        assert json.loads((folder / "config.json").read_text())["rope_theta"] == 50_000
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "onnx" / "config.json").read_bytes()
    assert ORTConfig.from_pretrained(tmp_path / "out").quantization.operators_to_quantize
    assert json.loads((tmp_path / "out" / "ort_config.json").read_text())["comp_recipe"]["name"] == recipe

    model = ORTModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[5, 6, 7, 8]]), do_sample=False, eos_token_id=127).shape[1] <= 4 + 7
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_logging_is_left_alone(exported, tmp_path):
    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters)
    quantize_onnx(exported("llama").folder, tmp_path / "out")
    assert (root.level, root.handlers, root.filters) == before


def test_half_precision_is_exported_in_float32(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    report = export_onnx(tmp_path / "bf16", tmp_path / "onnx")
    assert report.max_difference_prefill < 3e-6
    types = Counter(tensor.data_type for tensor in graph_of(tmp_path / "onnx").initializer)
    assert set(types) <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}


def test_disagreement_fails_and_leaves_nothing(exported, tmp_path):
    source = exported("llama").checkpoint
    with pytest.raises(RuntimeError, match=r"differ by up to \d"):
        export_onnx(source, tmp_path / "out", tolerance=0)
    assert list(tmp_path.iterdir()) == []


def test_broken_graph_fails_and_leaves_nothing(exported, tmp_path):
    shutil.copytree(exported("llama").folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(Exception, match="pars"):
        quantize_onnx(tmp_path / "broken", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_processor_that_cannot_check_a_target_checks_what_it_can(exported, tmp_path, monkeypatch, caplog):
    """On x86 without VNNI the sums of a model for Arm overflow, and it would be refused as gibberish."""
    checked, made = [], {}
    host_is_able = multiplies_8_bits()
    for able in (True, False):

        def watched(expected, found, allowed, is_right=host_is_able or not able):
            checked.append(found)
            # Such a host has the one for the target wrong itself.
            if is_right:
                require_close(expected, found, allowed)

        monkeypatch.setattr(quantization, "require_close", watched)
        monkeypatch.setattr(quantization, "multiplies_8_bits", lambda able=able: able)
        caplog.clear()
        quantize_onnx(exported("llama").folder, tmp_path / str(able), recipe="int8-dynamic", target="arm64")
        made[able] = (tmp_path / str(able) / "model.onnx").read_bytes()
        assert ("weights of 7 bits is checked" in caplog.text) is not able
    quantize_onnx(exported("llama").folder, tmp_path / "any", recipe="int8-dynamic")
    # The model is the same; what was run is the one for any processor.
    assert made[True] == made[False] != (tmp_path / "any" / "model.onnx").read_bytes()
    of_target, instead, narrow = (found.logits[PREFILL] for found in checked)
    assert torch.equal(instead, narrow) and not torch.equal(instead, of_target)
    files = {path.name for path in (tmp_path / "True").iterdir()}
    assert files == {path.name for path in (tmp_path / "False").iterdir()}


def test_existing_output_is_kept_or_replaced(exported, tmp_path):
    source, folder = exported("opt").checkpoint, exported("opt").folder
    output = tmp_path / "out"
    quantize_onnx(folder, output)
    before = (output / "model.onnx").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_onnx(folder, output, recipe="int8-dynamic")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_onnx(source, output)
    assert (output / "model.onnx").read_bytes() == before
    quantize_onnx(folder, output, recipe="int8-dynamic", overwrite=True)
    assert (output / "model.onnx").read_bytes() != before
    with pytest.raises(ValueError, match="also the input"):
        quantize_onnx(folder, folder, overwrite=True)


def test_wrong_inputs_are_named(exported, quantized, tmp_path):
    source, folder = exported("llama").checkpoint, exported("llama").folder
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_onnx(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no model\.onnx"):
        quantize_onnx(source, tmp_path / "out")
    with pytest.raises(ValueError, match="int8, int8-dynamic"):
        quantize_onnx(folder, tmp_path / "out", recipe="int7")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_onnx(quantized("llama", "int8").output, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rotary_settings_of_transformers_5_only_are_refused(exported, tmp_path):
    shutil.copytree(exported("llama").checkpoint, tmp_path / "five")
    path = tmp_path / "five" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_theta"):
        export_onnx(tmp_path / "five", tmp_path / "out")
