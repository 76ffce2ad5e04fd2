"""The loop over decoder layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn

from optimum_comp.checkpoint.source import ModelSource


class Visitor(Protocol):
    """What is done at each layer."""

    def visit(self, index: int, layer: nn.Module) -> None:
        """While this layer of the dense model, and no other, is at hand."""

    def leave(self, index: int) -> None:
        """Afterwards, when the memory that its weights took is free."""


def sweep(
    source: ModelSource,
    indices: Iterable[int],
    visitor: Visitor,
    reading: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Take a visitor to several layers of a dense model, one at a time.

    Args:
        source: the model.
        indices: of the layers, in order.
        visitor: what is done there.
        reading: makes a context around the reading of a layer, to measure it.
    """
    for index in indices:
        with contextlib.ExitStack() as stack:
            with reading():
                layer = stack.enter_context(source.layer(index))
            visitor.visit(index, layer)
            del layer
        visitor.leave(index)
