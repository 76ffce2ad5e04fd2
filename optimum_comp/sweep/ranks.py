"""Several processes that prune one model together, brought together by accelerate.

Started by `torchrun` or `accelerate launch`, each process takes a share of the calibration samples; moments are summed
over all, the first process decides and repairs, and the others take over what it found.
"""

from __future__ import annotations

import atexit
import functools
import io
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


def place_on_machine() -> tuple[int, int]:
    """This process's number among those that work together on this machine, and how many those are."""
    if not _is_launched():
        return 0, 1
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return number, max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), number + 1)


def device_of(given: str | torch.device | None, local_rank: int, local_size: int, devices: int) -> torch.device:
    """Where one of the processes on a machine computes: of several, each on a GPU of its own.

    Args:
        given: a device or its name, the same for all processes or of this one; the processor for `None`.
        local_rank: number of the process among those on its machine.
        local_size: how many those are.
        devices: CUDA devices that each of them sees.

    Raises:
        ValueError: there is no such device, or two processes would share a GPU.
    """
    try:
        device = torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={given!r} is not valid: give cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return device
    said = f"device={str(given)!r}"
    if device.type != "cuda":
        raise ValueError(f"{said} is not valid: layers run on cpu or cuda.")
    if devices == 0:
        raise ValueError(f"{said}: torch sees no CUDA device here; leave --device away to use the CPU.")
    if (device.index or 0) >= devices:
        raise ValueError(f"{said}: there are {devices} CUDA devices here.")
    if local_size == 1:
        return device
    if local_size > devices:
        raise ValueError(
            f"{said}: {local_size} processes on this machine need as many CUDA devices, and there are {devices} here; "
            "start fewer processes."
        )
    if device.index not in (None, local_rank):
        raise ValueError(
            f"{said}: {local_size} processes run on this machine, and number {local_rank} takes cuda:{local_rank}; "
            "give cuda, so that each has a GPU of its own."
        )
    return torch.device("cuda", local_rank)


def _has_met() -> bool:
    return dist.is_available() and dist.is_initialized()


def _part() -> None:
    if _has_met():
        dist.destroy_process_group()


def _meet(device: torch.device) -> None:
    """Make the process group of all that were started, by what this one computes on.

    Raises:
        ValueError: accelerate was told before that this process is alone.
    """
    from accelerate import PartialState

    # There is one in a process, whose first maker says how.
    state = PartialState(cpu=device.type != "cuda", timeout=_PATIENCE)
    if not _has_met():
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, and accelerate sees {state.num_processes}: start "
            "them with torchrun or accelerate launch, and make no PartialState or Accelerator without the others."
        )
    # A process that ends with gloo's threads still running is aborted now and then, its work done or not.
    atexit.register(_part)


class Ranks:
    """This process among those that work together; one alone needs neither accelerate nor `torch.distributed`.

    The collectives are torch's own: accelerate's know no process group but their own, and sum into a copy, of which a
    large Gram matrix leaves no room.

    Args:
        device: where this process computes. The first one asked for says how processes talk: over NCCL from CUDA
            devices, over gloo from any other. An initialised process group is used as it is.

    Raises:
        ValueError: accelerate was told before that this process is alone, though it was started as one of several.
    """

    def __init__(self, device: torch.device | None = None):
        own = device or torch.device("cpu")
        if _is_launched() and not _has_met():
            _meet(own)
        self.rank = dist.get_rank() if _has_met() else 0
        self.size = dist.get_world_size() if _has_met() else 1
        # What is said goes through memory of this device.
        self._device = torch.device("cpu")
        if self.size > 1 and dist.get_backend() == "nccl":
            self._device = own if own.type == "cuda" else torch.device("cuda", torch.cuda.current_device())

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
        """The first process's value; tensors in it come to the others' main memory, wherever the first has them."""
        if self.size == 1:
            return value
        # Pickled as it is, a tensor would come to the GPU that the first process computes on.
        packed = io.BytesIO()
        if self.is_first:
            torch.save(value, packed)
        box = [packed.getvalue()]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return value if self.is_first else torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=False)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
