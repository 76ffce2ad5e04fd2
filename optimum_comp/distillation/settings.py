"""How to distil."""

from __future__ import annotations

import dataclasses
from typing import Any

from optimum_comp.onnx.recipes import RECIPES
from optimum_comp.options import (
    Choice,
    Duration,
    Integer,
    Number,
    Share,
    Text,
    Texts,
    column_option,
    option,
    settings_class,
)


ROUNDED = tuple(name for name, recipe in RECIPES.items() if recipe.layers is not None and recipe.layers.bits < 8)
"""Recipes that round so coarsely that training with it gains something."""


@settings_class
class DistilSettings:
    """How to distil."""

    text: list[str] | None = option(
        Texts("a list of files, datasets' names, self or pydoc, each with :SHARE if need be"),
        "Text to train on, which needs no labels: as for --calibration, several times, or as a mix like "
        "a.txt:0.5,self:0.5.",
        default=None,
        default_text="self,pydoc; in a chain, the calibration text, and a fifth self",
        metavar="FILE|DATASET|self",
    )
    text_column: str | None = column_option()
    time: float | None = option(
        Duration(),
        "Stop after this time, evaluation included, like 30min; the learning rate falls to zero by then.",
        default=None,
        default_text="30min, if steps says nothing",
        metavar="TIME",
    )
    steps: int | None = option(
        Integer(1),
        "Stop after so many steps: the same result each time, where a time gives another on each machine.",
        default=None,
        metavar="N",
    )
    labels: float = option(
        Number("[0, 1]"),
        "How much the text's own next tokens count beside the teacher's predictions: 0 makes the most faithful copy, "
        "more a better model of the text, chat or none.",
        default=0.1,
    )
    learning_rate: float | None = option(
        Number("(0, 1]"),
        "Largest learning rate of AdamW.",
        default=None,
        default_text="by the size of the weights: of SmolLM2-135M 3e-4, with rounding, or where nothing is "
        "pruned, 1e-4",
    )
    batch_size: int = option(Integer(1), "Samples of each step.", default=4)
    sequence_length: int = option(Integer(2), "Tokens of each sample, start tokens included.", default=256)
    held_out: float = option(
        Share("(0, 0.5]"),
        "Share of each text that isn't trained on and decides which checkpoint is kept.",
        default=0.05,
    )
    written_tokens: int = option(
        Integer(1),
        "Tokens that the teacher writes where the text is self, used again and again; in a chain, beside what it "
        "wrote to calibrate pruning.",
        default=8192,
    )
    rounding: str | None = option(
        Choice(ROUNDED),
        "Train with weights as this recipe rounds them, which then finds them rounded already (quantization-aware); "
        "int4-small: every weight in 4 bits.",
        default=None,
        default_text="not rounded",
    )
    lora_rank: int | None = option(
        Integer(0),
        "Train low-rank additions of this rank (LoRA), merged afterwards; 0 trains the weights themselves.",
        default=None,
        default_text="0 if that fits into memory, else 16",
    )
    matmul_dtype: str = option(
        Choice(("auto", "float32", "bfloat16")),
        "Round factors of matrix products to this: float32 (not at all), bfloat16, or auto: bfloat16 where the "
        "processor has it.",
        default="auto",
    )
    device: str | None = option(
        Text("cpu or cuda"),
        "Where both models run: cpu, or cuda, the first GPU that is seen.",
        default=None,
        default_text="cpu",
    )
    seed: int = option(Integer(0), "Seed of the samples' order and of text that the teacher writes.", default=0)

    def _require(self) -> None:
        if self.text == []:
            raise ValueError("text=[] is not valid: name at least one source, or leave it away.")
        if self.lora_rank and self.rounding is not None:
            raise ValueError(
                f"rounding={self.rounding!r} trains the weights themselves; it excludes lora_rank={self.lora_rank}."
            )
        if self.time is not None and self.steps is not None:
            raise ValueError(f"time={self.time:g} and steps={self.steps} exclude each other: give one of them.")

    @property
    def seconds(self) -> float | None:
        """Time that it may take; `None` if the number of steps is given."""
        return self.time if self.time is not None or self.steps is not None else 1800.0

    @property
    def tokens_of_a_step(self) -> int:
        """Tokens of each step."""
        return self.batch_size * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """What is given, for a recipe or JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
