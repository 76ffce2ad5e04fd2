"""Activations of all calibration samples between two layers: in memory, or in a file that is mapped into it."""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from optimum_comp.files import durably


_COPY_BYTES = 2**24
_CHECKSUM = struct.Struct("<I")


def rows_of(batches: Sequence[Tensor]) -> list[slice]:
    """Which samples of the whole each of several consecutive batches `[batch, length]` holds."""
    ends = [0, *accumulate(len(batch) for batch in batches)]
    return [slice(start, end) for start, end in pairwise(ends)]


class ActivationStore:
    """A tensor `[samples, length, channels]` that is read and written a few samples at a time.

    In memory, what is read is a view where the dtype is the stored one. In a file, it is a copy, and the file's pages
    are let go of after each access, so that they don't count as this process's memory.

    Args:
        samples: calibration samples.
        length: tokens of each.
        channels: values of each token.
        dtype: in which they are kept.
        file: where they are kept; `None` for memory. Made here, its space on the disk reserved; removed by `close`.

    Raises:
        OSError: there isn't enough space for the file.
    """

    def __init__(self, samples: int, length: int, channels: int, dtype: torch.dtype, file: Path | None = None):
        self.shape = (samples, length, channels)
        self.dtype = dtype
        self.num_bytes = samples * length * channels * dtype.itemsize
        self._row = length * channels * dtype.itemsize
        self._file = file
        self._map: mmap.mmap | None = None
        if file is None or self.num_bytes == 0:
            self._values = torch.zeros(self.shape, dtype=dtype)
            return
        with file.open("wb+") as stream:
            if hasattr(os, "posix_fallocate"):
                # Without it, a disk that fills up would kill the process in the middle of a memory access.
                os.posix_fallocate(stream.fileno(), 0, self.num_bytes)
            else:
                stream.truncate(self.num_bytes)
            self._map = mmap.mmap(stream.fileno(), self.num_bytes)
        self._values = torch.frombuffer(self._map, dtype=dtype).view(self.shape)

    def read(self, rows: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Some samples' activations `[rows, length, channels]`, where and in the dtype that is asked for."""
        values = self._values[rows].to(device, dtype, copy=self._map is not None)
        self._release(rows)
        return values

    def write(self, rows: slice, values: Tensor) -> None:
        """Replace some samples' activations by `[rows, length, channels]` (or `[rows * length, channels]`)."""
        part = self._values[rows]
        part.copy_(values.view(part.shape))
        self._release(rows)

    def _release(self, rows: slice) -> None:
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        start = rows.start * self._row // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(rows.stop * self._row, self.num_bytes)
        # The mapping is shared: pages that were written stay in the system's cache on their way to the disk.
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def copy(self) -> ActivationStore:
        """The same in memory of its own."""
        other = ActivationStore(*self.shape, self.dtype)
        other.write(slice(None), self._values)
        return other

    def save(self, path: Path) -> None:
        """Write a copy that survives a power cut, and a checksum behind it."""
        with durably(path) as partial, partial.open("wb") as stream:
            found = 0
            for block in self._blocks():
                stream.write(block)
                found = zlib.crc32(block, found)
            stream.write(_CHECKSUM.pack(found))

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: it was made for other samples, or has been changed.
            OSError: it isn't there.
        """
        size, wanted = path.stat().st_size, self.num_bytes + _CHECKSUM.size
        if size != wanted:
            raise ValueError(f"it holds {size} bytes where {wanted} are wanted")
        with path.open("rb") as stream:
            found = 0
            for block in self._blocks():
                stream.readinto(block)
                found = zlib.crc32(block, found)
            if stream.read() != _CHECKSUM.pack(found):
                raise ValueError("its checksum is wrong")

    def _blocks(self) -> Iterator[memoryview]:
        """All bytes, a piece at a time; none is used after the next one is asked for."""
        flat = self._values.view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _COPY_BYTES):
            yield flat[start : start + _COPY_BYTES].numpy().data
            self._release(slice(start // self._row, -(-(start + _COPY_BYTES) // self._row)))

    def close(self) -> None:
        """Let go of memory and file."""
        self._values = torch.empty(0, dtype=self.dtype)
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file is not None:
            self._file.unlink(missing_ok=True)
