"""What the user asks for: one validated configuration."""

from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Any

from optimum.configuration_utils import BaseConfig


AXES = ("ffn", "kv", "heads")
LAYER_METRICS = ("cosine", "loss")
NEURON_METRICS = ("condition", "condition_gram", "condition_mask", "wanda", "magnitude", "random")
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
        "axes": ["ffn", "kv"],
        "attention_fraction": 0.25,
    },
}
"""`comp` (the default): condition metric, iterative removal, least squares. `comp-mask`: the form of the metric that
matches mask tuning, and mask tuning, the paper's own recovery. `fasp`: arXiv 2501.09412, which prunes attention by
values; here as far as whole key-value groups allow."""

# Keys that Optimum and transformers write into every saved configuration.
_BOOKKEEPING = {"transformers_version", "optimum_version", "model_type", "_commit_hash", "_name_or_path"}


class CompConfig(BaseConfig):
    """How to prune a model with COMP.

    Args:
        sparsity (`float`, defaults to 0.2):
            Share of the decoder-layer parameters to remove, in (0, 1). Embeddings and the language-model head don't
            count. Widths are rounded so that at least this share goes.
        layer_fraction (`float`, defaults to 0.0):
            Share of `sparsity` that whole decoder layers take, in [0, 1]; neurons take the rest.
        attention_fraction (`float`, defaults to 0.0):
            Share of `sparsity` that attention takes, in [0, 1], rounded down to whole key-value groups or query heads
            of every group.
        axes (`list[str]`, defaults to `["ffn", "kv"]`):
            What may go inside layers: `"ffn"` (neurons), `"kv"` (key-value groups with their query heads), `"heads"`
            (query heads within groups).
        layer_metric (`str`, defaults to `"cosine"`):
            Importance of a whole layer: `"cosine"` (1 − cosine similarity of its input and output hidden states) or
            `"loss"` (next-token loss of the calibration text with the layer skipped; slower).
        protected_layers (`list[int]`, defaults to `[0, -1]`):
            Layers that are never removed as a whole; negative numbers count from the last.
        bridge (`bool`, defaults to `True`):
            Re-fit the dense layer before a removed run of layers so that the hidden states land where the run would
            have left them (after ReplaceMe, arXiv 2505.02819).
        neuron_metric (`str`, defaults to `"condition"`):
            Importance of a neuron, group or head: `"condition"` (the matrix-condition metric in the form that matches
            `recovery`), `"condition_gram"`, `"condition_mask"`, `"wanda"`, `"magnitude"` or `"random"`.
        elimination_block (`int`, defaults to 32):
            Neurons removed between two evaluations of a matrix-condition metric, ≥ 0; 0 ranks only once.
        recovery (`str`, defaults to `"least_squares"`):
            Closed-form repair: `"least_squares"` (re-fits the kept columns), `"mask"` (one factor a kept column: the
            paper's mask tuning) or `"none"`.
        alignment (`float`, defaults to 0.5):
            How far each repair leans on the dense model, in [0, 1]: the share of the deviation that has built up
            between the pruned and the dense model's hidden states that a layer's repair is to take back. 0 repairs
            each layer on its own, and saves the forward pass of the dense model.
        ridge (`float`, defaults to 1e-3):
            Regularisation of every solve towards the unmodified weight, relative to the mean diagonal of its
            matrix, in (0, 1].
        equalize (`bool`, defaults to `False`):
            Fold powers of two into norms and dense layers that even out the range of activations, for quantization of
            activations afterwards. The model computes the same.
        num_samples (`int`, defaults to 64):
            Calibration samples, ≥ 1.
        sequence_length (`int`, defaults to 512):
            Tokens of each sample, ≥ 2, start tokens included.
        round_to (`int`, defaults to 32):
            The FFN width becomes a multiple of this, ≥ 1 (odd widths are slow on every backend).
        seed (`int`, defaults to 0):
            Seed of everything random: which samples are taken, self-calibration, the `"random"` metric.
        begin (`str`, defaults to `"auto"`):
            Whether samples begin with the tokens that the tokenizer puts in front of a text, as `<bos>`: `"auto"`
            (unless the dense model predicts the text as well without), `"always"` or `"never"`. Nothing is
            measured, and all three are the same, where the tokenizer puts nothing there.

    Raises:
        ValueError: a field is out of range or unknown; names the field, its value and what is allowed.
    """

    CONFIG_NAME = "comp_config.json"
    FULL_CONFIGURATION_FILE = "comp_config.json"

    def __init__(
        self,
        sparsity: float = 0.2,
        layer_fraction: float = 0.0,
        attention_fraction: float = 0.0,
        axes: list[str] | tuple[str, ...] = ("ffn", "kv"),
        layer_metric: str = "cosine",
        protected_layers: list[int] | tuple[int, ...] = (0, -1),
        bridge: bool = True,
        neuron_metric: str = "condition",
        elimination_block: int = 32,
        recovery: str = "least_squares",
        alignment: float = 0.5,
        ridge: float = 1e-3,
        equalize: bool = False,
        num_samples: int = 64,
        sequence_length: int = 512,
        round_to: int = 32,
        seed: int = 0,
        begin: str = "auto",
        **kwargs: Any,
    ):
        self.sparsity = _real("sparsity", sparsity, 0.0, 1.0, "(0, 1)")
        self.layer_fraction = _real("layer_fraction", layer_fraction, 0.0, 1.0, "[0, 1]")
        self.attention_fraction = _real("attention_fraction", attention_fraction, 0.0, 1.0, "[0, 1]")
        self.axes = _axes("axes", axes)
        if self.layer_fraction + self.attention_fraction > 1 + 1e-9:
            raise _refuse(
                "attention_fraction", attention_fraction, f"at most 1 - layer_fraction = {1 - self.layer_fraction:g}"
            )
        if self.attention_fraction and self.axes == ["ffn"]:
            raise _refuse("attention_fraction", attention_fraction, "0 where axes holds neither kv nor heads")
        self.layer_metric = _choice("layer_metric", layer_metric, LAYER_METRICS)
        self.protected_layers = _layers("protected_layers", protected_layers)
        self.bridge = _boolean("bridge", bridge)
        self.neuron_metric = _choice("neuron_metric", neuron_metric, NEURON_METRICS)
        self.elimination_block = _integer("elimination_block", elimination_block, 0)
        self.recovery = _choice("recovery", recovery, RECOVERY_METHODS)
        self.alignment = _real("alignment", alignment, 0.0, 1.0, "[0, 1]")
        self.ridge = _real("ridge", ridge, 0.0, 1.0, "(0, 1]")
        self.equalize = _boolean("equalize", equalize)
        self.num_samples = _integer("num_samples", num_samples, 1)
        self.sequence_length = _integer("sequence_length", sequence_length, 2)
        self.round_to = _integer("round_to", round_to, 1)
        self.seed = _integer("seed", seed, 0)
        self.begin = require_begin(begin)
        for name in sorted(set(kwargs) - _BOOKKEEPING):
            guess = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f" Did you mean {guess[0]!r}?" if guess else ""
            raise ValueError(f"CompConfig has no field {name!r}.{hint} Fields: {', '.join(FIELDS)}.")
        super().__init__()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> CompConfig:
        """A named recipe, with any field overridden.

        Raises:
            ValueError: there is no such preset, or a field is out of range.
        """
        return cls(**{**PRESETS[_choice("preset", name, tuple(PRESETS))], **overrides})

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
    return _choice("begin", value, BEGINS)


def _fields() -> tuple[str, ...]:
    code = CompConfig.__init__.__code__
    return code.co_varnames[1 : code.co_argcount]


FIELDS = _fields()


def _refuse(field: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{field}={value!r} is not valid: {field} must be {allowed}.")


def _real(field: str, given: Any, low: float, high: float, interval: str) -> float:
    allowed = f"a number in {interval}"
    if isinstance(given, bool) or not isinstance(given, Real):
        raise _refuse(field, given, allowed)
    value = float(given)
    too_low = value <= low if interval[0] == "(" else value < low
    too_high = value >= high if interval[-1] == ")" else value > high
    if math.isnan(value) or too_low or too_high:
        raise _refuse(field, given, allowed)
    return value


def _integer(field: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise _refuse(field, value, f"an integer >= {low}")
    return int(value)


def _boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(field, value, "true or false")
    return value


def _choice(field: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _refuse(field, value, f"one of {', '.join(choices)}")
    return value


def _axes(field: str, value: Any) -> list[str]:
    allowed = f"a list of some of {', '.join(AXES)}, each once"
    if not isinstance(value, (list, tuple)) or not value or len(set(map(str, value))) != len(value):
        raise _refuse(field, value, allowed)
    if not all(axis in AXES for axis in value):
        raise _refuse(field, value, allowed)
    return [axis for axis in AXES if axis in value]


def _layers(field: str, value: Any) -> list[int]:
    allowed = "a list of layer numbers"
    if not isinstance(value, (list, tuple)):
        raise _refuse(field, value, allowed)
    if not all(isinstance(index, Integral) and not isinstance(index, bool) for index in value):
        raise _refuse(field, value, allowed)
    return [int(index) for index in value]
