"""The stage that exports to ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_comp.chain_memory import EXPORT, predict_peak
from optimum_comp.onnx.export import AUTO, EXPORTERS, OPTIMUM, export_onnx, require_exporter
from optimum_comp.onnx.fused import genai_version
from optimum_comp.onnx.parity import TOLERANCE
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.options import Choice, Number, Option, option, options_of, settings_class
from optimum_comp.stages.base import CHECKPOINT, ONNX, Artifact, Stage
from optimum_comp.utils import get_logger


logger = get_logger(__name__)


@settings_class
class ExportSettings:
    """How an export is made and judged."""

    exporter: str = option(
        Choice(EXPORTERS),
        "What makes the graph: genai (ONNX Runtime GenAI's model builder: attention as one operator, faster), "
        "optimum, or auto: genai where it knows the family and computes what PyTorch does, else optimum.",
        default=AUTO,
    )
    tolerance: float = option(
        Number("(0, inf)"),
        "Largest difference of a logit to PyTorch's with which an export is kept, relative to the largest logit if "
        "that is above 1.",
        default=TOLERANCE,
    )


class Export(Stage):
    """Makes a float32 graph.

    Args:
        settings: how it is made and judged.
    """

    name, takes, makes = "export", CHECKPOINT, ONNX

    def __init__(self, settings: ExportSettings | None = None):
        self.settings = settings or ExportSettings()

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return options_of(ExportSettings)

    @classmethod
    def from_settings(cls, **given: Any) -> Export:
        """See `Stage`."""
        return cls(ExportSettings(**given))

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        return dataclasses.asdict(self.settings)

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        # What `auto` takes hangs on whether there is a builder, and its graph on which.
        builder = None if self.settings.exporter == OPTIMUM else genai_version()
        return {**self.to_dict(), "genai": builder}

    def place(self, before: str) -> str:
        """See `Stage`."""
        return f"{before}-onnx"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        require_onnxruntime()
        require_exporter(self.settings.exporter)

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`; float32, and once more while the exporter puts it together."""
        return 8 * int(chain.parameters_after)

    def memory_bytes(self, chain: Any) -> dict[str, int]:
        """See `Stage`."""
        return {EXPORT: predict_peak(EXPORT, chain.sizes)}

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        report = export_onnx(
            chain.local(source), target, **dataclasses.asdict(self.settings), overwrite=True, record=record
        )
        logger.info("%s", report.text)
        return {
            "seconds": report.seconds,
            "size_bytes": report.size_bytes,
            "exporter": report.exporter,
            "exporter_reason": report.reason,
        }
