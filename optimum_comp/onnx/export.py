"""Export to ONNX, with a check that the graph computes what PyTorch computes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_comp.checkpoint.reader import require_safetensors
from optimum_comp.checkpoint.rope import require_portable
from optimum_comp.files import atomic_folder, check_model
from optimum_comp.onnx.cache import open_cache
from optimum_comp.onnx.folders import copy_companions, graph_bytes
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.registration import register_families
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.onnx.tied import every_embedding_is_shared
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

_BATCH, _PREFILL, _CONTINUATION, _GENERATED = 2, 16, 8, 4
"""Sequences of the parity check, tokens of their prompt, after it through the cache, and of what is generated."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        output: the ONNX folder.
        max_difference_prefill: largest absolute difference of a logit to PyTorch in float32, over random prompts.
        max_difference_cached: the same over tokens that follow them and read the cache.
        max_difference_generated: the same over the steps of greedy generation.
        seconds: for the export and the check.
        size_bytes: of the graph and its weights.
    """

    output: Path
    max_difference_prefill: float
    max_difference_cached: float
    max_difference_generated: float
    seconds: float
    size_bytes: int


def export_onnx(
    model_dir: str | Path,
    output: str | Path,
    *,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a checkpoint in float32 with Optimum's own exporter, and compare it with PyTorch.

    Prompts, tokens after them and greedy generation are compared, through `ORTModelForCausalLM` itself, which opens
    and runs the graph whatever heads the model has (see `open_cache`).

    The comparison fails if a logit is further from PyTorch's than `tolerance * max(1, largest absolute logit)`:
    float32 rounding grows with the logits, so an absolute bound would refuse good exports of models with large ones.
    The report has the plain absolute differences; one above `tolerance` is logged even if it passes.

    Args:
        model_dir: a checkpoint of a decoder-only model, in any precision.
        output: the folder to make; it opens with `ORTModelForCausalLM.from_pretrained`.
        tolerance: see above.
        overwrite: replace a model that is in `output`.
        record: what the output is to be known by; see `atomic_folder`.

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
    with atomic_folder(output, overwrite=overwrite, sources=[source], record=record) as folder, without_noise():
        from optimum.exporters.onnx import main_export

        register_families()
        # Its validation compares at 1e-5, prints every value that is off by more, and then succeeds anyway.
        with every_embedding_is_shared():
            main_export(
                str(source), output=folder, task="text-generation-with-past", dtype="fp32", do_validation=False
            )
        copy_companions(source, folder)
        open_cache(folder)
        differences = _compare(source, folder, tolerance)
        size = graph_bytes(folder)
    return ExportReport(Path(output), *differences, time.perf_counter() - started, size)


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


@dataclass(frozen=True)
class _Found:
    """What a model computes.

    Attributes:
        prefill: logits of random prompts, `[batch, length, vocabulary]`.
        cached: of random tokens that follow them through the cache, likewise.
        generated: of the steps of greedy generation after the prompts, likewise.
        tokens: that this has chosen, `[batch, steps]`.
    """

    prefill: Tensor
    cached: Tensor
    generated: Tensor
    tokens: Tensor


def _compare(source: Path, folder: Path, tolerance: float) -> tuple[float, float, float]:
    """Largest absolute differences to PyTorch at the prompt, after it, and where tokens are generated.

    Raises:
        RuntimeError: they are above the tolerance, or the graph doesn't run.
    """
    from optimum.onnxruntime import ORTModelForCausalLM

    expected = _from_torch(source)
    # One of the two models in memory at a time.
    gc.collect()
    try:
        # As a user opens it, without what `load_onnx` does for graphs of others.
        actual = _run(ORTModelForCausalLM.from_pretrained(folder), expected.prefill.shape[-1])
    except Exception as error:
        raise RuntimeError(f"the exported model doesn't run in ORTModelForCausalLM: {error}") from error
    return _differences(expected, actual, tolerance)


def _differences(expected: _Found, actual: _Found, tolerance: float) -> tuple[float, float, float]:
    # A step's logits follow from the tokens before it, which differ after two that are about equally likely.
    same = (actual.tokens == expected.tokens).long().cumprod(1).roll(1, dims=1)
    same[:, 0] = 1
    kept = same.bool()
    return (
        _difference("prefill", expected.prefill, actual.prefill, tolerance),
        _difference("cached continuation", expected.cached, actual.cached, tolerance),
        _difference("generation", expected.generated[kept], actual.generated[kept], tolerance),
    )


def _difference(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> float:
    difference = (actual - expected).abs().max().item()
    bound = tolerance * max(1.0, expected.abs().max().item())
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
    return difference


def _from_torch(source: Path) -> _Found:
    from transformers import AutoModelForCausalLM

    # .float(): the argument that names a dtype has changed its own name between versions.
    model = AutoModelForCausalLM.from_pretrained(source).float().eval()
    return _run(model, model.config.vocab_size)


@torch.no_grad()
def _run(model: Any, vocabulary: int) -> _Found:
    from transformers import GenerationConfig

    length = _PREFILL + _CONTINUATION
    ids = torch.randint(vocabulary, (_BATCH, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    prompt = {"input_ids": ids[:, :_PREFILL], "attention_mask": mask[:, :_PREFILL]}
    prefill = model(**prompt, use_cache=True)
    cached = model(
        input_ids=ids[:, _PREFILL:], attention_mask=mask, past_key_values=prefill.past_key_values, use_cache=True
    )
    # Settings of its own, without the model's: no token ends it, and no penalty changes what is compared.
    settings = GenerationConfig(
        max_new_tokens=_GENERATED, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    generated = model.generate(**prompt, generation_config=settings, use_model_defaults=False)
    tokens = generated.sequences[:, _PREFILL:]
    return _Found(prefill.logits, cached.logits, torch.stack(generated.logits, 1), tokens)
