"""The whole chain: prune, export to ONNX, quantize, and measure every stage on the same tokens."""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.atomic import COMPRESSION_SUMMARY, atomic_folder, check_folder
from optimum_comp.calibration import CalibrationSource, read_text
from optimum_comp.configuration import CompConfig
from optimum_comp.evaluation import Evaluation, Settings, evaluate_apart, is_onnx_folder
from optimum_comp.onnx.export import export_onnx
from optimum_comp.onnx.quantization import RECIPES, QuantizationReport, quantize_onnx
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.pruner import CompPruner
from optimum_comp.report.table import evaluation_table
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

PRUNED, PRUNED_ONNX = "pruned", "pruned-onnx"
QUANTIZED_TOLERANCE = 1.05
"""A quantized model whose perplexity is above this multiple of its float original is called out."""


@dataclass
class Compression:
    """What the chain made.

    Attributes:
        output: the folder with a subfolder a stage.
        pruning: summary of the pruning run.
        stages: the stages' measurements, dense first.
    """

    output: Path
    pruning: dict[str, Any]
    stages: dict[str, Evaluation]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        stages = {name: stage.to_dict() for name, stage in self.stages.items()}
        return {"output": str(self.output), "pruning": self.pruning, "stages": stages}

    @property
    def quantization_loss(self) -> float | None:
        """Perplexity of the quantized model over that of its float original; `None` if not measured."""
        *_, pruned, quantized = (stage.perplexity for stage in self.stages.values())
        return quantized / pruned if pruned and quantized else None

    def text(self) -> str:
        """The table and what is to be said about it."""
        lines = [evaluation_table(self.stages)]
        loss = self.quantization_loss
        if loss is not None:
            verdict = "within" if loss <= QUANTIZED_TOLERANCE else "NOT within"
            aim = f"{verdict} the {QUANTIZED_TOLERANCE:g} aimed at"
            lines.append(f"Quantization: {loss:.4f} times the float model's perplexity, {aim}.")
        smaller = 1 - list(self.stages.values())[-1].size_bytes / next(iter(self.stages.values())).size_bytes
        lines.append(f"{self.output}: {smaller:.1%} smaller than the dense model.")
        return "\n\n".join(lines)


def compress(
    model: str | Path,
    output: str | Path,
    *,
    config: CompConfig,
    calibration: CalibrationSource | None = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_memory: str | int | None = None,
    recipe: str = "int8",
    settings: Settings | None = None,
    overwrite: bool = False,
    **loading: Any,
) -> Compression:
    """Prune a model, export it, quantize it, and measure dense, pruned, pruned ONNX and pruned quantized.

    Args:
        model: local folder or hub id.
        output: folder to make; gets `pruned`, `pruned-onnx`, `pruned-<recipe>`, `comp_compress.json` and `README.md`.
        config: how to prune.
        calibration: see `CompPruner.prune`.
        text_column: column of a dataset that holds text.
        batch_size: samples that go through a layer at a time.
        max_memory: of the pruning; see `CompPruner.prune`.
        recipe: how to quantize.
        settings: what to measure.
        overwrite: replace an earlier result.
        loading: passed on to `from_pretrained`.

    Raises:
        FileExistsError: the output exists and isn't to be overwritten.
        ImportError: ONNX Runtime isn't installed.
        ValueError: something that was asked for isn't possible.
    """
    settings = settings or Settings()
    output = Path(output)
    sources = [Path(model)] if Path(model).exists() else []
    check_folder(output, overwrite=overwrite, sources=sources)
    require_onnxruntime()
    _known_recipe(recipe)
    if settings.text is not None:
        read_text(settings.text, settings.text_column, settings.max_tokens)

    with atomic_folder(output, overwrite=overwrite, sources=sources) as folder:
        pruner = CompPruner.from_pretrained(model, **loading)
        # Not in the folder: what an interruption leaves of this chain can't be gone on with.
        pruning = pruner.prune(
            config, calibration, text_column=text_column, batch_size=batch_size, max_memory=max_memory
        ).summary()
        pruner.save_pretrained(folder / PRUNED)
        del pruner
        gc.collect()
        logger.info("Exporting to ONNX ...")
        export_onnx(folder / PRUNED, folder / PRUNED_ONNX)
        logger.info("Quantizing (%s) ...", recipe)
        quantized = f"pruned-{recipe}"
        quantize_onnx(folder / PRUNED_ONNX, folder / quantized, recipe=recipe)

        stages: dict[str, Evaluation] = {}
        paths: dict[str, str | Path] = {"dense": str(model)}
        paths |= {name: folder / name for name in (PRUNED, PRUNED_ONNX, quantized)}
        for name, path in paths.items():
            logger.info("Measuring %s ...", name)
            stages[name] = evaluate_apart(path, settings, **(loading if name == "dense" else {}))
            stages[name].model = str(model) if name == "dense" else name
        result = Compression(output, pruning, stages)
        (folder / COMPRESSION_SUMMARY).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(f"# {output.name}\n\n{result.text()}\n", encoding="utf-8")
    return result


def quantize_folder(
    model: str | Path, output: str | Path, *, recipe: str = "int8", overwrite: bool = False
) -> QuantizationReport:
    """Quantize a PyTorch or an ONNX folder; the former is exported to a temporary folder first.

    Raises:
        FileExistsError: the output exists and isn't to be overwritten.
        ValueError: no such folder or recipe.
    """
    model, output = Path(model), Path(output)
    if not model.is_dir():
        raise ValueError(f"--model {str(model)!r} is not a folder; give a PyTorch or an ONNX folder.")
    _known_recipe(recipe)
    check_folder(output, overwrite=overwrite, sources=[model])
    require_onnxruntime()
    if is_onnx_folder(model):
        return quantize_onnx(model, output, recipe=recipe, overwrite=overwrite)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".export-") as scratch:
        exported = Path(scratch) / "onnx"
        export_onnx(model, exported)
        return quantize_onnx(exported, output, recipe=recipe, overwrite=overwrite)


def _known_recipe(recipe: str) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not valid: it must be one of {', '.join(RECIPES)}.")
