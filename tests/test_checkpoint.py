from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tokenizers
import torch
from conftest import tiny_blocks, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_resume import interrupted, prune
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaModel,
    MixtralConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from optimum_comp import CompConfig, CompPruner
from optimum_comp.checkpoint.parts import _ranges
from optimum_comp.checkpoint.reader import Checkpoint, require_safetensors
from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.evaluation import load_model


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


def fingerprint(folder) -> str:
    checkpoint = Checkpoint.open(folder)
    return checkpoint.require_finite(checkpoint.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_of_the_values_in_their_order(dtype, tmp_path):
    tensors = {"a": torch.randn(600, 700).to(dtype), "b": torch.zeros(3, dtype=dtype), "empty": torch.zeros(0, 4)}
    tensors["scalar"] = torch.tensor(1.5, dtype=dtype)
    others = [
        {"a": tensors["a"].flip(0)},
        {"a": tensors["a"].index_copy(1, torch.tensor([698, 699]), tensors["a"][:, [699, 698]])},
        {"a": tensors["a"].view(700, 600)},
        {"b": -tensors["b"]},
        {"b": tensors["b"].view(torch.int16 if dtype == torch.bfloat16 else torch.int32).view(torch.float16)},
    ]
    found = []
    for number, change in enumerate([{}, {}, *others]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(
            {name: each.contiguous() for name, each in {**tensors, **change}.items()}, folder / "model.safetensors"
        )
        found.append(fingerprint(folder))
    assert found[0] == found[1] and len(set(found)) == 1 + len(others)


@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 419_999])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_bad_weight_is_found_wherever_it_is(place, bad, tmp_path):
    values = torch.zeros(420_000)
    values[place] = bad
    save_file({"a": values}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a holds NaN or infinite weights"):
        fingerprint(tmp_path)


def test_going_on_with_the_same_weights_in_another_order_is_refused(tiny_folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupted(tiny_folder, output, monkeypatch)
    weights = load_file(tiny_folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].flip(0)}, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has weights="):
        prune(tiny_folder, output, resume=True)


OTHER_WEIGHTS = [
    ("model.bin", ""),
    ("adapter.bin", ""),
    ("pytorch_model-00001-of-00002.bin", ""),
    ("consolidated.00.pth", ""),
    ("model.pt", ""),
    ("last.ckpt", ""),
    ("flax_model.msgpack", ""),
    ("tf_model.h5", ""),
    ("pytorch_model.bin", "convert it once"),
    ("pytorch_model.bin.index.json", "convert it once"),
]


@pytest.mark.parametrize(("name", "advice"), OTHER_WEIGHTS)
def test_weights_of_another_kind_are_named(name, advice, tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / name)
    advice = advice or "load the model with what wrote it"
    for refused in (lambda: CompPruner.from_pretrained(tiny_folder), lambda: load_model(tiny_folder)):
        with pytest.raises(ValueError, match=advice) as caught:
            refused()
        assert name in str(caught.value) and "pickle" in str(caught.value)
    (tiny_folder / name).unlink()
    with pytest.raises(OSError, match="holds no weights"):
        CompPruner.from_pretrained(tiny_folder)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**31, 10**6])
def test_a_header_that_lies_about_its_length_is_not_read(length, tiny_folder):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    for read in (lambda: _ranges(path), lambda: Checkpoint.open(tiny_folder)):
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            read()


class Hub(BaseHTTPRequestHandler):
    """What of the hub's interface a look at the names in a repository needs."""

    names: tuple[str, ...] = ()
    log_message = staticmethod(lambda *_: None)

    def do_GET(self):
        files = [{"type": "file", "path": name, "size": 9, "oid": "0" * 40} for name in self.names]
        body = json.dumps(files).encode()
        self.send_response(200 if self.path.startswith("/api/models/some/model/tree/main") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("names", "subfolder", "error", "message"),
    [
        (("config.json", "pytorch_model.bin"), "", "ValueError", "as a pickle (pytorch_model.bin)"),
        (("config.json", "model.bin"), "", "ValueError", "no safetensors weights, but model.bin"),
        (("config.json", "old/model.bin"), "", "OSError", "holds no weights"),
        (("config.json", "old/model.bin"), "old", "ValueError", "no safetensors weights, but model.bin"),
    ],
)
def test_on_the_hub_names_alone_are_looked_at(names, subfolder, error, message, tmp_path, monkeypatch):
    """Files that aren't there are never asked for: this hub has none."""
    monkeypatch.setattr(Hub, "names", names)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = (
            "from pathlib import Path; from optimum_comp.checkpoint.reader import require_safetensors\n"
            f"require_safetensors('some/model', Path({str(tmp_path)!r}), {{'subfolder': {subfolder!r}}})"
        )
        given = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
        server.shutdown()
    assert f"{error}: some/model holds " in done.stderr and message in done.stderr
    with pytest.raises(OSError, match="holds no weights"):
        require_safetensors("some/model", tmp_path, {"local_files_only": True})


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


@pytest.mark.parametrize(("model_type", "is_warned"), [("gemma3_text", False), ("mistral", True)])
def test_only_of_mistrals_tokenizers_is_said_what_is_wrong_with_those(model_type, is_warned, tmp_path, caplog):
    words = {f"w{number}": number for number in range(100_010)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Whitespace()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "transformers_version": "4.57.6", "vocab_size": len(words)})
    )
    with caplog.at_level("WARNING"):
        open_tokenizer(tmp_path)
        there = [record.getMessage() for record in caplog.records]
        AutoTokenizer.from_pretrained(tmp_path)
    # Where transformers says it of all, as some versions do.
    says = any("fix_mistral_regex" in record.getMessage() for record in caplog.records[len(there) :])
    assert any("fix_mistral_regex" in said for said in there) == (says and is_warned)
