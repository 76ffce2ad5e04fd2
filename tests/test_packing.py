"""Products that read one activation become one, and compute what they did."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need_onnx
from onnx import TensorProto, helper, numpy_helper


need_onnx()

from optimum_comp.onnx.packing import pack_products  # noqa: E402
from optimum_comp.onnx.runtime import open_session  # noqa: E402


WIDTH = 64


def product(name: str, rows: int, graph_tensors: list, seed: int, *, bits: int = 4, block: int = 32, flat=False):
    """A `MatMulNBits` node of random codes, `[rows, 64]`."""
    random = np.random.default_rng(seed)
    blocks = WIDTH // block
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8)
    scales = random.random((rows, blocks), dtype=np.float32)
    scales = scales.reshape(-1) if flat else scales
    graph_tensors += [numpy_helper.from_array(codes, f"{name}_q"), numpy_helper.from_array(scales, f"{name}_s")]
    return helper.make_node(
        "MatMulNBits",
        ["x", f"{name}_q", f"{name}_s"],
        [f"{name}_out"],
        name,
        domain="com.microsoft",
        K=WIDTH,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )


def model_of(nodes, tensors):
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "n", WIDTH])]
    graph = helper.make_graph(nodes, "products", given, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def outputs_of(model) -> list[np.ndarray]:
    x = np.random.default_rng(9).standard_normal((1, 5, WIDTH)).astype(np.float32)
    return open_session(model.SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize("flat", [False, True])
def test_products_of_one_kind_become_one_and_compute_the_same(flat):
    tensors: list = []
    sizes = {"q": 48, "k": 16, "v": 16}
    nodes = [product(name, rows, tensors, seed, flat=flat) for seed, (name, rows) in enumerate(sizes.items())]
    nodes.append(product("other", 32, tensors, 7, bits=8, flat=flat))
    nodes.append(product("coarse", 32, tensors, 8, block=64, flat=flat))
    model = model_of(nodes, tensors)
    wanted = outputs_of(model)
    assert pack_products(model.graph) == 2
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "Split", "MatMulNBits", "MatMulNBits"]
    assert len(model.graph.initializer) == 7
    for one, other in zip(wanted, outputs_of(model), strict=True):
        np.testing.assert_array_equal(one, other)
    # Nothing is left to pack.
    assert pack_products(model.graph) == 0


def test_a_weight_that_is_read_elsewhere_stays():
    tensors: list = []
    nodes = [product("head", 32, tensors, 0), product("twin", 32, tensors, 1)]
    nodes.append(helper.make_node("Shape", ["head_q"], ["head_shape"], "reader"))
    model = model_of(nodes[:2], tensors)
    model.graph.node.append(nodes[2])
    assert pack_products(model.graph) == 0
