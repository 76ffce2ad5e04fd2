"""Quantization recipes and the processors that they are for, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How a weight matrix is stored for ONNX Runtime's `MatMulNBits`.

    Attributes:
        bits: 4 or 8.
        block_size: weights that share a scale; a power of two of at least 16.
    """

    bits: int
    block_size: int

    def fitted(self, rows: int) -> Format:
        """The same with the block, up to this one's size, that stores `rows` weights in the fewest bytes.

        The operator pads a column to whole blocks.
        """
        return Format(self.bits, min(self.sizes(), key=lambda size: Format(self.bits, size).column_bytes(rows)))

    def sizes(self) -> list[int]:
        """Sizes that a block may have, up to this one's, the largest first."""
        return [size for size in (256, 128, 64, 32, 16) if size <= self.block_size]

    def column_bytes(self, rows: int) -> int:
        """Bytes of a column of `rows` weights: codes of whole blocks, and a scale of 16 bits for each."""
        blocks = -(-rows // self.block_size)
        return blocks * (self.block_size * self.bits // 8 + 2)

    def matrix_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix `[d_in, d_out]`."""
        return self.fitted(shape[0]).column_bytes(shape[0]) * shape[1]


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        description: what it is good for, in a line.
        layers: format of the decoder layers' weights; `None` leaves them to `ORTQuantizer`.
        head: format of the language-model head; an embedding that is tied to it shares its blocks.
        attention: format of what makes queries, keys and values, where it isn't that of the other layers. Attention
            scores are exponentiated: at 4 bits these few weights lose more than all others together.
        rounding: `"nearest"`, `"hqq"` (half-quadratic quantization) or `"compensated"` (each column makes good what
            those before it did wrong to the layer's output; needs calibration text).
        operators: operator types that `ORTQuantizer` quantizes to int8 in what is left.
        consumers_only: only the dense layers that read the FFN's neurons take the format `layers`. Their inputs have
            outliers, and one scale for all activations of a prompt loses the rest; `MatMulNBits` has one for each
            block.
    """

    description: str
    layers: Format | None
    head: Format | None = None
    attention: Format | None = None
    rounding: str = "nearest"
    operators: tuple[str, ...] = ("Gather",)
    consumers_only: bool = False


EIGHT, FOUR, FOUR_WIDE = Format(8, 64), Format(4, 32), Format(4, 64)

RECIPES: dict[str, Recipe] = {
    "int8": Recipe("8-bit weights with a scale for each block; next to no loss, fast generation", EIGHT, EIGHT),
    # Transpose: a tied head multiplies by the transposed embedding. Left out, its weight is quantized at every token.
    "int8-dynamic": Recipe(
        "8-bit weights and activations; fast prompts, some loss",
        EIGHT,
        operators=("MatMul", "Gather", "Transpose"),
        consumers_only=True,
    ),
    "int4": Recipe(
        "4-bit weights rounded with calibration text; queries, keys, values and embedding in 8 bits",
        FOUR,
        EIGHT,
        EIGHT,
        rounding="compensated",
    ),
    "int4-small": Recipe(
        "4-bit weights everywhere, the embedding's too; the smallest, for models that were trained rounded",
        FOUR_WIDE,
        FOUR_WIDE,
        rounding="compensated",
    ),
    "int4-hqq": Recipe("the mix of int4, rounded without text (HQQ)", FOUR, EIGHT, EIGHT, rounding="hqq"),
    "int4-rtn": Recipe("the same mix, each weight rounded to the nearest; to compare with", FOUR, EIGHT, EIGHT),
}

BUDGET = "budget"
"""Name of a mix of precisions that was searched for; no recipe of its own."""


@dataclass(frozen=True)
class Target:
    """A kind of processor.

    Attributes:
        description: which it is.
        reduce_range: keep int8 weights that are multiplied with 8-bit activations within 7 bits, because the
            processor adds pairs of products in 16 bits.
    """

    description: str
    reduce_range: bool


TARGETS: dict[str, Target] = {
    "any": Target("any processor", reduce_range=True),
    "arm64": Target("64-bit Arm, phones of any age", reduce_range=False),
    "arm64-i8mm": Target("64-bit Arm with int8 matrix products, phones since 2021", reduce_range=False),
    "x86-vnni": Target("x86-64 with VNNI", reduce_range=False),
    "x86": Target("x86-64 without VNNI", reduce_range=True),
}


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: there is none.
    """
    if name == BUDGET:
        return Recipe("a mix of precisions that keeps a budget", None)
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is not valid: it must be one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not valid: it must be one of {', '.join(TARGETS)}.")
    return TARGETS[name]
