"""Optimum's class for causal language models, with a cache that stays in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_comp.onnx.cache import cache_shapes
from optimum_comp.onnx.graph import ATTENTION, read_without_weights


try:
    from optimum.onnxruntime import ORTModelForCausalLM as OptimumModel
except ImportError as error:
    raise ImportError(
        "ORTModelForCausalLM is Optimum's, which needs ONNX Runtime and transformers below 4.58: "
        f"pip install 'optimum-comp[onnxruntime]'. {error}"
    ) from error


_ROOM = 256
"""Tokens: a cache has room for a multiple of that."""

_FLOAT, _INTEGER = "tensor(float)", "tensor(int64)"
_TOKENS = {"input_ids", "attention_mask", "position_ids"}


class ORTModelForCausalLM(OptimumModel):
    """`optimum.onnxruntime.ORTModelForCausalLM`, faster where attention is one operator that can add to a cache.

    There the cache has room for tokens to come, and the graph reads and writes it in place: for each token, nothing of
    it is copied, converted or bound anew. `past_key_values` are views of it; one from before stays as it was, and
    whoever goes on from it gets a copy. All else is Optimum's: other graphs, beams, a cache of one's own, GPUs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tokens = [name for name in self.input_names if name not in self.key_value_input_names]
        # Name of the past -> heads and width.
        self._shapes = shapes_in_place(self.path) if self._may_stay() else {}

    def _may_stay(self) -> bool:
        """Whether all that is bound here is of a kind that this class binds."""
        caches = [*self.key_value_input_names, *self.key_value_output_names]
        kinds = {**self.input_dtypes, **self.output_dtypes}
        return (
            self.can_use_cache
            and self.provider == "CPUExecutionProvider"
            and not self.use_io_binding
            and set(self._tokens) <= _TOKENS
            and {*self.output_names} == {"logits", *self.key_value_output_names}
            and isinstance(self.output_shapes["logits"][-1], int)
            # Logits of every token, not of the last alone.
            and self.output_shapes["logits"][:2] == self.input_shapes["input_ids"]
            and all(kinds[name] == _INTEGER for name in self._tokens)
            and all(kinds[name] == _FLOAT for name in ("logits", *caches))
        )

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See Optimum's class."""
        start = past_key_values.length if isinstance(past_key_values, _Kept) else 0
        if (
            not self._shapes
            or not (self.config.use_cache if use_cache is None else use_cache)
            or not (past_key_values is None or isinstance(past_key_values, _Kept))
            or not isinstance(input_ids, Tensor)
            or not isinstance(attention_mask, Tensor)
            or attention_mask.shape != (len(input_ids), start + input_ids.shape[1])
        ):
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        end = start + input_ids.shape[1]
        if past_key_values is None:
            room = _Room(self, len(input_ids), end)
        else:
            room = past_key_values.room
            if room.filled != start or room.capacity < end:
                room = room.copy(start, end)
        if position_ids is None:
            position_ids = torch.arange(start, end).expand(len(input_ids), -1)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits = room.run({name: given[name] for name in self._tokens})
        room.filled = end
        return CausalLMOutputWithPast(logits=logits, past_key_values=_Kept.of(room))


class _Room:
    """Memory for a cache, bound to a session as what it reads and what it writes.

    Args:
        model: whose session and names.
        sequences: of a batch.
        tokens: that there has to be room for.

    Attributes:
        capacity: tokens that there is room for.
        filled: tokens that are in it.
        tensors: `[sequences, heads, capacity, width]` in the order of the names.
    """

    def __init__(self, model: ORTModelForCausalLM, sequences: int, tokens: int):
        self._model = model
        self._binding = model.session.io_binding()
        self.capacity, self.filled = -(-(tokens + 1) // _ROOM) * _ROOM, 0
        self.tensors = []
        names = zip(model.key_value_input_names, model.key_value_output_names, strict=True)
        for past, present in names:
            heads, width = model._shapes[past]
            # Zeros, since what is masked is multiplied by 0, and what was in memory before may be NaN.
            self.tensors.append(torch.zeros(sequences, heads, self.capacity, width))
            self._bind(self._binding.bind_input, past, self.tensors[-1])
            self._bind(self._binding.bind_output, present, self.tensors[-1])

    def copy(self, kept: int, tokens: int) -> _Room:
        """Another with the first tokens of this one, and room for twice as many as before if they are too many."""
        sequences = len(self.tensors[0])
        wanted = tokens if tokens < self.capacity else max(tokens, 2 * self.capacity - 1)
        other = _Room(self._model, sequences, wanted)
        for mine, its in zip(self.tensors, other.tensors, strict=True):
            its[:, :, :kept] = mine[:, :, :kept]
        return other

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Logits `[sequences, tokens, vocabulary]`; the cache has the tokens' keys and values then, too."""
        # Held until the session has run.
        inputs = {name: tensor.to(torch.int64).contiguous() for name, tensor in given.items()}
        for name, tensor in inputs.items():
            self._bind(self._binding.bind_input, name, tensor)
        logits = torch.empty(*inputs["input_ids"].shape, self._model.output_shapes["logits"][-1])
        self._bind(self._binding.bind_output, "logits", logits)
        self._model.session.run_with_iobinding(self._binding)
        return logits

    @staticmethod
    def _bind(bind: Any, name: str, tensor: Tensor) -> None:
        kind = np.int64 if tensor.dtype == torch.int64 else np.float32
        bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())


class _Kept(tuple):
    """`past_key_values` as everywhere, two tensors a layer, which knows where they are views of.

    Attributes:
        room: where.
        length: tokens that are in it.
    """

    room: _Room
    length: int

    @classmethod
    def of(cls, room: _Room) -> _Kept:
        """What is in it now."""
        views = [tensor[:, :, : room.filled] for tensor in room.tensors]
        kept = cls(zip(views[::2], views[1::2], strict=True))
        kept.room, kept.length = room, room.filled
        return kept

    def __reduce__(self) -> Any:
        # What is copied or stored is tensors like any others: a session can't be.
        return tuple, (tuple(self),)


def shapes_in_place(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each past -> its heads and width, if attention in one operator is all that reads any of them.

    That operator adds to a past in place where its memory is also that of what it becomes, and reads as much of it as
    the attention mask is long.

    Args:
        path: a graph.

    Returns:
        Nothing if it isn't so for all of them.
    """
    graph = read_without_weights(path)
    shapes = cache_shapes(graph)
    readers = [(name, node.op_type) for node in graph.node for name in node.input if name in shapes]
    right = sorted(readers) == sorted((name, ATTENTION) for name in shapes)
    return shapes if right and all(map(all, shapes.values())) else {}
