"""The whole chain: prune, export to ONNX, quantize, measure every model on the same tokens, and bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_comp.calibration.text import CalibrationSource
from optimum_comp.configuration import CompConfig
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.evaluation import Evaluation, Settings
from optimum_comp.files import COMPRESSION_SUMMARY, durably
from optimum_comp.onnx.export import AUTO, told_exporter
from optimum_comp.onnx.search import Budget
from optimum_comp.options import parse_bytes
from optimum_comp.report.table import evaluation_table
from optimum_comp.stages.base import Stage
from optimum_comp.stages.bundle import Bundle, BundleSettings
from optimum_comp.stages.chain import Chain, Cost
from optimum_comp.stages.distil import Distil
from optimum_comp.stages.export import Export, ExportSettings
from optimum_comp.stages.prune import Prune, Running
from optimum_comp.stages.quantize import Quantize, QuantizeSettings
from optimum_comp.stages.recipe import Recipe
from optimum_comp.stages.vocabulary import Vocabulary
from optimum_comp.utils import format_bytes
from optimum_comp.vocabulary.settings import VocabularySettings


QUANTIZED_TOLERANCE = 1.05
"""A quantized model whose perplexity is above this multiple of its float original is called out."""


@dataclass
class Compression:
    """What the chain made.

    Attributes:
        output: the folder with a subfolder a stage.
        pruning: summary of the pruning run; empty if nothing was pruned.
        stages: the models' measurements, dense first.
        bundle: what the bundle's stage tells of itself; `None` if there is none.
        costs: what each step took, in order.
        notes: what the user has to know.
        distillation: what distillation's stage tells of itself; empty if there is none.
        quantization: what quantization's stage tells of itself; empty if there is none.
        export: what the export's stage tells of itself; empty if there is none.
        vocabulary: what the vocabulary's stage tells of itself; empty if there is none.
    """

    output: Path
    pruning: dict[str, Any]
    stages: dict[str, Evaluation]
    bundle: dict[str, Any] | None = None
    costs: dict[str, Cost] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    quantization: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "vocabulary": self.vocabulary,
            "pruning": self.pruning,
            "stages": {name: stage.to_dict() for name, stage in self.stages.items()},
            "distillation": self.distillation,
            "export": self.export,
            "quantization": self.quantization,
            "bundle": self.bundle,
            "costs": {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            "notes": self.notes,
        }

    @property
    def quantization_loss(self) -> float | None:
        """Perplexity of the quantized model over that of its float original; `None` if not measured."""
        if not self.quantization or len(self.stages) < 2:
            return None
        *_, original, quantized = (stage.perplexity for stage in self.stages.values())
        return quantized / original if original and quantized else None

    def text(self) -> str:
        """The table and what is to be said about it."""
        lines = [evaluation_table(self.stages)] if self.stages else []
        if self.costs:
            lines.append("What each step took:")
            lines.append("\n".join(f"- {name}: {cost}" for name, cost in self.costs.items()))
        if self.vocabulary:
            told = self.vocabulary
            lines.append(
                f"Vocabulary: {told['tokens_before']:,} -> {told['tokens_after']:,} tokens (by {told['chosen_by']})."
            )
        if "exporter" in self.export:
            lines.append(told_exporter(self.export["exporter"], self.export["exporter_reason"]))
        loss = self.quantization_loss
        if loss is not None:
            verdict = "within" if loss <= QUANTIZED_TOLERANCE else "NOT within"
            aim = f"{verdict} the {QUANTIZED_TOLERANCE:g} aimed at"
            lines.append(f"Quantization: {loss:.4f} times the float model's perplexity, {aim}.")
        if self.stages:
            sizes = [stage.size_bytes for stage in self.stages.values()]
            # Of a model whose files can't be found, nothing is known.
            smaller = f"{1 - sizes[-1] / sizes[0]:.1%} smaller than the dense model" if sizes[0] else "complete"
            lines.append(f"{self.output}: {smaller}.")
        else:
            lines.append(f"{self.output}: complete; nothing was measured.")
        if self.bundle is not None:
            size = format_bytes(sum(self.bundle["files"].values()))
            said = [f"{self.bundle['output']}: bundle for {self.bundle['target']}, {size}.", *self.bundle["notes"]]
            lines.append("\n".join(said))
        lines += self.notes
        return "\n\n".join(lines)


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    calibration: CalibrationSource | None = None,
    loading: Mapping[str, Any] | None = None,
    bundle: str | Path | None = None,
    max_memory: str | int | None = None,
    overwrite: bool = False,
) -> Compression:
    """Do what a recipe says.

    Every stage's result is kept in a folder of its own, under a key of its settings and of what it was made from. What
    is there already isn't made again: after an error, Ctrl-C or a full disk, the same call goes on; with another
    quantization, the pruned model and its export are used again.

    Args:
        recipe: stages, settings and model.
        output: folder; gets a subfolder a stage (`pruned`, `pruned-onnx`, `pruned-int8`, ...), `comp_recipe.yaml`,
            `comp_compress.json` and `README.md`.
        calibration: in place of what the recipe says; see `CompPruner.prune`.
        loading: passed on to `from_pretrained`, over what the recipe says.
        bundle: folder of the bundle, if it isn't to be in the output.
        max_memory: what a process of the chain may take in all, as `"4GB"` or bytes.
        overwrite: replace, stage by stage, what was made otherwise.

    Raises:
        FileExistsError: what is in the output was made otherwise, or isn't a compression.
        ImportError: ONNX Runtime isn't installed.
        ValueError: something that was asked for isn't possible.
        RuntimeError: a step failed; says what is kept, and how to go on.
        OSError: a file can't be read or written; likewise.
    """
    limit = None if max_memory is None else parse_bytes(max_memory)
    chain = Chain(
        recipe,
        output,
        calibration=calibration,
        loading=loading,
        bundle=bundle,
        max_memory=limit,
        overwrite=overwrite,
    )
    outcome = chain.run()
    result = Compression(
        Path(output),
        outcome.results.get(Prune.name, {}),
        outcome.models,
        outcome.results.get(Bundle.name),
        outcome.costs,
        outcome.notes,
        outcome.results.get(Quantize.name, {}),
        outcome.results.get(Distil.name, {}),
        outcome.results.get(Export.name, {}),
        outcome.results.get(Vocabulary.name, {}),
    )
    for name, text in (
        (COMPRESSION_SUMMARY, json.dumps(result.to_dict(), indent=1, default=str) + "\n"),
        ("README.md", f"# {result.output.resolve().name}\n\n{result.text()}\n"),
    ):
        with durably(result.output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return result


def compress(
    model: str | Path,
    output: str | Path,
    *,
    config: CompConfig,
    calibration: CalibrationSource | None = None,
    answers: float | None = None,
    text_column: str | None = None,
    batch_size: int | None = None,
    max_memory: str | int | None = None,
    matmul_dtype: str = "auto",
    recipe: str = "int8",
    target: str = "any",
    exporter: str = AUTO,
    distil: DistilSettings | None = None,
    vocabulary: VocabularySettings | None = None,
    budget: Budget | None = None,
    settings: Settings | None = None,
    bundle: str | Path | None = None,
    ort_format: bool = False,
    overwrite: bool = False,
    **loading: Any,
) -> Compression:
    """Prune a model, export it, quantize it, and measure dense, pruned, pruned ONNX and pruned quantized.

    Args:
        model: local folder or hub id.
        output: see `run`.
        config: how to prune.
        calibration: see `CompPruner.prune`.
        answers: share of the samples that a chat model answers itself; `None` for a fifth, where a text calibrates.
        text_column: column of a dataset that holds text.
        batch_size: samples that go through a layer at a time.
        max_memory: see `run`.
        matmul_dtype: of the pruning; see `CompPruner.prune`.
        recipe: how to quantize; not used with a budget.
        target: the processor that it is for.
        exporter: what makes the graph; see `export_onnx`.
        distil: train the pruned model on the dense one's predictions, like this; `None`: not.
        vocabulary: keep only some tokens, like this, before anything else is done; `None`: all.
        budget: search for the mix of precisions that keeps it, relative to the pruned model.
        settings: what to measure.
        bundle: folder to make a bundle for a phone in (see `write_bundle`); `None` for none.
        ort_format: with the model in ORT format, too.
        overwrite: replace, stage by stage, what was made otherwise.
        loading: passed on to `from_pretrained`.

    Raises:
        FileExistsError: see `run`.
        ImportError: see `run`.
        ValueError: see `run`.
        RuntimeError: see `run`.
        OSError: see `run`.
    """
    quantization = QuantizeSettings(
        recipe=recipe,
        target=target,
        max_perplexity_increase=None if budget is None else budget.perplexity_increase,
        max_size=None if budget is None else budget.size,
    )
    running = Running(answers=answers, text_column=text_column, batch_size=batch_size, matmul_dtype=matmul_dtype)
    stages: list[Stage] = [Prune(config, running, calibration, is_equalized=config.equalize)]
    if vocabulary is not None:
        stages.insert(0, Vocabulary(vocabulary))
    if distil is not None:
        stages.append(Distil(distil))
    stages += [Export(ExportSettings(exporter=exporter)), Quantize(quantization)]
    if bundle is not None:
        stages.append(Bundle(BundleSettings(ort_format=ort_format)))
    made = Recipe(tuple(stages), settings or Settings(), str(model))
    return run(made, output, loading=loading, bundle=bundle, max_memory=max_memory, overwrite=overwrite)
