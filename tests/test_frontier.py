"""Every lever measured side by side, and the choice by a budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import need_onnx, run, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


need_onnx()

from optimum_comp import CompConfig  # noqa: E402
from optimum_comp.evaluation import Evaluation, Settings  # noqa: E402
from optimum_comp.frontier import (  # noqa: E402
    Candidate,
    Frontier,
    FrontierSettings,
    Point,
    _Walk,
    choose,
    find_frontier,
)
from optimum_comp.stages.export import ExportSettings  # noqa: E402
from optimum_comp.stages.prune import Running  # noqa: E402


pytestmark = pytest.mark.usefixtures("measured_here")

CONFIG = CompConfig(num_samples=8, sequence_length=32, round_to=8)
MEASURING = Settings(window=32, max_tokens=96, prompt_tokens=0, new_tokens=2, repeats=1, threads=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and two texts."""
    folder = tmp_path_factory.mktemp("frontier")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "cat.txt").write_text("The cat sat on the mat and looked at the moon.\n" * 60)
    (folder / "dog.txt").write_text("A dog barked; nobody came. It went home again.\n" * 60)
    return folder


def walk(made: Path, output: Path, **settings) -> Frontier:
    settings = {"distil": False, **settings}
    settings.setdefault("text", [str(made / "dog.txt"), str(made / "cat.txt")])
    asked = FrontierSettings(sparsities=[0.3], **settings)
    return find_frontier(
        made / "model", output, asked, config=CONFIG, calibration=str(made / "cat.txt"), measuring=MEASURING
    )


def test_every_candidate_is_made_measured_and_kept(made, tmp_path):
    found = walk(made, tmp_path / "out")
    names = [point.candidate.name for point in found.points]
    assert names == ["dense, float32", "dense, int8", "dense, int4", "pruned 30%, int8", "pruned 30%, int4"]
    dense, *others = found.points
    assert dense.increases == [0.0, 0.0] and all(len(point.increases) == 2 for point in others)
    for point in others:
        # One vocabulary, so it is the plain ratio of perplexities.
        ratios = [a.perplexity / b.perplexity - 1 for a, b in zip(point.evaluations, dense.evaluations, strict=True)]
        assert point.increases == pytest.approx(ratios, abs=1e-6)
        assert (point.folder / "model.onnx").is_file()
    assert found.chosen is None and found.left == {}
    text = found.text()
    assert all(name in text for name in names) and "dog.txt" in text and "on the front" in text
    stored = json.loads((tmp_path / "out" / "comp_frontier.json").read_text())
    assert [each["name"] for each in stored["points"]] == names

    # Another budget takes up what is there: nothing is made or measured anew.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.onnx")}
    limit = sorted(point.size for point in found.points)[1]
    again = walk(made, tmp_path / "out", max_perplexity_increase=100.0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.onnx")} == before
    assert again.chosen.size == min(point.size for point in found.points)
    assert "Chosen: " in again.text()
    # And a size asks for mixes of precisions, which are made.
    sized = walk(made, tmp_path / "out", max_size=limit)
    assert sized.chosen is not None and sized.chosen.size <= limit
    assert sized.chosen.increase == min(point.increase for point in sized.points if point.size <= limit)
    # A second size has mixes of its own, beside the first's, and what only the first one asked for stays measured.
    other = walk(made, tmp_path / "out", max_size=limit - 3000)
    (mixed,) = (each for each in other.points if each.candidate.name == "pruned 30%, mixed")
    assert mixed.size <= limit - 3000 and mixed.folder.is_dir()
    first = [each for each in sized.points if each.candidate.weights == "mixed"]
    assert first and all(each.folder.is_dir() for each in first)
    stored = json.loads((tmp_path / "out" / "comp_frontier.json").read_text())
    assert {each["key"] for each in stored["others"]} >= {each.key for each in first}


def test_for_a_size_as_little_is_pruned_as_fits(made, tmp_path):
    asked = FrontierSettings(text=[str(made / "dog.txt")], distil=False)
    config = CompConfig(num_samples=8, sequence_length=32, round_to=16)
    given = {"config": config, "calibration": str(made / "cat.txt"), "measuring": MEASURING}
    dense = {
        point.candidate.weights: point.size
        for point in find_frontier(
            made / "model", tmp_path / "out", dataclasses.replace(asked, sparsities=[]), **given
        ).points
    }
    limit = dense["int4"] - 5000
    # A mix of precisions fits with nothing pruned, so nothing is.
    found = find_frontier(made / "model", tmp_path / "out", dataclasses.replace(asked, max_size=limit), **given)
    assert found.chosen is not None and found.chosen.candidate.weights == "mixed"
    assert not any(each.candidate.sparsity for each in found.points)
    assert "has cost less than pruning wherever both were measured" in found.verdict()
    # More than a size is asked for: what fits pruned is tried, too.
    asked = dataclasses.replace(asked, max_size=limit, max_perplexity_increase=100.0)
    found = find_frontier(made / "model", tmp_path / "out", asked, **given)
    pruned = {each.candidate.weights: each for each in found.points if each.candidate.sparsity}
    assert set(pruned) == {"int4", "mixed"}
    assert 0.9 * limit < pruned["int4"].size <= limit
    assert 0 < pruned["int4"].candidate.sparsity < 0.2
    assert any("more than" in reason for reason in found.left.values())
    assert "no pruned model that keeps to this does as well" in found.verdict() or found.chosen.candidate.sparsity


def test_what_is_unmeasured_is_expected_to_take_the_least(made, tmp_path):
    """Where nothing fits with nothing pruned, so much is pruned as the formats say, and not what is usual."""
    weights = sum(each.numel() for each in tiny_model("llama").parameters())
    settings = FrontierSettings(max_size=weights // 2, text=[str(made / "dog.txt")])
    config = CompConfig(num_samples=8, sequence_length=32, round_to=16)
    given = (config, str(made / "cat.txt"), Running(), ExportSettings(), "any", MEASURING, None, False, {})
    walk = _Walk(str(made / "model"), tmp_path, settings, *given)
    small, usual = Candidate(0.0, "int4-small"), Candidate(0.0, "int4")
    assert walk._least(small) > settings.max_size
    # 64 codes and a scale of two bytes a block.
    assert walk._least(Candidate(0.0, "int8")) == pytest.approx(weights * 66 / 64, rel=0.01)
    assert walk._least(small) < walk._least(Candidate(0.0, "mixed")) < walk._least(usual)
    assert walk._least(usual) < walk._least(Candidate(0.0, "int8"))
    fewest = walk._sparsities()[0]
    assert 0 < fewest < 0.2 and walk._least(small.pruned(fewest)) <= settings.max_size


@pytest.mark.slow
def test_training_for_fewer_bits_is_a_candidate(made, tmp_path):
    found = walk(made, tmp_path / "out", distil=True, distil_time=5)
    trained = [point for point in found.points if point.candidate.weights == "int4-small"]
    assert [point.candidate.name for point in trained] == [
        "dense, int4-small, trained",
        "pruned 30%, int4-small, trained",
    ]
    sizes = {point.candidate.name: point.size for point in found.points}
    for point in trained:
        assert point.size < sizes[point.candidate.name.replace("int4-small, trained", "int4")]
        distilled = point.folder.parent / point.folder.name.removesuffix("-int4-small")
        stored = json.loads((distilled / "comp_distil.json").read_text())
        assert stored["settings"]["rounding"] == "int4-small" and stored["steps"] > 0
        assert set(stored["texts"]) == {"cat.txt", "self"}


def test_fewer_tokens_are_a_candidate_and_compared_by_bytes(made, tmp_path):
    russian = "Кошка сидела на коврике и смотрела на луну. Собака лаяла; никто не пришёл.\n" * 30
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(made / "cat.txt").read_text(), russian], trainer)
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = tiny_model("llama").config
    config.vocab_size = len(tokenizer.get_vocab())
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    asked = FrontierSettings(
        sparsities=[],
        text=[str(made / "dog.txt")],
        vocabulary=["ascii"],
        vocabulary_tokens=270,
        distil=False,
        time="10min",
    )
    found = find_frontier(
        folder, tmp_path / "out", asked, config=CONFIG, calibration=str(made / "cat.txt"), measuring=MEASURING
    )
    assert found.left == {}
    points = {point.candidate.name: point for point in found.points}
    whole, fewer = points["dense, int8"], points["dense, ascii only, int8"]
    assert fewer.size < whole.size and fewer.evaluations[0].vocabulary < whole.evaluations[0].vocabulary
    # Perplexities of two vocabularies aren't comparable; bits of the same bytes are.
    assert abs(fewer.increases[0] - whole.increases[0]) < 0.5
    assert points["dense, ascii only, int4"].folder.parent.name == "dense-ascii"
    few = points["dense, ascii only, 270 tokens, int8"]
    assert few.evaluations[0].vocabulary == 270 and few.folder.parent.name == "dense-ascii-270"
    told = json.loads((few.folder.parent / "vocabulary" / "comp_vocabulary.json").read_text())
    assert told["settings"]["text"] == [str(made / "cat.txt")] and told["texts"]["cat.txt"]["kept"] < 1
    with pytest.raises(ValueError, match="name their scripts, too"):
        FrontierSettings(vocabulary_tokens=270)
    # What can't be made smaller is said by name, before anything is made.
    with pytest.raises(ValueError, match="WordLevel"):
        walk(made, tmp_path / "other", vocabulary=["ascii"])
    assert not (tmp_path / "other").exists()


def test_a_budget_that_nothing_keeps_to_says_what_comes_nearest(made, tmp_path):
    # Weights alone would fit; the graph around them doesn't.
    limit = sum(each.numel() for each in tiny_model("llama").parameters()) * 9 // 16
    done = run(
        *("frontier", "--model", made / "model", "--sparsities", "0.3", "--text", made / "dog.txt"),
        *("--calibration", made / "cat.txt", "--num-samples", "8", "--sequence-length", "32", "--round-to", "8"),
        *("--window", "32", "--max-tokens", "96", "--prompt-tokens", "0", "--no-distil"),
        *("--max-size", f"{limit}B", tmp_path / "out"),
        check=False,
    )
    assert done.returncode == 1 and "isn't kept by anything" in done.stderr and "Traceback" not in done.stderr
    assert "the nearest is" in done.stdout and "was left out: " in done.stdout
    assert "in as few bits as it may have" in done.stdout
    assert (tmp_path / "out" / "dense").is_dir()


def test_a_size_that_no_candidate_can_have_is_refused_before_anything_is_made(made, tmp_path):
    for command, more in (("frontier", ["--sparsities", "0.3"]), ("compress", [])):
        asked = ("--model", made / "model", *more, "--max-size", "1kB")
        done = run(command, *asked, tmp_path / "out", check=False)
        assert done.returncode == 1 and "max_size=1.0 kB can't be kept: the smallest" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_compress_searches_where_only_a_budget_is_given(made, tmp_path):
    asked = ("compress", "--model", made / "model", "--max-perplexity-increase", "500%", "--time", "1s")
    sizes = ("--num-samples", "8", "--sequence-length", "32", "--round-to", "8", "--prompt-tokens", "0")
    given = (*asked, *sizes, "--calibration", made / "cat.txt", "--text", made / "dog.txt", "--window", "32")
    done = run(*given, tmp_path / "out")
    assert "Chosen: dense, float32" in done.stdout and "are left" in done.stdout
    # On every text that is given, where a chain is measured on one.
    done = run(*given, "--text", made / "cat.txt", tmp_path / "out")
    assert "dog.txt" in done.stdout and "cat.txt" in done.stdout
    assert "cat.txt is measured on, and calibrates" in done.stderr and "dog.txt is measured" not in done.stderr
    # How to train, and what else to try, isn't how to keep the budget.
    done = run(*given, "--max-size", "1GB", "--distil-time", "3s", "--no-distil", tmp_path / "out")
    assert "dense, int8 was left out" in done.stdout and "trained" not in done.stdout
    done = run(*given, "--max-size", "1GB", "--distil-time", "3s", tmp_path / "out")
    assert "dense, int4-small, trained was left out: " in done.stdout
    done = run("compress", "--model", made / "model", "--no-distil", tmp_path / "o", check=False)
    assert done.returncode == 1 and "--no-distil is for a search over all levers" in done.stderr
    done = run(
        "compress", "--model", made / "model", "--text", "a.txt", "--text", "b.txt", tmp_path / "o", check=False
    )
    assert done.returncode == 1 and "--text is given 2 times (a.txt, b.txt)" in done.stderr
    done = run(*asked, "--weights", "int4", tmp_path / "other", check=False)
    assert done.returncode == 1 and "time asks for a search over all levers, and --weights says how" in done.stderr


def test_what_may_not_begin_any_more_is_named(made, tmp_path):
    found = walk(made, tmp_path / "out", time=0.001)
    assert [point.candidate.name for point in found.points] == ["dense, float32"]
    assert len(found.left) == 4 and all("are left" in reason for reason in found.left.values())


def test_bad_input_is_refused_before_anything_is_made(made, tmp_path):
    with pytest.raises(ValueError, match="sparsities"):
        FrontierSettings(sparsities=[0.3, 1.5])
    with pytest.raises(ValueError, match="min_speedup asks for"):
        walk(made, tmp_path / "out", min_speedup=2.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        walk(made, tmp_path / "mine")
    with pytest.raises((OSError, ValueError), match=r"missing\.txt"):
        walk(made, tmp_path / "out", text=["missing.txt"])
    with pytest.raises(ValueError, match="calibration is to be a file"):
        find_frontier(made / "model", tmp_path / "out", calibration=["in memory"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="isn't what this command made"):
        find_frontier(made / "model", tmp_path / "model", overwrite=True)
    assert not (tmp_path / "out").exists()


def point(name: str, sparsity: float, size: int, increase: float, speedup: float) -> Point:
    evaluation = Evaluation(
        "m", "onnxruntime", 1000, size, decode_tokens_per_second=1.0, prefill_tokens_per_second=1.0
    )
    return Point(Candidate(sparsity, name), Path(name), name, [evaluation], [increase], speedup)


POINTS = [
    point("float32", 0.0, 1000, 0.0, 1.0),
    point("int8", 0.0, 300, 0.01, 2.0),
    point("int4", 0.0, 200, 0.04, 2.5),
    point("int4", 0.2, 150, 0.2, 3.0),
]


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"max_size": 250}, 200),
        ({"max_perplexity_increase": 0.02}, 300),
        ({"max_perplexity_increase": 0.5}, 150),
        ({"min_speedup": 2}, 300),
        ({"min_speedup": 2.2, "max_size": 180}, 150),
        ({"max_size": 100}, None),
        ({}, None),
    ],
)
def test_the_choice_is_the_best_that_keeps_to_the_budget(asked, size):
    chosen = choose(POINTS, FrontierSettings(**asked))
    assert (None if chosen is None else chosen.size) == size


def test_the_verdict_says_where_quantization_alone_is_best():
    settings = FrontierSettings(max_size=250, text=["a.txt"])
    found = Frontier(Path("out"), settings, POINTS, choose(POINTS, settings), {})
    assert "Quantization alone is best here" in found.verdict()
    nothing = dataclasses.replace(found, settings=FrontierSettings(text=["a.txt"]), chosen=None)
    assert "Above 150 B, fewer bits alone are best" in nothing.verdict()
    alone = dataclasses.replace(nothing, points=POINTS[:3])
    assert "Nothing pruned was tried" in alone.verdict()
    bits = dataclasses.replace(nothing, points=[*POINTS[:3], point("pruned", 0.2, 200, 0.05, 3.0)])
    assert "best at every size" in bits.verdict()
