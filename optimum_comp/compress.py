"""The whole chain: prune, export to ONNX, quantize, and measure every stage on the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_comp.beginning import Beginning, decide, losses_of_model
from optimum_comp.bundle import BundleReport, write_bundle
from optimum_comp.calibration.text import PYDOC, SELF, CalibrationSource, prepare_calibration, read_text
from optimum_comp.checkpoint.opening import trusted
from optimum_comp.configuration import CompConfig, require_begin
from optimum_comp.evaluation import Evaluation, Settings, evaluate_all, is_onnx_folder, load_model
from optimum_comp.files import COMPRESSION_SUMMARY, atomic_folder, check_folder, check_model
from optimum_comp.onnx.export import export_onnx
from optimum_comp.onnx.quantization import QuantizationReport, quantize_onnx
from optimum_comp.onnx.recipes import BUDGET, find_recipe, find_target
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.onnx.search import Budget, search
from optimum_comp.pruner import CompPruner
from optimum_comp.report.run import recorded_beginning
from optimum_comp.report.table import evaluation_table
from optimum_comp.utils import format_bytes, get_logger


logger = get_logger(__name__)

PRUNED, PRUNED_ONNX = "pruned", "pruned-onnx"
QUANTIZED_TOLERANCE = 1.05
"""A quantized model whose perplexity is above this multiple of its float original is called out."""

_SAMPLES = 42
"""Samples of the pruning that quantization looks at, too; more gain nothing that could be measured."""
_HELD_OUT = 10
"""Samples that are set aside to measure a budget of perplexity on."""


@dataclass
class Cost:
    """What a step of the chain took.

    Attributes:
        seconds: wall time.
        peak_memory_bytes: largest memory of the process, where it is this step's.
        size_bytes: of the model that it made.
    """

    seconds: float
    peak_memory_bytes: int | None = None
    size_bytes: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.seconds:.0f} s"]
        if self.peak_memory_bytes is not None:
            parts.append(f"{format_bytes(self.peak_memory_bytes)} of memory")
        if self.size_bytes is not None:
            parts.append(f"makes {format_bytes(self.size_bytes)}")
        return ", ".join(parts)


@dataclass
class Compression:
    """What the chain made.

    Attributes:
        output: the folder with a subfolder a stage.
        pruning: summary of the pruning run.
        stages: the stages' measurements, dense first.
        bundle: what was written for a phone; `None` if nothing was.
        costs: what each step took, in order.
    """

    output: Path
    pruning: dict[str, Any]
    stages: dict[str, Evaluation]
    bundle: BundleReport | None = None
    costs: dict[str, Cost] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        stages = {name: stage.to_dict() for name, stage in self.stages.items()}
        bundle = None if self.bundle is None else {"output": str(self.bundle.output), "files": self.bundle.files}
        costs = {name: dataclasses.asdict(cost) for name, cost in self.costs.items()}
        return {
            "output": str(self.output),
            "pruning": self.pruning,
            "stages": stages,
            "bundle": bundle,
            "costs": costs,
        }

    @property
    def quantization_loss(self) -> float | None:
        """Perplexity of the quantized model over that of its float original; `None` if not measured."""
        *_, pruned, quantized = (stage.perplexity for stage in self.stages.values())
        return quantized / pruned if pruned and quantized else None

    def text(self) -> str:
        """The table and what is to be said about it."""
        lines = [evaluation_table(self.stages)]
        if self.costs:
            lines.append("What each step took:")
            lines.append("\n".join(f"- {name}: {cost}" for name, cost in self.costs.items()))
        loss = self.quantization_loss
        if loss is not None:
            verdict = "within" if loss <= QUANTIZED_TOLERANCE else "NOT within"
            aim = f"{verdict} the {QUANTIZED_TOLERANCE:g} aimed at"
            lines.append(f"Quantization: {loss:.4f} times the float model's perplexity, {aim}.")
        smaller = 1 - list(self.stages.values())[-1].size_bytes / next(iter(self.stages.values())).size_bytes
        lines.append(f"{self.output}: {smaller:.1%} smaller than the dense model.")
        if self.bundle is not None:
            size = format_bytes(sum(self.bundle.files.values()))
            lines.append(
                "\n".join([f"{self.bundle.output}: bundle for {self.bundle.target}, {size}.", *self.bundle.notes])
            )
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
    matmul_dtype: str = "auto",
    recipe: str = "int8",
    target: str = "any",
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
        output: folder to make; gets `pruned`, `pruned-onnx`, `pruned-<recipe>` (`pruned-budget` with a budget),
            `comp_compress.json` and `README.md`.
        config: how to prune.
        calibration: see `CompPruner.prune`.
        text_column: column of a dataset that holds text.
        batch_size: samples that go through a layer at a time.
        max_memory: of the pruning; see `CompPruner.prune`.
        matmul_dtype: of the pruning; see `CompPruner.prune`.
        recipe: how to quantize; not used with a budget.
        target: the processor that it is for.
        budget: search for the mix of precisions that keeps it, relative to the pruned model.
        settings: what to measure.
        bundle: folder to make a bundle for a phone in (see `write_bundle`); `None` for none.
        ort_format: with the model in ORT format, too.
        overwrite: replace an earlier result, and bundle.
        loading: passed on to `from_pretrained`.

    Raises:
        FileExistsError: the output exists and isn't to be overwritten.
        ImportError: ONNX Runtime isn't installed.
        ValueError: something that was asked for isn't possible.
    """
    settings = settings or Settings()
    output = Path(output)
    check_model(model)
    sources = [Path(model)] if Path(model).exists() else []
    check_folder(output, overwrite=overwrite, sources=sources)
    require_onnxruntime()
    find_recipe(recipe)
    find_target(target)
    if bundle is not None:
        check_folder(bundle, overwrite=overwrite, sources=sources)
        folders = output.resolve(), Path(bundle).resolve()
        if folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0]):
            raise ValueError(
                f"the bundle {bundle} and the output {output} are one folder, or one holds the other. Choose folders "
                "beside each other."
            )
    if settings.text is not None:
        read_text(settings.text, settings.text_column, settings.max_tokens)

    with atomic_folder(output, overwrite=overwrite, sources=sources) as folder:
        pruner = CompPruner.from_pretrained(model, **loading)
        # Not in the folder: what an interruption leaves of this chain can't be gone on with.
        costs: dict[str, Cost] = {}
        with _timed(costs, "prune"):
            pruning = pruner.prune(
                config,
                calibration,
                text_column=text_column,
                batch_size=batch_size,
                max_memory=max_memory,
                matmul_dtype=matmul_dtype,
            ).summary()
            pruner.save_pretrained(folder / PRUNED)
        costs["prune"].peak_memory_bytes = pruning["peak_memory_bytes"]
        tokens = None if pruner.samples is None else pruner.samples[:_SAMPLES]
        del pruner
        gc.collect()
        logger.info("Exporting to ONNX ...")
        with _timed(costs, "export"):
            export_onnx(folder / PRUNED, folder / PRUNED_ONNX)
        name = recipe if budget is None else BUDGET
        logger.info("Quantizing (%s, for %s) ...", name, target)
        quantized = f"pruned-{name}"
        with _timed(costs, "quantize"):
            _quantize(folder / PRUNED_ONNX, folder / quantized, recipe, target, budget, tokens)

        beginning = Beginning.from_dict(pruning["calibration"])
        if settings.begin == "auto" and beginning is not None:
            # As was decided on the dense model: stages that begin differently can't be compared.
            settings = dataclasses.replace(settings, begins_with=beginning.tokens)
        stages: dict[str, Evaluation] = {}
        paths: dict[str, str | Path] = {"dense": str(model)}
        paths |= {name: folder / name for name in (PRUNED, PRUNED_ONNX, quantized)}
        with _timed(costs, "measure"):
            for name, stage in evaluate_all(paths, settings, {"dense": loading}):
                stages[name] = stage
                stage.model = str(model) if name == "dense" else name
        for step, name in (("prune", PRUNED), ("export", PRUNED_ONNX), ("quantize", quantized)):
            costs[step].size_bytes = stages[name].size_bytes
        result = Compression(output, pruning, stages, costs=costs)
        (folder / COMPRESSION_SUMMARY).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(f"# {output.name}\n\n{result.text()}\n", encoding="utf-8")
    if bundle is not None:
        logger.info("Writing the bundle ...")
        with _timed(costs, "bundle"):
            result.bundle = write_bundle(
                output / quantized,
                bundle,
                target=target,
                ort_format=ort_format,
                checkpoint=output / PRUNED,
                overwrite=overwrite,
            )
        costs["bundle"].size_bytes = sum(result.bundle.files.values())
    return result


@contextlib.contextmanager
def _timed(costs: dict[str, Cost], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    costs[step] = Cost(time.perf_counter() - started)


def suits_equalization(recipe: str, budget: Budget | None) -> bool:
    """Whether equalization while pruning helps what comes after it.

    It evens out activations at the weights' expense: 8-bit weights can afford that, 4-bit ones can't.
    """
    layers = find_recipe(recipe).layers
    return budget is None and layers is not None and layers.bits == 8


def quantize_folder(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str = "int8",
    target: str = "any",
    budget: Budget | None = None,
    calibration: CalibrationSource | None = None,
    text_column: str | None = None,
    num_samples: int = 32,
    sequence_length: int = 512,
    begin: str = "auto",
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantize a PyTorch or an ONNX folder; the former is exported to a temporary folder first.

    Args:
        model: the folder.
        output: folder to make.
        recipe: a key of `RECIPES`; not used with a budget.
        target: a key of `TARGETS`.
        budget: search for the mix of precisions that keeps it.
        calibration: text for recipes that round with text, and for a budget; Python's documentation if `None`.
        text_column: column of a dataset that holds text.
        num_samples: calibration samples.
        sequence_length: tokens of each, start tokens included.
        begin: whether they begin with the tokens that the tokenizer puts in front of a text: `"auto"` (as
            `comp_report.json` says, else unless the model does better without), `"always"` or `"never"`.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be overwritten.
        ValueError: no such folder, recipe or target, too little text, or a budget that can't be kept.
    """
    model, output = Path(model), Path(output)
    if not model.is_dir():
        raise ValueError(f"--model {str(model)!r} is not a folder; give a PyTorch or an ONNX folder.")
    settings = find_recipe(recipe)
    find_target(target)
    require_begin(begin)
    check_folder(output, overwrite=overwrite, sources=[model])
    require_onnxruntime()
    tokens = None
    if budget is not None or settings.rounding == "compensated":
        wanted = num_samples + (_HELD_OUT if budget is not None else 0)
        tokens = _samples(model, calibration or PYDOC, text_column, wanted, sequence_length, begin)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".export-") as scratch:
        exported = model
        if not is_onnx_folder(model):
            exported = export_onnx(model, Path(scratch) / "onnx").output
        return _quantize(exported, output, recipe, target, budget, tokens, overwrite=overwrite)


def _samples(
    model: Path, source: CalibrationSource, text_column: str | None, number: int, length: int, begin: str
) -> Tensor:
    """Token blocks for quantization, `[number, length]`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, writer = AutoTokenizer.from_pretrained(model), None
    if isinstance(source, str) and source == SELF and not is_onnx_folder(model):
        writer = AutoModelForCausalLM.from_pretrained(model, **trusted(model, {})).eval()

    def beginning(pieces: Tensor) -> Beginning:
        recorded = recorded_beginning(model) if begin == "auto" else None
        if recorded is not None:
            return recorded

        def losses(samples: list[Tensor], spans: list[tuple[int, int]]) -> list[float]:
            # Loaded only where there is something to decide.
            return losses_of_model(load_model(model)[0] if writer is None else writer)(samples, spans)

        return decide(begin, tokenizer, pieces, losses, "Samples")

    return prepare_calibration(
        source,
        model=writer,
        tokenizer=tokenizer,
        num_samples=number,
        sequence_length=length,
        text_column=text_column,
        begin=beginning,
    ).tokens


def _quantize(
    source: Path,
    output: Path,
    recipe: str,
    target: str,
    budget: Budget | None,
    tokens: Tensor | None,
    *,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantize an ONNX folder by a recipe, or by what a search finds."""
    if budget is None:
        return quantize_onnx(source, output, recipe=recipe, target=target, tokens=tokens, overwrite=overwrite)
    assert tokens is not None
    # Spread over the text, so that both parts are of all of it.
    held_out = torch.zeros(len(tokens), dtype=torch.bool)
    held_out[torch.linspace(0, len(tokens) - 1, min(_HELD_OUT, len(tokens) // 2)).long()] = True
    found = search(source, budget, tokens[~held_out], tokens[held_out], target=target)
    report = quantize_onnx(source, output, recipe=BUDGET, target=target, plan=found.plan, overwrite=overwrite)
    if found.increase is not None:
        logger.info("Perplexity %+.2f %% on samples that were held out.", 100 * found.increase)
    return report
