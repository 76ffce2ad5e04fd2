"""Scales of weights in blocks are stored in half precision, and multiplied with in single."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from conftest import need_onnx
from onnx import TensorProto, numpy_helper
from test_packing import model_of, outputs_of, product


need_onnx()

from exports import exporter, outlier_model, stored_scales  # noqa: E402

from optimum_comp.core.rounding import compensated, nearest, on_grid  # noqa: E402
from optimum_comp.onnx.packing import pack_products  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402
from optimum_comp.onnx.recipes import EIGHT, FOUR, FOUR_WIDE  # noqa: E402
from optimum_comp.onnx.scales import store_scales_in_half  # noqa: E402


def products(scales_of=lambda scales: scales):
    tensors: list = []
    nodes = [product(name, 48, tensors, seed) for seed, name in enumerate(("q", "k"))]
    nodes.append(product("other", 32, tensors, 7, bits=8))
    for place, tensor in enumerate(tensors):
        if tensor.name.endswith("_s"):
            tensors[place] = numpy_helper.from_array(scales_of(numpy_helper.to_array(tensor)), tensor.name)
    return model_of(nodes, tensors)


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_half_precision_holds_computes_the_same(is_packed):
    model = products(lambda scales: scales.astype(np.float16).astype(np.float32))
    wanted = outputs_of(model)
    if is_packed:
        pack_products(model.graph)
    before = model.ByteSize()
    store_scales_in_half(model.graph)
    kinds = {each.name: each.data_type for each in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert {kinds[stored_scales(model.graph, node)] for node in nodes} == {TensorProto.FLOAT16}
    assert model.ByteSize() < before
    for one, other in zip(wanted, outputs_of(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_others_are_off_by_a_thousandth_at_most():
    model = products()
    before = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    store_scales_in_half(model.graph)
    after = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            wanted, found = before[node.input[2]], after[stored_scales(model.graph, node)]
            np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=2**-10)


@pytest.mark.parametrize("factor", [1e-6, 1e6, np.inf])
def test_scales_that_half_precision_cannot_hold_stay(factor):
    model = products(lambda scales: scales * np.float32(factor))
    before = model.SerializeToString()
    store_scales_in_half(model.graph)
    assert model.SerializeToString() == before


def test_a_block_of_next_to_nothing_beside_others_is_no_obstacle():
    def with_a_small_one(scales):
        scales = scales + 0.5
        scales[0, 0] = 1e-7
        return scales

    model = products(with_a_small_one)
    store_scales_in_half(model.graph)
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3


def test_rounding_chooses_scales_that_can_be_stored():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(9, 70, generator=generator), torch.randn(200, 70, generator=generator)
    for blocks in (nearest(weight, 4, 32), nearest(weight, 8, 32), compensated(weight, inputs.T @ inputs, 4, 32)):
        assert torch.equal(blocks.scales, blocks.scales.half().float())
    # Where they can be: of weights as small as these, half precision would make next to nothing.
    small = nearest(1e-6 * weight, 4, 32).weight()
    assert (1e6 * small - weight).square().mean() < 0.02


def test_a_rounded_weight_is_found_with_a_scale_that_can_be_stored():
    # Three times a scale would do as well for codes of 0 and 3, and takes two bits more.
    scale = torch.tensor(1 + 2**-10)
    weight = torch.zeros(1, 32)
    weight[0, 5] = 3 * scale
    blocks = on_grid(weight, 4, 32)
    assert blocks is not None and torch.equal(blocks.weight(), weight)
    assert torch.equal(blocks.scales, blocks.scales.half().float())
    # One that was made with scales of single precision is found all the same.
    weight[0, 5] = 3 * torch.tensor(1 + 2**-20)
    weight[0, 6] = 7 * torch.tensor(1 + 2**-20)
    assert torch.equal(on_grid(weight, 4, 32).weight(), weight)


@pytest.mark.parametrize(("form", "bits"), [(EIGHT, 8.25), (FOUR, 4.5), (FOUR_WIDE, 4.25)])
def test_what_a_weight_takes(form, bits):
    assert 8 * form.matrix_bytes((576, 64)) / (576 * 64) == bits


@pytest.mark.parametrize("recipe", ["int8", "int4-rtn", "int4-hqq"])
def test_a_model_stores_all_of_them_so(recipe, tmp_path_factory, tmp_path):
    folder = exporter(tmp_path_factory, outlier_model, by="genai")("llama").folder
    quantize_onnx(folder, tmp_path / recipe, recipe=recipe)
    graph = onnx.load(tmp_path / recipe / "model.onnx").graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert nodes
    assert all(kinds[stored_scales(graph, node)] == TensorProto.FLOAT16 for node in nodes)
