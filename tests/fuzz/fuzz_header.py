"""Headers of safetensors files, the index, names of files: a folder is read or refused in a few words."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from json_mutator import mutate_json

from optimum_comp.checkpoint.parts import _ranges
from optimum_comp.checkpoint.reader import INDEX, WEIGHTS, Checkpoint, require_safetensors, weight_files


SHARD = "model-00001-of-00002.safetensors"
HEADER = (
    b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}'
)
SECRET = b'{"secret":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
_LONGEST, _MOST_LINES = 1000, 4


def safetensors(header: bytes, values: bytes) -> bytes:
    """A file with a right length of its header."""
    return struct.pack("<Q", len(header)) + header + values


def write_file(folder: Path, data: bytes) -> None:
    """The bytes as the only file of weights."""
    (folder / WEIGHTS).write_bytes(data)


def write_header(folder: Path, data: bytes) -> None:
    """The bytes as its header; the first says how many bytes of values there are."""
    size = data[0] if data else 0
    write_file(folder, safetensors(data[1:], bytes(range(size))))


def write_index(folder: Path, data: bytes) -> None:
    """The bytes as an index beside a good shard, and with a good file outside of the folder."""
    (folder / INDEX).write_bytes(data)
    (folder / SHARD).write_bytes(safetensors(HEADER, bytes(26)))


def write_names(folder: Path, data: bytes) -> None:
    """The lines as names of empty files."""
    for name in data.decode(errors="replace").split("\n")[:8]:
        if name.strip(".") and not set(name) & {"/", "\0"} and len(name.encode()) < 200:
            (folder / name).touch()


LAYOUTS = (write_file, write_header, write_index, write_names)


PREFIXES = {1: 2, 2: 1}
"""Bytes in front of what is JSON, by layout."""


def mutate(data: bytes, most: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Change the JSON in an input, as `mutate_json` does, or its bytes."""
    prefix = PREFIXES.get(data[0] % len(LAYOUTS) if data else 0)
    if prefix is None or seed % 8 == 0:
        return mutate_bytes(data, most)
    return data[:prefix] + mutate_json(data[prefix:], most - prefix, seed, mutate_bytes)


def check(data: bytes, scratch: Path) -> bool:
    """Take bytes as a model's files. Nothing beside them is looked at.

    Returns:
        Whether they were read.
    """
    folder = scratch / "model"
    folder.mkdir()
    try:
        (scratch / "secret.safetensors").write_bytes(safetensors(SECRET, bytes(4)))
        LAYOUTS[data[0] % len(LAYOUTS) if data else 0](folder, data[1:])
        return [_is_read(look, folder) for look in (_require, _read, _ranges_are_right)] == [True] * 3
    finally:
        shutil.rmtree(folder)


def _is_read(look: Callable[[Path], None], folder: Path) -> bool:
    try:
        look(folder)
    except (ValueError, OSError) as error:
        _require_clear(str(error))
        return False
    return True


def _require(folder: Path) -> None:
    require_safetensors("model", folder)
    assert all(file.parent == folder for file in weight_files(folder))


def _read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert "secret" not in checkpoint.tensors
    for name, stored in checkpoint.tensors.items():
        assert stored.file.parent == folder
        value = checkpoint.read(name)
        assert (tuple(value.shape), value.dtype) == (stored.shape, stored.dtype)
    checkpoint.require_finite(checkpoint.tensors)


def _ranges_are_right(folder: Path) -> None:
    for file in weight_files(folder):
        found = _ranges(file)
        content = file.read_bytes()
        checkpoint = Checkpoint.open(folder)
        for name, stored in checkpoint.tensors.items():
            if stored.file == file:
                place = found[name]
                value = checkpoint.read(name).flatten().contiguous().view(torch.uint8).numpy().tobytes()
                assert content[place.start : place.start + place.size] == value


def _require_clear(message: str) -> None:
    assert len(message) <= _LONGEST, f"a message of {len(message)} characters: {message[:200]}"
    lines = message.split("\n")
    assert len(lines) <= _MOST_LINES, message
    assert all(line.isprintable() for line in lines), repr(message)
