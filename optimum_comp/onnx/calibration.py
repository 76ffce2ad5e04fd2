"""Running an exported float graph on calibration tokens: what goes into its dense layers, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.core.gram import GramAccumulator
from optimum_comp.onnx.graph import DenseNode, graph_size, needs_external_data
from optimum_comp.onnx.runtime import GraphRunner
from optimum_comp.scratch import make_scratch
from optimum_comp.utils import progress_disabled


GRAM_BYTES = 2_000_000_000
"""Gram matrices that are summed up in one pass over the tokens; more need more passes."""


@contextmanager
def opened(model: Any, outputs: Sequence[str] = (), weights: Sequence[str] = ()) -> Iterator[GraphRunner]:
    """A session over a graph that also gives inner activations, and takes weights.

    Args:
        model: an ONNX model; left as it is.
        outputs: activations that become outputs.
        weights: initializers whose value can be given to `run` in place of their own.
    """
    import onnx

    graph = model.graph
    count_outputs, count_inputs = len(graph.output), len(graph.input)
    known = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for name in weights:
        tensor = initializers[name]
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    try:
        with make_scratch(graph_size(graph), "graphs that are looked into", announced=False) as folder:
            path = Path(folder) / "model.onnx"
            # A copy, because saving as external data takes the weights out of the model that it is given.
            if needs_external_data(graph):
                copied = onnx.ModelProto()
                copied.CopyFrom(model)
                onnx.save(copied, path, save_as_external_data=True)
            else:
                onnx.save(model, path)
            yield GraphRunner(path)
    finally:
        del graph.output[count_outputs:]
        del graph.input[count_inputs:]


def second_moments(
    model: Any, nodes: Sequence[DenseNode], tokens: Tensor, limit: int = GRAM_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Second moments of what goes into dense layers, those of a few activations at a time.

    Those of all of a model's activations take far more memory than the model, so each part is to be used and dropped
    before the next one is asked for.

    Args:
        model: a float ONNX model.
        nodes: the dense layers.
        tokens: `[samples, length]`.
        limit: bytes of a part, if it has more than one activation; each part takes a pass over the tokens.

    Yields:
        Name of the activation -> `Σ_t x_t x_tᵀ`, `[d_in, d_in]`, float32.
    """
    widths = {node.inputs: node.shape[0] for node in nodes}
    passes: list[list[str]] = [[]]
    for name, width in widths.items():
        if sum(widths[other] ** 2 for other in passes[-1]) * 4 + width**2 * 4 > limit and passes[-1]:
            passes.append([])
        passes[-1].append(name)
    progress = tqdm(total=len(passes) * len(tokens), desc="Calibrating", unit="sample", disable=progress_disabled())
    with progress:
        for names in passes:
            sums = {name: GramAccumulator(widths[name], dtype=torch.float32) for name in names}
            with opened(model, outputs=names) as runner:
                for sample in tokens.split(1):
                    for name, values in zip(names, runner.run(sample.numpy(), names), strict=True):
                        sums[name].update(torch.from_numpy(values))
                    progress.update()
            yield {name: total.value() for name, total in sums.items()}
