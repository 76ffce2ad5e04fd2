"""Export to ONNX, with a check that the graph computes what PyTorch computes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.checkpoint.reader import require_safetensors
from optimum_comp.checkpoint.rope import require_portable
from optimum_comp.files import atomic_folder, check_model
from optimum_comp.onnx.cache import open_cache
from optimum_comp.onnx.folders import copy_companions, graph_bytes
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.parity import CACHED, GENERATED, PADDED, PREFILL, TOLERANCE, require_same, run_graph, run_torch
from optimum_comp.onnx.registration import register_families
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.onnx.tied import every_embedding_is_shared


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        output: the ONNX folder.
        max_difference_prefill: largest absolute difference of a logit to PyTorch in float32, over random prompts.
        max_difference_cached: the same over tokens that follow them and read the cache.
        max_difference_generated: the same over the steps of greedy generation.
        max_difference_padded: the same over a prompt, and tokens that follow it, that is padded on the left.
        seconds: for the export and the check.
        size_bytes: of the graph and its weights.
    """

    output: Path
    max_difference_prefill: float
    max_difference_cached: float
    max_difference_generated: float
    max_difference_padded: float
    seconds: float
    size_bytes: int


def export_onnx(
    model_dir: str | Path,
    output: str | Path,
    *,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a checkpoint in float32 with Optimum's own exporter, and compare it with PyTorch.

    Prompts alone and beside others, with padding on the left and without, tokens after them with and without the
    cache, and greedy generation are compared, through `ORTModelForCausalLM` itself, which opens and runs the graph
    whatever heads the model has (see `open_cache`).

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
        # PyTorch's model is gone when the graph is opened.
        expected = run_torch(source)
        names = ("the ONNX model", "PyTorch")
        differences = require_same(expected, run_graph(folder), tolerance=tolerance, names=names)
        size = graph_bytes(folder)
    return ExportReport(
        Path(output),
        max_difference_prefill=differences[PREFILL],
        max_difference_cached=differences[CACHED],
        max_difference_generated=differences[GENERATED],
        max_difference_padded=differences[PADDED],
        seconds=time.perf_counter() - started,
        size_bytes=size,
    )


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
