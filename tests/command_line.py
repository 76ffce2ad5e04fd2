"""`optimum-cli comp` in processes that are forked off one that has imported what it needs.

Importing takes longer than most of what the tests have a command do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path


# Those that can't be imported, as some with transformers 5, are passed over. Nothing may be computed in that process:
# its threads wouldn't be there in what is forked off it.
IMPORTED = [
    "optimum_comp.compress",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "onnxruntime.quantization",
    "optimum.exporters.onnx.convert",
    "optimum.onnxruntime.modeling_decoder",
    "optimum.onnxruntime.quantization",
    "optimum.commands.optimum_cli",
]


def start(arguments: list[str], stdout: Path, stderr: Path) -> int:
    """Run a command to its end, with what it writes in two files.

    Args:
        arguments: the program's name first.
        stdout: file to make.
        stderr: file to make.

    Returns:
        Its exit status; of a signal, the negative number.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(arguments, str(stdout), str(stderr)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], stdout: str, stderr: str) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = arguments
    from optimum.commands.optimum_cli import main

    sys.exit(main())
