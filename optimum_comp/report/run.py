"""The record of one pruning run, written as `comp_report.json`."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optimum_comp.beginning import Beginning
from optimum_comp.core.allocation import Entry
from optimum_comp.files import VOCABULARY
from optimum_comp.strict_json import read_object
from optimum_comp.utils import format_bytes


REPORT_NAME = "comp_report.json"
_OF_THE_RUN = ("seconds", "peak_memory_bytes", "timings")
_LIBRARIES = ("optimum-comp", "optimum", "transformers", "torch")


@dataclass
class Decision:
    """What of one layer stays along one axis.

    Attributes:
        axis: `ffn`, `kv` or `heads`.
        kept: units that stay, ascending, numbered as in the dense model.
        scores: importance before anything was removed along the axis, of every unit that was there then.
        relative_error: squared error that the removal leaves in the dense layer's output, compared with what the
            repair aims at, over that error and the repaired output's square: the part that couldn't be kept.
        unrepaired_error: what it would be, over the same sum, had the units that stay been left as they were; `None`
            where nobody has worked it out.
    """

    axis: str
    kept: list[int]
    scores: list[float]
    relative_error: float
    unrepaired_error: float | None = None


@dataclass
class LayerReport:
    """One decoder layer that stayed.

    Attributes:
        index: its place in the dense model.
        decisions: one for each axis that was pruned, the feed-forward layer's last.
        bridged: whether it stands in for removed layers behind it.
    """

    index: int
    decisions: list[Decision]
    bridged: bool

    @classmethod
    def of(cls, data: dict[str, Any]) -> LayerReport:
        """From what `to_dict` made."""
        return cls(**{**data, "decisions": [Decision(**each) for each in data["decisions"]]})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def decision(self, axis: str) -> Decision:
        """What was decided for an axis.

        Raises:
            KeyError: nothing was.
        """
        for each in self.decisions:
            if each.axis == axis:
                return each
        raise KeyError(f"layer {self.index} has no decision for {axis!r}.")

    @property
    def kept(self) -> list[int]:
        """Neurons that stay, ascending."""
        return self.decision("ffn").kept

    @property
    def scores(self) -> list[float]:
        """Every neuron's importance before anything was removed."""
        return self.decision("ffn").scores

    @property
    def relative_error(self) -> float:
        """What the feed-forward layer couldn't keep."""
        return self.decision("ffn").relative_error


@dataclass
class CompReport:
    """A pruning run: what was asked, what was done, on which text, with which versions.

    Attributes:
        units: kind of unit -> how many each layer had, and has now.
        matmul_dtype: what factors of matrix products were rounded to while layers ran.
        ledger: what was to go of each kind of unit, and what did; empty where nobody has recorded it.
        expected_costs: nats a token that each layer's width was expected to cost; `None` where all have one width.
        weighed: the splits of the budget, where there was one to choose: whole `layers` that go, `units` that stay in
            each other, the `cost` that was expected, in nats a token, `None` for one that can't be, and the
            `divergence` from the dense model on samples that were held out, `None` for one that wasn't tried.
        seconds: wall time; of a run that was gone on with, since then.
        peak_memory_bytes: largest memory of the process so far.
        timings: seconds by kind of work.
    """

    source: str | None
    model_type: str
    requested_sparsity: float
    achieved_sparsity: float
    parameters_before: int
    parameters_after: int
    removed_layers: list[int]
    layer_scores: list[float]
    units: dict[str, list[int]]
    layers: list[LayerReport]
    calibration: dict[str, Any]
    versions: dict[str, str]
    matmul_dtype: str = "float32"
    ledger: list[Entry] = field(default_factory=list)
    expected_costs: list[float] | None = None
    weighed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Everything but the per-layer lists."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "layers"}

    @property
    def width(self) -> int:
        """Neurons of a feed-forward layer; of the widest, where they differ."""
        return self.units["ffn"][1]

    @property
    def widths(self) -> list[int]:
        """Neurons of each layer that stays."""
        return [len(layer.kept) for layer in self.layers]

    @property
    def cache_share(self) -> float:
        """Size of the pruned model's key-value cache over that of the dense one's."""
        before, after = self.units.get("kv", [1, 1])
        layers = len(self.layers)
        return after * layers / (before * (layers + len(self.removed_layers)))

    def sizes(self) -> str:
        """What became smaller, in words."""
        names = {"ffn": "feed-forward width", "heads": "query heads", "kv": "key-value heads"}
        changed = [
            f"{names[kind]} {before} -> {after}"
            for kind, (before, after) in self.units.items()
            if before != after and (kind != "ffn" or self.expected_costs is None)
        ]
        if self.expected_costs is not None:
            to = f"{min(self.widths)} to {max(self.widths)}, filled up with zeros"
            changed.insert(0, f"{names['ffn']} {self.units['ffn'][0]} -> {to}")
        if self.removed_layers:
            changed.append(f"without layers {', '.join(map(str, self.removed_layers))}")
        if self.cache_share < 1:
            changed.append(f"key-value cache {self.cache_share:.0%} of the size")
        return ", ".join(changed)

    def headline(self, output: Path | str) -> str:
        """What was achieved, in one line."""
        return (
            f"{output}: {self.achieved_sparsity:.2%} of the decoder layers removed ({self.requested_sparsity:.2%} "
            f"asked: {self.sizes()}), {self.parameters_before:,} -> {self.parameters_after:,} parameters"
            + (f", {self.seconds:.0f} s, peak memory {format_bytes(self.peak_memory_bytes)}" if self.seconds else "")
        )

    def save(self, folder: Path) -> None:
        """Write `comp_report.json` into a folder, without what differs from one run to the next of the same."""
        lasting = {key: value for key, value in dataclasses.asdict(self).items() if key not in _OF_THE_RUN}
        (folder / REPORT_NAME).write_text(json.dumps(lasting, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CompReport:
        """Read what `save` wrote."""
        return cls.of(json.loads((folder / REPORT_NAME).read_text(encoding="utf-8")))

    @classmethod
    def of(cls, data: dict[str, Any]) -> CompReport:
        """From what `save` wrote."""
        layers = [LayerReport.of(layer) for layer in data["layers"]]
        ledger = [Entry(**entry) for entry in data.get("ledger", [])]
        return cls(**{**data, "layers": layers, "ledger": ledger})


def recorded_beginning(folder: str | Path) -> Beginning | None:
    """What the calibration blocks of the pruning run that made a folder begin with.

    `None` where no report says it: the folder is no pruned model's, or blocks were given as tokens.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return None
    return Beginning.from_dict(json.loads(path.read_text(encoding="utf-8"))["calibration"])


def told_name(model: str | Path) -> str:
    """What a model is called in reports: of one with fewer tokens, the name of the one that had all.

    Of a folder, its name alone: a path says nothing to others and may say too much.

    Args:
        model: folder or hub id.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    try:
        return str(read_object(folder / VOCABULARY)["model"])
    except (OSError, ValueError, KeyError):
        return folder.resolve().name


def library_versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
