"""Export, quantization and bundle without Optimum's ONNX part, which transformers 5 leaves no room for."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from optimum_comp.bundle import write_bundle
from optimum_comp.evaluation import Settings, evaluate
from optimum_comp.onnx.export import export_onnx
from optimum_comp.onnx.plain import PlainModel
from optimum_comp.onnx.quantization import quantize_onnx
from optimum_comp.onnx.runtime import is_transformers_5


PROMPTS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def made(request, tmp_path_factory):
    """A model, its checkpoint and its graph."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(folder / "torch")
    tiny_tokenizer().save_pretrained(folder / "torch")
    report = export_onnx(folder / "torch", folder / "onnx")
    assert report.exporter == "genai"
    assert report.max_difference_padded < 1e-5
    return model, folder


def test_it_generates_what_pytorch_does(made):
    model, folder = made
    plain, growing = (PlainModel(folder / "onnx", threads=1, in_place=each) for each in (True, False))
    assert plain._in_place is not None and growing._in_place is None
    mask = torch.ones_like(PROMPTS)
    mask[0, :4] = 0
    for given in (torch.ones_like(PROMPTS), mask):
        settings = {"attention_mask": given, "max_new_tokens": 12, "min_new_tokens": 6, "do_sample": False}
        expected = model.generate(PROMPTS, **settings)
        assert torch.equal(plain.generate(PROMPTS, **settings), expected)
        assert torch.equal(growing.generate(PROMPTS, **settings), expected)


def test_an_answer_ends_where_the_model_says(made):
    model, folder = made
    plain = PlainModel(folder / "onnx")
    settings = {"attention_mask": torch.ones_like(PROMPTS), "max_new_tokens": 12, "do_sample": False}
    free = plain.generate(PROMPTS, **settings, eos_token_id=None)
    # What it says third ends it, for one sequence before the other.
    end = int(free[0, PROMPTS.shape[1] + 2])
    expected = model.generate(PROMPTS, **settings, eos_token_id=end, pad_token_id=0)
    assert torch.equal(plain.generate(PROMPTS, **settings, eos_token_id=end, pad_token_id=0), expected)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}])
def test_what_it_cannot_do_is_refused(settings, made):
    plain = PlainModel(made[1] / "onnx")
    with pytest.raises(ValueError, match="only greedy generation"):
        plain.generate(PROMPTS, torch.ones_like(PROMPTS), **settings)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "int4-rtn"])
def test_a_quantized_model_becomes_a_bundle_that_genai_runs(recipe, made, tmp_path):
    _, folder = made
    quantize_onnx(folder / "onnx", tmp_path / "quantized", recipe=recipe)
    report = write_bundle(tmp_path / "quantized", tmp_path / "bundle", target="arm64")
    assert report.genai_agrees is True
    assert report.recipe == recipe


def test_it_is_measured(made, tmp_path):
    _, folder = made
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 40)
    settings = Settings(
        text=str(tmp_path / "text.txt"), window=32, max_tokens=96, prompt_tokens=4, new_tokens=2, repeats=1, threads=1
    )
    found, expected = (evaluate(folder / name, settings) for name in ("onnx", "torch"))
    assert found.runtime == "onnxruntime"
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)


@pytest.mark.skipif(not is_transformers_5(), reason="Optimum's exporter is there")
def test_the_other_exporter_is_refused(made, tmp_path):
    with pytest.raises(ImportError, match="can't be installed with transformers 5"):
        export_onnx(made[1] / "torch", tmp_path / "onnx", exporter="optimum")
