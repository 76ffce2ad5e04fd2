"""llama.cpp beside ONNX Runtime: the benchmark gives it the very weights, and says why where it can't."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, need_onnx, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from optimum_comp.evaluation import Settings


# The benchmark stands beside ONNX Runtime's, with the transformers that has it.
need_onnx()
gguf = pytest.importorskip("gguf")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def llama_cpp(benchmarks):
    return benchmarks("llama_cpp")


def grouped_llama(folder: Path, **changes) -> Path:
    """Untied, heads of a width that isn't hidden size / heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = LlamaConfig(**{"vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, **sizes, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_has_the_checkpoints_weights(tied, llama_cpp, tmp_path):
    source = grouped_llama(tmp_path / "llama", tie_word_embeddings=tied, rope_theta=5e4)
    llama_cpp.write_gguf(source, tmp_path / "model.gguf")
    # transformers' own reader undoes what llama.cpp wants otherwise.
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    for name in ("rope_theta", "head_dim", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(found.config, name) == pytest.approx(getattr(expected.config, name)), name
    stored = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in stored) is not tied


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is {.*linear"),
    ],
)
def test_what_is_not_written_is_refused(changes, said, llama_cpp, tmp_path):
    source = grouped_llama(tmp_path / "llama", **changes)
    with pytest.raises(llama_cpp.LlamaCppUnavailableError, match=said):
        llama_cpp.write_gguf(source, tmp_path / "model.gguf")
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(llama_cpp.LlamaCppUnavailableError, match="model_type is 'opt'"):
        llama_cpp.write_gguf(tmp_path / "opt", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model*"))


def test_a_machine_without_it_is_told_why(llama_cpp, benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "")
    assert benchmarks("speed").in_llama_cpp("somewhere", tmp_path, Settings()) == {}
    assert capsys.readouterr().err == "without llama.cpp: there is no node: install Node.js 20 or later.\n"
    monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "s390x")
    with pytest.raises(llama_cpp.LlamaCppUnavailableError, match=r"no build .* s390x"):
        llama_cpp.set_up(tmp_path)


@pytest.mark.parametrize(("body", "said"), [("echo 'npm error code E404' >&2; exit 1", "code E404"), ("exit 3", "3")])
def test_an_installation_that_fails_says_what_npm_said(body, said, benchmarks, tmp_path, monkeypatch):
    for name in ("node", "npm"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    node_packages = benchmarks("node_packages")
    for _ in range(2):
        with pytest.raises(node_packages.NodeUnavailableError, match=f"npm install failed in .*{said}$"):
            node_packages.install({"nothing-like-it": "1.0.0"}, tmp_path / "there")
    assert json.loads((tmp_path / "there" / "package.json").read_text())["dependencies"] == {
        "nothing-like-it": "1.0.0"
    }


@pytest.mark.slow
def test_llama_cpp_generates_what_pytorch_generates(real_model, llama_cpp, tmp_path):
    # One thread: more than there are free cores wait for each other most of the time.
    try:
        modules, _ = llama_cpp.set_up(tmp_path)
    except llama_cpp.LlamaCppUnavailableError as error:
        pytest.skip(f"no llama.cpp: {error}")
    llama_cpp.write_gguf(real_model, tmp_path / "F32.gguf")
    prompt = AutoTokenizer.from_pretrained(real_model)("The capital of France is", return_tensors="pt")
    whole = AutoModelForCausalLM.from_pretrained(real_model).generate(**prompt, max_new_tokens=12, do_sample=False)
    ids, expected = whole[0, :-12].tolist(), whole[0, -12:].tolist()
    assert llama_cpp.generated(tmp_path / "F32.gguf", modules, ids, 12, threads=1) == expected
    settings = Settings(text=None, prompt_tokens=16, long_prompt_tokens=32, new_tokens=4, repeats=1, threads=1)
    measured = dict(llama_cpp.measure(real_model, tmp_path, settings, ["Q8_0", "Q4_0"]))
    eight, four = measured["Q8_0"], measured["Q4_0"]
    assert 0.25 < eight.size_bytes / (tmp_path / "F32.gguf").stat().st_size < 0.28
    assert four.size_bytes < 0.65 * eight.size_bytes
    assert eight.parameters == 134_515_008
    for result in measured.values():
        assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
        assert (result.prompt_tokens, result.long_prompt_tokens, result.threads) == (16, 32, 1)
        # The weights are mapped into memory, and there is Node.js.
        assert result.size_bytes < result.peak_memory_bytes < 600e6
