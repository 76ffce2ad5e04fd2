"""What an ONNX folder holds besides the graph."""

from __future__ import annotations

import shutil
from pathlib import Path


MODEL_NAME = "model.onnx"
"""The name that `ORTModelForCausalLM` looks for first."""

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config byte for byte, over what is there.

    Loading and saving them again isn't the same: each version of transformers writes its own tokenizer class, splits
    off the chat template, and checks the generation config by its own rules.
    """
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def graph_bytes(folder: Path) -> int:
    """Size of an ONNX folder's graphs and weights, in bytes."""
    patterns = ("*.onnx", "*.onnx_data", "*.onnx.data")
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
