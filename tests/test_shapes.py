"""Graphs with less to do for each token: the same results for any batch, prompt and cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIGS, need_onnx, tiny_model
from hypothesis import given
from hypothesis import strategies as st


need_onnx()

import onnx  # noqa: E402

from optimum_comp.onnx.attention import group_heads  # noqa: E402
from optimum_comp.onnx.cache import present_of  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.runtime import GraphRunner  # noqa: E402
from optimum_comp.onnx.shapes import expand_target, fold_shapes, infer_shapes, reshape_target  # noqa: E402


SIZES = {"batch": 2, "length": 3, "past + length": 5}

names = st.sampled_from([*SIZES, None])
dimensions = st.one_of(st.integers(1, 4), names)


def number(dimension):
    # What isn't known has a size all the same.
    return dimension if isinstance(dimension, int) else SIZES.get(dimension, 7)


def sizes(shape):
    return [number(dimension) for dimension in shape]


@given(st.lists(dimensions, min_size=1, max_size=5), st.data())
def test_targets_of_reshape_give_the_shape(after, data):
    before = data.draw(st.permutations(after))
    # Two neighbours that have become one, of which nothing is known.
    if len(before) > 1 and data.draw(st.booleans()):
        merged = np.prod(sizes(before[:2]))
        before, after = [None, *before[2:]], [*after]
        values = np.zeros([merged, *sizes(before[1:])])
    else:
        values = np.zeros(sizes(before))
    target = reshape_target(before, after)
    if target is None:
        assert sum(not isinstance(each, int) for each in after) > 1
        return
    copied = [values.shape[place] if each == 0 else each for place, each in enumerate(target)]
    assert values.reshape(copied).shape == tuple(sizes(after))


@given(st.lists(dimensions, min_size=1, max_size=5), st.data())
def test_targets_of_expand_give_the_shape(after, data):
    kept = data.draw(st.lists(st.booleans(), min_size=len(after), max_size=len(after)))
    before = [dimension if keep else 1 for dimension, keep in zip(after, kept, strict=True)]
    before = before[data.draw(st.integers(0, next((i for i, each in enumerate(before) if each != 1), len(before)))) :]
    target = expand_target(before, after)
    if target is None:
        assert any(not isinstance(each, int) for each in after)
        return
    assert np.broadcast_shapes(tuple(sizes(before)), target) == tuple(sizes(after))


def test_zero_and_two_unknown_dimensions_are_left_alone():
    assert reshape_target(["batch", 0], ["batch", 0, 4]) is None
    assert reshape_target([None, None], [None, 4, None]) is None
    assert expand_target(["batch", 1], ["batch", "length"]) is None
    assert expand_target([None], [None]) is None


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_folded_graph_computes_the_same(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "torch")
    path = export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="optimum").output / "model.onnx"
    model = onnx.load(path)
    before = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    shapes = infer_shapes(model)
    assert fold_shapes(model, shapes) > 0
    after = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    assert len(after) < 0.75 * len(before)
    # OPT makes one dimension of batch and length for its FFN, and has to take it apart again.
    left = [node.name for node in model.graph.node if node.op_type == "Shape" and "layers.1/" in node.name]
    assert len(left) == (2 if name.startswith("opt") else 0)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "folded.onnx")
    assert_same(path, tmp_path / "folded.onnx")
    # Nothing is left to fold.
    assert fold_shapes(model, infer_shapes(model)) == 0


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_shared_keys_and_values_are_not_repeated(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "torch")
    path = export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="optimum").output / "model.onnx"
    graph = onnx.load(path)
    shapes = infer_shapes(graph)
    # Shapes that are worked out read the repeated keys, too.
    fold_shapes(graph, shapes)
    shared = model.config.num_attention_heads != getattr(model.config, "num_key_value_heads", 4)
    # Keys and values of each layer.
    assert group_heads(graph, shapes) == (2 * model.config.num_hidden_layers if shared else 0)
    assert not [node.name for node in graph.graph.node if node.op_type == "Expand" and "self_attn" in node.name]
    onnx.checker.check_model(graph)
    onnx.save(graph, tmp_path / "grouped.onnx")
    assert_same(path, tmp_path / "grouped.onnx")
    assert group_heads(graph, infer_shapes(graph)) == 0


def test_shapes_that_cannot_be_told_are_left_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Two unknown lengths that are one, or an error.
    shapes = {"one": ["a"], "other": ["b"], "sum": ["c"]}
    one, other, result = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items())
    known = onnx.helper.make_tensor_value_info("length", onnx.TensorProto.INT64, [1])
    nodes = [
        onnx.helper.make_node("Expand", ["one", "length"], ["expanded"]),
        onnx.helper.make_node("Add", ["expanded", "other"], ["sum"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [one, other, known], [result]))
    assert infer_shapes(model) == {}
    assert list(tmp_path.iterdir()) == []


def test_heads_that_something_else_reads_stay_repeated(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "torch")
    graph = onnx.load(export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="optimum").output / "model.onnx")
    shapes = infer_shapes(graph)
    fold_shapes(graph, shapes)
    repeated = next(node for node in graph.graph.node if node.op_type == "Expand" and "layers.0/" in node.name)
    (merged,) = (node.output[0] for node in graph.graph.node if repeated.output[0] in node.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=merged))
    # Keys and values of four layers, but for one.
    assert group_heads(graph, shapes) == 7


def assert_same(path, changed):
    """At several batches, at the prompt and behind a cache."""
    runners = [GraphRunner(path), GraphRunner(changed)]
    caches = runners[0].cache_names
    outputs = ["logits", *(present_of(each) for each in caches)]
    for batch in (1, 3):
        tokens = torch.randint(3, 128, (batch, 11), generator=torch.Generator().manual_seed(batch)).numpy()
        prompts = [runner.run(tokens[:, :7], outputs) for runner in runners]
        np.testing.assert_allclose(prompts[1][0], prompts[0][0], atol=1e-5, rtol=0)
        for length in (1, 4):
            given = tokens[:, 7 : 7 + length]
            found = [
                runner.run(given, outputs, dict(zip(caches, prompt[1:], strict=True)), start=7)
                for runner, prompt in zip(runners, prompts, strict=True)
            ]
            for one, other in zip(*found, strict=True):
                np.testing.assert_allclose(other, one, atol=1e-5, rtol=0)
