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
from optimum_comp.utils import format_bytes


REPORT_NAME = "comp_report.json"
_OF_THE_RUN = ("seconds", "peak_memory_bytes", "timings")
_LIBRARIES = ("optimum-comp", "optimum", "transformers", "torch")


@dataclass
class LayerReport:
    """One decoder layer that stayed.

    Attributes:
        index: its place in the dense model.
        kept: neurons that stay, ascending.
        scores: every neuron's importance before anything was removed.
        relative_error: squared error that the removal leaves in the dense layer's output, compared with what the
            repair aims at, over that error and the repaired output's square: the part that couldn't be kept.
        bridged: whether it stands in for removed layers behind it.
    """

    index: int
    kept: list[int]
    scores: list[float]
    relative_error: float
    bridged: bool


@dataclass
class CompReport:
    """A pruning run: what was asked, what was done, on which text, with which versions.

    Attributes:
        matmul_dtype: what factors of matrix products were rounded to while layers ran.
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
    width: int
    layers: list[LayerReport]
    calibration: dict[str, Any]
    versions: dict[str, str]
    matmul_dtype: str = "float32"
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Everything but the per-layer lists."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "layers"}

    def headline(self, output: Path | str) -> str:
        """What was achieved, in one line."""
        removed = f" and layers {', '.join(map(str, self.removed_layers))}" if self.removed_layers else ""
        return (
            f"{output}: {self.achieved_sparsity:.2%} of the decoder layers removed ({self.requested_sparsity:.2%} "
            f"asked: feed-forward width {len(self.layers[0].scores)} -> {self.width}{removed}), "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
            + (f", {self.seconds:.0f} s, peak memory {format_bytes(self.peak_memory_bytes)}" if self.seconds else "")
        )

    def save(self, folder: Path) -> None:
        """Write `comp_report.json` into a folder, without what differs from one run to the next of the same."""
        lasting = {key: value for key, value in dataclasses.asdict(self).items() if key not in _OF_THE_RUN}
        (folder / REPORT_NAME).write_text(json.dumps(lasting, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CompReport:
        """Read what `save` wrote."""
        data = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        return cls(**{**data, "layers": [LayerReport(**layer) for layer in data["layers"]]})


def recorded_beginning(folder: str | Path) -> Beginning | None:
    """What the calibration blocks of the pruning run that made a folder begin with.

    `None` where no report says it: the folder is no pruned model's, or blocks were given as tokens.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return None
    return Beginning.from_dict(json.loads(path.read_text(encoding="utf-8"))["calibration"])


def library_versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
