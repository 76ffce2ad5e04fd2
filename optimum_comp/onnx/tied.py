"""Tied embeddings of a class that Optimum's exporter doesn't take for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def every_embedding_is_shared() -> Iterator[None]:
    """Have the exporter store a tied head once, whatever the class of its embedding.

    It goes by the name of the class; Gemma 3's, which scales what it looks up, has one of its own, and its 168 million
    weights would be there twice. The export's comparison with PyTorch shows that the graph is right.
    """
    from optimum.onnx import graph_transformations as transformations

    original = transformations._get_weights_to_tie

    def by_kind(tied_params: list[list[str]], torch_model: nn.Module) -> Any:
        modules = [torch_model.get_submodule(name.rpartition(".")[0]) for group in tied_params for name in group]
        names = {type(module): type(module).__name__ for module in modules if isinstance(module, nn.Embedding)}
        try:
            for each in names:
                each.__name__ = nn.Embedding.__name__
            return original(tied_params, torch_model)
        finally:
            for each, name in names.items():
                each.__name__ = name

    transformations._get_weights_to_tie = by_kind
    try:
        yield
    finally:
        transformations._get_weights_to_tie = original
