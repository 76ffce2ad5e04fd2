"""The graph of GenAI's model builder as it is made into one that every runtime runs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import GQA, IDS, SIZES, need_onnx, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig


need_onnx()

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM  # noqa: E402

from optimum_comp.onnx import export, fused  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.runtime import CachedDecoder, greedy_tokens, open_session  # noqa: E402


GEMMA = {
    **SIZES,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 8,
    # Not the family's usual order: as after whole layers were taken out.
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 1024,
}


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **GEMMA, **IDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    save(model, folder / "torch")
    return model, export_onnx(folder / "torch", folder / "onnx", exporter="genai").output


@pytest.mark.parametrize("padding", ["left", "right", "hole"])
def test_what_the_mask_leaves_out_is_not_seen(padding, gemma):
    """A batch, one token at a time behind the prompts: as PyTorch computes it."""
    model, folder = gemma
    opened = ORTModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 6), "right": slice(14, 20), "hole": slice(4, 7)}[padding]] = 0
    positions = {"attention_mask": mask}
    if padding != "left":
        # Places in the mask, where PyTorch is told them.
        positions["position_ids"] = torch.arange(20).expand(2, -1)
    with torch.no_grad():
        expected, found = (each(input_ids=ids, **positions).logits for each in (model, opened))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_windows_and_angles_follow_the_config(gemma):
    _, folder = gemma
    graph = onnx.load(folder / "model.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    windows = [next(a.i for a in node.attribute if a.name == "local_window_size") for node in nodes]
    assert windows == [-1, 8, -1]
    assert [node.input[7].rpartition("_")[2] for node in nodes] == ["global", "local", "global"]


def test_angles_are_worked_out_when_a_graph_is_opened(gemma):
    """The tables aren't in the file, and a long text is read as PyTorch reads it."""
    model, folder = gemma
    graph = onnx.load(folder / "model.onnx").graph
    assert not [t.name for t in graph.initializer if 1024 in t.dims]
    ids = torch.randint(3, 128, (1, 900), generator=torch.Generator().manual_seed(4))
    decoder = CachedDecoder(folder / "model.onnx")
    with torch.no_grad():
        expected = model(ids).logits[0, -100:]
    decoder.logits(ids[0, :800].tolist())
    np.testing.assert_allclose(decoder.logits(ids[0, 800:].tolist()), expected, atol=1e-3)


def test_a_table_of_another_kind_stays():
    places, width = 64, 8
    angles = np.outer(np.arange(places, dtype=np.float32), 0.3 ** np.arange(width, dtype=np.float32))
    cosines, sines = np.cos(angles), np.sin(angles)
    names = ("cos_cache", "sin_cache")
    # Scaled, as some long contexts are: made. Bent from some place on: not made.
    for change, is_made in (
        (lambda table: table * 1.2, True),
        (lambda table: np.where(table > 0.9, 0.9, table), False),
    ):
        tables = [change(table).astype(np.float32) for table in (cosines, sines)]
        nodes, given = fused._angles(names, *tables)
        assert fused._are_made(nodes, given, dict(zip(names, tables, strict=True))) == is_made


def test_any_empty_past_is_taken_where_its_shape_is_not_guessed(gemma, tmp_path):
    # Heads that the hidden size isn't made of, as pruning leaves them.
    save(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **GQA, **IDS, head_dim=32)), tmp_path / "torch")
    folder = export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="genai").output
    session = open_session(str(folder / "model.onnx"))
    ids = np.arange(3, 9)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.zeros_like(ids)}
    found = []
    for heads, width in ((2, 32), (4, 16), (1, 7)):
        past = {
            each.name: np.zeros((1, heads, 0, width), np.float32)
            for each in session.get_inputs()
            if each.name.startswith("past")
        }
        found.append(session.run(["logits", "present.0.key"], feeds | past))
        assert found[-1][1].shape == (1, 2, 6, 32)
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][0], found[2][0])
    # Elsewhere, nothing stands between the cache and what reads it.
    graph = onnx.load(gemma[1] / "model.onnx").graph
    readers = {node.op_type for node in graph.node for name in node.input if name.startswith("past_key_values")}
    assert readers == {"GroupQueryAttention"}


def test_plain_onnx_runtime_generates_what_optimum_does(gemma):
    _, folder = gemma
    prompt = [5, 90, 17, 100, 33]
    model = ORTModelForCausalLM.from_pretrained(folder)
    given = torch.tensor([prompt])
    expected = model.generate(given, attention_mask=torch.ones_like(given), min_new_tokens=9, max_new_tokens=9)
    assert greedy_tokens(folder / "model.onnx", prompt, 9) == expected[0, len(prompt) :].tolist()


def test_weights_are_those_of_the_checkpoint(gemma):
    """Each once, as a matrix that the recipes find; the tied head is the embedding."""
    model, folder = gemma
    graph = onnx.load(folder / "model.onnx").graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert np.array_equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight.detach().numpy())
    layer = model.model.layers[1]
    for place in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        name = f"/model/layers.1/{place.replace('.', '/')}/MatMul"
        (node,) = (node for node in graph.node if node.name == name)
        assert np.array_equal(stored[node.input[1]].T, layer.get_submodule(place).weight.detach().numpy())


def test_auto_takes_optimum_where_the_built_graph_computes_something_else(tmp_path, monkeypatch):
    """Here since a mask is left out; whatever it is, PyTorch decides."""
    save(tiny_model("llama"), tmp_path / "torch")
    # What comes along with a model may be a folder.
    (tmp_path / "torch" / "additional_chat_templates").mkdir()
    (tmp_path / "torch" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    monkeypatch.setattr(fused, "_MASKED", 0.0)
    with pytest.raises(RuntimeError, match=r"disagrees with PyTorch.*left padding"):
        export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="genai")
    assert not (tmp_path / "onnx").exists()
    report = export_onnx(tmp_path / "torch", tmp_path / "onnx")
    assert report.exporter == "optimum"
    assert "left padding" in report.reason
    assert "Optimum's exporter: the ONNX model disagrees" in report.text
    operators = {node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node}
    assert "GroupQueryAttention" not in operators
    assert (tmp_path / "onnx" / "additional_chat_templates" / "tools.jinja").is_file()


def test_auto_leaves_nothing_of_what_it_has_tried(tmp_path):
    """The folder is that of Optimum's exporter to the byte."""
    save(tiny_model("opt"), tmp_path / "torch")
    for exporter in ("auto", "optimum"):
        export_onnx(tmp_path / "torch", tmp_path / exporter, exporter=exporter)
    files = [{path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("auto", "optimum")]
    assert files[0] == files[1]


def test_a_missing_builder_is_told(tmp_path, monkeypatch):
    save(tiny_model("llama"), tmp_path / "torch")
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ImportError, match=r"isn't installed: pip install 'onnxruntime-genai"):
        export_onnx(tmp_path / "torch", tmp_path / "onnx", exporter="genai")
    assert export_onnx(tmp_path / "torch", tmp_path / "onnx").exporter == "optimum"


@pytest.mark.parametrize("version", ["0.16.0", "0.18.1", "1.0"])
def test_a_builder_for_another_transformers_is_told(version, monkeypatch):
    monkeypatch.setattr(fused, "genai_version", lambda: version)
    with pytest.raises(ImportError, match=rf"builder of onnxruntime-genai {version} doesn't run with transformers 4"):
        fused.require_genai()


def test_another_exporter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exporter='tensorrt' is not valid: it must be one of auto, optimum, genai"):
        export_onnx(tmp_path, tmp_path / "out", exporter="tensorrt")
    assert export.EXPORTERS == ("auto", "optimum", "genai")


def test_layers_of_their_own_width_open_without_warnings(tmp_path, capfd):
    """The builder notes for every layer the width that the config says, and ONNX Runtime warns where it isn't so."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 32:] = 0
    made = export_onnx(save(model, tmp_path / "torch"), tmp_path / "onnx", exporter="genai").output
    weights = {each.name: each for each in onnx.load(made / "model.onnx").graph.initializer}
    assert any(32 in each.dims and 64 in each.dims for each in weights.values())
    capfd.readouterr()
    onnxruntime.InferenceSession(str(made / "model.onnx"))
    assert "MergeShapeInfo" not in capfd.readouterr().err
