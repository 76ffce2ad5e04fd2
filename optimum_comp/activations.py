"""Running a model's decoder layers one at a time, and looking at what goes in and out of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class _StopForward(Exception):  # noqa: N818 - control flow, never an error that a user sees
    pass


def first(output: Any) -> Tensor:
    """The hidden states of a decoder layer's output, which is a tensor or a tuple, by transformers version."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def replaced(root: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Put another module at `path` below `root` for a while."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    original = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, original)


class Tap(nn.Module):
    """Stands in for a dense layer: keeps its inputs and returns zeros.

    In a decoder layer that adds the dense layer's output to its residual stream, what comes out is then the residual
    stream itself, and the dense layer's own product isn't computed in vain.
    """

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.inputs: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return inputs.new_zeros(*inputs.shape[:-1], self.out_features)


class LayerRunner:
    """Calls decoder layers with the very arguments that the model itself gives them.

    The arguments (masks, rotary embeddings, positions) are recorded layer by layer during one forward pass over one
    sample and broadcast over the batch, so no version of transformers is imitated here.

    Args:
        model: a causal language model in evaluation mode.
        layers: its decoder layers.
        example: one sample, `[1, length]`; all later batches have this length.

    Attributes:
        seconds_per_sample: wall time of that forward pass.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, example: Tensor):
        self._model = model
        self._layers = layers
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self._arguments.append((args[1:], named))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        started = time.perf_counter()
        try:
            model(input_ids=example, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.seconds_per_sample = time.perf_counter() - started

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the first decoder layer, `[batch, length, hidden]`."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _StopForward

        hook = self._layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(input_ids=tokens, use_cache=False)
        except _StopForward:
            return found[0]
        finally:
            hook.remove()
        raise RuntimeError("the model never called its first decoder layer.")

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output of decoder layer `index` of the dense model for hidden states `[batch, length, hidden]`."""
        args, kwargs = self._arguments[index]
        return first(self._layers[index](hidden, *args, **kwargs))

    def run_all(self, indices: range, hidden: Tensor) -> Tensor:
        """Output of several decoder layers in a row; `hidden` itself if there are none."""
        for index in indices:
            hidden = self.run(index, hidden)
        return hidden
