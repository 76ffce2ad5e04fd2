"""What the quantizers have to know of an exported graph: its weights, who multiplies by them, how large they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from optimum_comp.onnx.attention import group_heads
from optimum_comp.onnx.shapes import fold_shapes, infer_shapes


PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights above which a model needs a second file: protobuf ends at 2 GiB."""

SMALL_TENSOR = 1024
"""Bytes up to which a tensor stays in the graph's own file."""

ATTENTION = "GroupQueryAttention"
"""The operator that is all of a layer's attention, in graphs that have one."""

QUANTIZED_OPERATORS = {"MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "DequantizeLinear"}

_NUMBER_BY_NUMBER = {"Add", "Cast", "Div", "Mul", "Tanh"}


@dataclass(frozen=True)
class DenseNode:
    """A multiplication by a constant matrix.

    Attributes:
        name: of the node.
        weight: name of its matrix `[d_in, d_out]`; of a tied head, of the embedding `[d_out, d_in]`.
        inputs: name of the activation that it reads.
        shape: `(d_in, d_out)`.
        is_tied: whether it multiplies by the transposed embedding.
        is_head: whether it makes the logits, before whatever scales, caps or shifts them.
    """

    name: str
    weight: str
    inputs: str
    shape: tuple[int, int]
    is_tied: bool = False
    is_head: bool = False


def load_float_graph(path: Path) -> Any:
    """An exported float model, with less to do for each token.

    `Gemm` is written as `MatMul` and `Add`, shapes that are known are constants, and keys and values aren't repeated.

    Raises:
        ValueError: it is quantized already.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = onnx.load(path)
    if any(node.op_type in QUANTIZED_OPERATORS for node in model.graph.node):
        raise ValueError(f"{path} is quantized already; give the float model.")
    # OPT flattens batch and length before its FFN, which exports as Gemm.
    ONNXModel(model).replace_gemm_with_matmul()
    # One that has attention as one operator is as it should be.
    if not is_fused(model.graph):
        shapes = infer_shapes(model)
        fold_shapes(model, shapes)
        group_heads(model, shapes)
    return model


def read_without_weights(path: Path) -> Any:
    """A graph without its initializers, which are most of its file and aren't read.

    Parsed as a whole, they would be in memory beside those of a session. Fields are found as
    https://protobuf.dev/programming-guides/encoding says.

    Args:
        path: of a model that is known to be valid.
    """
    import onnx

    left_out = (onnx.GraphProto.INITIALIZER_FIELD_NUMBER, onnx.GraphProto.SPARSE_INITIALIZER_FIELD_NUMBER)
    graph = onnx.GraphProto()
    with path.open("rb") as file:
        for number, _, content, end in _fields(file, 0, path.stat().st_size):
            if number != onnx.ModelProto.GRAPH_FIELD_NUMBER:
                continue
            for each, start, _, after in _fields(file, content, end):
                if each not in left_out:
                    file.seek(start)
                    graph.MergeFromString(file.read(after - start))
    return graph


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number of each field of a message, and where it, its content, and what follows it begin."""
    fixed = {1: 8, 5: 4}
    while start < end:
        file.seek(start)
        # A tag and a length, of ten bytes at most each.
        head = file.read(20)
        tag, place = _varint(head, 0)
        kind = tag & 7
        if kind == 2:
            size, place = _varint(head, place)
        elif kind == 0:
            size = _varint(head, place)[1] - place
        else:
            size = fixed[kind]
        content = start + place
        yield tag >> 3, start, content, content + size
        start = content + size


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A number in groups of seven bits, the least first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start


def is_fused(graph: Any) -> bool:
    """Whether a graph has attention as one operator."""
    return any(node.op_type == ATTENTION for node in graph.node)


def dense_nodes(graph: Any) -> list[DenseNode]:
    """The graph's multiplications by a constant matrix, in its order."""
    constant = matrices(graph)
    transposed = {node.output[0]: node.input[0] for node in transposed_matrices(graph)}
    head = _head(graph)
    found = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        inputs, weight = node.input
        is_head = node.output[0] == head
        if weight in constant:
            rows, columns = constant[weight].dims
            found.append(DenseNode(node.name, weight, inputs, (rows, columns), is_head=is_head))
        elif weight in transposed:
            columns, rows = constant[transposed[weight]].dims
            found.append(DenseNode(node.name, transposed[weight], inputs, (rows, columns), True, is_head))
    return found


def _head(graph: Any) -> str:
    """What the head's product makes: the logits, or what becomes them number by number.

    A bias (Phi), a scale (Cohere, Granite) or a cap (Gemma 2) may come after the product.
    """
    producers = {name: node for node in graph.node for name in node.output}
    constant = {tensor.name for tensor in graph.initializer}
    constant |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    name = str(graph.output[0].name)
    while name in producers and producers[name].op_type in _NUMBER_BY_NUMBER:
        activations = [each for each in producers[name].input if each not in constant]
        if len(activations) != 1:
            break
        name = str(activations[0])
    return name


def products_of_activations(graph: Any) -> list[str]:
    """Names of the multiplications that have no constant matrix."""
    dense = {node.name for node in dense_nodes(graph)}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.name not in dense]


def matrices(graph: Any) -> dict[str, Any]:
    """The graph's constant float matrices by name."""
    from onnx import TensorProto

    return {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}


def transposed_matrices(graph: Any) -> Iterator[Any]:
    """Nodes that transpose a constant float matrix."""
    constant = matrices(graph)
    return (node for node in graph.node if node.op_type == "Transpose" and node.input[0] in constant)


def graph_size(graph: Any) -> int:
    """Bytes of the weights, whether they are loaded or not."""
    return sum(tensor_bytes(tensor) for tensor in graph.initializer)


def needs_external_data(graph: Any) -> bool:
    """Whether the weights are too large for one protobuf file."""
    return graph_size(graph) > PROTOBUF_LIMIT


def tensor_bytes(tensor: Any) -> int:
    """Size of an initializer, whether it is loaded or not."""
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)


def weight_of(graph: Any, node: DenseNode) -> Any:
    """A dense node's matrix as a NumPy array, `[d_out, d_in]`."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(matrices(graph)[node.weight])
    return values if node.is_tied else values.T


def save_with_data(model: Any, path: Path) -> None:
    """Write a model of `onnx_ir`, its weights in one file beside it that a runtime can map into memory."""
    import onnx_ir

    # The alignment is that of memory mapping on Windows, the coarsest there is.
    onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL_TENSOR, alignment=65536)
