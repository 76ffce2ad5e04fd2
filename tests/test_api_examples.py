"""The examples of the Python interfaces run on the real model, and achieve what they print."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need_onnx


need_onnx()

from transformers import AutoConfig  # noqa: E402

from optimum_comp.bundle import verify_bundle  # noqa: E402
from optimum_comp.evaluation import count_parameters  # noqa: E402


pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(each) for each in found.groups()]


def test_prune_from_pretrained(first_layers, tmp_path):
    folder = tmp_path / "pruned"
    said = example("prune_from_pretrained", "--model", first_layers, "--samples", 16, folder)
    before, after = numbers(r"([\d.]+) -> ([\d.]+) M parameters", said)
    counted = (count_parameters(AutoConfig.from_pretrained(each)) for each in (first_layers, folder))
    assert [before, after] == [round(count / 1e6, 1) for count in counted]
    # Half of these are the embedding's.
    assert after < 0.91 * before
    dense, ours = numbers(r"perplexity ([\d.]+) -> ([\d.]+)", said)
    # So few samples of 256 tokens cost some quality.
    assert dense < ours < 1.7 * dense


def test_chain_with_quantization(real_model, tmp_path):
    said = example("chain_with_quantization", "--model", real_model, "--tokens", 1024, tmp_path / "out")
    sizes, perplexities = {}, {}
    for name in ("float32", "optimum-int8", "comp-int8"):
        sizes[name], perplexities[name] = numbers(rf"(?m)^{name}: ([\d.]+) MB, perplexity ([\d.]+)$", said)
        assert (tmp_path / "out" / name / "model.onnx").is_file()
    assert sizes["optimum-int8"] < 0.27 * sizes["float32"] and sizes["comp-int8"] < 0.27 * sizes["float32"]
    # 1.016 times.
    assert perplexities["comp-int8"] < 1.05 * perplexities["float32"]
    assert perplexities["comp-int8"] < perplexities["optimum-int8"]


def test_mobile_export(real_model, tmp_path):
    said = example("mobile_export", "--model", real_model, "--sparsity", 0, tmp_path / "out")
    report = verify_bundle(tmp_path / "out" / "phone")
    assert report.text() in said and report.target == "arm64"
    assert f"node serve.mjs {tmp_path / 'out' / 'phone'}" in said
    answer = re.search(r"(?m)^GenAI: (.+)$", said)
    assert answer, said
    if importlib.util.find_spec("onnxruntime_genai") is None:
        assert "pip install" in answer[1]
    else:
        # "The" and "L" are as likely as each other to begin with, which rounding decides.
        assert report.genai_agrees is True and len(answer[1].split()) >= 3
