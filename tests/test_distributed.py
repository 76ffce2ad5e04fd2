"""Two processes on one machine, over gloo: what they decide together is what one decides alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLI, run, tiny_blocks, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp.calibration.text import read_text, tokenize
from optimum_comp.evaluation import perplexity
from optimum_comp.sweep.ranks import Ranks


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "--no_python"],
}


def launched(launcher: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHERS[launcher], CLI, "comp", "prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def kept(folder: Path) -> list[list[int]]:
    layers = json.loads((folder / "comp_report.json").read_text())["layers"]
    return [each["kept"] for layer in layers for each in layer["decisions"]]


@pytest.fixture
def given(tmp_path) -> list[object]:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and looked at the moon; nobody knew why.\n" * 60)
    given = ["--model", tmp_path / "dense", "--calibration", tmp_path / "text.txt", "--sparsity", 0.4]
    return [*given, "--num-samples", 9, "--sequence-length", 32, "--round-to", 8, "--batch-size", 2]


ATTENTION = ("--axes", "ffn,kv", "--attention-fraction", 0.9)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "more", [(), ("--layer-fraction", 0.7), ("--layer-fraction", 0.7, "--layer-metric", "loss"), ATTENTION]
)
def test_two_processes_decide_as_one(launcher, more, given, tmp_path):
    if launcher == "accelerate" and more:
        pytest.skip("the launchers set the same variables; once is enough")
    run("prune", *given, *more, tmp_path / "one")
    done = launched(launcher, *given, *more, tmp_path / "two")
    assert done.stdout.count("decoder layers removed") == 1
    assert kept(tmp_path / "two") == kept(tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    prompt = tiny_blocks(2, 12, seed=9)
    logits = []
    for name in ("one", "two"):
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(prompt).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_two_began_two_go_on_with(given, tmp_path):
    launched("torchrun", *given, tmp_path / "undisturbed")
    # The second layer's part can't be written: its name is taken by a folder.
    crash = (
        "import sys, os\n"
        "from optimum_comp.sweep.pruning import PruningRun\n"
        "original, calls = PruningRun._record, []\n"
        "def record(self, *args):\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "    calls.append(1)\n"
        "    return original(self, *args)\n"
        "PruningRun._record = record\n"
        "sys.argv[0] = 'optimum-cli'\n"
        "from optimum.commands.optimum_cli import main\n"
        "main()\n"
    )
    (tmp_path / "crash.py").write_text(crash)
    command = [BIN / "torchrun", "--nproc-per-node", 2, tmp_path / "crash.py", "comp", "prune", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(list(map(str, [*command, tmp_path / "out"])), capture_output=True, env=environment)
    assert killed.returncode != 0
    assert json.loads((tmp_path / "out" / "comp_journal.json").read_text())["finished"] == 2
    done = run("prune", "--resume", tmp_path / "out", check=False)
    assert "has processes=2, and now it is 1" in done.stderr
    launched("torchrun", "--resume", tmp_path / "out")
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


APART = """
import os, sys
from optimum_comp.sweep.pruning import PruningRun
# Each process on a disk of its own.
sys.argv = ["optimum-cli", *sys.argv[2:-1], f"{sys.argv[-1]}-{os.environ['RANK']}"]
dies = int(os.environ.get("DIES_AFTER", 99))
original, calls = PruningRun._record, []
def record(self, *args):
    if len(calls) == dies:
        os.kill(os.getpid(), 9)
    calls.append(1)
    return original(self, *args)
PruningRun._record = record
from optimum.commands.optimum_cli import main
main()
"""


def apart(tmp_path: Path, *arguments: object, dies_after: int = 99) -> subprocess.CompletedProcess[str]:
    (tmp_path / "apart.py").write_text(APART)
    command = [BIN / "torchrun", "--nproc-per-node", 2, tmp_path / "apart.py", "-", "comp", "prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIES_AFTER": str(dies_after)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def test_processes_without_a_common_disk_go_on_and_leave_nothing(given, tmp_path):
    launched("torchrun", *given, tmp_path / "undisturbed")
    assert apart(tmp_path, *given, tmp_path / "out", dies_after=2).returncode != 0
    assert (tmp_path / "out-0" / "comp_journal.json").is_file()
    assert {path.name for path in (tmp_path / "out-1" / "comp_work").glob("*-00002.bin")}
    # Model, config, text and all else are the first process's to know.
    done = apart(tmp_path, "--resume", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("decoder layers removed") == 1
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "out-0" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (tmp_path / "out-0").iterdir()} == {
        path.name for path in (tmp_path / "undisturbed").iterdir()
    }
    assert not (tmp_path / "out-1").exists()
    # Complete, it is left as it is.
    done = apart(tmp_path, "--resume", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count("decoder layers removed") == 1, done.stderr
    assert not (tmp_path / "out-1").exists()


def test_a_bad_value_ends_all_processes(given, tmp_path):
    done = launched("torchrun", *given, "--num-samples", 1, tmp_path / "out", check=False)
    assert done.returncode != 0 and "1 calibration samples can't be shared by 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("samples", "batch"), [(5, 8), (9, 2), (64, 8), (7, 7)])
def test_every_sample_is_one_processes(size, samples, batch):
    tokens = torch.arange(samples)[:, None].expand(-1, 4)
    seen = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        batches = ranks.batches(tokens, batch)
        assert batches and max(len(each) for each in batches) <= batch
        seen += torch.cat(batches)[:, 0].tolist()
    assert seen == list(range(samples))


@pytest.mark.slow
def test_the_real_model_in_two_processes(real_model, tmp_path):
    text, _ = read_text("pydoc")
    (tmp_path / "text.txt").write_text(text[: int(0.6 * len(text))])
    given = ["--model", real_model, "--calibration", tmp_path / "text.txt", "--num-samples", 16]
    run("prune", *given, tmp_path / "one")
    launched("torchrun", *given, tmp_path / "two")
    assert kept(tmp_path / "one") == kept(tmp_path / "two")
    tokens = tokenize(AutoTokenizer.from_pretrained(real_model), text[int(0.6 * len(text)) :])[: 4 * 512]
    one, two = (
        perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval(), tokens)[0] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-3)
