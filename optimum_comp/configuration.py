"""What the user asks of pruning: one validated configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig

from optimum_comp.options import (
    AUTO,
    Boolean,
    Choice,
    Integer,
    Integers,
    Number,
    NumberOrAuto,
    Option,
    Subset,
    describe,
    refuse,
    require_known,
    signature_defaults,
)
from optimum_comp.strict_json import read_object
from optimum_comp.utils import explaining, shown


AXES = ("ffn", "kv", "heads")
LAYER_METRICS = ("cosine", "loss")
NEURON_METRICS = ("condition", "condition_gram", "condition_mask", "wanda", "magnitude", "random")
ALLOCATIONS = ("auto", "uniform", "adaptive")
ERROR_NORMS = ("fisher", "euclidean")
RECOVERY_METHODS = ("least_squares", "mask", "none")
BEGINS = ("auto", "always", "never")

PRESETS: dict[str, dict[str, Any]] = {
    "comp": {"neuron_metric": "condition", "recovery": "least_squares"},
    "comp-mask": {"neuron_metric": "condition", "recovery": "mask"},
    "fasp": {
        "neuron_metric": "wanda",
        "recovery": "least_squares",
        "layer_fraction": 0.0,
        "alignment": 0.0,
        "error_norm": "euclidean",
        "axes": ["ffn", "kv"],
        "attention_fraction": 0.25,
    },
}
"""`comp` (the default): condition metric, iterative removal, least squares. `comp-mask`: the form of the metric that
matches mask tuning, and mask tuning, the paper's own recovery. `fasp`: arXiv 2501.09412, which prunes attention by
values; here as far as whole key-value groups allow."""

# Keys that Optimum and transformers write into every saved configuration.
_BOOKKEEPING = {"transformers_version", "optimum_version", "model_type", "_commit_hash", "_name_or_path"}


OPTIONS = {
    "sparsity": Option(
        Number("(0, 1)"),
        "Share of the decoder-layer parameters to remove. Embeddings and the language-model head don't count. Widths "
        "are rounded so that at least this share goes.",
    ),
    "layer_fraction": Option(
        NumberOrAuto("[0, 1]"),
        "Share of the sparsity that whole decoder layers take; neurons take the rest. auto: as many as cost less loss "
        "than what else could go, bridged, no two of them neighbours, where allocation is adaptive; else 0.",
    ),
    "attention_fraction": Option(
        NumberOrAuto("[0, 1]"),
        "Share of the sparsity that attention takes, rounded down to whole key-value groups or query heads of every "
        "group. auto: as many as cost less loss than what else could go, where allocation is adaptive; else 0.",
    ),
    "allocation": Option(
        Choice(ALLOCATIONS),
        "How many neurons each layer keeps: uniform (as many as every other), adaptive (what costs least loss, to "
        "second order; layers with fewer than the widest are filled up with zeros, and export leaves those out), or "
        "auto: adaptive in a chain that exports, if the metric says what a neuron costs, else uniform.",
    ),
    "axes": Option(
        Subset(AXES),
        "What may go inside layers: ffn (neurons), kv (key-value groups with their query heads), heads (query heads "
        "within groups).",
        metavar="AXIS,AXIS",
    ),
    "layer_metric": Option(
        Choice(LAYER_METRICS),
        "Importance of a whole layer: cosine (1 − cosine similarity of its input and output hidden states) or loss "
        "(next-token loss of the calibration text with the layer skipped; slower).",
    ),
    "protected_layers": Option(
        Integers("a list of layer numbers"),
        "Layers that are never removed as a whole; negative numbers count from the last.",
        metavar="N,N",
    ),
    "bridge": Option(
        Boolean(),
        "Re-fit the dense layer before a removed run of layers so that the hidden states land where the run would "
        "have left them (after ReplaceMe, arXiv 2505.02819).",
    ),
    "neuron_metric": Option(
        Choice(NEURON_METRICS),
        "Importance of a neuron, group or head: condition (the matrix-condition metric in the form that matches the "
        "recovery), condition_gram, condition_mask, wanda, magnitude or random.",
    ),
    "elimination_block": Option(
        Integer(0), "Neurons removed between two evaluations of a matrix-condition metric; 0 ranks only once."
    ),
    "error_norm": Option(
        Choice(ERROR_NORMS),
        "How a matrix-condition metric, and mask tuning, measure an error in a layer's output: fisher (by what it "
        "costs in loss, from the gradients of a few samples: more time), or euclidean (every direction alike).",
    ),
    "recovery": Option(
        Choice(RECOVERY_METHODS),
        "Closed-form repair: least_squares (re-fits the kept columns), mask (one factor a kept column: the paper's "
        "mask tuning) or none.",
    ),
    "alignment": Option(
        Number("[0, 1]"),
        "How far each repair leans on the dense model: the share of the deviation that has built up between the "
        "pruned and the dense model's hidden states that a layer's repair is to take back. 0 repairs each layer on "
        "its own, and saves the forward pass of the dense model.",
    ),
    "ridge": Option(
        Number("(0, 1]"),
        "Regularisation of every solve towards the unmodified weight, relative to the mean diagonal of its matrix.",
    ),
    "equalize": Option(
        Boolean(),
        "Fold powers of two into norms and dense layers that even out the range of activations, for 8-bit "
        "quantization afterwards. The model computes the same.",
    ),
    "num_samples": Option(Integer(1), "Calibration samples."),
    "sequence_length": Option(Integer(2), "Tokens of each calibration sample, start tokens included."),
    "round_to": Option(Integer(1), "The FFN width becomes a multiple of this (odd widths are slow on every backend)."),
    "seed": Option(
        Integer(0), "Seed of everything random: which samples are taken, self-calibration, the random metric."
    ),
    "begin": Option(
        Choice(BEGINS),
        "Whether samples begin with the tokens that the tokenizer puts in front of a text, as <bos>: auto (unless the "
        "model predicts the text as well without), always or never. Nothing is measured, and all three are the same, "
        "where the tokenizer puts nothing there.",
    ),
}
"""What each field of `CompConfig` may be and means; its default is in the signature."""


class CompConfig(BaseConfig):
    """How to prune a model with COMP.

    Raises:
        ValueError: a field is out of range or unknown; names the field, its value and what is allowed.
    """

    CONFIG_NAME = "comp_config.json"
    FULL_CONFIGURATION_FILE = "comp_config.json"

    def __init__(
        self,
        sparsity: float = 0.2,
        layer_fraction: float | str = AUTO,
        attention_fraction: float | str = AUTO,
        allocation: str = "auto",
        axes: list[str] | tuple[str, ...] = ("ffn", "kv", "heads"),
        layer_metric: str = "cosine",
        protected_layers: list[int] | tuple[int, ...] = (0, -1),
        bridge: bool = True,
        neuron_metric: str = "condition",
        elimination_block: int = 32,
        error_norm: str = "fisher",
        recovery: str = "least_squares",
        alignment: float = 0.5,
        ridge: float = 1e-3,
        equalize: bool = False,
        num_samples: int = 192,
        sequence_length: int = 256,
        round_to: int = 32,
        seed: int = 0,
        begin: str = "auto",
        **kwargs: Any,
    ):
        given = locals()
        for name, each in OPTIONS.items():
            setattr(self, name, each.check(name, given[name]))
        layers, attention = self.fixed_layer_fraction or 0.0, self.fixed_attention_fraction or 0.0
        if layers + attention > 1 + 1e-9:
            raise refuse("attention_fraction", attention_fraction, f"at most 1 - layer_fraction = {1 - layers:g}")
        if attention and self.axes == ["ffn"]:
            raise refuse("attention_fraction", attention_fraction, "0 where axes holds neither kv nor heads")
        if self.allocation == "adaptive" and not self.measures_loss:
            raise refuse(
                "allocation", allocation, "uniform without error_norm=fisher and a matrix-condition neuron_metric"
            )
        require_known(sorted(set(kwargs) - _BOOKKEEPING), FIELDS, "CompConfig")
        super().__init__()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> CompConfig:
        """A named recipe, with any field overridden.

        Raises:
            ValueError: there is no such preset, or a field is out of range.
        """
        return cls(**{**PRESETS[Choice(tuple(PRESETS)).check("preset", name)], **overrides})

    @classmethod
    def get_config_dict(cls, name: Any, **kwargs: Any) -> Any:
        """What a stored configuration holds, and the arguments that are left.

        Raises:
            OSError: there is none.
            ValueError: it is damaged.
        """
        with explaining(f"{shown(name)} has no {cls.CONFIG_NAME} that can be read; give another folder or hub id"):
            return super().get_config_dict(name, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """What a stored configuration holds; see `read_object`."""
        return read_object(Path(json_file))

    def fields(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def protected(self, num_layers: int) -> set[int]:
        """The layers that `protected_layers` means in a model with so many.

        Raises:
            ValueError: one of them doesn't exist.
        """
        for index in self.protected_layers:
            if not -num_layers <= index < num_layers:
                raise ValueError(
                    f"protected_layers={self.protected_layers!r} is not valid: the model has {num_layers} layers, so "
                    f"each number must be in [{-num_layers}, {num_layers - 1}]."
                )
        return {index % num_layers for index in self.protected_layers}

    @property
    def resolved_neuron_metric(self) -> str:
        """`neuron_metric`, with `"condition"` replaced by the form that matches the recovery.

        The metric has to assume the re-fit that follows. The Gram form before a mask trusts a re-fit that a mask
        can't make; with no recovery at all, the mask form promises least.
        """
        if self.neuron_metric != "condition":
            return self.neuron_metric
        return "condition_gram" if self.recovery == "least_squares" else "condition_mask"

    @property
    def fixed_layer_fraction(self) -> float | None:
        """`layer_fraction`; `None` where it is to be found out."""
        return self._fixed(self.layer_fraction)

    @property
    def fixed_attention_fraction(self) -> float | None:
        """`attention_fraction`, likewise."""
        return self._fixed(self.attention_fraction)

    def _fixed(self, fraction: float | str) -> float | None:
        if fraction != AUTO:
            return float(fraction)
        # Only then is it worked out what neurons cost in each layer, which takes as long as pruning in wide ones.
        return None if self.allocation == "adaptive" else 0.0

    @property
    def measures_loss(self) -> bool:
        """Whether the metric says what going without a neuron costs in loss, so that layers can be compared."""
        return self.resolved_neuron_metric.startswith("condition") and self.error_norm == "fisher"

    @property
    def needs_fisher(self) -> bool:
        """Whether anything is measured by the loss's gradients."""
        measures = self.resolved_neuron_metric.startswith("condition") or self.recovery == "mask"
        return measures and self.error_norm == "fisher"

    def to_dict(self) -> dict[str, Any]:
        """The fields and the versions that wrote them, without the keys that only make sense for a model."""
        bookkeeping = {key: value for key, value in super().to_dict().items() if key.endswith("_version")}
        return {**self.fields(), **bookkeeping}

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields: a side-car should say what was done without a look at the defaults of that day."""
        return self.to_dict()


def require_begin(value: Any) -> str:
    """A valid `begin`, of this configuration or of whatever else takes one.

    Raises:
        ValueError: it is none.
    """
    found: str = OPTIONS["begin"].check("begin", value)
    return found


FIELDS = tuple(OPTIONS)
DEFAULTS = signature_defaults(CompConfig, FIELDS)
describe(CompConfig, OPTIONS, DEFAULTS, "Args")
