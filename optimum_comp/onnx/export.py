"""Export to ONNX, with a check that the graph computes what PyTorch computes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_comp.atomic import atomic_folder, check_model
from optimum_comp.checkpoint.reader import require_safetensors
from optimum_comp.checkpoint.rope import require_portable
from optimum_comp.onnx.folders import copy_companions, graph_bytes
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.runtime import load_onnx, require_onnxruntime
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

_BATCH, _PREFILL, _CONTINUATION = 2, 16, 8
"""Sequences of the parity check, tokens of their prompt, and tokens after it that read the cache."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        output: the ONNX folder.
        max_difference_prefill: largest absolute difference of a logit to PyTorch in float32, over random prompts.
        max_difference_cached: the same over tokens that follow them and read the cache.
        seconds: for the export and the check.
        size_bytes: of the graph and its weights.
    """

    output: Path
    max_difference_prefill: float
    max_difference_cached: float
    seconds: float
    size_bytes: int


def export_onnx(
    model_dir: str | Path, output: str | Path, *, tolerance: float = 1e-3, overwrite: bool = False
) -> ExportReport:
    """Export a checkpoint in float32 with Optimum's own exporter, and compare it with PyTorch.

    The comparison fails if a logit is further from PyTorch's than `tolerance * max(1, largest absolute logit)`:
    float32 rounding grows with the logits, so an absolute bound would refuse good exports of models with large ones.
    The report has the plain absolute differences; one above `tolerance` is logged even if it passes.

    Args:
        model_dir: a checkpoint of a decoder-only model, in any precision.
        output: the folder to make; it opens with `ORTModelForCausalLM.from_pretrained`.
        tolerance: see above.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed.
        RuntimeError: the exported graph doesn't compute what PyTorch computes, or doesn't run.
        ValueError: `model_dir` isn't a checkpoint that this version of transformers reads right, or `output` is
            in it.
    """
    started = time.perf_counter()
    source = Path(model_dir)
    _check_source(source)
    require_onnxruntime()
    with atomic_folder(output, overwrite=overwrite, sources=[source]) as folder, without_noise():
        from optimum.exporters.onnx import main_export

        # Its validation compares at 1e-5, prints every value that is off by more, and then succeeds anyway.
        main_export(str(source), output=folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
        copy_companions(source, folder)
        prefill, cached = _compare(source, folder, tolerance)
        size = graph_bytes(folder)
    return ExportReport(Path(output), prefill, cached, time.perf_counter() - started, size)


def check_checkpoint(source: Path) -> None:
    """Refuse what can't be exported, before anything starts.

    Raises:
        ValueError: it isn't a finished safetensors checkpoint.
    """
    check_model(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is not a model folder: it has no config.json.")
    require_safetensors(str(source), source)


def _check_source(source: Path) -> None:
    check_checkpoint(source)
    path = source / "config.json"
    require_portable(json.loads(path.read_text(encoding="utf-8")), str(path))


def _compare(source: Path, folder: Path, tolerance: float) -> tuple[float, float]:
    """Largest absolute differences to PyTorch at the prompt and after it.

    Raises:
        RuntimeError: they are above the tolerance, or the graph doesn't run.
    """
    expected = _torch_logits(source)
    # One of the two models in memory at a time.
    gc.collect()
    vocabulary = expected[0].shape[-1]
    try:
        actual = _logits(load_onnx(folder), vocabulary)
    except Exception as error:
        raise RuntimeError(f"the exported model doesn't run in ORTModelForCausalLM: {error}") from error
    differences = []
    for name, reference, logits in zip(("prefill", "cached continuation"), expected, actual, strict=True):
        difference = (logits - reference).abs().max().item()
        bound = tolerance * max(1.0, reference.abs().max().item())
        # Written so that NaN fails too.
        if not difference <= bound:
            raise RuntimeError(
                f"the ONNX model disagrees with PyTorch: its logits differ by up to {difference:.3g} ({name}), more "
                f"than {bound:.3g}. The export is not kept."
            )
        if difference > tolerance:
            logger.warning(
                "ONNX and PyTorch differ by up to %.3g (%s): above %g, though within it relative to the logits.",
                difference,
                name,
                tolerance,
            )
        differences.append(difference)
    return differences[0], differences[1]


def _torch_logits(source: Path) -> tuple[Tensor, Tensor]:
    from transformers import AutoModelForCausalLM

    # .float(): the argument that names a dtype has changed its own name between versions.
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    return _logits(model, model.config.vocab_size)


@torch.no_grad()
def _logits(model: Callable[..., Any], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits of random prompts, and of random tokens that follow them through the cache, `[batch, length, vocab]`."""
    length = _PREFILL + _CONTINUATION
    ids = torch.randint(vocabulary, (_BATCH, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    prefill = model(input_ids=ids[:, :_PREFILL], attention_mask=mask[:, :_PREFILL], use_cache=True)
    cached = model(
        input_ids=ids[:, _PREFILL:], attention_mask=mask, past_key_values=prefill.past_key_values, use_cache=True
    )
    return prefill.logits, cached.logits
