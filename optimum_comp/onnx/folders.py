"""What an ONNX folder holds besides the graph."""

from __future__ import annotations

import shutil
from pathlib import Path

from optimum_comp.checkpoint.tokenizer import copy_tokenizer
from optimum_comp.utils import file_bytes


MODEL_NAME = "model.onnx"
"""The name that `ORTModelForCausalLM` looks for first."""

GRAPH_FILES = ("*.onnx", "*.onnx_data", "*.onnx.data")
"""Patterns of graphs and of the weights beside them."""


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config byte for byte, over what is there.

    Loading and saving them again isn't the same: each version of transformers writes its own tokenizer class, splits
    off the chat template, and checks the generation config by its own rules.
    """
    copy_tokenizer(source, target)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")


def graph_bytes(folder: Path) -> int:
    """Size of an ONNX folder's graphs and weights, in bytes."""
    return file_bytes(folder, GRAPH_FILES)
