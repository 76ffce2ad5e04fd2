from __future__ import annotations

import json

import pytest
import torch
from conftest import IDS, SIZES, need_onnx, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig


need_onnx()

from optimum_comp.core.gram import GramAccumulator  # noqa: E402
from optimum_comp.evaluation import perplexity  # noqa: E402
from optimum_comp.onnx.calibration import second_moments  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.folders import graph_bytes  # noqa: E402
from optimum_comp.onnx.graph import dense_nodes, load_float_graph  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402
from optimum_comp.onnx.recipes import BUDGET, Format  # noqa: E402
from optimum_comp.onnx.runtime import load_onnx  # noqa: E402
from optimum_comp.onnx.search import Budget, search  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama that predicts its own text well, its ONNX folder, and that text."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **IDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
        # One layer does much more than the others.
        model.model.layers[-1].mlp.down_proj.weight.mul_(3)
    start = torch.randint(3, 128, (16, 1), generator=torch.Generator().manual_seed(1))
    tokens = model.generate(start, max_new_tokens=47, min_new_tokens=47, do_sample=True, top_k=0, pad_token_id=0)
    model.save_pretrained(folder / "torch")
    export_onnx(folder / "torch", folder / "onnx")
    return folder / "onnx", tokens


def ratio(folder, source, tokens) -> float:
    models = (load_onnx(each, threads=1) for each in (folder, source))
    quantized, dense = (perplexity(model, tokens.flatten(), tokens.shape[1])[0] for model in models)
    return quantized / dense


def test_second_moments_are_those_of_the_inputs(tmp_path):
    model = tiny_model("opt")
    model.save_pretrained(tmp_path / "torch")
    graph = load_float_graph(export_onnx(tmp_path / "torch", tmp_path / "onnx").output / "model.onnx")
    tokens = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    nodes = [node for node in dense_nodes(graph.graph) if not node.is_head]
    outputs, inputs = len(graph.graph.output), len(graph.graph.input)
    (found,) = second_moments(graph, nodes, tokens)
    # A part at a time, if they take more than is allowed: OPT's two widths are 64 and 96.
    parts = list(second_moments(graph, nodes, tokens, limit=2 * 64**2 * 4))
    assert len(parts) > 4 and max(sum(each.numel() * 4 for each in part.values()) for part in parts) <= 96**2 * 4
    together = {name: each for part in parts for name, each in part.items()}
    assert together.keys() == found.keys() and all(torch.equal(together[name], found[name]) for name in found)
    assert (len(graph.graph.output), len(graph.graph.input)) == (outputs, inputs)

    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "out_proj", "fc1", "fc2")):
            total = seen[name] = GramAccumulator(module.in_features)
            module.register_forward_pre_hook(lambda _, args, total=total: total.update(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    for name, total in seen.items():
        layer, path = name.removeprefix("model.decoder.layers.").split(".", 1)
        (node,) = (node for node in nodes if f"/layers.{layer}/{path.replace('.', '/')}/" in node.name)
        expected = total.value().float()
        torch.testing.assert_close(found[node.inputs], expected, atol=1e-4 * float(expected.max()), rtol=1e-3)


def test_a_budget_of_perplexity_is_kept(exported, tmp_path):
    source, tokens = exported
    sizes = []
    for allowed in (0.05, 0.0005):
        found = search(source, Budget(perplexity_increase=allowed), tokens[:8], tokens[8:])
        report = quantize_onnx(source, tmp_path / str(allowed), recipe=BUDGET, plan=found.plan)
        assert report.size_bytes == found.size
        assert ratio(report.output, source, tokens[8:]) - 1 <= allowed
        sizes.append(report.size_bytes)
        recorded = json.loads((report.output / "ort_config.json").read_text())["comp_recipe"]
        assert recorded["name"] == BUDGET
        assert len(recorded["nodes"]) == len(found.plan.assignment)
    assert sizes[0] < sizes[1] < graph_bytes(source)


def test_a_budget_of_size_is_used_well(exported, tmp_path):
    source, tokens = exported
    plain = quantize_onnx(source, tmp_path / "int8").size_bytes
    found = search(source, Budget(size=plain), tokens[:8], tokens[8:])
    report = quantize_onnx(source, tmp_path / "found", recipe=BUDGET, plan=found.plan)
    assert 0.8 * plain < report.size_bytes <= plain


def test_the_most_sensitive_group_gets_its_bits_first(exported):
    source, tokens = exported
    found = search(source, Budget(perplexity_increase=0.01), tokens[:8], tokens[8:])
    formats = found.plan.assignment
    groups = {node.inputs: node.name for node in dense_nodes(load_float_graph(source / "model.onnx").graph)}
    ranked = sorted(found.sensitivities, key=lambda name: -found.sensitivities[name])
    kept = [name for name in ranked if formats.get(groups[name], Format(32, 0)).bits > 4]
    assert 0 < len(kept) < len(ranked)
    assert ranked[0] in kept


def test_a_size_alone_is_kept_with_nothing_measured(exported):
    source, tokens = exported
    found = search(source, Budget(size=graph_bytes(source) // 2), tokens[:8], tokens[:0])
    assert found.size <= graph_bytes(source) // 2 and found.trials == () and found.increase is None


def test_what_cannot_be_kept_is_said(exported, tmp_path):
    source, tokens = exported
    with pytest.raises(ValueError, match=r"max_size=1\.0 kB can't be kept.*4 bits"):
        search(source, Budget(size=1000), tokens[:8], tokens[8:])
    size = quantize_onnx(source, tmp_path / "int8").size_bytes
    with pytest.raises(ValueError, match=r"max_perplexity_increase=0\.00% can't be kept within .* nearest"):
        # Well below 8 bits, where no luck makes the text likelier.
        search(source, Budget(perplexity_increase=1e-9, size=int(0.85 * size)), tokens[:8], tokens[8:])


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match="largest size"):
        Budget()
    with pytest.raises(ValueError, match=r"max_perplexity_increase=-0\.1"):
        Budget(perplexity_increase=-0.1)
