"""Interrupted runs: whatever stops them, the output folder is complete or says how to go on, and going on is exact."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import CLI, run, run_until, tiny_blocks, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_comp import CompConfig, CompPruner
from optimum_comp.checkpoint.source import multiplies_bfloat16
from optimum_comp.evaluation import Settings, evaluate, load_model
from optimum_comp.sweep.journal import Journal
from optimum_comp.sweep.pruning import PruningRun
from optimum_comp.utils import ROOT_LOGGER


SHARES = {"layer_fraction": 0.8, "attention_fraction": 0.0}
FIELDS = {"sparsity": 0.35, "num_samples": 8, "sequence_length": 32, "round_to": 8, **SHARES}
CONFIG = CompConfig(**FIELDS)


def digest_of(files) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def digest(folder: Path) -> dict[str, str]:
    return digest_of(folder.iterdir())


def prune(model: Path, output: Path, **arguments):
    pruner = CompPruner.from_pretrained(model)
    return pruner.prune(CONFIG, tiny_blocks(8, 32), output=output, **arguments)


@pytest.fixture
def undisturbed(tiny_folder, tmp_path) -> dict[str, str]:
    prune(tiny_folder, tmp_path / "undisturbed")
    return digest(tmp_path / "undisturbed")


class Stop(BaseException):
    pass


@pytest.mark.parametrize("step", ["_observe", "_decide", "_commit", "_update", "_record"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_stopped_anywhere_and_gone_on_with(step, after, layer, tiny_folder, tmp_path, undisturbed, monkeypatch):
    calls = []
    original = getattr(PruningRun, step)

    def stopping(self, *args, **kwargs):
        calls.append(step)
        if len(calls) == layer + 1 and not after:
            raise Stop
        result = original(self, *args, **kwargs)
        if len(calls) == layer + 1:
            raise Stop
        return result

    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, step, stopping)
        with pytest.raises(Stop):
            prune(tiny_folder, tmp_path / "out")
    done = Journal.read(tmp_path / "out").finished
    assert done == layer + (step == "_record" and after)
    # Recognisably unfinished, to our loaders and to transformers.
    for refused in (CompPruner.from_pretrained, load_model, lambda folder: evaluate(folder, Settings())):
        with pytest.raises(ValueError, match=r"is unfinished(.|\n)*--resume"):
            refused(tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="unfinished pruning run"):
        prune(tiny_folder, tmp_path / "out")
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed


OPEN = {"layer_fraction": "auto", "attention_fraction": "auto", "protected_layers": []}


@pytest.mark.parametrize("shares", [{"layer_fraction": 0.0}, OPEN], ids=["neurons", "all"])
def test_what_was_weighed_is_kept_with_what_is_finished(shares, tiny_folder, tmp_path, monkeypatch):
    config = CompConfig(**{**FIELDS, **shares}, allocation="adaptive")

    def adaptive(output: Path, **more):
        return CompPruner.from_pretrained(tiny_folder).prune(config, tiny_blocks(8, 32), output=output, **more)

    found = adaptive(tmp_path / "undisturbed")
    assert len(set(found.widths)) > 1 and bool(found.weighed) == (shares is OPEN)
    record, calls = PruningRun._record, []

    def stopping(self, *args):
        record(self, *args)
        calls.append(args)
        if len(calls) == 2:
            raise Stop

    def refuse(*args, **kwargs):
        raise AssertionError("was weighed again")

    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_record", stopping)
        with pytest.raises(Stop):
            adaptive(tmp_path / "out")
    monkeypatch.setattr("optimum_comp.sweep.pruning.weigh", refuse)
    path = tmp_path / "out" / "comp_journal.json"
    journal = json.loads(path.read_text())
    damages = [
        {"widths": [10_000] * len(journal["widths"])},
        {"widths": [8] * 9},
        {"chosen": 1000},
        {"weighed": [0.1] * 99},
    ]
    for damage in damages:
        path.write_text(json.dumps({**journal, **damage}))
        with pytest.raises(ValueError, match="widths that the model doesn't have"):
            adaptive(tmp_path / "out", resume=True)
    path.write_text(json.dumps(journal))
    adaptive(tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")


def test_what_comes_into_the_folder_meanwhile_stays(tiny_folder, tmp_path, undisturbed, monkeypatch):
    output = tmp_path / "out"
    begin = Journal.begin

    def noting(self, *arguments):
        (output / "notes.txt").write_text("mine")
        return begin(self, *arguments)

    monkeypatch.setattr(Journal, "begin", noting)
    prune(tiny_folder, output)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert digest(output) == undisturbed


def test_stopped_while_finishing(tiny_folder, tmp_path, undisturbed, monkeypatch):
    """Killed between any two of the moves that put the result in place, an old model's files there or not."""
    replace, moves = Path.replace, []

    def stopping(self, target):
        if self.parent.name == "final":
            moves.append(self.name)
            if len(moves) == stop:
                raise Stop
        return replace(self, target)

    for stop in range(1, len(undisturbed) + 1):
        for old in (False, True):
            moves.clear()
            output = tmp_path / f"out-{stop}-{old}"
            if old:
                tiny_model("opt").save_pretrained(output)
                (output / "stale").mkdir()
                (output / "stale" / "notes.txt").write_text("old")
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", stopping)
                with pytest.raises(Stop):
                    prune(tiny_folder, output, overwrite=old)
            assert len(moves) == stop
            with pytest.raises(ValueError, match="is unfinished"):
                CompPruner.from_pretrained(output)
            report = prune(tiny_folder, output, resume=True)
            assert len(report.layers) == 3 and digest(output) == undisturbed


def test_an_old_model_stays_until_the_new_one_is_complete(tiny_folder, tmp_path, undisturbed, monkeypatch):
    output = tmp_path / "out"
    tiny_model("opt").save_pretrained(output)
    old = digest(output)
    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_commit", lambda *args: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            prune(tiny_folder, output, overwrite=True)
    now = {path.name: path for path in output.iterdir()}
    assert old == digest_of([now[name] for name in old])
    prune(tiny_folder, output, overwrite=True)
    assert digest(output) == undisturbed


def interrupted(tiny_folder, output, monkeypatch, error=Stop) -> None:
    original, calls = PruningRun._record, []

    def stopping(self, *args):
        if len(calls) == 2:
            raise error
        calls.append(1)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_record", stopping)
        with pytest.raises(type(error) if isinstance(error, BaseException) else error):
            prune(tiny_folder, output)


def test_going_on_takes_what_is_not_given_from_the_journal(tiny_folder, tmp_path, undisturbed, monkeypatch):
    interrupted(tiny_folder, tmp_path / "out", monkeypatch)
    # On a processor of another kind.
    monkeypatch.setattr(
        "optimum_comp.checkpoint.source.multiplies_bfloat16", lambda device: not multiplies_bfloat16(device)
    )
    CompPruner.from_pretrained(tiny_folder).prune(output=tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed
    # Complete, it is left as it is.
    report = CompPruner.from_pretrained(tiny_folder).prune(CONFIG, output=tmp_path / "out", resume=True)
    assert report.width and digest(tmp_path / "out") == undisturbed
    with pytest.raises(FileExistsError, match="made otherwise"):
        CompPruner.from_pretrained(tiny_folder).prune(CompConfig(), output=tmp_path / "out", resume=True)


def test_going_on_with_nothing_starts(tiny_folder, tmp_path, undisturbed):
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed
    with pytest.raises(ValueError, match="needs the output folder"):
        CompPruner.from_pretrained(tiny_folder).prune(CONFIG, tiny_blocks(8, 32), resume=True)


@pytest.mark.parametrize("step", ["durably", "begin"])
def test_stopped_before_the_first_entry(step, tiny_folder, tmp_path, undisturbed, monkeypatch):
    def stopping(*args, **kwargs):
        if step == "durably":
            (tmp_path / "out" / ".comp_journal.json.partial").write_text("{")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(
            *(("optimum_comp.sweep.journal.durably",) if step == "durably" else (Journal, "begin")), stopping
        )
        with pytest.raises(Stop):
            prune(tiny_folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir())
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed


def test_going_on_otherwise_is_refused(tiny_folder, tmp_path, undisturbed, monkeypatch):
    output = tmp_path / "out"
    interrupted(tiny_folder, output, monkeypatch)
    with pytest.raises(ValueError, match=r"sparsity=0.35, and now it is 0.2"):
        CompPruner.from_pretrained(tiny_folder).prune(
            CompConfig(**{**FIELDS, "sparsity": 0.2}), output=output, resume=True
        )
    with pytest.raises(ValueError, match="calibrated on 'token blocks', not on 'self'"):
        CompPruner.from_pretrained(tiny_folder).prune(CONFIG, "self", output=output, resume=True)
    begun = json.loads((output / "comp_journal.json").read_text())["run"]["matmul_dtype"]
    for given in {"float32", "bfloat16"} - {begun}:
        with pytest.raises(ValueError, match=f"has matmul_dtype='{begun}', and now it is '{given}'"):
            prune(tiny_folder, output, resume=True, matmul_dtype=given)
    other = tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has weights="):
        prune(tmp_path / "other", output, resume=True)
    journal = json.loads((output / "comp_journal.json").read_text())
    (output / "comp_journal.json").write_text(json.dumps({**journal, "format": 99}))
    with pytest.raises(ValueError, match="another version of optimum-comp"):
        prune(tiny_folder, output, resume=True)
    (output / "comp_journal.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        prune(tiny_folder, output, resume=True)
    (output / "comp_journal.json").write_text(json.dumps(journal))
    prune(tiny_folder, output, resume=True)
    assert digest(output) == undisturbed


def test_errors_that_would_come_again_leave_nothing(tmp_path):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.2\.mlp\.down_proj"):
        prune(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_can_be_gone_on_from(tiny_folder, tmp_path, undisturbed, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    interrupted(tiny_folder, tmp_path / "out", monkeypatch, full)
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed


def test_too_small_a_disk_is_refused_before_any_output(tiny_folder, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"needs \d.* of disk space at .*out, and 1.0 kB are free"):
        prune(tiny_folder, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_file_size_limit_on_the_command_line(tmp_path):
    """`ulimit -f` makes writes fail as a full disk does."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the moon.\n" * 60)
    given = ["prune", "--model", tmp_path / "dense", "--calibration", tmp_path / "text.txt", "--round-to", 8]
    given += ["--num-samples", 8, "--sequence-length", 32]
    run(*given, tmp_path / "undisturbed")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run(*given, tmp_path / "out", check=False, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and f"--resume {tmp_path / 'out'}" in done.stderr
    run("prune", "--resume", tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
    assert "decoder layers removed" in run("prune", "--resume", tmp_path / "out").stdout


def test_ctrl_c_on_the_command_line(tmp_path):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the moon.\n" * 600)
    given = ["prune", "--model", tmp_path / "dense", "--calibration", tmp_path / "text.txt"]
    given += ["--num-samples", 8, "--sequence-length", 256, "--layer-fraction", 0, "--attention-fraction", 0]
    status, rest = run_until("1/24", *given, tmp_path / "out")
    assert status == 130 and "Traceback" not in rest
    said = re.search(r"interrupted; (\d+) layers are done and kept in .*out; go on with\n  optimum-cli (.*)\n", rest)
    assert said and 1 <= int(said[1]) < 24
    assert Journal.read(tmp_path / "out").finished == int(said[1])
    going_on = subprocess.run([CLI, *said[2].split()], capture_output=True, text=True)
    assert f"Going on after {said[1]} finished layers" in going_on.stderr
    assert "decoder layers removed" in going_on.stdout
    assert "decoder layers removed" in run(*given, tmp_path / "undisturbed").stdout
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")


SCRIPT = """
import sys, torch
from optimum_comp import CompConfig, CompPruner
model, output, tokens = sys.argv[1:]
torch.set_num_threads(1)
print("ready", flush=True)
blocks = torch.load(tokens)
config = CompConfig(num_samples=blocks.shape[0], sequence_length=blocks.shape[1], round_to=8)
CompPruner.from_pretrained(model).prune(config, blocks, output=output, resume=True)
"""


@pytest.mark.slow
def test_real_layers_killed_at_random_moments(first_layers, tmp_path):
    """Kill -9 at random moments of the run until it is through; every result has to be that of an undisturbed run."""
    tokens = torch.randint(0, 49000, (4, 128), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(first_layers), str(output), str(tmp_path / "tokens.pt")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    started = time.perf_counter()
    assert start(tmp_path / "undisturbed").wait() == 0
    duration, want = time.perf_counter() - started, digest(tmp_path / "undisturbed")
    moments = random.Random(0)
    unfinished = 0
    for number in range(4):
        output = tmp_path / f"out-{number}"
        process = start(output)
        time.sleep(moments.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += (output / "comp_journal.json").exists()
        process = start(output)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert digest(output) == want
    # The moments are spread over the run, so not all of them can lie before or behind the layers.
    assert unfinished


def test_a_generation_config_that_transformers_reads_and_will_not_write_is_copied(tiny_folder, tmp_path):
    path = tiny_folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1}))
    prune(tiny_folder, tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_fails_after_the_last_layer_deletes_none(tiny_folder, tmp_path, undisturbed, monkeypatch):
    def fails(*_, **__):
        raise ValueError("nothing goes.")

    with monkeypatch.context() as patch:
        patch.setattr("optimum_comp.pruner.fill_folder", fails)
        with pytest.raises(RuntimeError, match=r"nothing goes\. 3 layers are done and kept(.|\n)*--resume"):
            prune(tiny_folder, tmp_path / "out")
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("again", [None, {"stage": 2}])
def test_what_the_output_is_to_be_known_by_is_there_with_the_model(again, tiny_folder, tmp_path, monkeypatch):
    record = {"stage": 1, "of": ["a", "b"]}
    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_decide", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            prune(tiny_folder, tmp_path / "out", record=record)
    assert Journal.read(tmp_path / "out").identity == record and not (tmp_path / "out" / "comp_stage.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_decide", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            prune(tiny_folder, tmp_path / "out", resume=True, record=again)
    assert Journal.read(tmp_path / "out").identity == (again or record)
    prune(tiny_folder, tmp_path / "out", resume=True)
    assert json.loads((tmp_path / "out" / "comp_stage.json").read_text()) == (again or record)


def test_a_record_of_a_model_in_memory_and_of_one_that_is_saved_later(tiny_folder, tmp_path):
    for model in (tiny_model("llama"), tiny_folder):
        pruner = CompPruner.from_pretrained(model)
        with pytest.raises(ValueError, match=r"record=.*JSON"):
            pruner.prune(CONFIG, tiny_blocks(8, 32), record={"no": {1, 2}})
        pruner.prune(CONFIG, tiny_blocks(8, 32), record={"stage": 1})
        pruner.save_pretrained(tmp_path / "out", overwrite=True)
        assert json.loads((tmp_path / "out" / "comp_stage.json").read_text()) == {"stage": 1}


def changed(journal: dict, changes: dict) -> str:
    """The journal with entries changed, `None` taking one out; `run.x` is one of the run's."""
    journal = json.loads(json.dumps(journal))
    for name, value in changes.items():
        place = journal
        *above, last = name.split(".")
        for each in above:
            place = place[each]
        place.pop(last, None)
        if value is not None:
            place[last] = value
    return json.dumps(journal)


DAMAGES = {
    "another stage": {"stage": "publishing"},
    "no count": {"finished": None},
    "a count in words": {"finished": "two"},
    "a count that is true": {"finished": True},
    "a negative count": {"finished": -1},
    "more layers than there are": {"finished": 4},
    "a huge count": {"finished": 10**18},
    "a number without end": {"finished": 10**400},
    "no run": {"run": {}},
    "an unknown entry": {"surprise": 1},
    "a layer that is none": {"removed": [99], "layer_scores": [0.5] * 4},
    "a score that is none": {"layer_scores": [float("nan")]},
    "a permission": {"run.arguments": {"trust_remote_code": True}},
    "a pickle": {"run.arguments": {"use_safetensors": False}},
    "a token": {"run.arguments": {"token": "hf_x"}},
    "a cache": {"run.arguments": {"cache_dir": "/tmp"}},
    "an unknown permission": {"run.permissions": ["sudo"]},
    "no source": {"run.source": None},
    "a source that is no text": {"run.source": 7},
    "half a config": {"run.config": {"sparsity": 0.2}},
    "no batches": {"run.batch_size": 0},
    "a dtype that is a function": {"run.matmul_dtype": "save"},
    "text that is none": {"run.calibration": []},
    "a record that is none": {"run.record": [1]},
    "files without the stage": {"stage": "finishing"},
    "a file outside": {"stage": "finishing", "files": ["config.json"], "stale": ["../victim"]},
    "a result outside": {"stage": "finishing", "files": ["../victim/notes.txt"], "stale": []},
    "a file outside, by a backslash": {"stage": "finishing", "files": ["config.json"], "stale": ["..\\victim"]},
    "an absolute path": {"stage": "finishing", "files": ["config.json"], "stale": ["/tmp/victim"]},
    "a drive": {"stage": "finishing", "files": ["config.json"], "stale": ["C:victim"]},
    "the folder": {"stage": "finishing", "files": ["config.json"], "stale": ["."]},
    "the folder above": {"stage": "finishing", "files": [".."], "stale": []},
    "the work": {"stage": "finishing", "files": ["config.json"], "stale": ["comp_work"]},
    "the work in capitals": {"stage": "finishing", "files": ["config.json"], "stale": ["Comp_Work."]},
    "the journal": {"stage": "finishing", "files": ["comp_journal.json"], "stale": []},
    "a name that is none": {"stage": "finishing", "files": [""], "stale": []},
    "a name with an end": {"stage": "finishing", "files": ["config.json\0"], "stale": []},
    "a name that no disk takes": {"stage": "finishing", "files": ["x" * 300], "stale": []},
    "half a character": {"stage": "finishing", "files": ["\ud800"], "stale": []},
    "a number for a name": {"stage": "finishing", "files": [7], "stale": []},
    "nothing finished": {"stage": "finishing", "files": [], "stale": ["comp_config.json"]},
    "a result that is missing": {"stage": "finishing", "files": ["config.json"], "stale": ["old.txt"]},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with a model, `dense`, and a run on it that was interrupted after two layers, `out`."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny_model("llama").save_pretrained(folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(folder / "dense", folder / "out", patch)
    return folder


@pytest.fixture
def attacked(stopped, tmp_path) -> Path:
    """The same beside something precious, with an old file in the output folder."""
    folder = tmp_path / "attacked"
    shutil.copytree(stopped, folder)
    (folder / "victim").mkdir()
    (folder / "victim" / "notes.txt").write_text("precious")
    (folder / "out" / "old.txt").write_text("old")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, said: str) -> None:
    """Going on is refused in one line, by us and on the command line, and nothing is changed."""
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=said) as error:
            prune(folder / "dense", folder / "out", resume=True)
        assert "\n" not in str(error.value) and "--overwrite" in str(error.value)
        assert contents(folder) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_journal_that_no_run_has_written_is_refused(damage, attacked):
    path = attacked / "out" / "comp_journal.json"
    path.write_text(changed(json.loads(path.read_text()), DAMAGES[damage]))
    refused(attacked, r"unfinished run in .*out is damaged: .*(comp_journal|config\.json)")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"format": 5', b'{"format": NaN}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"format": 5, "run": ' + b'{"a":' * 40 + b"1" + b"}" * 41),
    ],
)
def test_a_journal_that_is_not_even_json_is_refused(data, attacked):
    (attacked / "out" / "comp_journal.json").write_bytes(data)
    refused(attacked, r"unfinished run in .*out is damaged: comp_journal\.json: ")


@pytest.mark.parametrize(
    "name", ["tokens.safetensors", "layer-00001.json", "layer-00001.safetensors", "own-0-00002.bin"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_what_finished_layers_have_left_is_refused_when_damaged(name, damage, attacked):
    path = attacked / "out" / "comp_work" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-1], "garbage": data[:20] + b"\xff" + data[21:]}[damage])
    refused(attacked, rf"unfinished run in .*out is damaged: {re.escape(name)} ")


@pytest.mark.parametrize("place", ["comp_work", "comp_work/final", "comp_work/own-0-00002.bin", "comp_journal.json"])
def test_links_out_of_the_folder_are_not_followed(place, attacked):
    path, elsewhere = attacked / "out" / place, attacked / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "notes.txt").write_text("precious")
    path.symlink_to(elsewhere)
    refused(attacked, rf"unfinished run in .*out is damaged: {place} is a link")
    precious = contents(attacked / "elsewhere")
    prune(attacked / "dense", attacked / "out", overwrite=True)
    assert contents(attacked / "elsewhere") == precious and not (attacked / "out" / "comp_work").exists()


def test_permissions_are_given_again(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy")
    output = tmp_path / "copy" / "out"
    path = output / "comp_journal.json"
    changes = {
        "run.permissions": ["trust_remote_code"],
        "run.arguments": {"revision": "refs/pr/1", "dtype": "float32"},
    }
    path.write_text(changed(json.loads(path.read_text()), changes))
    journal, trust = Journal.read(output), {"trust_remote_code": True}
    dense = str(stopped / "dense")
    assert journal.opening(None, trust) == (dense, {**changes["run.arguments"], **trust})
    # Another revision than the one that is trusted isn't taken from the folder.
    assert journal.opening("trusted", trust) == ("trusted", {"dtype": "float32", **trust})
    assert Journal.read(output).hint().endswith(f"prune --resume --trust-remote-code {output}")
    done = run("prune", "--resume", output, check=False)
    assert done.returncode == 1
    assert re.search(
        "begun with --trust-remote-code, which has to be given again: .* trust .*dense', revision 'refs/pr/1'",
        done.stderr,
    )
    run("prune", "--resume", "--trust-remote-code", output)
    assert (output / "model.safetensors").is_file()


def test_permissions_are_not_written(tmp_path, tiny_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_commit", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            CompPruner.from_pretrained(
                tiny_folder, trust_remote_code=True, use_safetensors=False, token="hf_secret", revision="main"
            ).prune(CONFIG, tiny_blocks(8, 32), output=tmp_path / "out")
    kept = Journal.read(tmp_path / "out").run
    assert kept["arguments"] == {"revision": "main"} and kept["permissions"] == ["trust_remote_code"]
    assert "hf_secret" not in (tmp_path / "out" / "comp_journal.json").read_text()


WAITING = """
import sys, time
from optimum_comp import CompConfig, CompPruner
from optimum_comp.sweep.pruning import PruningRun
import torch
model, output, tokens = sys.argv[1:]
def wait(*_):
    print("waiting", flush=True)
    time.sleep(600)
PruningRun._decide = wait
blocks = torch.load(tokens)
config = CompConfig(num_samples=8, sequence_length=32, round_to=8)
CompPruner.from_pretrained(model).prune(config, blocks, output=output, resume=True)
"""


@pytest.mark.parametrize("begun", [False, True])
def test_two_processes_do_not_share_a_folder(begun, attacked):
    output = attacked / "out" if begun else attacked / "new"
    torch.save(tiny_blocks(8, 32), attacked / "tokens.pt")
    arguments = [attacked / "dense", output, attacked / "tokens.pt"]
    script = WAITING.replace("config, blocks", "None, None") if begun else WAITING
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        before = contents(output)
        for option in ("--resume", "--overwrite"):
            given = [] if option == "--resume" else ["--model", attacked / "dense"]
            done = run("prune", option, *given, output, check=False)
            assert done.returncode == 1 and "Traceback" not in done.stderr
            assert f"error: another process is at work in {output}; wait for it, or stop it" in done.stderr
        assert contents(output) == before
    finally:
        process.kill()
        process.wait()
    run("prune", "--resume", output)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_pruned_layers_wait_where_there_is_room(tiny_folder, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage

    def pruned() -> str:
        caplog.clear()
        pruner = CompPruner.from_pretrained(tiny_folder)
        pruner.prune(CONFIG, tiny_blocks(8, 32))
        where = Path(re.search(r"Pruned layers wait in (\S+) \(.* needed, .* free\)", caplog.text)[1])
        assert where.is_dir()
        del pruner
        gc.collect()
        assert not where.exists()
        return str(where.parent)

    caplog.set_level("INFO", ROOT_LOGGER)
    monkeypatch.setattr(logging.getLogger(ROOT_LOGGER.split(".")[0]), "propagate", True)
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "usual").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "usual"))
    assert pruned() == str(tmp_path / "usual")

    # A file system in memory, unless the user wants it.
    partitions = psutil.disk_partitions(all=True)
    there = partitions[0]._replace(mountpoint=str(tmp_path / "usual"), fstype="tmpfs")
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [*partitions, there])
    assert pruned() == str(tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "usual"))
        assert pruned() == str(tmp_path / "usual")

    # Too small a one, and none at all.
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [])
    small = usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small if Path(path).name == "usual" else usage(path))
    assert pruned() == str(tmp_path / "work")
    monkeypatch.setattr("shutil.disk_usage", lambda path: small)
    with pytest.raises(OSError, match=r"usual has 1\.0 kB free; .*work has 1\.0 kB free\. Give output="):
        CompPruner.from_pretrained(tiny_folder).prune(CONFIG, tiny_blocks(8, 32))
    assert not list((tmp_path / "usual").iterdir()) and not list((tmp_path / "work").iterdir())
