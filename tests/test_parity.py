"""Graphs that compute something else than what they were made from: none is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import need_onnx
from tiny_families import tiny_family


need_onnx()

import onnx  # noqa: E402
from exports import exporter, outlier_model, stored_scales  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from optimum_comp.onnx import blocks, export, quantization  # noqa: E402
from optimum_comp.onnx import graph as graphs  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.graph import dense_nodes, load_float_graph  # noqa: E402
from optimum_comp.onnx.parity import GENERATED, Found, require_same  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402
from optimum_comp.onnx.recipes import BUDGET, EIGHT, RECIPES  # noqa: E402
from optimum_comp.onnx.search import Budget, search  # noqa: E402


TOKENS = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exporter(tmp_path_factory, lambda name: outlier_model(name) if name == "llama" else tiny_family(name))


def put_before(model, name: str, *nodes) -> None:
    """Have a graph read what nodes make of an input, `changed`, in place of the input."""
    for node in model.graph.node:
        node.input[:] = ["changed" if each == name else each for each in node.input]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def ignore_padding(model) -> None:
    """Take every token for one of the text, which only shows where there is padding."""
    put_before(
        model,
        "attention_mask",
        helper.make_node("Equal", ["attention_mask", "attention_mask"], ["always"]),
        helper.make_node("Cast", ["always"], ["changed"], to=TensorProto.INT64),
    )


def forget_positions(model) -> None:
    """Count positions from the first token that is given, which only shows behind a cache."""
    model.graph.initializer.append(numpy_helper.from_array(torch.tensor([1]).numpy(), "last_axis"))
    put_before(
        model,
        "position_ids",
        helper.make_node("ReduceMin", ["position_ids", "last_axis"], ["first"], keepdims=1),
        helper.make_node("Sub", ["position_ids", "first"], ["changed"]),
    )


def swap_layers(model) -> None:
    """Exchange two layers' weights: a graph that runs, and computes something else."""
    nodes = {node.name: node for node in dense_nodes(model.graph)}
    one, other = (nodes[f"/model/layers.{layer}/self_attn/o_proj/MatMul"] for layer in (0, 1))
    for node in model.graph.node:
        if node.name in (one.name, other.name):
            node.input[1] = other.weight if node.name == one.name else one.weight


def damaging(original, damage):
    """A function that does its work, on a model or a graph's file, and damages what it has made."""

    def damaged(given, *args, **kwargs):
        result = original(given, *args, **kwargs)
        path = given / "model.onnx" if isinstance(given, Path) and given.is_dir() else given
        model = onnx.load(path) if isinstance(path, Path) else path
        damage(model)
        if isinstance(path, Path):
            onnx.save(model, path)
        return result

    return damaged


@pytest.mark.parametrize(
    ("damage", "case"), [(ignore_padding, "left padding"), (forget_positions, "cached continuation")]
)
def test_an_export_is_compared_with_padding_and_cache(damage, case, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "open_cache", damaging(export.open_cache, damage))
    with pytest.raises(RuntimeError, match=rf"the ONNX model disagrees with PyTorch: .* differ by up to .*\({case}\)"):
        export_onnx(exported("llama").checkpoint, tmp_path / "onnx", exporter="optimum")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rewriting", ["fold_shapes", "group_heads"])
@pytest.mark.parametrize(
    ("damage", "case"),
    [(swap_layers, "prefill"), (ignore_padding, "left padding"), (forget_positions, "cached continuation")],
)
def test_a_rewritten_graph_is_compared_with_its_original(rewriting, damage, case, exported, tmp_path, monkeypatch):
    source = exported("llama").folder
    quantize_onnx(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    monkeypatch.setattr(graphs, rewriting, damaging(getattr(graphs, rewriting), damage))
    said = rf"the rewritten graph disagrees with the exported one: .* differ by up to .*\({case}\)"
    with pytest.raises(RuntimeError, match=said):
        quantize_onnx(source, tmp_path / "out", overwrite=True)
    # What was there is still there, and nothing else.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("damage", "case"), [(ignore_padding, "left padding"), (forget_positions, "cached continuation")]
)
def test_a_quantized_graph_is_compared_with_itself(damage, case, recipe, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "open_cache", damaging(quantization.open_cache, damage))
    with pytest.raises(RuntimeError, match=rf"disagrees with itself: .* off by .*\({case} against"):
        quantize_onnx(exported("llama").folder, tmp_path / "out", recipe=recipe, tokens=TOKENS)
    assert list(tmp_path.iterdir()) == []


def roll_scales(model) -> None:
    """Give each block the scale of the one before it."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            name = stored_scales(model.graph, node)
            scales = numpy_helper.to_array(tensors[name])
            rolled = torch.tensor(scales).flatten().roll(1).view(scales.shape).numpy()
            tensors[name].CopyFrom(numpy_helper.from_array(rolled, name))


def swap_scales(model) -> None:
    """Exchange the scales of keys and values in one layer."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(
        each for each in model.graph.node if each.op_type == "MatMulNBits" and "layers.1/self_attn/q" in each.name
    )
    (split,) = (each for each in model.graph.node if node.output[0] in each.input)
    sizes = numpy_helper.to_array(tensors[split.input[1]])
    name = stored_scales(model.graph, node)
    scales = numpy_helper.to_array(tensors[name])
    rows = scales.reshape(sizes.sum(), -1)
    queries, keys, values = (part for part in torch.tensor(rows).split(sizes.tolist()))
    swapped = torch.cat([queries, values, keys]).view(scales.shape).numpy()
    tensors[name].CopyFrom(numpy_helper.from_array(swapped, name))


@pytest.mark.parametrize(
    ("damage", "recipe"),
    [
        *((swap_scales, recipe) for recipe in RECIPES if recipe != "int8-dynamic"),
        *((roll_scales, recipe) for recipe in ("int4", "int4-hqq", "int4-rtn")),
    ],
)
def test_a_quantized_graph_is_compared_with_the_float_one(damage, recipe, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "open_cache", damaging(quantization.open_cache, damage))
    with pytest.raises(RuntimeError, match=r"disagrees with the float one: .* off by"):
        quantize_onnx(exported("olmo2").folder, tmp_path / "out", recipe=recipe, tokens=TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_halves_in_the_wrong_order_are_noticed(exported, tmp_path, monkeypatch):
    packed = blocks._packed
    monkeypatch.setattr(blocks, "_packed", lambda given: packed(given) << 4 | packed(given) >> 4)
    with pytest.raises(RuntimeError, match=r"disagrees with the float one: .* off by"):
        quantize_onnx(exported("llama").folder, tmp_path / "out", recipe="int4", tokens=TOKENS)


def test_trials_of_a_search_are_not_run_for_it(exported, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("was run")

    monkeypatch.setattr(quantization, "run_graph", refuse)
    source = exported("llama").folder
    found = search(source, Budget(size=200_000), TOKENS[:2], TOKENS[2:])
    with pytest.raises(RuntimeError, match="was run"):
        quantize_onnx(source, tmp_path / "out", recipe=BUDGET, plan=found.plan)


def test_generation_is_compared_until_the_tokens_part():
    generated = torch.zeros(2, 3, 3)

    def found(tokens, change=0.0, step=0):
        changed = generated.clone()
        changed[1, step] += change
        return Found({GENERATED: changed}, torch.tensor(tokens))

    def compare(one, other):
        return require_same(one, other, names=("one", "other"))

    one = found([[1, 2, 0], [1, 2, 0]])
    # The second sequence parts at its second token: its third step follows from another.
    other = [[1, 2, 0], [1, 0, 2]]
    assert compare(one, found(other, 5.0, step=2)) == {GENERATED: 0}
    with pytest.raises(RuntimeError, match=r"differ by up to 5 \(generation\)"):
        compare(one, found(other, 5.0, step=1))
    with pytest.raises(RuntimeError, match=r"differ by up to 5 \(generation\)"):
        compare(one, found([[1, 2, 0], [1, 2, 0]], 5.0, step=2))
    with pytest.raises(RuntimeError, match=r"differ by up to nan \(generation\)"):
        compare(one, found([[1, 2, 0], [1, 2, 0]], float("nan"), step=2))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi", "granite"])
def test_a_head_is_one_whatever_comes_after_its_product(name, exported, tmp_path):
    """A cap, a scale, a bias: the head and the embedding that is tied to it have 8 bits all the same."""
    model = load_float_graph(exported(name).folder / "model.onnx")
    (head,) = (node for node in dense_nodes(model.graph) if node.is_head)
    assert head.shape[1] == exported(name).model.config.vocab_size
    for recipe in ("int4", "int4-hqq"):
        assert quantization.plan_of(model, RECIPES[recipe], None, None).assignment[head.name] == EIGHT
    report = quantize_onnx(exported(name).folder, tmp_path / "hqq", recipe="int4-hqq")
    assert report.nodes["MatMulNBits"]
