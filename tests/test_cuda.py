"""What only a GPU shows: layers in half precision, its random numbers, its place among several processes.

Skipped without a CUDA device: then this isn't watched, and the table of `device_of` (test_distributed.py) and half
precision on the CPU (test_equalization.py) stand for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_blocks
from tiny_families import tiny_family
from transformers import AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Gated, with GELU (which passes no scale on), with a norm behind the residual stream, with norms behind dense layers.
FAMILIES = ("llama", "mistral", "starcoder2", "phi", "gpt2", "opt", "opt-350m", "gemma2")
SETTINGS = {"sparsity": 0.3, "num_samples": 8, "sequence_length": 32, "round_to": 8}


def pruned(folder: Path, output: Path, device: str, **settings):
    """The pruned model in float32 on the CPU, and the report."""
    pruner = CompPruner.from_pretrained(folder, device=device)
    exact = {"matmul_dtype": "float32"} if device == "cpu" else {}
    report = pruner.prune(CompConfig(**SETTINGS, **settings), tiny_blocks(8, 32), output=output, **exact)
    return AutoModelForCausalLM.from_pretrained(output).float().eval(), report


@torch.no_grad()
def difference(one, other) -> float:
    """Of logits, relative to what they vary by."""
    tokens = tiny_blocks(4, 24, seed=5)
    found, expected = one(tokens).logits, other(tokens).logits
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def save(name: str, folder: Path, dtype: torch.dtype) -> Path:
    tiny_family(name).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equalization_changes_nothing_in_any_precision(name, dtype, tmp_path):
    folder = save(name, tmp_path / "dense", dtype)
    plain, report = pruned(folder, tmp_path / "plain", "cuda")
    equal, equalized = pruned(folder, tmp_path / "equal", "cuda", equalize=True)
    # Half precision rounds equalized weights of other channels otherwise; a fold that doesn't hold changes everything.
    assert difference(equal, plain) < {torch.float32: 1e-4}.get(dtype, 0.1)
    assert [layer.kept for layer in equalized.layers] == [layer.kept for layer in report.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_prunes_as_the_cpu_does(name, tmp_path):
    folder = save(name, tmp_path / "dense", torch.float32)
    on_gpu, report = pruned(folder, tmp_path / "gpu", "cuda")
    on_cpu, expected = pruned(folder, tmp_path / "cpu", "cpu")
    # Sums of float32 in another order: one of two neurons that are worth the same may stay in place of the other.
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert len(set(one.kept) ^ set(other.kept)) <= 2
    assert difference(on_gpu, on_cpu) < 1e-3


def test_writing_calibration_text_leaves_the_gpus_random_numbers_alone(tmp_path):
    folder = save("llama", tmp_path / "dense", torch.float32)
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    CompPruner.from_pretrained(folder, device="cuda").prune(CompConfig(**SETTINGS), "self", output=tmp_path / "out")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="several CUDA devices: each process gets one")
def test_two_processes_for_one_gpu_are_refused(tmp_path):
    folder = save("llama", tmp_path / "dense", torch.float32)
    code = f"from optimum_comp import CompPruner; CompPruner.from_pretrained({str(folder)!r}, device='cuda')"
    (tmp_path / "open.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "open.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode != 0 and "2 processes on this machine need as many CUDA devices" in done.stderr
