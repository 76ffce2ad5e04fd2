"""The stage that quantizes, and quantization of a folder by itself."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_comp.beginning import Beginning, decide, losses_of_model
from optimum_comp.calibration.text import PYDOC, evenly, is_self, prepare_calibration
from optimum_comp.chain_memory import QUANTIZE, SEARCH, Load, predict_peak
from optimum_comp.checkpoint.opening import trusted
from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.configuration import BEGINS
from optimum_comp.evaluation import is_onnx_folder, load_model
from optimum_comp.files import check_folder, clear_debris, hold
from optimum_comp.onnx.export import AUTO, export_onnx, require_exporter
from optimum_comp.onnx.quantization import QuantizationReport, quantize_onnx
from optimum_comp.onnx.recipes import BUDGET, FOUR, RECIPES, TARGETS, Format
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.onnx.search import Budget, BudgetError, search
from optimum_comp.options import (
    Choice,
    Integer,
    Option,
    Share,
    Size,
    Text,
    column_option,
    option,
    options_of,
    settings_class,
)
from optimum_comp.report.run import recorded_beginning
from optimum_comp.stages.base import ONNX, Artifact, Stage
from optimum_comp.utils import format_bytes, get_logger


logger = get_logger(__name__)

SAMPLES = 42
"""Samples of the pruning that quantization looks at, too; more gain nothing that could be measured."""
HELD_OUT = 10
"""Samples that are set aside to measure a budget of perplexity on."""


@settings_class
class QuantizeSettings:
    """What the weights become."""

    recipe: str = option(
        Choice(tuple(RECIPES)),
        "How weights are stored: int8, int8-dynamic (faster prompts), int4, int4-small (for models trained rounded), "
        "int4-hqq, int4-rtn; a budget chooses by itself.",
        default="int8",
    )
    target: str = option(
        Choice(tuple(TARGETS)),
        "Processor: arm64, arm64-i8mm, x86-vnni, x86, or any of them.",
        default="any",
    )
    max_perplexity_increase: float | None = option(
        Share("(0, inf)"),
        "Search for the smallest mix of 4 bits, 8 bits and float that keeps this, like 2%.",
        default=None,
        metavar="SHARE",
    )
    max_size: int | None = option(
        Size(), "Search for the best mix of this size, like 110MB.", default=None, metavar="SIZE"
    )

    @property
    def budget(self) -> Budget | None:
        """What is to be kept in place of a recipe; `None` for none."""
        if self.max_perplexity_increase is None and self.max_size is None:
            return None
        return Budget(self.max_perplexity_increase, self.max_size)

    @property
    def wants_text(self) -> bool:
        """Whether calibration samples are needed."""
        return self.budget is not None or RECIPES[self.recipe].rounding == "compensated"

    @property
    def suits_equalization(self) -> bool:
        """Whether equalization while pruning helps what is made here.

        It evens out activations at the weights' expense: 8-bit weights can afford that, 4-bit ones can't.
        """
        layers = RECIPES[self.recipe].layers
        return self.budget is None and layers is not None and layers.bits == 8


@settings_class
class SampleSettings:
    """Calibration samples of a quantization by itself; after pruning, those of the pruning are used."""

    calibration: str = option(
        Text("a file, a dataset's name, self or pydoc"),
        "Calibration text, for int4 and for a budget: a text, JSONL, CSV or Parquet file; a dataset as "
        "name[:config[:split]]; self: text that the model writes; pydoc: Python's documentation.",
        default=PYDOC,
        metavar="FILE|DATASET|self",
    )
    text_column: str | None = column_option()
    num_samples: int = option(Integer(1), "Calibration samples.", default=32)
    sequence_length: int = option(Integer(2), "Tokens of each calibration sample, start tokens included.", default=512)
    begin: str = option(
        Choice(BEGINS),
        "Whether samples begin with the tokens that the tokenizer puts in front of a text, as <bos>: auto (as pruning "
        "found, else unless the model does as well without), always or never.",
        default="auto",
    )


class Quantize(Stage):
    """Makes a graph with fewer bits.

    Args:
        settings: what the weights become.
        samples: where samples come from if nothing before has made some; `None` if nothing is said.
    """

    name, takes, makes = "quantize", ONNX, ONNX
    version = 2

    def __init__(self, settings: QuantizeSettings | None = None, samples: SampleSettings | None = None):
        self.settings = settings or QuantizeSettings()
        self.samples = samples

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return {**options_of(QuantizeSettings), **options_of(SampleSettings)}

    @classmethod
    def from_settings(cls, **given: Any) -> Quantize:
        """See `Stage`."""
        own = {name: value for name, value in given.items() if name in options_of(QuantizeSettings)}
        samples = {name: value for name, value in given.items() if name not in own}
        return cls(QuantizeSettings(**own), SampleSettings(**samples) if samples else None)

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        found = {**dataclasses.asdict(self.settings), **(dataclasses.asdict(self.samples) if self.samples else {})}
        return {name: value for name, value in found.items() if value is not None}

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        found = {name: value for name, value in dataclasses.asdict(self.settings).items() if value is not None}
        if self.settings.budget is not None:
            # It isn't looked at.
            del found["recipe"]
        return {**found, "samples": chain.samples_key if self.settings.wants_text else None}

    def place(self, before: str) -> str:
        """See `Stage`."""
        budget = self.settings.budget
        # One beside the other, so that what one budget took an hour for is there while another is tried.
        name = self.settings.recipe if budget is None else "-".join([BUDGET, *budget.names])
        return f"{before.removesuffix('-onnx')}-{name}"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        require_onnxruntime()
        budget = self.settings.budget
        if budget is None:
            return
        if budget.perplexity_increase is not None:
            require_held_out(chain.num_samples)
        least = least_bytes(chain.parameters_after)
        if budget.size is not None and budget.size < least:
            raise BudgetError(
                f"max_size={format_bytes(budget.size)} can't be kept: with every weight in 4 bits the model takes at "
                f"least {format_bytes(least)}. Prune more (sparsity), or allow more."
            )

    @property
    def wants_samples(self) -> bool:
        """See `Stage`."""
        return self.settings.wants_text

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`; the graph that is on its way is float32 where its weights aren't in blocks."""
        return 5 * int(chain.parameters_after)

    def memory_bytes(self, chain: Any) -> dict[str, int]:
        """See `Stage`."""
        step = QUANTIZE if self.settings.budget is None else SEARCH
        load = Load(chain.sequence_length, self.settings.wants_text)
        return {step: predict_peak(step, chain.sizes, load)}

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        tokens = chain.samples().tokens if self.settings.wants_text else None
        if tokens is not None and chain.prunes:
            tokens = spread_out(tokens)
        report = _quantize(source.folder, target, self.settings, tokens, overwrite=True, record=record)
        return {**dataclasses.asdict(report), "output": target.name}


def spread_out(samples: Tensor) -> Tensor:
    """As many as quantization looks at, from all over the text, in whose order they may lie."""
    return evenly(samples, SAMPLES)


def least_bytes(parameters: int, form: Format = FOUR) -> int:
    """What so many parameters take at least: no weight takes less than 4 bits and its share of a scale.

    Args:
        parameters: how many.
        form: of the smallest weights.
    """
    return int(parameters * form.column_bytes(form.block_size) / form.block_size)


def require_held_out(samples: int) -> None:
    """Refuse to measure a budget on nothing.

    Raises:
        ValueError: there are too few samples to set one aside.
    """
    if samples < 2:
        raise ValueError(
            f"num_samples={samples} leaves no sample to measure max_perplexity_increase on; give at least 2, better "
            f"{SAMPLES} or more."
        )


def quantize_folder(
    model: str | Path,
    output: str | Path,
    *,
    settings: QuantizeSettings | None = None,
    samples: SampleSettings | None = None,
    exporter: str | None = None,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantize a PyTorch or an ONNX folder; the former is exported to a temporary folder first.

    Args:
        model: the folder.
        output: folder to make.
        settings: what the weights become.
        samples: calibration samples, for recipes that round with text and for a budget.
        exporter: of a PyTorch folder (see `export_onnx`); `None` for `auto`.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be overwritten.
        ValueError: no such folder or exporter, an exporter for what is exported already, too little text, or a budget
            that can't be kept.
    """
    model, output = Path(model), Path(output)
    settings, samples = settings or QuantizeSettings(), samples or SampleSettings()
    if not model.is_dir():
        raise ValueError(f"--model {str(model)!r} is not a folder; give a PyTorch or an ONNX folder.")
    if exporter is not None and is_onnx_folder(model):
        raise ValueError(f"exporter={exporter!r} is for a PyTorch folder; {model} is exported already.")
    check_folder(output, overwrite=overwrite, sources=[model])
    require_onnxruntime()
    require_exporter(exporter or AUTO)
    tokens = _samples(model, settings, samples) if settings.wants_text else None
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    work = output.resolve().with_name(f".{output.resolve().name}.quantizing")
    with hold(work):
        # What a kill has left.
        clear_debris(output)
        scratch = work / "onnx"
        shutil.rmtree(scratch, ignore_errors=True)
        clear_debris(scratch)
        try:
            exported = model
            if not is_onnx_folder(model):
                report = export_onnx(model, scratch, exporter=exporter or AUTO)
                logger.info("%s", report.text)
                exported = report.output
            return _quantize(exported, output, settings, tokens, overwrite=overwrite)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _samples(model: Path, settings: QuantizeSettings, samples: SampleSettings) -> Tensor:
    """Token blocks for quantization, `[number, length]`."""
    from transformers import AutoModelForCausalLM

    tokenizer, writer = open_tokenizer(model), None
    if is_self(samples.calibration) and not is_onnx_folder(model):
        writer = AutoModelForCausalLM.from_pretrained(model, **trusted(model, {})).eval()

    def beginning(pieces: Tensor) -> Beginning:
        recorded = recorded_beginning(model) if samples.begin == "auto" else None
        if recorded is not None:
            return recorded

        def losses(blocks: list[Tensor], spans: list[tuple[int, int]]) -> list[float]:
            # Loaded only where there is something to decide.
            return losses_of_model(load_model(model)[0] if writer is None else writer)(blocks, spans)

        return decide(samples.begin, tokenizer, pieces, losses, "Samples")

    return prepare_calibration(
        samples.calibration,
        model=writer,
        tokenizer=tokenizer,
        num_samples=samples.num_samples + (HELD_OUT if settings.budget is not None else 0),
        sequence_length=samples.sequence_length,
        text_column=samples.text_column,
        begin=beginning,
    ).tokens


def _quantize(
    source: Path,
    output: Path,
    settings: QuantizeSettings,
    tokens: Tensor | None,
    *,
    overwrite: bool,
    record: Mapping[str, Any] | None = None,
) -> QuantizationReport:
    """Quantize an ONNX folder by a recipe, or by what a search finds."""
    target, budget = settings.target, settings.budget
    if budget is None:
        return quantize_onnx(
            source, output, recipe=settings.recipe, target=target, tokens=tokens, overwrite=overwrite, record=record
        )
    assert tokens is not None
    # Spread over the text, so that both parts are of all of it.
    held_out = torch.zeros(len(tokens), dtype=torch.bool)
    held_out[torch.linspace(0, len(tokens) - 1, min(HELD_OUT, len(tokens) // 2)).long()] = True
    found = search(source, budget, tokens[~held_out], tokens[held_out], target=target)
    report = quantize_onnx(
        source, output, recipe=BUDGET, target=target, plan=found.plan, overwrite=overwrite, record=record
    )
    if found.increase is not None:
        logger.info("Perplexity %+.2f %% on samples that were held out.", 100 * found.increase)
    return report
