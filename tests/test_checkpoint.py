from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_blocks, tiny_model, tiny_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, LlamaModel, MixtralConfig, T5Config

from optimum_comp import CompConfig, CompPruner


CONFIG = {"sparsity": 0.3, "num_samples": 8, "sequence_length": 32, "round_to": 8}


def pruned(source, calibration=None) -> CompPruner:
    pruner = CompPruner.from_pretrained(source)
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32) if calibration is None else calibration)
    return pruner


def test_the_folder_is_complete(tiny_folder, tmp_path):
    folder = pruned(tiny_folder).save_pretrained(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"comp_config.json", "comp_report.json", "tokenizer.json", "tokenizer_config.json"} <= names
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tiny_folder / name).exists() and "TokenizersBackend" not in (tiny_folder / name).read_text():
            assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer().chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.max_new_tokens == 7
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - no dict


def test_side_cars_say_what_was_done(tiny_folder, tmp_path):
    pruner = pruned(tiny_folder)
    folder = pruner.save_pretrained(tmp_path / "out")
    report = json.loads((folder / "comp_report.json").read_text())
    assert report["requested_sparsity"] == 0.3 <= report["achieved_sparsity"]
    (decisions,) = zip(*(layer["decisions"] for layer in report["layers"]), strict=True)
    assert report["units"] == {"ffn": [96, len(decisions[0]["kept"])], "heads": [4, 4], "kv": [2, 2]}
    assert [len(each["kept"]) for each in decisions] == [report["units"]["ffn"][1]] * 4
    assert [len(each["scores"]) for each in decisions] == [96] * 4
    assert len(report["calibration"]["sha256"]) == 64
    assert set(report["versions"]) >= {"torch", "transformers", "optimum", "python"}
    assert CompConfig.from_pretrained(folder).sparsity == 0.3
    card = (folder / "README.md").read_text()
    assert f"{report['achieved_sparsity']:.4f}" in card and "library_name: transformers" in card
    assert str(tmp_path) not in card


def test_kept_rows_are_the_dense_models(tiny_folder, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    pruner = pruned(tiny_folder)
    for layer, old, new in zip(pruner.report.layers, dense.model.layers, pruner.model.model.layers, strict=True):
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[layer.kept])
        assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[layer.kept])
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight)


def test_existing_output_is_refused_and_replaced_only_when_asked(tiny_folder, tmp_path):
    pruner = pruned(tiny_folder)
    folder = pruner.save_pretrained(tmp_path / "out")
    (folder / "stale.txt").write_text("old")
    with pytest.raises(FileExistsError, match="overwrite"):
        pruner.save_pretrained(folder)
    assert (folder / "stale.txt").exists()
    pruner.save_pretrained(folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    with pytest.raises(ValueError, match="input"):
        pruner.save_pretrained(tiny_folder, overwrite=True)
    precious = tmp_path / "documents"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="doesn't look like a model"):
        pruner.save_pretrained(precious, overwrite=True)
    assert (precious / "thesis.tex").exists()


def test_half_precision_stays_half_precision(tiny_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_folder).to(torch.bfloat16).save_pretrained(tiny_folder)
    folder = pruned(tiny_folder).save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    asked = CompPruner.from_pretrained(tiny_folder, dtype=torch.float32)
    assert asked.model.dtype == torch.float32


def test_sharded_saving(tiny_folder, tmp_path):
    pruner = pruned(tiny_folder)
    folder = pruner.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    prompt = tiny_blocks(1, 8)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder)(prompt).logits
        torch.testing.assert_close(again, pruner.model(prompt).logits)


def test_saving_before_pruning_and_pruning_twice_are_refused(tiny_folder, tmp_path):
    pruner = CompPruner.from_pretrained(tiny_folder)
    with pytest.raises(RuntimeError, match="has not been called"):
        pruner.save_pretrained(tmp_path / "out")
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32))
    with pytest.raises(RuntimeError, match="pruned already"):
        pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32))
    with pytest.raises(TypeError, match="max_shards"):
        pruner.save_pretrained(tmp_path / "out", max_shards=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused_by_name_before_any_work(bad):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 3] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinite"):
        CompPruner.from_pretrained(model).prune(CompConfig(**CONFIG), tiny_blocks(8, 32))


def test_bad_activations_name_the_layer_and_leave_nothing(tmp_path):
    model = tiny_model("llama")
    # Finite weights whose product overflows float32.
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    pruner = CompPruner.from_pretrained(model)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or infinity"):
        pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32))
    with pytest.raises(RuntimeError, match="was interrupted"):
        pruner.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "model_type='bert' has no family spec; supported: bloom, cohere, falcon, gemma"),
        (MixtralConfig(), "model_type='mixtral' is a mixture of experts"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_other_models_are_refused_before_their_weights_are_read(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CompPruner.from_pretrained(tmp_path)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model"):
        CompPruner.from_pretrained(LlamaModel(tiny_model("llama").config))


def test_protected_layers_must_exist():
    pruner = CompPruner.from_pretrained(tiny_model("llama"))
    with pytest.raises(ValueError, match="the model has 4 layers"):
        pruner.plan(CompConfig(protected_layers=[9]))


def test_importing_the_package_is_light():
    code = "import sys, optimum_comp; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
