"""The stage that assembles a folder for a phone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_comp.bundle import write_bundle
from optimum_comp.chain_memory import BUNDLE as BUNDLE_STEP
from optimum_comp.chain_memory import predict_peak
from optimum_comp.onnx.fused import genai_version
from optimum_comp.onnx.recipes import TARGETS
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.options import Boolean, Choice, Option, option, options_of, settings_class
from optimum_comp.stages.base import BUNDLE, ONNX, Artifact, Stage


@settings_class
class BundleSettings:
    """What a bundle is for."""

    target: str | None = option(
        Choice(tuple(TARGETS)), "Processor that it is for.", default=None, default_text="that of quantization"
    )
    ort_format: bool = option(Boolean(), "With the model in ORT format, too.", default=False)


class Bundle(Stage):
    """Makes a folder with all that ONNX Runtime and ONNX Runtime GenAI need.

    Args:
        settings: what it is for.
    """

    name, takes, makes = "bundle", ONNX, BUNDLE

    def __init__(self, settings: BundleSettings | None = None):
        self.settings = settings or BundleSettings()

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return options_of(BundleSettings)

    @classmethod
    def from_settings(cls, **given: Any) -> Bundle:
        """See `Stage`."""
        return cls(BundleSettings(**given))

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        found = dataclasses.asdict(self.settings)
        return {name: value for name, value in found.items() if value is not None}

    def _target(self, chain: Any) -> str:
        return self.settings.target or str(chain.target)

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        return {"target": self._target(chain), "ort_format": self.settings.ort_format, "genai": genai_version()}

    def place(self, before: str) -> str:
        """See `Stage`."""
        return "bundle"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        require_onnxruntime()

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`; 8 bits at most, and the graphs."""
        return int(1.2 * chain.parameters_after)

    def memory_bytes(self, chain: Any) -> dict[str, int]:
        """See `Stage`."""
        return {BUNDLE_STEP: predict_peak(BUNDLE_STEP, chain.sizes)}

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        report = write_bundle(
            source.folder,
            target,
            target=self._target(chain),
            ort_format=self.settings.ort_format,
            overwrite=True,
            record=record,
        )
        return {**dataclasses.asdict(report), "output": str(target)}
