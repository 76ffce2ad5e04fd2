"""A cache that stays in its place: memory with room for tokens to come, which a graph reads and writes as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_comp.onnx.cache import PAST, cache_shapes, present_of
from optimum_comp.onnx.graph import ATTENTION, read_without_weights
from optimum_comp.onnx.logits import KEPT, POSITIONS, keeps_asked_logits


_ROOM = 256
"""Tokens: a cache has room for a multiple of that."""

_FLOAT, _INTEGER = "tensor(float)", "tensor(int64)"
_TOKENS = {"input_ids", "attention_mask", POSITIONS}


class InPlace:
    """A decoder's graph on the CPU, with what its cache needs to stay in its place.

    Args:
        session: of the graph.
        path: where it is.

    Attributes:
        session: as given.
        shapes: name of each past -> its heads and width; nothing if this graph's cache can't stay in its place.
    """

    def __init__(self, session: Any, path: Path):
        self.session = session
        inputs = {each.name: each for each in session.get_inputs()}
        outputs = {each.name: each for each in session.get_outputs()}
        pasts = [name for name in inputs if name.startswith(PAST)]
        self._tokens = [name for name in inputs if name not in pasts]
        self._keeps_asked = POSITIONS in inputs and keeps_asked_logits(inputs[POSITIONS].shape)
        presents = [present_of(name) for name in pasts]
        self.shapes: dict[str, tuple[int, int]] = {}
        if (
            not pasts
            or not {"input_ids", "attention_mask"} <= set(self._tokens) <= _TOKENS
            or {*outputs} != {"logits", *presents}
            or any(inputs[name].type != _INTEGER for name in self._tokens)
            or any(each.type != _FLOAT for each in (*outputs.values(), *(inputs[name] for name in pasts)))
        ):
            return
        rows, length, self._vocabulary = outputs["logits"].shape
        asked, there = inputs["input_ids"].shape
        # Logits of every token, or of as many as are asked for.
        is_right = [rows, length] == [asked, KEPT if self._keeps_asked else there]
        if is_right and isinstance(self._vocabulary, int):
            self.shapes = shapes_in_place(path)

    @classmethod
    def of(cls, session: Any, path: Path) -> InPlace | None:
        """The same, if this graph's cache can stay in its place."""
        found = cls(session, path)
        return found if found.shapes else None

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: Kept | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> tuple[Tensor, Kept]:
        """Logits of tokens that follow those in a cache, and the cache with them.

        Args:
            input_ids: `[sequences, tokens]`.
            attention_mask: `[sequences, tokens and what is in the cache]`.
            past: of an earlier run; nothing is in the cache if `None`. Whoever goes on from one that something else
                went on from already gets a copy.
            position_ids: `[sequences, tokens]`, for a graph that reads them; counted if `None`.
            logits_to_keep: how many of the last tokens get logits, or which; 0 for all.

        Returns:
            Logits `[sequences, as many as asked, vocabulary]`, float32.
        """
        rows, length = input_ids.shape
        start = 0 if past is None else past.length
        end = start + length
        if past is None:
            room = Room(self, rows, end)
        else:
            room = past.room
            if room.filled != start or room.capacity < end:
                room = room.copy(start, end)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        asked = logits_to_keep if self._keeps_asked and isinstance(logits_to_keep, int) else 0
        count = min(asked, length) if asked > 0 else length
        if self._keeps_asked:
            # Only how many there are is looked at.
            given[POSITIONS] = torch.zeros(rows, count, dtype=torch.int64)
        elif POSITIONS in self._tokens:
            counted = torch.arange(start, end).expand(rows, -1)
            given[POSITIONS] = counted if position_ids is None else position_ids
        logits = torch.empty(rows, count, self._vocabulary)
        room.run({name: given[name] for name in self._tokens}, logits)
        room.filled = end
        return kept(logits, logits_to_keep), Kept.of(room)


class Room:
    """Memory for a cache, bound to a session as what it reads and what it writes.

    Args:
        graph: whose cache.
        sequences: of a batch.
        tokens: that there has to be room for.

    Attributes:
        capacity: tokens that there is room for.
        filled: tokens that are in it.
        tensors: `[sequences, heads, capacity, width]` in the order of the names.
    """

    def __init__(self, graph: InPlace, sequences: int, tokens: int):
        self._graph = graph
        self._binding = graph.session.io_binding()
        self.capacity, self.filled = -(-(tokens + 1) // _ROOM) * _ROOM, 0
        self.tensors = []
        for past, (heads, width) in graph.shapes.items():
            # Zeros, since what is masked is multiplied by 0, and what was in memory before may be NaN.
            self.tensors.append(torch.zeros(sequences, heads, self.capacity, width))
            self._bind(self._binding.bind_input, past, self.tensors[-1])
            self._bind(self._binding.bind_output, present_of(past), self.tensors[-1])

    def copy(self, count: int, tokens: int) -> Room:
        """Another with the first tokens of this one, and room for twice as many as before if they are too many."""
        sequences = len(self.tensors[0])
        wanted = tokens if tokens < self.capacity else max(tokens, 2 * self.capacity - 1)
        other = Room(self._graph, sequences, wanted)
        for mine, its in zip(self.tensors, other.tensors, strict=True):
            its[:, :, :count] = mine[:, :, :count]
        return other

    def run(self, given: dict[str, Tensor], logits: Tensor) -> None:
        """Fill the logits, and add the tokens' keys and values to the cache.

        Args:
            given: what the graph takes beside the cache.
            logits: `[sequences, as many as it makes, vocabulary]`.
        """
        # Held until the session has run.
        inputs = {name: tensor.to(torch.int64).contiguous() for name, tensor in given.items()}
        for name, tensor in inputs.items():
            self._bind(self._binding.bind_input, name, tensor)
        self._bind(self._binding.bind_output, "logits", logits)
        self._graph.session.run_with_iobinding(self._binding)

    @staticmethod
    def _bind(bind: Any, name: str, tensor: Tensor) -> None:
        kind = np.int64 if tensor.dtype == torch.int64 else np.float32
        bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())


class Kept(tuple):
    """`past_key_values` as everywhere, two tensors a layer, which knows where they are views of.

    Attributes:
        room: where.
        length: tokens that are in it.
    """

    room: Room
    length: int

    @classmethod
    def of(cls, room: Room) -> Kept:
        """What is in it now."""
        views = [tensor.narrow(2, 0, room.filled) for tensor in room.tensors]
        found = cls(zip(views[::2], views[1::2], strict=True))
        found.room, found.length = room, room.filled
        return found

    def __reduce__(self) -> Any:
        # What is copied or stored is tensors like any others: a session can't be.
        return tuple, (tuple(self),)


def kept(logits: Tensor, count: int | Tensor) -> Tensor:
    """Logits of the last tokens, or of those of some indices; all of them where there are no more."""
    return logits[:, -count:] if isinstance(count, int) else logits[:, count]


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
