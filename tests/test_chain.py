"""The chain loses nothing: whatever fails, what was finished is kept, and the same call goes on to the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import breaking
import pytest
import torch
import yaml
from conftest import need_onnx, run, run_until, tiny_blocks, tiny_model, tiny_tokenizer


need_onnx()

from optimum_comp import CompConfig  # noqa: E402
from optimum_comp.bundle import verify_bundle  # noqa: E402
from optimum_comp.compress import compress  # noqa: E402
from optimum_comp.compress import run as run_recipe  # noqa: E402
from optimum_comp.evaluation import Settings  # noqa: E402
from optimum_comp.onnx.search import Budget  # noqa: E402
from optimum_comp.stages.chain import Chain  # noqa: E402
from optimum_comp.stages.prune import Prune, Running  # noqa: E402
from optimum_comp.stages.quantize import SAMPLES, spread_out  # noqa: E402
from optimum_comp.stages.recipe import Recipe  # noqa: E402


pytestmark = pytest.mark.usefixtures("measured_here")

TEXT = "The cat sat on the mat and looked at the moon.\n" * 60
STAGES = {"prune": "pruned", "export": "pruned-onnx", "quantize": "pruned-int4"}
ORDER = ("samples", "prune", "export", "quantize", "measure", "bundle")
MEASURING = {"window": 32, "max_tokens": 96, "prompt_tokens": 0, "new_tokens": 2, "repeats": 1, "threads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a text, and a recipe for them."""
    folder = tmp_path_factory.mktemp("chain")
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def recipe_of(made: Path, *, measure: dict | bool = False, quantize: dict | None = None, **prune) -> dict:
    small = {"num_samples": 8, "sequence_length": 32, "round_to": 8, "calibration": str(made / "text.txt")}
    return {
        "model": str(made / "model"),
        "stages": [
            {"prune": {"sparsity": 0.3, **small, **prune}},
            "export",
            {"quantize": quantize or {"recipe": "int4"}},
            "bundle",
        ],
        "measure": measure and {"text": str(made / "text.txt"), **MEASURING},
    }


def weights(folder: Path) -> dict[str, bytes]:
    """All that a later step, or a user, reads; not what tells of times."""
    names = ("*/model.safetensors", "*/*.onnx", "*/*.json", "*/tokens.safetensors")
    found = {str(path.relative_to(folder)): path.read_bytes() for name in names for path in sorted(folder.glob(name))}
    return {name: content for name, content in found.items() if not name.startswith("comp_notes")}


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run_recipe(Recipe.from_dict(recipe_of(made)), folder)
    return folder


def broken_run(data: dict, output: Path, step: str, kind: str) -> subprocess.CompletedProcess[str]:
    job = json.dumps({"recipe": data, "output": str(output), "bundle": None, "step": step, "kind": kind})
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("breaking.py"), job],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=900,
    )


def require_kept(output: Path, step: str, reference: Path) -> dict[Path, int]:
    """Everything that was finished before a step is there, with the bytes that it has to have."""
    times = {}
    for stage in ORDER[: ORDER.index(step)]:
        if stage not in STAGES and stage != "samples":
            continue
        name = STAGES.get(stage, "comp_samples")
        for path in (reference / name).rglob("*"):
            there = output / name / path.relative_to(reference / name)
            assert there.read_bytes() == path.read_bytes(), there
            times[there] = there.stat().st_mtime_ns
    return times


def require_complete(output: Path, reference: Path) -> None:
    assert weights(output).keys() == weights(reference).keys()
    for name, content in weights(reference).items():
        assert (output / name).read_bytes() == content, name
    litter = [
        path for path in output.rglob("*") if re.search(r"\.(partial|old)-|\.partial$|comp_lock|comp_work", path.name)
    ]
    assert litter == []


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        *((step, "exception") for step in ORDER),
        ("prune", "ctrl-c"),
    ],
)
def test_a_failure_in_this_process_keeps_what_was_finished(step, kind, made, undisturbed, tmp_path, monkeypatch):
    data = recipe_of(made, measure=step == "measure")
    output = tmp_path / "out"
    errors = {"exception": RuntimeError, "ctrl-c": KeyboardInterrupt}
    with monkeypatch.context() as patch:
        module, name, _ = breaking.PLACES[step]
        holder, _, attribute = f"{module}.{name}".rpartition(".")
        # Undone at the end of the block, whatever `break_at` puts in its place.
        patch.setattr(f"{holder}.{attribute}", _found(holder, attribute))
        breaking.break_at(step, kind)
        # Tests that a shell runs in the background ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(errors[kind]) as failed:
                run_recipe(Recipe.from_dict(data), output)
        finally:
            signal.signal(signal.SIGINT, before)
    assert f"optimum-cli comp compress --resume {output}" in str(failed.value)
    times = require_kept(output, step, undisturbed)
    assert all(
        name in str(failed.value) for name in (STAGES[each] for each in ORDER[1 : ORDER.index(step)] if each in STAGES)
    )
    run_recipe(Recipe.from_dict(data), output)
    require_complete(output, undisturbed)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items()), "something was made twice"


def _found(holder: str, attribute: str):
    import importlib

    module, _, owner = holder.rpartition(".")
    try:
        place = importlib.import_module(holder)
    except ModuleNotFoundError:
        place = getattr(importlib.import_module(module), owner)
    return getattr(place, attribute)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        *((step, "kill") for step in ORDER),
        # Where most is written, and where most is held.
        ("prune", "disk"),
        ("quantize", "disk"),
        ("export", "memory"),
        ("measure", "memory"),
    ],
)
def test_a_process_that_dies_keeps_what_was_finished(step, kind, made, undisturbed, tmp_path):
    data = recipe_of(made, measure=step == "measure")
    output = tmp_path / "out"
    done = broken_run(data, output, step, kind)
    assert done.returncode != 0, done.stderr
    if kind == "kill":
        assert done.returncode == -9
    times = require_kept(output, step, undisturbed)
    run_recipe(Recipe.from_dict(data), output)
    require_complete(output, undisturbed)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items()), "something was made twice"


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kind"), [("prune", "kill"), ("bundle", "disk")])
def test_real_layers_lose_nothing(step, kind, first_layers, real_undisturbed, tmp_path):
    done = broken_run(real_recipe(first_layers), tmp_path / "out", step, kind)
    assert done.returncode != 0, done.stderr
    times = require_kept(tmp_path / "out", step, real_undisturbed)
    run_recipe(Recipe.from_dict(real_recipe(first_layers)), tmp_path / "out")
    require_complete(tmp_path / "out", real_undisturbed)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def real_recipe(model: Path) -> dict:
    # One width for all: what is weighed first is tested on tiny models.
    small = {"num_samples": 4, "sequence_length": 64, "calibration": "pydoc", "allocation": "uniform"}
    stages = [{"prune": small}, "export", {"quantize": {"recipe": "int4"}}, "bundle"]
    return {"model": str(model.resolve()), "stages": stages, "measure": False}


@pytest.fixture(scope="module")
def real_undisturbed(first_layers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "out"
    run_recipe(Recipe.from_dict(real_recipe(first_layers)), folder)
    return folder


def test_other_bits_use_the_pruned_model_and_its_export_again(made, tmp_path, caplog):
    output = tmp_path / "out"
    first = run_recipe(Recipe.from_dict(recipe_of(made, quantize={"recipe": "int8"})), output)
    before = {
        path: path.stat().st_mtime_ns for name in ("pruned", "pruned-onnx") for path in (output / name).iterdir()
    }
    assert not any(cost.earlier for cost in first.costs.values())
    with caplog.at_level("INFO", logger="transformers.optimum_comp"):
        shutil.rmtree(output / "bundle")
        second = run_recipe(Recipe.from_dict(recipe_of(made, quantize={"recipe": "int4"})), output)
    assert "Taking up pruned, pruned-onnx; making pruned-int4, bundle." in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [name for name, cost in second.costs.items() if cost.earlier] == ["prune", "export"]
    assert (output / "pruned-int8").is_dir() and (output / "pruned-int4").is_dir()
    # What is made for 8 bits isn't what would be made for 4: it is said.
    assert any("taken up as it was made for 8 bits (equalized)" in note for note in second.notes)
    assert second.pruning == first.pruning
    again = run_recipe(Recipe.read(output / "comp_recipe.yaml"), output)
    assert all(cost.earlier for cost in again.costs.values())


def test_what_was_made_otherwise_is_replaced_only_when_asked(made, tmp_path):
    output = tmp_path / "out"
    run_recipe(Recipe.from_dict(recipe_of(made)), output)
    before = weights(output)
    other = Recipe.from_dict(recipe_of(made, seed=1))
    with pytest.raises(FileExistsError, match=r"pruned was made otherwise \(seed=0, not 1\).*--overwrite"):
        run_recipe(other, output)
    assert weights(output) == before
    run_recipe(other, output, overwrite=True)
    assert weights(output)["pruned/model.safetensors"] != before["pruned/model.safetensors"]
    # The same place, another text in it.
    data = recipe_of(made, calibration=str(tmp_path / "other.txt"), seed=1)
    (tmp_path / "other.txt").write_text(TEXT.replace("moon", "star"))
    with pytest.raises(FileExistsError, match=r"made otherwise \(calibration="):
        run_recipe(Recipe.from_dict(data), output)


def test_another_model_in_the_same_place_is_another_model(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    data = {**recipe_of(made), "model": str(tmp_path / "model")}
    run_recipe(Recipe.from_dict(data), tmp_path / "out")
    model = tiny_model("llama", seed=1)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"pruned was made otherwise \(of another model\)"):
        run_recipe(Recipe.from_dict(data), tmp_path / "out")


def test_a_recipe_in_the_output_repeats_the_run(made, undisturbed, tmp_path):
    recipe = Recipe.read(undisturbed / "comp_recipe.yaml")
    run_recipe(recipe, tmp_path / "again")
    require_complete(tmp_path / "again", undisturbed)
    assert Recipe.read(tmp_path / "again" / "comp_recipe.yaml").to_dict() == recipe.to_dict()


def prune_stage(made, source, tmp_path, **settings):
    """The stage that prunes, as a chain has it."""
    told = recipe_of(made, **settings)
    if source is not None:
        told["stages"][0]["prune"]["calibration"] = source
    return Chain(Recipe.from_dict(told), tmp_path / "out").stages[0]


def test_a_chat_model_is_calibrated_on_answers_too(made, undisturbed, tmp_path):
    text = str(made / "text.txt")
    assert prune_stage(made, None, tmp_path).calibration == f"{text}:0.8,self:0.2"
    assert prune_stage(made, f"{text}:0.5,pydoc:0.5", tmp_path).calibration == f"{text}:0.4,pydoc:0.4,self:0.2"
    assert prune_stage(made, None, tmp_path, answers=0.5).calibration == f"{text}:0.5,self:0.5"
    # Asked not to, or done already, or of so few samples that none would be an answer.
    assert prune_stage(made, None, tmp_path, answers=0).calibration == text
    assert prune_stage(made, f"{text}:0.9,self:0.1", tmp_path).calibration == f"{text}:0.9,self:0.1"
    assert prune_stage(made, None, tmp_path, num_samples=2).calibration == text
    told = json.loads((undisturbed / "pruned" / "comp_report.json").read_text())["calibration"]
    assert told["source"] == "text.txt 80%, self 20%" and told["num_samples"] == 8


def test_answers_that_cannot_be_had_are_refused_in_words(made, tmp_path):
    with pytest.raises(ValueError, match=r"answers=1.5 is not valid"):
        prune_stage(made, None, tmp_path, answers=1.5)
    with pytest.raises(ValueError, match="leaves 'self' none; take more samples"):
        prune_stage(made, None, tmp_path, answers=0.01)
    stage = Prune(CompConfig(), Running(answers=0.5), tiny_blocks(8, 32))
    with pytest.raises(ValueError, match="put them among the samples yourself"):
        stage.with_answers(0.0)


def test_what_is_no_chat_model_or_is_not_exported_writes_no_answers(made, tmp_path):
    model = shutil.copytree(made / "model", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    told = recipe_of(made)
    for recipe in ({**told, "model": str(model)}, {**told, "stages": told["stages"][:1]}):
        stage = Chain(Recipe.from_dict(recipe), tmp_path / "out").stages[0]
        assert stage.calibration == told["stages"][0]["prune"]["calibration"]


def test_samples_that_only_memory_holds_are_kept_for_the_resume(made, tmp_path, monkeypatch):
    config = CompConfig(num_samples=8, sequence_length=32, round_to=8)

    def broken(*args, **kwargs):
        raise RuntimeError("no")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="--resume"):
        patch.setattr("optimum_comp.onnx.export.run_torch", broken)
        compress(
            made / "model",
            tmp_path / "out",
            config=config,
            calibration=tiny_blocks(8, 32),
            settings=Settings(text=None),
        )
    written = yaml.safe_load((tmp_path / "out" / "comp_recipe.yaml").read_text())
    assert written["stages"][0]["prune"]["calibration"].startswith("given in memory: ")
    recipe = Recipe.read(tmp_path / "out" / "comp_recipe.yaml")
    run_recipe(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "pruned-int8" / "model.onnx").is_file()
    with pytest.raises(ValueError, match="given in memory, and no file holds them"):
        run_recipe(recipe, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_chain_without_pruning(made, tmp_path):
    data = {
        "model": str(made / "model"),
        "stages": [
            "export",
            {
                "quantize": {
                    "recipe": "int4",
                    "calibration": str(made / "text.txt"),
                    "num_samples": 4,
                    "sequence_length": 32,
                }
            },
        ],
        "measure": {"text": str(made / "text.txt"), **MEASURING},
    }
    result = run_recipe(Recipe.from_dict(data), tmp_path / "out")
    assert list(result.stages) == ["dense", "dense-onnx", "dense-int4"]
    assert result.stages["dense-onnx"].perplexity == pytest.approx(result.stages["dense"].perplexity, rel=1e-4)
    assert result.pruning == {} and (tmp_path / "out" / "dense-int4" / "model.onnx").is_file()


def test_the_dense_model_is_measured_first(made, tmp_path, monkeypatch):
    data = recipe_of(made, measure=True)
    measured = []

    def broken(path, settings, **loading):
        measured.append(path)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("optimum_comp.stages.chain.evaluate_apart", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_recipe(Recipe.from_dict(data), tmp_path / "out")
    assert measured == [str(made / "model")] and not (tmp_path / "out" / "pruned").exists()


def test_too_little_text_beside_answers_is_refused_before_anything_is_measured(made, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_comp.stages.chain.evaluate_apart", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "short.txt").write_text("The cat sat.")
    data = recipe_of(made, measure=True, calibration=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"short.txt is too short"):
        run_recipe(Recipe.from_dict(data), tmp_path / "out")


REFUSED = {
    "a dtype that JSON can't hold": ({"loading": {"quantization_config": object()}}, "quantization_config="),
    "too few samples to hold one out": ({"budget": Budget(0.02), "samples": 1}, "num_samples=1 leaves no sample"),
    "a budget that 4 bits can't keep": ({"budget": Budget(size=1000)}, "max_size=1.0 kB can't be kept"),
    "an unknown recipe": ({"recipe": "int3"}, "recipe='int3' is not valid"),
    "an unknown target": ({"target": "riscv"}, "target='riscv' is not valid"),
    "a sparsity that can't be": ({"sparsity": 0.95}, "sparsity=0.95"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_refused_is_refused_before_any_work(case, made, tmp_path, monkeypatch):
    given, said = REFUSED[case]
    given = dict(given)
    loading = given.pop("loading", {})
    config = CompConfig(
        num_samples=given.pop("samples", 8), sequence_length=32, round_to=8, sparsity=given.pop("sparsity", 0.2)
    )
    monkeypatch.setattr("optimum_comp.stages.chain.evaluate_apart", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(ValueError, match=re.escape(said)):
        compress(made / "model", tmp_path / "out", config=config, calibration=made / "text.txt", **given, **loading)
    assert not (tmp_path / "out").exists()


def test_a_dtype_of_torch_is_written_as_a_word(made, tmp_path):
    import torch

    config = CompConfig(num_samples=8, sequence_length=32, round_to=8)
    settings = Settings(text=str(made / "text.txt"), **MEASURING)
    result = compress(
        made / "model",
        tmp_path / "out",
        config=config,
        calibration=made / "text.txt",
        settings=settings,
        dtype=torch.float32,
    )
    assert result.stages["dense"].perplexity is not None
    assert yaml.safe_load((tmp_path / "out" / "comp_recipe.yaml").read_text())["loading"] == {"dtype": "float32"}


def test_a_token_reaches_no_command_line(made, monkeypatch):
    from optimum_comp import evaluation

    seen = []
    run_process = subprocess.run

    def watch(command, **kwargs):
        seen.append(command)
        return run_process(command, **kwargs)

    monkeypatch.setattr(evaluation.subprocess, "run", watch)
    evaluation.evaluate_apart(made / "model", Settings(text=None, prompt_tokens=0), token="hf_secret")
    assert seen and not any("hf_secret" in str(word) for command in seen for word in command)


def test_a_budget_that_turns_out_too_small_keeps_the_pruned_model(made, tmp_path):
    config = CompConfig(num_samples=8, sequence_length=32, round_to=8)
    with pytest.raises(ValueError, match="can't be kept") as failed:
        compress(
            made / "model",
            tmp_path / "out",
            config=config,
            calibration=made / "text.txt",
            budget=Budget(perplexity_increase=1e-9, size=70_000),
            settings=Settings(text=None, prompt_tokens=0, threads=1),
        )
    assert "pruned, pruned-onnx are kept" in str(failed.value) and "allow more" in str(failed.value)
    assert (tmp_path / "out" / "pruned" / "model.safetensors").is_file()


def test_a_model_that_export_cannot_read_is_refused_before_it_is_measured(made, tmp_path):
    wrong = {"recipe": 1, "model": str(made / "model"), "stages": ["export", "quantize"], "measure": False}
    for loading, kind in (({"gguf_file": "model.gguf"}, "a GGUF file"), ({"use_safetensors": False}, "a pickle")):
        with pytest.raises(ValueError, match=f"export reads safetensors, and .* is loaded from {kind}; save it with"):
            run_recipe(Recipe.from_dict(wrong), tmp_path / "out", loading=loading)
    folder = tmp_path / "model"
    shutil.copytree(made / "model", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds its weights as a pickle"):
        run_recipe(Recipe.from_dict({**wrong, "model": str(folder)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantization_after_pruning_looks_at_all_of_the_text():
    places = spread_out(torch.arange(200).view(200, 1)).flatten().tolist()
    assert len(set(places)) == SAMPLES and (places[0], places[-1]) == (0, 199) and places == sorted(places)
    assert spread_out(torch.arange(5)).tolist() == list(range(5))


def test_ctrl_c_on_the_command_line_says_how_to_go_on(made, tmp_path):
    given = ("compress", "--model", made / "model", "--calibration", made / "text.txt", "--no-measure")
    small = ("--num-samples", 8, "--sequence-length", 32, "--round-to", 8)
    status, rest = run_until("export: making", *given, *small, tmp_path / "out")
    assert status == 130 and f"--resume {tmp_path / 'out'}" in rest and "pruned is kept" in rest
    assert "--bundle" not in rest
    done = run("compress", "--resume", "--bundle", tmp_path / "phone", tmp_path / "out")
    assert "Taking up pruned; making pruned-onnx, pruned-int8, bundle." in done.stderr
    verify_bundle(tmp_path / "phone")


def test_two_at_once_are_one_too_many(made, tmp_path):
    from optimum_comp.files import hold

    output = tmp_path / "out"
    run_recipe(Recipe.from_dict(recipe_of(made)), output)
    before = weights(output)
    with hold(output), pytest.raises(OSError, match="another process is at work"):
        run_recipe(Recipe.from_dict(recipe_of(made)), output)
    assert weights(output) == before


def test_a_disk_that_is_too_small_is_said_before_any_work(made, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_comp.sweep.memory.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(OSError, match=r"needs .* of disk space at .*, and 1 B are free"):
        run_recipe(Recipe.from_dict(recipe_of(made)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_that_is_too_little_is_said_before_any_work(made, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"export needs about .* of memory, and 100\.0 MB are allowed \(max_memory\)"):
        run_recipe(Recipe.from_dict(recipe_of(made)), tmp_path / "out", max_memory="100MB")
    assert not (tmp_path / "out").exists()
    with caplog.at_level("INFO", logger="transformers.optimum_comp"):
        run_recipe(Recipe.from_dict(recipe_of(made)), tmp_path / "out", max_memory="1.5GB")
    assert re.search(r"steps after pruning may take: export .*, quantize .*, bundle ", caplog.text)


def test_a_model_folder_is_no_output(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "mine")
    before = weights(tmp_path)
    with pytest.raises(FileExistsError, match="holds a model, not a compression"):
        run_recipe(Recipe.from_dict(recipe_of(made)), tmp_path / "mine", overwrite=True)
    assert weights(tmp_path) == before
