"""Runs a chain in this process and has it fail in the middle of a step: `python breaking.py JOB`.

`JOB` is JSON: `recipe` (a recipe's data), `output`, `bundle` (or null), `step` (a name in `PLACES`) and `kind` (a name
in `FAILURES`). What fails is real work of the step: the failure comes where a step has made half of what it makes.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys


def _raise() -> None:
    raise AssertionError("injected")


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill_disk() -> None:
    # Every write from here on fails with an OSError, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _run_out_of_memory() -> None:
    import torch

    taken = 4096 * int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**24, resource.RLIM_INFINITY))
    torch.ones(2**28)


FAILURES = {
    "exception": _raise,
    "ctrl-c": _interrupt,
    "kill": _kill,
    "disk": _fill_disk,
    "memory": _run_out_of_memory,
}

PLACES = {
    # Module, function or Class.method, and which of its calls fails.
    "samples": ("optimum_comp.stages.chain", "save_file", 1),
    "prune": ("optimum_comp.sweep.pruning", "PruningRun._record", 3),
    "export": ("optimum_comp.onnx.export", "run_torch", 1),
    "quantize": ("optimum_comp.onnx.quantization", "_check_and_tidy", 1),
    "measure": ("optimum_comp.stages.chain", "evaluate_apart", 2),
    "bundle": ("optimum_comp.bundle.assembly", "_write_manifest", 1),
}


def break_at(step: str, kind: str) -> None:
    """Have a step fail."""
    module, name, number = PLACES[step]
    holder = importlib.import_module(module)
    *owners, name = name.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    work, calls = getattr(holder, name), []

    def broken(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            FAILURES[kind]()
        return work(*args, **kwargs)

    setattr(holder, name, broken)


def main() -> None:
    # A shell that runs the tests in the background has its children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from optimum_comp.compress import run
    from optimum_comp.stages.recipe import Recipe

    job = json.loads(sys.argv[1])
    break_at(job["step"], job["kind"])
    run(Recipe.from_dict(job["recipe"]), job["output"], bundle=job["bundle"])


if __name__ == "__main__":
    main()
