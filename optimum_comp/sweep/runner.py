"""Running a model's decoder layers one at a time, and looking at what goes in and out of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.checkpoint.source import HALF_PRECISION, ModelSource, in_dtype
from optimum_comp.families import Slot
from optimum_comp.sweep.states import ActivationStore, rows_of


_LOGITS = 2**24
"""That are worked out at a time: with a vocabulary of 262 144, those of 512 positions would take 0.5 GB."""


def positions_of_gradients(hidden: int, vocabulary: int) -> int:
    """Positions of a sample whose logits may be there several times over, for gradients.

    The head is read once for each such part, and with few positions that is all the time that it takes. What there is
    of so many, five times their logits at most, takes about as much memory as the head does.

    Args:
        hidden: hidden size.
        vocabulary: its size.
    """
    return max(1, _LOGITS // 8 // vocabulary, hidden // 6)


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


def _widened(value: Any) -> Any:
    """The same with all tensors of half precision in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_PRECISION else value
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return value


class Tap(nn.Module):
    """Stands in for a dense layer: keeps its inputs and returns its bias alone.

    In a decoder layer that adds the dense layer's output to its residual stream, what comes out is then the residual
    stream itself, and the dense layer's own product isn't computed in vain.

    Args:
        slot: the dense layer.
        layer: the decoder layer.
        with_bias: return nothing at all if not.
        stops: the decoder layer ends there (see `LayerRunner.inputs_of`).
    """

    def __init__(self, slot: Slot, layer: nn.Module, *, with_bias: bool = True, stops: bool = False):
        super().__init__()
        weight, bias = slot.matrix(layer), getattr(slot.module(layer), "bias", None)
        self.empty = weight.new_zeros(weight.shape[0]) if bias is None or not with_bias else bias.detach()
        self.inputs: Tensor | None = None
        self._stops = stops

    def forward(self, inputs: Tensor) -> Tensor:
        self.inputs = inputs
        if self._stops:
            raise _StopForward
        # Not a view: a family may add to it in place.
        return self.empty.to(inputs).expand(*inputs.shape[:-1], -1).clone()


class LayerRunner:
    """Calls decoder layers one by one with the very arguments that the model itself gives them.

    The arguments (masks, rotary embeddings, positions) are recorded for each layer during one pass of one sample
    through the model's own code, in which only the first layer computes; they are broadcast over a batch. So no
    version of transformers is imitated here, and no other layer's weights have to be there.

    Args:
        source: the dense model.
        example: one sample, `[1, length]`; all later batches have this length.
        matmul_dtype: of the factors of matrix products (see `find_matmul_dtype`); sums and all else are in the dtype
            that the source computes in.

    Attributes:
        source: the dense model.
        matmul_dtype: of factors of matrix products.
        seconds_per_layer: wall time of the first layer on that sample.
    """

    def __init__(self, source: ModelSource, example: Tensor, matmul_dtype: torch.dtype):
        self.source = source
        self.matmul_dtype = matmul_dtype
        self._model = source.model
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._is_tuple = False
        self.seconds_per_layer = 0.0
        with source.outside(), source.layer(0):
            self._record(example)

    def _record(self, example: Tensor) -> None:
        first_layer, last = self.source.layers[0], len(self.source.layers) - 1
        compute = first_layer.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], args)
            named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            number = len(self._arguments)
            self._arguments.append((args, named))
            if number == 0:
                with self.products():
                    # What is only done once, and would be taken for the layer's own time, is done at first.
                    compute(hidden, *args, **named)
                    started = time.perf_counter()
                    output = compute(hidden, *args, **named)
                self.seconds_per_layer = time.perf_counter() - started
                self._is_tuple = isinstance(output, tuple)
            if number == last:
                raise _StopForward
            return (hidden,) if self._is_tuple else hidden

        with self._standing_in([record] * (last + 1)), contextlib.suppress(_StopForward):
            self._model.base_model(input_ids=example, use_cache=False)
        if len(self._arguments) != last + 1:
            raise RuntimeError(f"the model called {len(self._arguments)} of its {last + 1} decoder layers.")

    @contextlib.contextmanager
    def _standing_in(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        """Other functions in place of the decoder layers' `forward`; their other attributes stay readable."""
        layers = list(self.source.layers)
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the first decoder layer, `[batch, length, hidden]`.

        To be called inside `source.outside()`.
        """
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _StopForward

        # Told that all tokens are there, transformers 4 doesn't look for several texts in a sample, which takes longer
        # than a small model's layers do.
        with self._standing_in([stop] * len(self._arguments)), contextlib.suppress(_StopForward):
            self._model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return found[0]

    def embed_all(self, batches: Sequence[Tensor], states: ActivationStore) -> None:
        """Fill a store with the hidden states that enter the first decoder layer.

        Args:
            batches: the store's samples in order, each `[batch, length]`.
            states: where they go.
        """
        with self.source.outside():
            for rows, batch in zip(rows_of(batches), batches, strict=True):
                states.write(rows, self.embed(batch.to(self.source.device)))

    @property
    def positions_at_a_time(self) -> int:
        """Of a sample, whose logits together don't take much memory."""
        return max(1, _LOGITS // self._model.config.vocab_size)

    @property
    def positions_of_gradients(self) -> int:
        """Of a sample, whose logits may be there several times over; see `positions_of_gradients`."""
        config = self._model.config
        return positions_of_gradients(config.hidden_size, config.vocab_size)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of hidden states `[batch, length, hidden]` that leave its last decoder layer.

        To be called inside `source.outside(head=True)`.

        Args:
            tokens: the samples, `[batch, length]`.
            hidden: their hidden states.

        Returns:
            `[batch, length, vocabulary]`.
        """

        def give(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._is_tuple else hidden

        with self._standing_in([give] * len(self._arguments)):
            return self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products meanwhile have factors of `matmul_dtype`, and so may their results."""
        differs = self.matmul_dtype != self.source.compute_dtype
        rounded = self.matmul_dtype if differs else None
        # Not cached: each weight is used once, and all of a layer's would add half its size to the peak.
        return torch.autocast(self.source.device.type, rounded, enabled=differs, cache_enabled=False)

    def run(self, index: int, hidden: Tensor, *, exact: bool = False) -> Tensor:
        """Output of decoder layer `index` for hidden states `[batch, length, hidden]`.

        To be called inside `source.layer(index)`.

        Args:
            index: the layer.
            hidden: what goes in.
            exact: with products in the dtype of all else.
        """
        args, kwargs = self._arguments[index]
        rows = self.source.family.repeated
        # One sample's are broadcast over a batch, but for those with a row for every sample's head.
        several = {
            name: kwargs[name].repeat(len(hidden), *[1] * (kwargs[name].dim() - 1))
            for name in rows
            if kwargs.get(name) is not None
        }
        with contextlib.nullcontext() if exact else self.products():
            return first(self.source.layers[index](hidden, *args, **{**kwargs, **several})).to(hidden.dtype)

    @contextlib.contextmanager
    def widened(self, index: int) -> Iterator[torch.dtype]:
        """Decoder layer `index` computes in float32 meanwhile, if it computes in half precision otherwise.

        To be called inside `source.layer(index)`; for what is measured to tell a difference from rounding.

        Yields:
            The dtype that its hidden states are to have.
        """
        if self.source.compute_dtype not in HALF_PRECISION:
            yield self.source.compute_dtype
            return
        layer, recorded = self.source.layers[index], self._arguments[index]
        narrow = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.dtype in HALF_PRECISION]
        args, kwargs = recorded
        self._arguments[index] = _widened(args), _widened(kwargs)
        try:
            with in_dtype(narrow, torch.float32):
                yield torch.float32
        finally:
            self._arguments[index] = recorded

    def inputs_of(self, index: int, slot: Slot, hidden: Tensor) -> Tensor:
        """What a dense layer of decoder layer `index` reads, `[batch, length, d_in]`; nothing behind it is run.

        To be called inside `source.layer(index)`.

        Args:
            index: the layer.
            slot: the dense layer.
            hidden: what goes into the decoder layer.

        Raises:
            RuntimeError: the decoder layer never called it.
        """
        layer = self.source.layers[index]
        tap = Tap(slot, layer, stops=True)
        with replaced(layer, slot.path, tap), contextlib.suppress(_StopForward):
            self.run(index, hidden)
        if tap.inputs is None:
            raise RuntimeError(f"layer {index} never called its {slot.path}.")
        return tap.inputs.to(hidden.dtype)

    def run_and_watch(self, index: int, slot: Slot, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output of decoder layer `index`, and of one of its dense layers without the bias.

        To be called inside `source.layer(index)`.

        Args:
            index: the layer.
            slot: the dense layer.
            hidden: what goes into the decoder layer, `[batch, length, hidden]`.
        """
        seen: list[Tensor] = []
        module = slot.module(self.source.layers[index])
        hook = module.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
        try:
            behind = self.run(index, hidden)
        finally:
            hook.remove()
        output, bias = seen[0].to(hidden.dtype), getattr(module, "bias", None)
        return behind, output if bias is None else output - bias
