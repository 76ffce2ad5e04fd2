"""Structured pruning, ONNX export and quantization of language models for CPU-only devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Without `ORTModelForCausalLM`, which needs an extra: `import *` takes what is always there.
__all__ = [
    "CompConfig",
    "CompPruner",
    "CompReport",
    "DistilSettings",
    "VocabularySettings",
    "__version__",
    "distil",
    "shrink_vocabulary",
]

if TYPE_CHECKING:
    from optimum_comp.configuration import CompConfig
    from optimum_comp.distillation.run import distil
    from optimum_comp.distillation.settings import DistilSettings
    from optimum_comp.onnx.modeling import ORTModelForCausalLM as ORTModelForCausalLM
    from optimum_comp.pruner import CompPruner
    from optimum_comp.report.run import CompReport
    from optimum_comp.vocabulary.run import shrink_vocabulary
    from optimum_comp.vocabulary.settings import VocabularySettings

_HOMES = {
    "CompConfig": "optimum_comp.configuration",
    "CompPruner": "optimum_comp.pruner",
    "CompReport": "optimum_comp.report.run",
    "DistilSettings": "optimum_comp.distillation.settings",
    "ORTModelForCausalLM": "optimum_comp.onnx.modeling",
    "VocabularySettings": "optimum_comp.vocabulary.settings",
    "distil": "optimum_comp.distillation.run",
    "shrink_vocabulary": "optimum_comp.vocabulary.run",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line answers --help without torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
