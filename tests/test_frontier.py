"""Every lever measured side by side, and the choice by a budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import need_onnx, run, tiny_model, tiny_tokenizer


need_onnx()

from optimum_comp import CompConfig  # noqa: E402
from optimum_comp.evaluation import Evaluation, Settings  # noqa: E402
from optimum_comp.frontier import (  # noqa: E402
    Candidate,
    Frontier,
    FrontierSettings,
    Point,
    choose,
    find_frontier,
)


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
    asked = FrontierSettings(sparsities=[0.3], text=[str(made / "dog.txt"), str(made / "cat.txt")], **settings)
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


def test_a_budget_that_nothing_keeps_to_says_what_comes_nearest(made, tmp_path):
    done = run(
        *("frontier", "--model", made / "model", "--sparsities", "0.3", "--text", made / "dog.txt"),
        *("--calibration", made / "cat.txt", "--num-samples", "8", "--sequence-length", "32", "--round-to", "8"),
        *("--window", "32", "--max-tokens", "96", "--prompt-tokens", "0", "--max-size", "1kB", tmp_path / "out"),
        check=False,
    )
    assert done.returncode == 1 and "isn't kept by anything" in done.stderr and "Traceback" not in done.stderr
    assert "the nearest is" in done.stdout and "was left out: with every weight in 4 bits" in done.stdout
    assert (tmp_path / "out" / "dense").is_dir()


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
    assert "Above 150 B, quantization alone is best" in nothing.verdict()
    bits = dataclasses.replace(nothing, points=POINTS[:3])
    assert "best at every size" in bits.verdict()
