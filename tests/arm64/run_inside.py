"""Run ONNX graphs and keep what they compute: the same code inside the emulator and outside of it.

    python run_inside.py JOB.json RESULT.npz

JOB.json holds a list of `{"name", "graph", "inputs", "outputs"}`: the path of a graph, the path of an .npz file with
its inputs, and the names of the outputs to keep. RESULT.npz gets an array `NAME/OUTPUT` for each, `NAME/seconds` for
opening and running the graph, and `machine` and `version`.

Only NumPy and ONNX Runtime are there inside the emulator.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def run(graph: str, inputs: str, outputs: list[str]) -> list[np.ndarray]:
    """Run one graph.

    Args:
        graph: path of the graph.
        inputs: path of an .npz file with an array for each input.
        outputs: names of the outputs to return.
    """
    options = onnxruntime.SessionOptions()
    # Whatever the machine: the cores of an emulated one are the host's.
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    with np.load(inputs) as arrays:
        return session.run(outputs, {entry.name: arrays[entry.name] for entry in session.get_inputs()})


def main(job: Path, result: Path) -> None:
    results = {"machine": np.array(platform.machine()), "version": np.array(onnxruntime.__version__)}
    for task in json.loads(job.read_text(encoding="utf-8")):
        name = task["name"]
        started = time.perf_counter()
        arrays = run(task["graph"], task["inputs"], task["outputs"])
        results[f"{name}/seconds"] = np.array(time.perf_counter() - started)
        results |= {f"{name}/{output}": array for output, array in zip(task["outputs"], arrays, strict=True)}
    np.savez(result, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
