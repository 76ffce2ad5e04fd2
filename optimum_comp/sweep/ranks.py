"""Several processes that prune one model together, on `torch.distributed`.

Started by `torchrun` or `accelerate launch`, each process takes a share of the calibration samples; moments are summed
over all, the first process decides and repairs, and the others take over what it found.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist


T = TypeVar("T")

_PATIENCE = timedelta(hours=4)
"""The others wait while the first checks the weights, writes calibration text or solves for a wide layer."""


def is_first_process() -> bool:
    """What `Ranks.is_first` will be, for what has to be known before the processes meet."""
    return not _is_launched() or os.environ["RANK"] == "0"


def _is_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


_NUMBERS = itertools.count()


@functools.cache
def _board() -> dist.Store:
    """Where processes leave word for each other; has to be there as long as one may come to read."""
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("optimum-comp", store)


def first_says(value: T) -> T:
    """The first process's value, as JSON has it, before the processes meet.

    How they do depends on the device, which the first one may have to tell.
    """
    if not _is_launched():
        return value
    number = str(next(_NUMBERS))
    if is_first_process():
        _board().set(number, json.dumps(value))
    found: T = json.loads(_board().get(number))
    return found


class Ranks:
    """This process among those that work together; one alone needs no `torch.distributed`.

    Args:
        device: a CUDA device uses NCCL, any other gloo. An initialised process group is used as it is.
    """

    def __init__(self, device: torch.device | None = None):
        if _is_launched() and not dist.is_initialized():
            backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._device = device if together and dist.get_backend() == "nccl" else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process decides, writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> int:
        """How many of `count` things are this process's, so that all are somebody's."""
        return count // self.size + (self.rank < count % self.size)

    def require(self, samples: int) -> None:
        """Refuse to share what is too little.

        Raises:
            ValueError: there are fewer samples than processes.
        """
        if samples < self.size:
            raise ValueError(
                f"{samples} calibration samples can't be shared by {self.size} processes; take more samples or fewer "
                "processes."
            )

    def batches(self, tokens: Tensor, batch_size: int) -> list[Tensor]:
        """This process's share of the batches that a single one would form of all samples `[samples, length]`.

        So sums agree closely, however many processes there are.
        """
        # Smaller batches rather than a process with nothing to do.
        batches = list(tokens.split(min(batch_size, tokens.shape[0] // self.size)))
        start = self.rank * (len(batches) // self.size) + min(self.rank, len(batches) % self.size)
        return batches[start : start + self.share(len(batches))]

    def sum_(self, *tensors: Tensor | None) -> None:
        """Replace each tensor by its sum over all processes."""
        self._reduce(dist.ReduceOp.SUM, tensors)

    def max_(self, *tensors: Tensor | None) -> None:
        """Replace each tensor by its largest values over all processes."""
        self._reduce(dist.ReduceOp.MAX, tensors)

    def _reduce(self, operation: Any, tensors: Sequence[Tensor | None]) -> None:
        if self.size == 1:
            return
        for tensor in tensors:
            if tensor is not None:
                there = tensor.to(self._device).contiguous()
                dist.all_reduce(there, operation)
                if there is not tensor:
                    tensor.copy_(there)

    def from_first(self, value: T) -> T:
        """The first process's value, tensors in it included."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
