"""Shapes that a graph works out at every run although they are known when it is made.

Optimum's export computes the target of each reshape from the shape of some activation, in a dozen small operators.
With one token at a time, these take as long as the products by the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_comp.onnx.cache import close_cache
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

_SHAPE_VALUES = 64
"""A tensor with more values than this isn't one that shapes are worked out from."""

Dimension = int | str | None
"""Known, known by name (the same name is the same number), or unknown."""


def fold_shapes(model: Any, shapes: Mapping[str, Sequence[Dimension]]) -> int:
    """Replace what the shapes of a graph's activations say beforehand, in place.

    `Reshape` and `Expand` get constant targets: a dimension that the input has at the same place is copied (0 to
    `Reshape`, 1 to `Expand`), and one other of `Reshape` may be inferred (-1), so batches, prompts and caches of any
    length still fit. A known dimension that is looked up becomes a constant, and a `Slice` of everything is left out.

    Args:
        model: an ONNX model; nodes that nothing needs any more are removed.
        shapes: of its activations, as `infer_shapes` gives them.

    Returns:
        How many nodes were changed or replaced.
    """
    graph = model.graph
    folding = _Folding(graph, shapes)
    for node in graph.node:
        folding.visit(node)
    folding.rename()
    remove_unused(graph)
    return folding.count


class _Folding:
    """One pass over a graph's nodes, in their order.

    Args:
        graph: to be changed.
        shapes: of its activations.
    """

    def __init__(self, graph: Any, shapes: Mapping[str, Sequence[Dimension]]):
        self.count = 0
        self._graph, self._shapes = graph, shapes
        self._producers = {name: node for node in graph.node for name in node.output}
        self._constants = constants(graph)
        self._results = {value.name for value in graph.output}
        self._added: dict[tuple[int, ...] | int, str] = {}
        self._renamed: dict[str, str] = {}

    def visit(self, node: Any) -> None:
        """Fold one node if it can be."""
        if node.op_type in ("Reshape", "Expand"):
            self._fold_target(node)
        elif node.op_type == "Gather":
            self._fold_lookup(node)
        elif node.op_type == "Slice" and self._takes_all(node):
            self._replace(node, node.input[0])

    def rename(self) -> None:
        """Have the readers of what was replaced read what stands for it."""
        for node in self._graph.node:
            for place, name in enumerate(node.input):
                while name in self._renamed:
                    name = self._renamed[name]
                node.input[place] = name

    def _fold_target(self, node: Any) -> None:
        before, after = self._shapes.get(node.input[0]), self._shapes.get(node.output[0])
        if node.input[1] in self._constants or before is None or after is None:
            return
        target = reshape_target(before, after) if node.op_type == "Reshape" else expand_target(before, after)
        if target is not None:
            node.input[1] = self._constant(target)
            self.count += 1

    def _fold_lookup(self, node: Any) -> None:
        source, index = self._producers.get(node.input[0]), self._constants.get(node.input[1])
        if source is None or source.op_type != "Shape" or source.attribute or index is None or index.shape:
            return
        shape = self._shapes.get(source.input[0])
        if shape is not None and isinstance(shape[int(index)], int):
            self._replace(node, self._constant(shape[int(index)]))

    def _takes_all(self, node: Any) -> bool:
        before, after = (self._shapes.get(name) for name in (node.input[0], node.output[0]))
        steps = self._constants.get(node.input[4]) if len(node.input) > 4 else None
        forward = len(node.input) < 5 or (steps is not None and bool((steps == 1).all()))
        return forward and before is not None and before == after and None not in before

    def _replace(self, node: Any, name: str) -> None:
        if node.output[0] not in self._results:
            self._renamed[node.output[0]] = name
            self.count += 1

    def _constant(self, value: Any) -> str:
        import numpy as np
        from onnx import numpy_helper

        if value not in self._added:
            self._added[value] = f"comp_shape_{len(self._added)}"
            tensor = numpy_helper.from_array(np.array(value, np.int64), self._added[value])
            self._graph.initializer.append(tensor)
        return self._added[value]


def constants(graph: Any, folder: str | Path = "") -> dict[str, Any]:
    """Name -> value of small constants, whichever way the graph has them.

    Args:
        graph: of a model.
        folder: where the weights are that lie in a file of their own.
    """
    from onnx import numpy_helper

    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _SHAPE_VALUES]
    found = {tensor.name: numpy_helper.to_array(tensor, base_dir=str(folder)) for tensor in small}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def reshape_target(before: Sequence[Dimension], after: Sequence[Dimension]) -> tuple[int, ...] | None:
    """What to give `Reshape` so that a shape becomes another one; `None` if more than one dimension is unknown."""
    target = []
    for place, dimension in enumerate(after):
        if isinstance(dimension, int):
            target.append(dimension)
        elif dimension is not None and place < len(before) and before[place] == dimension:
            target.append(0)
        else:
            target.append(-1)
    # A literal zero would be taken for a copy.
    return tuple(target) if target.count(-1) <= 1 and 0 not in after else None


def expand_target(before: Sequence[Dimension], after: Sequence[Dimension]) -> tuple[int, ...] | None:
    """What to give `Expand` so that a shape becomes another one; `None` if a dimension grows to an unknown one."""
    padded = [*([1] * (len(after) - len(before))), *before]
    target = []
    for old, new in zip(padded, after, strict=True):
        if isinstance(new, int):
            target.append(new)
        elif new is not None and old == new:
            target.append(1)
        else:
            return None
    return tuple(target)


def infer_shapes(model: Any) -> dict[str, list[Dimension]]:
    """Name of each activation -> its shape as far as it is known.

    Nothing is known of a graph that has graphs inside (loops, branches), or an operator or a shape that ONNX Runtime's
    inference of shapes can't make out (Cohere's rotary embedding).
    """
    import onnx
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return {}
    # Without the weights, of which only the shapes matter.
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.graph.name = graph.name
    skeleton.graph.node.extend(graph.node)
    skeleton.graph.input.extend(graph.input)
    skeleton.graph.output.extend(graph.output)
    close_cache(skeleton.graph)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SHAPE_VALUES:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        # In the steps of its `infer_shapes`, which leaves a file in the working directory where it gets stuck.
        inference, complete = SymbolicShapeInference(2**31 - 1, False, False, 0), False
        inference._preprocess(skeleton)
        while inference.run_:
            complete = inference._infer_impl()
        inference._update_output_from_vi()
        inferred = inference.out_mp_.graph
    # What it raises where it doesn't know an operator is of no narrower class.
    except Exception as error:
        logger.info("Shapes are worked out at every run: %s", error)
        return {}
    if not complete:
        logger.info("Shapes are worked out at every run: some of them can't be told beforehand.")
        return {}
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    tensors = {value.name: value.type.tensor_type for value in values}
    return {
        name: [_dimension(each) for each in tensor.shape.dim]
        for name, tensor in tensors.items()
        if tensor.HasField("shape")
    }


def _dimension(given: Any) -> Dimension:
    return given.dim_value if given.HasField("dim_value") else given.dim_param or None


def remove_unused(graph: Any) -> None:
    """Take out nodes and initializers that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    nodes = kept[::-1]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
