"""Weights written piece by piece, and pieces joined to the shards of a plain checkpoint without loading them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from optimum_comp.checkpoint.reader import INDEX, open_weights
from optimum_comp.files import durably


_PATTERN = "model{suffix}.safetensors"
_METADATA = {"format": "pt"}
_COPY_BYTES = 2**22


@dataclass(frozen=True)
class _Range:
    """A tensor's bytes in a safetensors file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    size: int


def write_part(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is on disk whole, or not there under its name.

    Raises:
        OSError: it can't be written (the disk is full, ...).
    """
    with durably(path) as partial:
        try:
            save_file(tensors, partial, metadata=_METADATA)
        except SafetensorError as error:
            raise OSError(f"{path.name} can't be written: {error}") from error


def join_parts(parts: Sequence[Path], folder: Path, max_shard_size: int | str) -> None:
    """Copy the tensors of several safetensors files into the shards (and index) that transformers reads.

    Bytes are copied from file to file, so no tensor is ever in memory; safetensors' own writer would need a whole
    shard of them.

    Args:
        parts: safetensors files; of tensors of one name, the last file's is taken.
        folder: where the shards go.
        max_shard_size: bytes, or as text (`"5GB"`).
    """
    ranges: dict[str, _Range] = {}
    for part in parts:
        ranges |= _ranges(part)
    # What the sharding sees are our ranges, not tensors; none shares storage with another.
    plan = split_state_dict_into_shards_factory(
        ranges,
        get_storage_size=lambda item: item.size,
        get_storage_id=lambda item: None,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    for name, tensors in plan.filename_to_tensors.items():
        _write_shard({tensor: ranges[tensor] for tensor in tensors}, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        with durably(folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ranges(file: Path) -> dict[str, _Range]:
    # safetensors doesn't say where in the file a tensor is, but checks what the header says of it.
    with open_weights(file), file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Range(file, item["dtype"], item["shape"], 8 + length + begin, end - begin)
        for name, item in header.items()
        for begin, end in [item["data_offsets"]]
    }


def _write_shard(ranges: dict[str, _Range], path: Path) -> None:
    # Wide types first, as safetensors itself has it: then every tensor is aligned.
    order = sorted(ranges, key=lambda name: (-_width(ranges[name]), name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for name in order:
        item = ranges[name]
        header[name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [offset, offset + item.size]}
        offset += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with durably(path) as partial, partial.open("wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _copy(ranges[name], output)


def _width(item: _Range) -> int:
    count = math.prod(item.shape)
    return item.size // count if count else 0


def _copy(item: _Range, output: BinaryIO) -> None:
    with item.file.open("rb") as stream:
        stream.seek(item.start)
        left = item.size
        while left:
            block = stream.read(min(left, _COPY_BYTES))
            if not block:
                raise OSError(f"{item.file.name} ended early.")
            output.write(block)
            left -= len(block)
