"""One contract for every family: prune along every axis, save, reload in plain transformers, export, quantize.

The table in docs/families.md says what these tests found; `make families` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_blocks
from tiny_families import CONFIGS, tiny_config, tiny_family

from optimum_comp import CompConfig, CompPruner
from optimum_comp.families import FAMILIES, FFN, HEADS, KV, LAYERS, family_of
from optimum_comp.families.check import check_result
from optimum_comp.families.cutting import filled_parameters


SETTINGS = {"num_samples": 16, "sequence_length": 32, "round_to": 8}
VARIANTS = {
    FFN: {"sparsity": 0.2, "axes": ["ffn"]},
    KV: {"sparsity": 0.4, "axes": ["ffn", "kv"], "attention_fraction": 1.0},
    HEADS: {"sparsity": 0.4, "axes": ["ffn", "heads"], "attention_fraction": 1.0},
    LAYERS: {"sparsity": 0.3, "layer_fraction": 1.0},
}
ADAPTIVE = {"sparsity": 0.2, "axes": ["ffn"], "allocation": "adaptive"}
MAJOR = int(transformers.__version__.split(".")[0])
FOUND: dict[str, dict[str, bool]] = {}
"""Config -> what the tests of this session found."""


def able(name: str) -> dict[str, str | None]:
    """Axis -> why it can't be pruned; `None` if it can."""
    config = tiny_config(name)
    return {what: family_of(config).refusal(what, config) for what in VARIANTS}


def everything(name: str) -> dict[str, object]:
    """All that can be pruned, at once."""
    may = [what for what, reason in able(name).items() if reason is None]
    axes = [axis for axis in (FFN, KV, HEADS) if axis in may]
    if not axes:
        return {"sparsity": 0.3, "layer_fraction": 1.0}
    return {
        "sparsity": 0.45,
        "layer_fraction": 0.56 if LAYERS in may else 0.0,
        "attention_fraction": 0.44 if {KV, HEADS} & set(may) else 0.0,
        "axes": axes,
    }


def prune(name: str, **fields):
    pruner = CompPruner.from_pretrained(tiny_family(name))
    pruner.prune(CompConfig(**{**SETTINGS, **fields}), tiny_blocks(), batch_size=5)
    return pruner


def test_every_family_is_covered():
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)


@pytest.fixture(scope="module")
def plain_transformers():
    """Has a process that knows transformers alone open checkpoints `root/name`."""
    command = [sys.executable, str(Path(__file__).with_name("plain_transformers.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def look(root: Path, names: list[str]) -> None:
            process.stdin.write(json.dumps({"root": str(root), "names": names}) + "\n")
            process.stdin.flush()
            wrong = process.stdout.readline()
            assert wrong and not json.loads(wrong), wrong and json.loads(wrong)

        yield look
        process.stdin.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name, plain_transformers, tmp_path):
    dense = sum(parameter.numel() for parameter in tiny_family(name).parameters())
    prompt = tiny_blocks(2, 12, seed=9)
    torch.save(prompt, tmp_path / "prompt.pt")
    wanted: dict[str, torch.Tensor] = {}
    reasons = able(name)
    reasons["adaptive"] = reasons[FFN]
    for what, fields in {**VARIANTS, "adaptive": ADAPTIVE, "everything": everything(name)}.items():
        if reasons.get(what) is not None:
            with pytest.raises(ValueError, match="can't be"):
                prune(name, **fields)
            continue
        pruner = prune(name, **fields)
        report = pruner.report
        folder = pruner.save_pretrained(tmp_path / what)
        with torch.no_grad():
            wanted[what] = pruner.model(prompt).logits

        # Really smaller, where it was to be, and by what the report says.
        assert report.parameters_before == dense
        there = sum(p.numel() for p in pruner.model.parameters())
        assert report.parameters_after == there - filled_parameters(pruner.model) < dense
        assert what == "adaptive" or there == report.parameters_after
        assert report.achieved_sparsity >= fields["sparsity"]
        changed = {kind for kind, (before, after) in report.units.items() if after < before}
        assert what in ("everything", "adaptive") or what in changed or (what == LAYERS and report.removed_layers)
        for layer in report.layers:
            # At most 0.54; 1 if nothing is left of what the units did.
            assert all(0 <= each.relative_error < 0.6 for each in layer.decisions)
        config = json.loads((folder / "config.json").read_text())
        for field in family_of(tiny_config(name)).per_layer_fields:
            assert len(config.get(field) or report.layers) == len(report.layers)
        # Read from files, and pruned a layer at a time, it is the same.
        if what == "everything":
            tiny_family(name).save_pretrained(tmp_path / "dense")
            streamed = CompPruner.from_pretrained(tmp_path / "dense")
            streamed.prune(
                CompConfig(**{**SETTINGS, **fields}), tiny_blocks(), batch_size=5, output=tmp_path / "streamed"
            )
            with torch.no_grad():
                torch.testing.assert_close(streamed.model(prompt).logits, wanted[what], rtol=0, atol=1e-6)

    plain_transformers(tmp_path, sorted(wanted))
    for what, logits in wanted.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{what}.pt"), logits, rtol=0, atol=1e-5)
    FOUND.setdefault(name, {}).update({what: what in wanted for what in VARIANTS}, reload=True)


@pytest.mark.onnx
@pytest.mark.parametrize("name", CONFIGS)
def test_contract_of_the_export(name, tmp_path):
    from optimum_comp.evaluation import load_model
    from optimum_comp.onnx.export import export_onnx
    from optimum_comp.onnx.quantization import quantize_onnx

    folder = prune(name, **everything(name), allocation="adaptive").save_pretrained(tmp_path / "pruned")
    exported = export_onnx(folder, tmp_path / "onnx")
    # At most 5e-7; the export itself refuses more than 1e-3.
    assert max(exported.max_difference_prefill, exported.max_difference_cached) < 3e-6
    quantize_onnx(exported.output, tmp_path / "int8", recipe="int8")
    prompt = tiny_blocks(2, 12, seed=9)
    model, _ = load_model(tmp_path / "int8")
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert answer.shape == (2, 18)
    FOUND.setdefault(name, {}).update(onnx=True, int8=True)


@pytest.mark.onnx
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_a_tied_embedding_is_exported_once(name, tmp_path):
    import numpy as np
    import onnx

    from optimum_comp.onnx.export import export_onnx

    model = tiny_family(name)
    kind = type(model.get_input_embeddings()).__name__
    model.save_pretrained(tmp_path / "dense")
    graph = onnx.load(export_onnx(tmp_path / "dense", tmp_path / "onnx").output / "model.onnx").graph
    embedding = model.get_input_embeddings().weight.detach().numpy()
    values = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2]
    copies = [each for each in values for same in (embedding, embedding.T) if np.array_equal(each, same)]
    assert len(copies) == 1
    # The class has its name back.
    assert type(model.get_input_embeddings()).__name__ == kind


ATTENTION = [name for name in CONFIGS if able(name)[KV] is None]
WITHIN = [name for name in CONFIGS if able(name)[HEADS] is None]


@pytest.mark.parametrize(("axis", "name"), [(KV, name) for name in ATTENTION] + [(HEADS, name) for name in WITHIN])
def test_heads_that_do_nothing_go_first_and_the_model_stays(axis, name):
    """Groups (or heads) whose columns of the output projection are zero: the right rows and columns go."""
    model = tiny_family(name)
    family, config = family_of(model.config), model.config
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    each = heads // groups
    generator = torch.Generator().manual_seed(0)
    idle = {}
    for index, layer in enumerate(family.get_layers(model)):
        weight = family.axis(KV).consumer.matrix(layer)
        width = weight.shape[1] // heads
        if axis == KV:
            group = int(torch.randint(groups, (1,), generator=generator))
            idle[index] = {group}
            weight.data[:, group * each * width : (group + 1) * each * width] = 0
        else:
            idle[index] = {g * each + int(torch.randint(each, (1,), generator=generator)) for g in range(groups)}
            for head in idle[index]:
                weight.data[:, head * width : (head + 1) * width] = 0
    prompt = tiny_blocks(2, 12, seed=9)
    whole = family.layer_parameters(config, layer, {})
    left = {KV: groups - 1, HEADS: heads - each} if axis == KV else {HEADS: heads - groups}
    share = 1 - family.layer_parameters(config, layer, left) / whole
    with torch.no_grad():
        before = model(prompt).logits
        pruner = CompPruner.from_pretrained(model)
        fields = {"sparsity": share - 1e-6, "axes": [axis]}
        pruner.prune(CompConfig(**{**SETTINGS, **fields}), tiny_blocks(), matmul_dtype="float32")
        after = model(prompt).logits
    for layer in pruner.report.layers:
        count = groups if axis == KV else heads
        assert set(range(count)) - set(layer.decision(axis).kept) == idle[layer.index]
    # At most 8e-6; from 1e-3 where heads go that do something.
    torch.testing.assert_close(after, before, rtol=0, atol=5e-5)
    assert pruner.report.width == family.counts(config, family.get_layers(model)[0])[FFN]


def test_whole_groups_are_rounded_up_where_none_has_a_head_to_spare():
    pruner = CompPruner.from_pretrained(tiny_family("phi"))
    plan = pruner.plan(CompConfig(axes=["kv", "heads"], sparsity=0.03))
    assert plan.units == {FFN: 96, KV: 3}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("t5", "encoder-decoder"),
        ("bert", "no family spec"),
        ("mamba", "no attention"),
        ("gemma3", "language model"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name_with_the_reason(model_type, reason):
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(ValueError, match=rf"model_type='{model_type}'.*{reason}"):
        family_of(config)


def test_layers_whose_number_is_in_their_attention_stay():
    model = tiny_family("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="layers of gpt2 can't be removed: its attention is scaled by the layer's"):
        CompPruner.from_pretrained(model).prune(CompConfig(layer_fraction=1.0, sparsity=0.3), tiny_blocks())


def test_a_spec_that_does_not_fit_costs_no_work(monkeypatch):
    import dataclasses

    from optimum_comp.families import Axis, Slot

    llama = FAMILIES["llama"]
    wrong = {
        "has no mlp.down": dataclasses.replace(
            llama, axes=(Axis(FFN, Slot("mlp.down", (FFN,)), llama.ffn.producers, llama.ffn.fields),)
        ),
        "config.width is missing": dataclasses.replace(
            llama, axes=(Axis(FFN, llama.ffn.consumer, llama.ffn.producers, ((FFN, "width"),)),)
        ),
        "there is no model.blocks": dataclasses.replace(llama, layers="model.blocks"),
        "config.depth is None": dataclasses.replace(llama, depth_field="depth"),
        # A fused projection that the spec doesn't know for one: it would be cut at the wrong rows.
        "self_attn.q_proj.weight of shape": dataclasses.replace(
            llama,
            axes=(
                Axis(FFN, llama.ffn.consumer, (Slot("self_attn.q_proj", ("gate:ffn", "up:ffn")),), llama.ffn.fields),
            ),
        ),
    }
    for problem, spec in wrong.items():
        model = tiny_family("llama")
        monkeypatch.setitem(FAMILIES, "llama", spec)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises((ValueError, AttributeError), match=problem):
            CompPruner.from_pretrained(model).prune(CompConfig(**SETTINGS), tiny_blocks())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox", "stablelm"])
def test_a_config_that_ignores_what_it_is_told_is_found_out_before_the_run(model_type, monkeypatch):
    """These take `head_dim` without a word and build something else."""
    import dataclasses

    from optimum_comp.families.catalogue import attention
    from optimum_comp.families.spec import Slot

    family = FAMILIES[model_type]
    layer = family.get_layers(tiny_family(model_type))[0]
    output = next(
        path
        for path in ("self_attn.o_proj", "self_attn.out_proj", "attention.dense", "attn.c_proj")
        if Slot(path).is_in(layer)
    )
    qkv = tuple(
        Slot(
            path,
            ("q:heads", "k:kv", "v:kv") if len(family.attention) == 1 else ((HEADS,) if "q_" in path else (KV,)),
            transposed=family.ffn.consumer.transposed,
        )
        for path in family.attention
    )
    axes = (family.ffn, *attention(output, *qkv))
    if family.ffn.consumer.transposed:
        axes = tuple(
            dataclasses.replace(axis, consumer=dataclasses.replace(axis.consumer, transposed=True)) for axis in axes
        )
    monkeypatch.setitem(FAMILIES, model_type, dataclasses.replace(family, axes=axes, refusals=()))
    name = next(each for each, (kind, _) in CONFIGS.items() if kind == model_type)
    with pytest.raises(ValueError, match=r"a config of .* can't say what the pruned model would be"):
        model = tiny_family(name)
        model.config.num_key_value_heads = getattr(model.config, "num_key_value_heads", 4)
        CompPruner.from_pretrained(model).prune(CompConfig(**SETTINGS, **VARIANTS[KV]), tiny_blocks())


def test_a_result_that_its_config_does_not_describe_is_not_published(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = prune("llama").save_pretrained(tmp_path / "out")
    check_result(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for change, problem in (
        ({name: weights[name][:, :-8].contiguous()}, "has shape"),
        ({name: None}, "is missing"),
        ({"model.layers.9.mlp.down_proj.weight": weights[name].clone()}, "isn't one of its weights"),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match=problem):
            check_result(folder)


def test_a_result_that_fails_the_check_costs_no_finished_work(tmp_path, monkeypatch):
    tiny_family("llama").save_pretrained(tmp_path / "dense")

    def fails(folder, **_):
        raise RuntimeError("the pruned model can't be loaded by its own config: this is a test.")

    fields = CompConfig(**SETTINGS)
    pruner = CompPruner.from_pretrained(tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr("optimum_comp.pruner.check_result", fails)
        with pytest.raises(RuntimeError, match="this is a test"):
            pruner.prune(fields, tiny_blocks(), output=tmp_path / "out")
    assert len(list((tmp_path / "out" / "comp_work").glob("layer-*.safetensors"))) == 4
    assert not (tmp_path / "out" / "config.json").exists()
    CompPruner.from_pretrained(tmp_path / "dense").prune(output=tmp_path / "out", resume=True)
    check_result(tmp_path / "out")


TABLE = Path(__file__).parent.parent / "docs" / "families.md"


def test_the_table_says_what_was_found():
    """Last: after a whole run of this file, docs/families.md has what it found."""
    from family_table import read, written

    if set(FOUND) != set(CONFIGS):
        pytest.skip("only part of the contract was run")
    column = f"transformers {MAJOR}"
    rows = {
        name: {**{key: value for key, value in found.items() if key != "reload"}, column: found.get("reload", False)}
        for name, found in FOUND.items()
    }
    if os.environ.get("COMP_WRITE_TABLE"):
        TABLE.write_text(written(rows, read(TABLE)), encoding="utf-8")
    known = read(TABLE)
    for name, row in rows.items():
        assert known[name].items() >= row.items(), f"{name}: run `make families`"
