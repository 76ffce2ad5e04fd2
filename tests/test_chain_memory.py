"""What the chain's steps are expected to need of memory, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from transformers import AutoConfig, LlamaConfig

from optimum_comp.chain_memory import STEPS, Load, ModelSizes, predict_peak, require_memory, sizes_of


LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def test_sizes_are_those_of_the_model():
    model = tiny_model("llama")
    found = sizes_of(model.config, torch.bfloat16)
    assert found == ModelSizes(sum(p.numel() for p in model.parameters()), 131 * 64, 131, 64, 96, 4, 2)
    # Nothing is allocated.
    large = sizes_of(LlamaConfig(**LLAMA_7B), torch.float16)
    assert large.parameters == pytest.approx(6.74e9, rel=0.01)
    assert (large.largest, large.width) == (32000 * 4096, 11008)


def test_a_model_of_any_size_is_not_exported_in_any_memory():
    sizes = sizes_of(LlamaConfig(**LLAMA_7B), torch.float16)
    assert predict_peak("export", sizes) > 5 * 4 * sizes.parameters
    # Second moments are bounded: those of all activations would take 22 GB.
    with_text, without = (predict_peak("quantize", sizes, Load(with_text=given)) for given in (True, False))
    assert 2e9 < with_text - without - sizes.parameters < 8e9


def test_a_step_that_does_not_fit_is_named_before_any_starts():
    sizes = sizes_of(LlamaConfig(**LLAMA_7B), torch.float16)
    needs = {step: predict_peak(step, sizes) for step in ("evaluate", "export")}
    with pytest.raises(
        ValueError, match=r"^export needs about 1\d\d\.\d GB of memory, and 60\.0 GB are allowed \(max_m.*: prune"
    ):
        require_memory(needs, 60 * 10**9)
    with pytest.raises(ValueError, match=r"^evaluate needs about .* are there; "):
        require_memory({"evaluate": 2**60}, None)
    require_memory(needs, 10**12)
    require_memory({"export": 10**6}, None)


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match=r"step='fly' is not valid: it must be one of export"):
        predict_peak("fly", ModelSizes(1, 1, 1, 1, 1, 1, 4))


RUNS = {
    "export": "from optimum_comp.onnx.export import export_onnx as f; f(model, made / 'onnx')",
    "quantize": "from optimum_comp.onnx.quantization import quantize_onnx as f; "
    "f(made / 'onnx', made / 'int4', recipe='int4', tokens=tokens)",
    "evaluate": "evaluate(model, settings)",
    "evaluate onnx": "evaluate(made / 'onnx', settings)",
    "evaluate quantized": "evaluate(made / 'int4', settings)",
    "bundle": "from optimum_comp.bundle import write_bundle as f; "
    "f(made / 'int4', made / 'bundle', target='any', ort_format=True)",
}


def measured(model, made, steps=RUNS) -> dict[str, int]:
    """Largest resident set of a process of its own for each step."""
    found = {}
    for step, run in steps.items():
        script = f"""
from pathlib import Path
import torch
from optimum_comp.evaluation import Settings, evaluate
from optimum_comp.utils import peak_memory_bytes
model, made = Path({str(model)!r}), Path({str(made)!r})
tokens = torch.randint(3, 128, (2, 128), generator=torch.Generator().manual_seed(0))
settings = Settings(window=128, max_tokens=256, prompt_tokens=0, begin="never")
{run}
print(peak_memory_bytes())
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found[step] = int(done.stdout.split()[-1])
    return found


def require_near(model, made, most: float) -> None:
    sizes = sizes_of(AutoConfig.from_pretrained(model), torch.float32)
    for step, peak in measured(model, made).items():
        expected = predict_peak(step, sizes, Load(tokens=128, with_text=step == "quantize"))
        # What libraries take by themselves differs a little from machine to machine.
        assert peak <= 1.1 * expected and expected <= most * peak, (step, peak, expected)


@pytest.mark.onnx
def test_every_step_of_a_tiny_model_stays_within_what_is_expected(tiny_folder, tmp_path):
    assert set(RUNS) == set(STEPS) - {"search"}
    require_near(tiny_folder, tmp_path, 1.7)


@pytest.mark.slow
@pytest.mark.onnx
def test_every_step_of_a_real_model_is_foreseen(real_model, tmp_path):
    require_near(real_model, tmp_path, 1.7)
