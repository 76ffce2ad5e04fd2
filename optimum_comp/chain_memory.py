"""What each step of the chain will need of memory, before it starts.

Pruning takes a layer at a time (`sweep/memory.py`). The steps behind it hold the whole model, several times over where
ONNX's tools copy it: how often was measured (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from optimum_comp.checkpoint.source import empty_model
from optimum_comp.families import family_of
from optimum_comp.machine import free_memory
from optimum_comp.onnx.calibration import GRAM_BYTES
from optimum_comp.utils import format_bytes, parameter_count


BASE_BYTES = 470 * 10**6
"""Python, torch, transformers, optimum and ONNX Runtime, with what they load when they are first used."""
_ROUNDING_BYTES = 2**29
"""What rounding takes at most for some of a matrix's rows, beside its matrices."""

DISTIL, EXPORT, QUANTIZE, SEARCH, BUNDLE = "distil", "export", "quantize", "search", "bundle"
EVALUATE, EVALUATE_ONNX, EVALUATE_QUANTIZED = "evaluate", "evaluate onnx", "evaluate quantized"


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that memory follows from.

    Attributes:
        parameters: tied ones once.
        largest: values of its largest matrix.
        vocabulary: tokens that it knows.
        hidden: values of a token between layers.
        width: neurons of one layer's FFN.
        layers: decoder layers.
        itemsize: bytes of a value on disk.
    """

    parameters: int
    largest: int
    vocabulary: int
    hidden: int
    width: int
    layers: int
    itemsize: int

    @property
    def whole(self) -> int:
        """Bytes of the model in float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Load:
    """What a step is given.

    Attributes:
        tokens: of a calibration sample, or of a window.
        with_text: weights are rounded with calibration text.
        base: bytes that the process takes already.
    """

    tokens: int = 512
    with_text: bool = False
    base: int = BASE_BYTES


def sizes_of(config: Any, dtype: torch.dtype) -> ModelSizes:
    """The sizes of the model that a config describes; nothing is allocated.

    Args:
        config: of a supported family.
        dtype: of its weights on disk.
    """
    model, family = empty_model(config, dtype), family_of(config)
    hidden, width = family.ffn.consumer.matrix(family.get_layers(model)[0]).shape
    return ModelSizes(
        parameters=parameter_count(model),
        largest=max(parameter.numel() for parameter in model.parameters()),
        vocabulary=config.vocab_size,
        hidden=hidden,
        width=width,
        layers=len(family.get_layers(model)),
        itemsize=dtype.itemsize,
    )


def _logits(sizes: ModelSizes, tokens: int) -> int:
    """Of a window, in float32 and as logarithms, and what the runtime holds."""
    return 3 * 4 * tokens * sizes.vocabulary


def _export(sizes: ModelSizes, load: Load) -> int:
    """The model, what is traced of it, the graph, its bytes, and the graph with its weights sorted out."""
    return 5 * sizes.whole


def _moments(sizes: ModelSizes, load: Load) -> int:
    """Second moments that are summed up in one pass, and the activations of a sample that they are of."""
    layer = 4 * (3 * sizes.hidden**2 + sizes.width**2)
    together = min(sizes.layers * layer, max(GRAM_BYTES, 4 * sizes.width**2))
    return together + 4 * load.tokens * (3 * sizes.hidden + sizes.width) * max(1, together // layer)


def _rounding(sizes: ModelSizes, load: Load) -> int:
    """Moments, factors of one matrix of them, a weight in several stages, and the codes of all weights."""
    stages = 5 * 4 * sizes.width**2 + 6 * 4 * sizes.hidden * sizes.width
    equations = min(_ROUNDING_BYTES, 2 * 4 * sizes.hidden * (sizes.width // 32) ** 2)
    return _moments(sizes, load) + stages + equations + sizes.parameters + _logits(sizes, load.tokens)


def _quantize(sizes: ModelSizes, load: Load) -> int:
    """The graph, its bytes, and what ONNX Runtime's quantizers copy of it."""
    return 5 * sizes.whole + (_rounding(sizes, load) if load.with_text else 0)


def _search(sizes: ModelSizes, load: Load) -> int:
    """As quantizing with text, with every weight's codes in 8 bits, too, and the models that are tried."""
    return round(5.25 * sizes.whole) + _rounding(sizes, load) + sizes.parameters


def _evaluate(sizes: ModelSizes, load: Load) -> int:
    """In float32; files of another dtype are mapped into memory while they are widened."""
    mapped = sizes.itemsize * sizes.parameters if sizes.itemsize != 4 else 0
    return sizes.whole + mapped + _logits(sizes, load.tokens)


def _evaluate_onnx(sizes: ModelSizes, load: Load) -> int:
    """The graph, and the weights as ONNX Runtime arranges them."""
    return 2 * sizes.whole + _logits(sizes, load.tokens)


def _evaluate_quantized(sizes: ModelSizes, load: Load) -> int:
    """The same in 8 bits and their scales, arranged for the processor at hand."""
    return round(3 * 1.07 * sizes.parameters) + _logits(sizes, load.tokens)


def _bundle(sizes: ModelSizes, load: Load) -> int:
    """The quantized graph in 8 bits as it is read, changed, and written in ORT format."""
    return round(3.85 * 1.07 * sizes.parameters)


STEPS: dict[str, Callable[[ModelSizes, Load], int]] = {
    EXPORT: _export,
    QUANTIZE: _quantize,
    SEARCH: _search,
    EVALUATE: _evaluate,
    EVALUATE_ONNX: _evaluate_onnx,
    EVALUATE_QUANTIZED: _evaluate_quantized,
    BUNDLE: _bundle,
}
"""Step -> bytes that it takes beyond what the process has taken before."""

_WAYS_OUT = {
    DISTIL: "take smaller steps (batch_size, sequence_length), low-rank additions (lora_rank), or a machine with more "
    "memory.",
    EXPORT: "ONNX's exporter holds the whole model in float32 several times: prune here, and export on a machine with "
    "more memory.",
    QUANTIZE: "the whole float32 graph is held several times: quantize on a machine with more memory.",
    SEARCH: "a budget holds the float32 graph and every weight's codes: take a recipe, or a machine with more memory.",
}
_WAY_OUT = "the whole model is held: take smaller windows (--window), or a machine with more memory."


def predict_peak(step: str, sizes: ModelSizes, load: Load | None = None) -> int:
    """Largest resident set that a process will have had after a step, in bytes; rather too much than too little.

    Args:
        step: a key of `STEPS`.
        sizes: of the model that it starts from; of a bundle, and of quantized models, those of the float one.
        load: what else it follows from.

    Raises:
        ValueError: no such step.
    """
    if step not in STEPS:
        raise ValueError(f"step={step!r} is not valid: it must be one of {', '.join(STEPS)}.")
    load = load or Load()
    return load.base + STEPS[step](sizes, load)


def available_memory() -> int:
    """What this process has taken, which is part of what each step needs, and what is free, in bytes."""
    return int(psutil.Process().memory_info().rss) + free_memory()


class NotEnoughMemoryError(ValueError):
    """A step needs more memory than there is."""


def require_memory(steps: Mapping[str, int], limit: int | None) -> None:
    """Refuse a chain one step of which won't fit, before the first one starts.

    Args:
        steps: bytes that each takes (see `predict_peak`).
        limit: that none may take more than; `None` for what this process has, and the machine and its container leave
            it, now.

    Raises:
        NotEnoughMemoryError: a step needs more; names the first one, what it needs and what is there, and says what
            to do.
    """
    room, named = (available_memory(), "are there") if limit is None else (limit, "are allowed (max_memory)")
    for step, needed in steps.items():
        if needed > room:
            raise NotEnoughMemoryError(
                f"{step} needs about {format_bytes(needed)} of memory, and {format_bytes(room)} {named}; "
                f"{_WAYS_OUT.get(step, _WAY_OUT)}"
            )
