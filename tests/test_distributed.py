"""Two processes on one machine, over gloo: what they decide together is what one decides alone.

Of GPUs only the choice is tested, as a table. Nothing here has been watched on several GPUs: not NCCL, not that a
process keeps to its own GPU, not a CPU request after a CUDA one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLI, run, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp.calibration.text import read_text, tokenize
from optimum_comp.evaluation import perplexity
from optimum_comp.sweep.ranks import Ranks, device_of, place_on_machine


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "--no_python"],
}


def launched(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHERS["torchrun"], CLI, "comp", "prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def together(code: str, tmp_path: Path, *launcher: object) -> list[str]:
    """What two processes print that run some code."""
    (tmp_path / "code.py").write_text(code)
    command = [*(launcher or (BIN / "torchrun", "--nproc-per-node", 2)), tmp_path / "code.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


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


ONE_AFTER_ANOTHER = """
import sys
from optimum.commands.optimum_cli import main
for arguments in {}:
    sys.argv = ["optimum-cli", "comp", "prune", *arguments]
    main()
"""


# The launchers set the same variables; once is enough.
@pytest.mark.parametrize(
    ("launcher", "runs"),
    [
        ("accelerate", [()]),
        (
            "torchrun",
            [(), ("--layer-fraction", 0.7), ("--layer-fraction", 0.7, "--layer-metric", "loss"), ATTENTION],
        ),
    ],
)
def test_two_processes_decide_as_one(launcher, runs, given, tmp_path):
    arguments = [[*map(str, [*given, *more, tmp_path / f"two-{number}"])] for number, more in enumerate(runs)]
    said = together(ONE_AFTER_ANOTHER.format(arguments), tmp_path, *LAUNCHERS[launcher], sys.executable)
    assert "\n".join(said).count("decoder layers removed") == len(runs)
    for number, more in enumerate(runs):
        one, two = tmp_path / f"one-{number}", tmp_path / f"two-{number}"
        run("prune", *given, *more, one)
        assert kept(two) == kept(one)
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
        torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)


def test_what_two_began_two_go_on_with(given, tmp_path):
    launched(*given, tmp_path / "undisturbed")
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
    launched("--resume", tmp_path / "out")
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
    launched(*given, tmp_path / "undisturbed")
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
    done = launched(*given, "--num-samples", 1, tmp_path / "out", check=False)
    assert done.returncode != 0 and "1 calibration samples can't be shared by 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


TELL = """
import os
import torch
from optimum_comp.sweep.ranks import Ranks
for _ in range(2):
    ranks = Ranks(torch.device("cpu"))
    number = torch.full((2, 2), ranks.rank + 1.0, dtype=torch.float64)
    largest = number.clone().T
    ranks.sum_(number, None)
    ranks.max_(largest)
    first = ranks.from_first({"rank": ranks.rank, "tensor": torch.arange(3) + 10 * ranks.rank})
    ranks.wait()
assert number.tolist() == [[3.0, 3.0]] * 2 and largest.tolist() == [[2.0, 2.0]] * 2
said = f"{ranks.rank} {ranks.size} {ranks.is_first} {first['rank']} {first['tensor'].tolist()}\\n"
# All at once: the processes write into one pipe.
os.write(1, said.encode())
"""
TOLD = ["0 2 True 0 [0, 1, 2]", "1 2 False 0 [0, 1, 2]"]


def test_processes_add_up_and_take_over_from_the_first(tmp_path):
    assert together(TELL, tmp_path) == TOLD


def test_a_process_group_that_is_there_is_used_as_it_is(tmp_path):
    """Made without a launcher, so that its place isn't in the environment either."""
    code = f"""
import os, sys, torch
from torch import distributed, multiprocessing

def work(rank):
    distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=rank, world_size=2)
    group = distributed.group.WORLD
    exec({TELL!r}, {{}})
    assert distributed.group.WORLD is group
    distributed.destroy_process_group()
    sys.stdout.flush()

if __name__ == "__main__":
    multiprocessing.spawn(work, nprocs=2)
"""
    assert together(code, tmp_path, sys.executable) == TOLD


def test_what_accelerate_has_been_set_up_for_is_used(tmp_path):
    """`PartialState()` asks for a GPU, and there is one in a process."""
    if torch.cuda.is_available():
        pytest.skip("both processes would take a GPU")
    end = "torch.distributed.destroy_process_group()"
    assert together(f"from accelerate import PartialState\nPartialState()\n{TELL}{end}", tmp_path) == TOLD


def test_processes_that_accelerate_takes_for_single_ones_do_not_prune_apart(tmp_path):
    code = """
import os
from accelerate import PartialState
from optimum_comp.sweep.ranks import Ranks
PartialState(cpu=True)
os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
try:
    Ranks()
except ValueError as error:
    print(error)
"""
    (said,) = together(code, tmp_path, sys.executable)
    assert said.startswith("2 processes were started, and accelerate sees 1: start them with torchrun")


TOO_FEW = "8 processes on this machine need as many CUDA devices, and there are 2 here; start fewer processes"


@pytest.mark.parametrize(
    ("given", "local_rank", "local_size", "devices", "expected"),
    [
        (None, 0, 1, 0, "cpu"),
        (None, 1, 2, 8, "cpu"),
        ("cpu", 1, 2, 0, "cpu"),
        ("cuda", 0, 1, 1, "cuda"),
        ("cuda", 0, 1, 8, "cuda"),
        ("cuda:3", 0, 1, 8, "cuda:3"),
        (torch.device("cuda:3"), 0, 1, 8, "cuda:3"),
        ("cuda", 0, 2, 2, "cuda:0"),
        ("cuda", 1, 2, 2, "cuda:1"),
        ("cuda", 1, 2, 8, "cuda:1"),
        ("cuda", 7, 8, 8, "cuda:7"),
        # A program that has told each process its own.
        ("cuda:1", 1, 2, 2, "cuda:1"),
        ("cuda", 0, 1, 0, "device='cuda': torch sees no CUDA device here"),
        ("cuda:1", 1, 2, 0, "device='cuda:1': torch sees no CUDA device here"),
        ("cuda:8", 0, 1, 8, "device='cuda:8': there are 8 CUDA devices here"),
        ("cuda:2", 1, 2, 2, "device='cuda:2': there are 2 CUDA devices here"),
        ("cuda", 0, 8, 2, TOO_FEW),
        ("cuda", 7, 8, 2, TOO_FEW),
        ("cuda:0", 0, 8, 2, TOO_FEW),
        ("cuda:0", 1, 2, 2, "device='cuda:0': 2 processes run on this machine, and number 1 takes cuda:1; give cuda"),
        ("xla", 0, 1, 0, "device='xla' is not valid: layers run on cpu or cuda"),
        ("nonsense", 0, 1, 0, "device='nonsense' is not valid: give cpu, cuda or cuda:N"),
    ],
)
def test_each_process_has_a_gpu_of_its_own_not_watched_on_gpus(given, local_rank, local_size, devices, expected):
    if expected[:3] in ("cpu", "cud"):
        assert device_of(given, local_rank, local_size, devices) == torch.device(expected)
    else:
        with pytest.raises(ValueError, match=expected):
            device_of(given, local_rank, local_size, devices)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (0, 1)),
        # Left over from something else.
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_a_process_knows_its_place_on_its_machine(said, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert place_on_machine() == expected


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
def test_real_layers_in_two_processes(first_layers, tmp_path):
    text, _ = read_text("pydoc")
    (tmp_path / "text.txt").write_text(text[: int(0.6 * len(text))])
    given = ["--model", first_layers, "--calibration", tmp_path / "text.txt", "--num-samples", 16]
    run("prune", *given, tmp_path / "one")
    launched(*given, tmp_path / "two")
    assert kept(tmp_path / "one") == kept(tmp_path / "two")
    tokens = tokenize(AutoTokenizer.from_pretrained(first_layers), text[int(0.6 * len(text)) :])[: 4 * 512]
    one, two = (
        perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval(), tokens)[0] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-3)
