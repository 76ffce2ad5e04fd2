"""Export to ONNX, with a check that the graph computes what PyTorch computes."""

from __future__ import annotations

import json
import shutil
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
from optimum_comp.onnx.fused import build_fused, require_genai
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.parity import (
    CACHED,
    GENERATED,
    PADDED,
    PREFILL,
    TOLERANCE,
    Found,
    require_same,
    run_graph,
    run_torch,
)
from optimum_comp.onnx.registration import register_families
from optimum_comp.onnx.runtime import is_transformers_5, require_onnxruntime
from optimum_comp.onnx.tied import every_embedding_is_shared
from optimum_comp.onnx.widths import real_widths
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

AUTO, OPTIMUM, GENAI = "auto", "optimum", "genai"
EXPORTERS = (AUTO, OPTIMUM, GENAI)
"""Ways to make a graph; `auto` takes GenAI's where its graph computes what PyTorch does, else Optimum's."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        output: the ONNX folder.
        exporter: which made it, `optimum` or `genai`.
        reason: why `auto` has taken Optimum's exporter; empty if it hasn't, or wasn't asked to choose.
        max_difference_prefill: largest absolute difference of a logit to PyTorch in float32, over random prompts.
        max_difference_cached: the same over tokens that follow them and read the cache.
        max_difference_generated: the same over the steps of greedy generation.
        max_difference_padded: the same over a prompt, and tokens that follow it, that is padded on the left.
        seconds: for the export and the check.
        size_bytes: of the graph and its weights.
    """

    output: Path
    exporter: str
    reason: str
    max_difference_prefill: float
    max_difference_cached: float
    max_difference_generated: float
    max_difference_padded: float
    seconds: float
    size_bytes: int

    @property
    def text(self) -> str:
        """Which exporter made it, in a line."""
        return told_exporter(self.exporter, self.reason)


def told_exporter(exporter: str, reason: str) -> str:
    """Which exporter made a graph, and why it was no other, in a line."""
    if exporter == GENAI:
        return "The graph is that of GenAI's model builder, with attention as one operator."
    return "The graph is that of Optimum's exporter" + (f": {reason}" if reason else ".")


def export_onnx(
    model_dir: str | Path,
    output: str | Path,
    *,
    exporter: str = AUTO,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a checkpoint in float32, and compare the graph with PyTorch.

    Prompts alone and beside others, with padding on the left and without, tokens after them with and without the
    cache, and greedy generation are compared, through `ORTModelForCausalLM` itself, which opens and runs the graph
    whatever heads the model has (see `open_cache`); of GenAI's graph, a long prompt too.

    The comparison fails if a logit is further from PyTorch's than `tolerance * max(1, largest absolute logit)`:
    float32 rounding grows with the logits, so an absolute bound would refuse good exports of models with large ones.
    The report has the plain absolute differences; one above `tolerance` is logged even if it passes.

    Args:
        model_dir: a checkpoint of a decoder-only model, in any precision.
        output: the folder to make; it opens with `ORTModelForCausalLM.from_pretrained`.
        exporter: `optimum`; `genai`, whose graph has attention as one operator and generates faster, for the families
            that ONNX Runtime GenAI's model builder knows; or `auto`: that one, and Optimum's where the builder isn't
            installed, doesn't know the family or makes a graph that computes something else. With transformers 5,
            Optimum's exporter doesn't run, and `auto` is `genai`.
        tolerance: see above.
        overwrite: replace a model that is in `output`.
        record: what the output is to be known by; see `atomic_folder`.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed, or ONNX Runtime GenAI for `exporter="genai"`.
        RuntimeError: the exported graph doesn't compute what PyTorch computes, or doesn't run; or GenAI's builder
            failed.
        ValueError: no such exporter, `model_dir` isn't a checkpoint that this version of transformers reads right, or
            `output` is in it.
    """
    started = time.perf_counter()
    source = Path(model_dir)
    require_exporter(exporter)
    _check_source(source)
    require_onnxruntime()
    reason = ""
    with atomic_folder(output, overwrite=overwrite, sources=[source], record=record) as folder, without_noise():
        # PyTorch's model is gone when a graph is opened.
        expected = run_torch(source, far=exporter != OPTIMUM)
        differences = None
        if exporter != OPTIMUM:
            try:
                _export_with_genai(source, folder)
                differences = _compare(expected, folder, tolerance, far=True)
            except (ImportError, RuntimeError) as error:
                if exporter == GENAI or is_transformers_5():
                    raise
                reason = str(error)
                logger.info("Exporting with Optimum instead: %s", reason)
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        made_by = OPTIMUM if differences is None else GENAI
        if differences is None:
            _export_with_optimum(source, folder)
            differences = _compare(expected, folder, tolerance)
        size = graph_bytes(folder)
    return ExportReport(
        Path(output),
        made_by,
        reason,
        max_difference_prefill=differences[PREFILL],
        max_difference_cached=differences[CACHED],
        max_difference_generated=differences[GENERATED],
        max_difference_padded=differences[PADDED],
        seconds=time.perf_counter() - started,
        size_bytes=size,
    )


def _export_with_genai(source: Path, folder: Path) -> None:
    require_genai()
    with real_widths():
        build_fused(source, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
    copy_companions(source, folder)


def _export_with_optimum(source: Path, folder: Path) -> None:
    from optimum.exporters.onnx import main_export

    register_families()
    # Its validation compares at 1e-5, prints every value that is off by more, and then succeeds anyway.
    with every_embedding_is_shared(), real_widths():
        main_export(str(source), output=folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
    copy_companions(source, folder)
    open_cache(folder)


def _compare(expected: Found, folder: Path, tolerance: float, *, far: bool = False) -> dict[str, float]:
    found = run_graph(folder, far=far)
    return require_same(expected, found, tolerance=tolerance, names=("the ONNX model", "PyTorch"))


def require_exporter(name: str) -> None:
    """Refuse an exporter that isn't there.

    Raises:
        ValueError: there is none of that name.
        ImportError: it isn't installed; says how to install it.
    """
    if name not in EXPORTERS:
        raise ValueError(f"exporter={name!r} is not valid: it must be one of {', '.join(EXPORTERS)}.")
    if name == GENAI or (name == AUTO and is_transformers_5()):
        require_genai()
    if name == OPTIMUM and is_transformers_5():
        raise ImportError(
            f"exporter={name!r} needs optimum-onnx, which can't be installed with transformers 5; take genai, or an "
            "environment with transformers below 4.58."
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
