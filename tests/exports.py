"""Tiny models that are exported once for all tests of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from optimum_comp.onnx.export import ExportReport, export_onnx


@dataclass(frozen=True)
class Exported:
    model: Any
    checkpoint: Path
    report: ExportReport

    @property
    def folder(self) -> Path:
        return self.report.output


def exporter(
    factory: pytest.TempPathFactory, make: Callable[[str], Any], by: str = "optimum"
) -> Callable[[str], Exported]:
    """What gives the export, by an exporter, of the model that `make` makes of a name, and makes each only once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            root, model = factory.mktemp(name), make(name)
            model.save_pretrained(root / "torch")
            made[name] = Exported(model, root / "torch", export_onnx(root / "torch", root / "onnx", exporter=by))
        return made[name]

    return get


def outlier_model(name: str):
    """A tiny model whose attention isn't uniform and whose keys have outliers."""
    if name == "llama-odd":
        # Tied, and no width that a block of 16 divides.
        sizes = {**SIZES, "hidden_size": 40, "intermediate_size": 52, "tie_word_embeddings": True}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **IDS)).eval()
    else:
        model = tiny_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            if "k_proj.weight" in key:
                parameter[::16] *= 20
            elif "k_proj.bias" in key:
                parameter[::16] += 20
    return model


def uneven_model(kind: str, sizes: dict[str, Any]):
    """A tiny model of a type whose attention isn't uniform and whose biases aren't zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **IDS)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    return model


def stored_scales(graph: Any, node: Any) -> str:
    """Name of the initializer that the scales of a `MatMulNBits` are made from."""
    (name,) = (
        *(each.input[0] for each in graph.node if each.op_type == "Cast" and node.input[2] in each.output),
        *(each.name for each in graph.initializer if each.name == node.input[2]),
    )
    return name
