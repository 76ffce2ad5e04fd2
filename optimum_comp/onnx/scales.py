"""Scales of weights in blocks, stored in half precision: of a model with 4 bits, they are a ninth in single."""

from __future__ import annotations

from typing import Any


_BLOCKS = "MatMulNBits"
_SCALES = 2
_ALLOWED, _SMALL = 2**-10, 2**-6
"""What half precision may do to a scale, relative to itself, or to that share of the matrix's largest."""


def store_scales_in_half(graph: Any) -> None:
    """Keep the scales of weights in blocks in half precision, in place.

    They are widened again by an operator, which a runtime that works out constants does once, when it opens the graph:
    what is multiplied is single precision as before. Beside a code's own rounding, at most a thousandth of a scale is
    nothing, and nothing at all of those that were chosen in half precision. Scales that half precision
    can't hold so exactly stay as they are.

    Args:
        graph: with `MatMulNBits` nodes.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    names = {node.input[_SCALES] for node in graph.node if node.op_type == _BLOCKS}
    tensors = [each for each in graph.initializer if each.name in names and each.data_type == TensorProto.FLOAT]
    widened = []
    for tensor in tensors:
        scales = numpy_helper.to_array(tensor)
        size = np.abs(scales)
        with np.errstate(over="ignore", invalid="ignore"):
            half = scales.astype(np.float16)
            off = np.abs(half.astype(np.float32) - scales)
        if not scales.size or not (off <= _ALLOWED * np.maximum(size, _SMALL * size.max())).all():
            continue
        stored = f"{tensor.name}_half"
        node = helper.make_node("Cast", [stored], [tensor.name], f"{tensor.name}/Widen", to=TensorProto.FLOAT)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(half, stored))
        widened.append(node)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*widened, *rest])
