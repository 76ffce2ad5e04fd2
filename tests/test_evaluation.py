from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import tiny_blocks, tiny_model

from optimum_comp.evaluation import (
    Settings,
    answer,
    count_parameters,
    evaluate,
    evaluate_apart,
    perplexity,
    weight_bytes,
)
from optimum_comp.report.table import evaluation_table
from optimum_comp.utils import peak_memory_bytes


SETTINGS = {"window": 32, "max_tokens": 640, "new_tokens": 4, "prompt_tokens": 16, "repeats": 1}


def test_perplexity_is_that_of_the_loss_of_transformers():
    model = tiny_model("llama")
    tokens = tiny_blocks(6, 32).flatten()
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) for w in tokens.view(6, 32)]
    got, predictions = perplexity(model, torch.cat([tokens, tokens[:31]]), window=32)
    assert got == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)
    assert predictions == 6 * 31


def test_a_model_that_knows_the_text_has_low_perplexity():
    model = tiny_model("llama")
    tokens = model.generate(torch.tensor([[5]]), max_new_tokens=63, min_new_tokens=63, do_sample=False)[0]
    assert perplexity(model, tokens, 64)[0] < perplexity(model, tiny_blocks(1, 64).flatten(), 64)[0]


def test_evaluation_in_a_process_of_its_own(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 60)
    result = evaluate_apart(tiny_folder, Settings(text=str(text), prompts=("Hello?", "And?"), threads=1, **SETTINGS))
    here = evaluate(tiny_folder, Settings(text=str(text), prompts=("Hello?", "And?"), threads=1, **SETTINGS))
    assert result.perplexity == pytest.approx(here.perplexity, rel=1e-5)
    assert (result.predictions, result.window, result.text) == (620, 32, "text.txt")
    assert result.text_sha256 == here.text_sha256
    assert result.answers == here.answers and [each["prompt"] for each in result.answers] == ["Hello?", "And?"]
    assert result.runtime == "pytorch"
    assert result.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert result.size_bytes == (tiny_folder / "model.safetensors").stat().st_size
    assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
    assert result.peak_memory_bytes > 50e6
    table = evaluation_table({"one": result, "two": here})
    assert f"{result.perplexity:.2f} (1.000x)" in table and "620 predicted tokens in windows of 32" in table


def test_weights_that_are_there_twice_count_once(tmp_path):
    folder = tmp_path / "model" / "inner"
    tiny_model("llama").save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    (folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (folder / "model.gguf").write_bytes(bytes(500))
    assert weight_bytes(folder) == weight_bytes(tmp_path / "model", {"subfolder": "inner"}) == size
    assert weight_bytes(folder, {"gguf_file": "model.gguf"}) == 500
    (folder / "model.safetensors").unlink()
    assert weight_bytes(folder) == 1500


def test_peak_memory_is_that_of_the_process_alone():
    ballast = torch.ones(600_000_000, dtype=torch.uint8)
    assert peak_memory_bytes() > ballast.numel()
    code = "from optimum_comp.utils import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < 0.9 * ballast.numel()


def test_parts_can_be_left_out(tiny_folder):
    result = evaluate(tiny_folder, Settings(text=None, prompt_tokens=0))
    assert result.perplexity is None and result.decode_tokens_per_second is None
    assert "-" in evaluation_table({"model": result})


def test_short_text_is_refused(tiny_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("short")
    with pytest.raises(ValueError, match="don't fill one window of 512"):
        evaluate(tiny_folder, Settings(text=str(text)))


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": "Hi"},
        {"begin": "maybe"},
        {"window": 1},
        {"max_tokens": 5},
        {"new_tokens": 1},
        {"repeats": 0},
        {"threads": 0},
        {"prompt_tokens": -1},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


def test_a_failing_process_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="evaluation of"):
        evaluate_apart(tmp_path / "nothing", Settings())


def test_parameters_are_counted_once_when_tied():
    tied, untied = tiny_model("llama"), tiny_model("llama-untied")
    for model in (tied, untied):
        assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_an_answer_is_text(tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    assert isinstance(answer(model, tokenizer, "Hi", 4), str)
    tokenizer.chat_template = None
    assert isinstance(answer(model, tokenizer, "Hi", 4), str)
