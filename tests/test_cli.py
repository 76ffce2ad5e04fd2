"""The command line as a user meets it: in processes of its own."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from conftest import run, run_until, tiny_model
from transformers import AutoModelForCausalLM, BertConfig

from optimum_comp.bundle import verify_bundle


SMALL = ("--num-samples", "8", "--sequence-length", "32", "--round-to", "8")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat and looked at the moon.\n" * 60)
    return path


def test_help_is_fast_and_complete():
    started = time.perf_counter()
    shown = run("--help", alone=True).stdout
    # Imports of torch or transformers alone would take longer than this.
    assert time.perf_counter() - started < 5
    assert all(name in shown for name in ("prune", "quantize", "compress", "eval", "bench"))
    options = run("prune", "--help").stdout
    for option in ("--model", "--sparsity", "--calibration", "--num-samples", "--sequence-length", "--seed"):
        assert option in options
    for option in ("--max-memory", "--device", "--resume", "--allow-pickle", "--trust-remote-code"):
        assert option in options
    assert "--overwrite" in options and "--json FILE" in options and "OUTPUT" in options


def test_prune(tiny_folder, text, tmp_path):
    numbers = tmp_path / "numbers.json"
    arguments = ("prune", "--model", tiny_folder, "--sparsity", 0.3, "--calibration", text, "--seed", 3, *SMALL)
    done = run(*arguments, "--json", numbers, tmp_path / "out")
    assert re.search(r"30\.00% asked: feed-forward width 96 -> \d+", done.stdout)
    assert "of memory at the peak" in done.stderr and "Peak memory" in done.stderr and "Pruning" in done.stderr
    assert json.loads(numbers.read_text())["achieved_sparsity"] >= 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size < 96
    again = run(*arguments, tmp_path / "out", check=False)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    run(*arguments, "--overwrite", "--quiet", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comp_config.json").read_text())["seed"] == 3


def test_quiet_prints_the_result_alone(tiny_folder, text, tmp_path):
    done = run("prune", "--model", tiny_folder, "--calibration", text, *SMALL, "--quiet", tmp_path / "out")
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_self_calibration_is_the_default(tiny_folder, tmp_path):
    run("prune", "--model", tiny_folder, *SMALL, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comp_report.json").read_text())["calibration"]["source"] == "self"


def test_presets_and_stored_configs(tiny_folder, text, tmp_path):
    run("prune", "--model", tiny_folder, "--calibration", text, "--preset", "fasp", *SMALL, tmp_path / "fasp")
    stored = json.loads((tmp_path / "fasp" / "comp_config.json").read_text())
    assert stored["neuron_metric"] == "wanda"
    run(
        "prune",
        "--model",
        tiny_folder,
        "--calibration",
        text,
        "--config",
        tmp_path / "fasp",
        "--seed",
        5,
        tmp_path / "b",
    )
    assert json.loads((tmp_path / "b" / "comp_config.json").read_text()) == {**stored, "seed": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", 0), "sparsity=0.0 is not valid: sparsity must be a number in (0, 1)"),
        (("--sparsity", 1), "sparsity=1.0 is not valid"),
        (("--sparsity", -0.2), "sparsity=-0.2 is not valid"),
        (("--sparsity", "nan"), "sparsity=nan is not valid"),
        (("--sparsity", 0.9), "leaves no neuron in the feed-forward layers"),
        (("--preset", "best"), "preset='best' is not valid: preset must be one of comp, comp-mask, fasp"),
        (("--protected-layers", "0,9"), "the model has 4 layers"),
        (("--calibration", "missing.txt"), "'missing.txt' does not exist"),
        (("--num-samples", 100000), "num_samples=100000 needs"),
        (("--max-memory", "much"), "max_memory='much' is not valid: give a size like 4GB"),
        (("--max-memory", "50MB"), "50.0 MB (max_memory) is too little: this model needs at least"),
        (("--device", "cuda:99"), "device='cuda:99'"),
        (("--dtype", "int8"), "dtype='int8' is not valid"),
        (("--batch-size", 0), "batch_size=0 is not valid"),
        (
            ("--matmul-dtype", "fp8"),
            "matmul_dtype='fp8' is not valid: matmul_dtype must be one of auto, float32, bfloat16",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(arguments, message, tiny_folder, text, tmp_path):
    given = ("--calibration", text) if "--calibration" not in arguments else ()
    done = run("prune", "--model", tiny_folder, *given, *arguments, tmp_path / "out", check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("command", ["prune", "compress", "eval", "bench"])
def test_a_folder_that_is_not_there_is_said_at_once(command, tiny_folder, tmp_path):
    missing = tmp_path / "missing"
    given = {"bench": (tiny_folder, missing), "eval": ("--model", missing)}
    done = run(command, *given.get(command, ("--model", missing, tmp_path / "out")), check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert f"error: there is no folder {missing}. Give a folder, or a model on the hub" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.onnx
@pytest.mark.parametrize("place", ["", "phone"])
def test_a_bundle_in_the_output_is_refused_at_once(place, tiny_folder, tmp_path):
    output = tmp_path / "out"
    done = run("compress", "--model", tiny_folder, "--bundle", output / place, output, check=False)
    assert done.returncode == 1 and "are one folder, or one holds the other" in done.stderr
    assert "Writing calibration text" not in done.stderr and not output.exists()


def test_a_word_for_a_number_is_refused(tiny_folder, tmp_path):
    done = run("prune", "--model", tiny_folder, "--sparsity", "much", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "sparsity='much' is not valid: sparsity must be a number in (0, 1)." in done.stderr


def test_other_models_are_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    done = run("prune", "--model", tmp_path / "bert", tmp_path / "out", check=False)
    assert done.returncode == 1 and "model_type='bert' has no family spec" in done.stderr
    done = run("prune", "--model", tmp_path / "nothing", tmp_path / "out", check=False)
    assert done.returncode == 1 and "nothing" in done.stderr and "Traceback" not in done.stderr


def test_nan_weights_name_the_tensor(tmp_path, text):
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    done = run("prune", "--model", tmp_path / "nan", "--calibration", text, tmp_path / "out", check=False)
    assert "model.layers.1.mlp.gate_proj.weight holds NaN" in done.stderr and done.returncode == 1


def test_ctrl_c_leaves_nothing(tiny_folder, tmp_path):
    given = ("prune", "--model", tiny_folder, "--num-samples", "4000", tmp_path / "out")
    status, rest = run_until("Writing calibration text", *given)
    assert status == 130 and "interrupted; nothing was written." in rest
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_eval_and_bench(tiny_folder, text, tmp_path):
    numbers = tmp_path / "numbers.json"
    speed = ("--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 1, "--threads", 1)
    done = run(
        "eval",
        *("--model", tiny_folder, "--text", text, "--window", 32, "--prompt", "Hi", "--prompt", "Why?"),
        *(*speed, "--json", numbers),
    )
    result = json.loads(numbers.read_text())
    assert f"{result['perplexity']:.2f}" in done.stdout and "Asked: Hi" in done.stdout
    assert [each["prompt"] for each in result["answers"]] == ["Hi", "Why?"] and "Asked: Why?" in done.stdout
    assert result["window"] == 32 and result["predictions"] % 31 == 0
    done = run("bench", tiny_folder, *speed, "--json", numbers)
    assert json.loads(numbers.read_text())[0]["perplexity"] is None
    assert "decode tok/s" in done.stdout


@pytest.mark.onnx
def test_compress_and_quantize(tiny_folder, text, tmp_path):
    measuring = ("--text", text, "--window", 32, "--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 1)
    given = ("--model", tiny_folder, "--calibration", text, "--sparsity", 0.3, *SMALL, *measuring, "--prompt", "Hi")
    phone = ("--target", "arm64", "--bundle", tmp_path / "phone")
    done = run("compress", *given, *phone, "--json", tmp_path / "numbers.json", tmp_path / "out")
    stages = json.loads((tmp_path / "numbers.json").read_text())["stages"]
    assert list(stages) == ["dense", "pruned", "pruned-onnx", "pruned-int8"]
    assert stages["pruned-onnx"]["perplexity"] == pytest.approx(stages["pruned"]["perplexity"], rel=1e-4)
    assert stages["pruned-int8"]["perplexity"] == pytest.approx(stages["pruned"]["perplexity"], rel=0.05)
    assert stages["pruned"]["parameters"] < stages["dense"]["parameters"]
    assert stages["pruned-int8"]["runtime"] == "onnxruntime"
    assert all(name in done.stdout for name in stages) and "smaller than the dense model" in done.stdout
    assert list(json.loads((tmp_path / "numbers.json").read_text())["costs"]) == [
        *("measure", "prune", "export", "quantize", "bundle")
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("pruned", "pruned-onnx", "pruned-int8"),
        *("comp_compress.json", "comp_recipe.yaml", "comp_samples", "comp_notes", "README.md"),
    }
    assert str(tmp_path) not in (tmp_path / "out" / "pruned" / "README.md").read_text()
    # Equalization is on where 8 bits follow.
    assert json.loads((tmp_path / "out" / "pruned" / "comp_config.json").read_text())["equalize"] is True
    assert "phone: bundle for arm64" in done.stdout
    assert verify_bundle(tmp_path / "phone").target == "arm64"
    x86 = ("--target", "x86", "--bundle", tmp_path / "phone")
    again = run("compress", *given, *x86, tmp_path / "other", check=False)
    assert again.returncode == 1 and "phone was made otherwise (target='arm64', not 'x86')" in again.stderr
    assert not (tmp_path / "other").exists()
    for number, source in enumerate(("pruned", "pruned-onnx")):
        run("quantize", "--model", tmp_path / "out" / source, "--recipe", "int8-dynamic", tmp_path / f"q{number}")
        assert (tmp_path / f"q{number}" / "model.onnx").is_file()
    again = run("quantize", "--model", tmp_path / "out" / "pruned", tmp_path / "q0", check=False)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    bad = run("quantize", "--model", tmp_path / "out" / "pruned", "--recipe", "int2", tmp_path / "q9", check=False)
    assert "recipe='int2' is not valid: recipe must be one of int8" in bad.stderr


@pytest.mark.onnx
def test_quantize_to_4_bits_and_to_a_budget(tiny_folder, text, tmp_path):
    given = ("--calibration", text, "--num-samples", 4, "--sequence-length", 32)
    # What a kill has left is cleared away.
    left = tmp_path / ".q4.quantizing" / ".onnx.partial-0123abcd"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(bytes(10))
    run("quantize", "--model", tiny_folder, "--weights", "int4", "--target", "arm64", *given, tmp_path / "q4")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    recorded = json.loads((tmp_path / "q4" / "ort_config.json").read_text())["comp_recipe"]
    assert (recorded["name"], recorded["target"]) == ("int4", "arm64")
    assert {form["bits"] for form in recorded["nodes"].values()} == {4, 8}

    numbers = tmp_path / "numbers.json"
    budget = ("--max-perplexity-increase", "3%", *given, "--json", numbers)
    done = run("quantize", "--model", tiny_folder, *budget, tmp_path / "budget")
    assert "held out" in done.stderr and "Sensitivity" in done.stderr
    assert json.loads(numbers.read_text())["recipe"] == "budget"
    assert run("eval", "--model", tmp_path / "budget", "--text", text, "--window", 32, "--prompt-tokens", 0).stdout


@pytest.mark.onnx
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-size", "1kB"), "max_size=1.0 kB can't be kept"),
        (("--max-size", "much"), "max_size='much' is not valid"),
        (("--max-perplexity-increase", "0%"), "max_perplexity_increase=0.0 is not valid"),
        (("--max-perplexity-increase", "some"), "max_perplexity_increase='some' is not valid"),
        (("--max-size", "1MB", "--recipe", "int8"), "exclude each other"),
        (("--target", "riscv"), "arm64-i8mm"),
        (("--weights", "int4", "--num-samples", "900"), "too short for calibration"),
    ],
)
def test_quantization_that_cannot_be_is_one_line(options, said, tiny_folder, text, tmp_path):
    given = ("--calibration", text, "--num-samples", 4, "--sequence-length", 32)
    done = run("quantize", "--model", tiny_folder, *given, *options, tmp_path / "out", check=False)
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert said in error
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tiny-llama"]


@pytest.mark.parametrize("command", ["quantize", "compress"])
def test_without_onnx_runtime_it_is_said_at_once(command, tiny_folder, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "onnxruntime.py").write_text("raise ImportError('none here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    done = run(command, "--model", tiny_folder, tmp_path / "out", check=False, env=environment)
    assert done.returncode == 1 and "pip install 'optimum-comp[onnxruntime]'" in done.stderr
    assert "none here" in done.stderr and "Traceback" not in done.stderr
    assert "Pruning" not in done.stderr and not (tmp_path / "out").exists()


def test_bench_writes_a_report(tiny_folder, text, tmp_path):
    measured = ("--text", text, "--max-tokens", 600, "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1)
    done = run("bench", tiny_folder, *measured, "--long-prompt-tokens", 16, "--report", tmp_path / "report")
    assert "long prefill tok/s" in done.stdout
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")


def test_families_says_what_can_be_pruned_and_why_not(tiny_folder, tmp_path):
    shown = run("families", "--json", tmp_path / "families.json").stdout
    assert "| gemma3_text | yes | yes | yes | yes |" in shown
    row = next(line for line in shown.splitlines() if line.startswith("| opt "))
    (number,) = set(re.findall(r"no \((\d)\)", row))
    assert f"({number}) its code takes a head's size from hidden_size" in shown
    assert json.loads((tmp_path / "families.json").read_text())["bloom"]["layers"] == "yes"
    assert "| llama | yes | yes | yes | yes |" in run("families", "--model", tiny_folder).stdout


def test_attention_is_pruned_when_asked(tiny_folder, text, tmp_path):
    arguments = ("prune", "--model", tiny_folder, "--calibration", text, *SMALL, "--sparsity", 0.3)
    done = run(*arguments, "--axes", "ffn,heads", "--attention-fraction", 0.6, tmp_path / "heads")
    assert "query heads 4 -> 2" in done.stdout
    done = run(*arguments, "--axes", "kv,ffn", "--attention-fraction", 0.9, tmp_path / "kv")
    assert "key-value heads 2 -> 1, key-value cache 50% of the size" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kv")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 16)
    for option, value in (("--axes", "ffn,rows"), ("--attention-fraction", "2")):
        done = run(*arguments, option, value, tmp_path / "no", check=False)
        assert done.returncode == 1 and "is not valid" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "no").exists()
