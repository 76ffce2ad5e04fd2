"""The loop over decoder layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from optimum_comp.checkpoint.source import ModelSource
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.states import ActivationStore
from optimum_comp.sweep.stopwatch import Stopwatch


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


class _Reader:
    """Takes a few samples' hidden states, which stay in memory, through dense layers."""

    def __init__(self, runner: LayerRunner, states: list[Tensor]):
        self.states = states
        self._runner = runner

    def visit(self, index: int, layer: nn.Module) -> None:
        self.states = [self._runner.run(index, each) for each in self.states]

    def leave(self, index: int) -> None:
        """Nothing is left to do."""


def read_through(
    source: ModelSource, samples: Sequence[Tensor], indices: Iterable[int] | None = None
) -> tuple[LayerRunner, list[Tensor]]:
    """Have a dense model read a few samples, each layer being at hand once for all of them.

    In the dtype that the source computes in, so that no processor finds otherwise than another.

    Args:
        source: the model.
        samples: of one length, `[batch, length]` each.
        indices: of all its layers in order, for somebody who shows how far it is.

    Returns:
        What makes logits of hidden states, and the states behind the last layer, `[batch, length, hidden]` each.
    """
    runner = LayerRunner(source, samples[0], source.compute_dtype)
    with source.outside():
        reader = _Reader(runner, [runner.embed(sample) for sample in samples])
    sweep(source, range(len(source.layers)) if indices is None else indices, reader)
    return runner, reader.states


class Through:
    """Takes hidden states through dense layers.

    Args:
        runner: runs them.
        rows: of the states, some samples at a time.
        states: that go through.
        clock: of the time that it takes.
    """

    def __init__(self, runner: LayerRunner, rows: list[slice], states: ActivationStore, clock: Stopwatch):
        self._runner, self._rows, self._states, self._clock = runner, rows, states, clock

    def visit(self, index: int, layer: nn.Module) -> None:
        source = self._runner.source
        with self._clock("forward"):
            for rows in self._rows:
                hidden = self._states.read(rows, source.device, source.compute_dtype)
                self._states.write(rows, self._runner.run(index, hidden))

    def leave(self, index: int) -> None:
        """Nothing is left to do."""
