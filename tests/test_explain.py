"""What `comp explain` says of folders that were really made."""

from __future__ import annotations

import json

import pytest
from conftest import run, tiny_blocks, tiny_model, tiny_tokenizer

from optimum_comp import CompConfig, CompPruner
from optimum_comp.commands.explain import explain
from optimum_comp.report.explain import Run, explain_pruning, explanation_text
from optimum_comp.report.run import REPORT_NAME, CompReport, Decision, LayerReport
from optimum_comp.sweep.journal import Journal
from optimum_comp.sweep.pruning import PruningRun


FIELDS = {"num_samples": 16, "sequence_length": 32, "round_to": 8}
ALL_AXES = {
    "sparsity": 0.55,
    "layer_fraction": 0.5,
    "attention_fraction": 0.4,
    "axes": ["ffn", "kv", "heads"],
    "elimination_block": 4,
}


class Stop(BaseException):
    pass


def prune(folder, output, **fields) -> CompReport:
    config = CompConfig(**{**FIELDS, **fields})
    return CompPruner.from_pretrained(folder).prune(config, tiny_blocks(), output=output)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("pruned") / "out"
    prune(dense, output, **ALL_AXES)
    return output


def said(folder, layer: int | None = None) -> str:
    """The text, as one line."""
    text = explanation_text(explain(folder, layer))
    assert max(map(len, text.splitlines())) <= 100
    return " ".join(text.split())


def test_the_budget_is_explained_in_numbers_that_add_up(pruned):
    report = CompReport.load(pruned)
    (found,) = explain(pruned).values()
    budget = found["budget"]
    layer = tiny_model("llama").model.layers[0]
    assert budget["parameters"] == 4 * sum(each.numel() for each in layer.parameters())
    assert [entry["axis"] for entry in budget["ledger"]] == ["layers", "kv", "heads", "ffn"]
    assert sum(entry["taken_parameters"] for entry in budget["ledger"]) == budget["removed_parameters"]
    assert budget["removed_parameters"] == report.parameters_before - report.parameters_after
    text = said(pruned)
    assert f"{budget['parameters']:,} parameters in 4 decoder layers. 55.00%" in text
    for entry in budget["ledger"]:
        assert entry["reason"] in text
        assert f"{entry['taken_parameters']:,} {entry['share']:.1%}" in text
    more = budget["removed_parameters"] - 0.55 * budget["parameters"]
    assert f"rounding took {more:,.0f} more than was asked" in text


def test_whole_layers_are_explained_by_their_scores(pruned):
    report = CompReport.load(pruned)
    (gone,) = report.removed_layers
    scores = {index: f"{score:.3g}" for index, score in enumerate(report.layer_scores)}
    text = said(pruned)
    assert f"Layer {gone} went: score {scores[gone]}; layer {gone - 1} was fitted anew to stand in for it." in text
    assert f"Protected, whatever their score: 0 ({scores[0]}), 3 ({scores[3]})." in text
    other = 3 - gone
    assert f"Next, and kept: {other} ({scores[other]})." in text
    alone = said(pruned, gone)
    assert f"Layer {gone} was removed as a whole: 1 had to go, and its score, {scores[gone]}, is number 1" in alone
    assert f"The lowest that stayed is {scores[other]}, of layer {other}." in alone
    assert f"stand in for removed layers ({gone})" in said(pruned, gone - 1)


def test_each_layer_has_its_units_scores_around_the_threshold_and_errors(pruned):
    report = CompReport.load(pruned)
    (found,) = explain(pruned).values()
    text = explanation_text(explain(pruned))
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in report.layers:
        (entry,) = (each for each in found["layers"] if each["layer"] == layer.index)
        assert [each["axis"] for each in entry["axes"]] == ["kv", "heads", "ffn"]
        neurons, decision = entry["axes"][-1], layer.decision("ffn")
        removed = {unit: score for unit, score in enumerate(decision.scores) if unit not in decision.kept}
        assert (neurons["before"], neurons["after"]) == (96, report.width)
        assert neurons["highest_removed"]["score"] == max(removed.values())
        assert removed[neurons["highest_removed"]["unit"]] == max(removed.values())
        assert neurons["lowest_kept"]["score"] == min(decision.scores[unit] for unit in decision.kept)
        ranked = sorted(range(96), key=decision.scores.__getitem__)[-len(decision.kept) :]
        assert neurons["swapped"] == len(set(ranked) - set(decision.kept))
        row = f"{neurons['unrepaired_error']:.2%} {neurons['relative_error']:.2%}".replace("%", " %").split()
        assert any(line.split()[-4:] == row for line in text.splitlines() if "neurons" in line)
        (kept,) = layer.decision("kv").kept
        heads = entry["axes"][1]
        # Heads are numbered as in the dense model: those of the group that stays.
        assert {heads["highest_removed"]["unit"], heads["lowest_kept"]["unit"]} == {2 * kept, 2 * kept + 1}
    assert any(each["axes"][-1]["swapped"] for each in found["layers"] if not each["removed"])
    alone = said(pruned, 0)
    assert "neurons: 96 -> " in alone and "query heads: 2 -> 1" in alone and "key-value groups: 2 -> 1" in alone
    assert "a plain ranking by these scores. Units go a few at a time" in alone
    assert f"(neuron {found['layers'][0]['axes'][-1]['lowest_kept']['unit']})" in alone


@pytest.mark.parametrize("recovery", ["least_squares", "mask", "none"])
@pytest.mark.parametrize("metric", ["condition", "wanda"])
def test_errors_with_and_without_the_repair_are_recorded(recovery, metric, dense, tmp_path):
    # A mask that is best by what errors cost may be worse by errors that all count alike, which is what is recorded.
    extra = {"attention_fraction": 0.5, "neuron_metric": metric, "recovery": recovery, "error_norm": "euclidean"}
    report = prune(dense, tmp_path / "out", sparsity=0.4, **extra)
    decisions = [each for layer in report.layers for each in layer.decisions]
    assert {each.axis for each in decisions} == {"ffn", "kv"}
    for each in decisions:
        assert 0 <= each.relative_error <= 1
        # What is recorded of the mask is that of its own problem, whose error without a repair counts its ridge, too.
        assert each.relative_error <= each.unrepaired_error * (1 + 1e-3)
        if recovery == "none" and metric == "wanda":
            assert each.unrepaired_error == each.relative_error
    if recovery == "none":
        assert "nothing was repaired" in said(tmp_path / "out", 0)
    if metric == "wanda":
        assert "Units were ranked once, so there are none." in said(tmp_path / "out")
        (found,) = explain(tmp_path / "out").values()
        assert all(axis["swapped"] == 0 for layer in found["layers"] for axis in layer["axes"])


@pytest.mark.parametrize(("number", "known"), [(4, "has layers 0 to 3"), (-1, "has layers 0 to 3")])
def test_a_layer_that_the_model_does_not_have_is_refused(number, known, pruned):
    with pytest.raises(ValueError, match=rf"layer={number} is not valid: the dense model {known}\."):
        explain(pruned, number)


def test_a_report_from_before_says_what_it_does_not_hold(pruned, tmp_path):
    data = json.loads((pruned / REPORT_NAME).read_text())
    del data["ledger"]
    for layer in data["layers"]:
        for decision in layer["decisions"]:
            del decision["unrepaired_error"]
    (tmp_path / REPORT_NAME).write_text(json.dumps(data))
    (tmp_path / "comp_config.json").write_bytes((pruned / "comp_config.json").read_bytes())
    assert CompReport.load(tmp_path).ledger == []
    text = said(tmp_path)
    assert "How the budget was shared out isn't recorded here. What changed: feed-forward width 96 ->" in text
    assert 'unrepaired "-": not recorded in this report.' in text
    assert "left as it was" not in text
    assert "with what stays as it was, not recorded; once that is repaired by least squares," in said(tmp_path, 0)


def test_an_unfinished_run_says_what_is_decided_so_far(dense, tmp_path, monkeypatch):
    output = tmp_path / "out"

    original = PruningRun._record

    def stopping(self, *args):
        original(self, *args)
        self._recorder.wait()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_record", stopping)
        with pytest.raises(Stop):
            prune(dense, output, **ALL_AXES)
    journal = Journal.read(output)
    assert journal.finished == 1
    text = said(output)
    assert "The run isn't finished: 1 layers are done." in text
    assert "55.00% of the decoder layers' parameters are to go" in text
    (gone,) = journal.state["removed"]
    assert f"Layer {gone} went: score" in text and "neurons" in text
    assert said(output, 3).endswith("Layer 3: not decided yet.")
    assert "neurons: 96 ->" in said(output, 0)
    with pytest.raises(ValueError, match="the dense model has layers 0 to 3"):
        explain(output, 4)
    # Of a model that the run is to replace, nothing is said.
    (output / REPORT_NAME).write_text("{}")
    assert "The run isn't finished" in said(output)
    # Nothing but the text is known before layers are scored.
    state = {key: value for key, value in journal.state.items() if key not in ("removed", "layer_scores")}
    found = explain_pruning(Run.unfinished(state, []))
    assert "Which go isn't decided yet." in explanation_text({"out": found})


def test_a_run_that_was_stopped_while_it_put_the_result_in_place_is_finished(dense, tmp_path, monkeypatch):
    output = tmp_path / "out"
    original = Journal.record

    def stopping(self, **changes):
        original(self, **changes)
        if changes.get("stage") == "finishing":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stopping)
        with pytest.raises(Stop):
            prune(dense, output)
    assert not (output / REPORT_NAME).exists()
    assert "In all " in said(output)


def made_up(axis: str, kept: list[int], scores: list[float], *others: Decision) -> dict:
    """What is found of one layer with this decision."""
    layer = LayerReport(0, [*others, Decision(axis, kept, scores, 0.1, 0.2)], bridged=False)
    run_of = Run(CompConfig(), "a", {}, [layer], [], [])
    return explain_pruning(run_of)["layers"][0]["axes"][-1]


def test_swapped_units_are_those_that_a_plain_ranking_would_have_kept():
    assert made_up("ffn", [0, 1], [4.0, 3.0, 2.0, 1.0])["swapped"] == 0
    found = made_up("ffn", [1, 3], [4.0, 3.0, 2.0, 1.0])
    assert found["swapped"] == 1
    assert found["highest_removed"] == {"unit": 0, "score": 4.0}
    assert found["lowest_kept"] == {"unit": 3, "score": 1.0}
    # Either of two equal ones.
    assert made_up("ffn", [0, 2], [4.0, 3.0, 3.0, 1.0])["swapped"] == 0
    # As many heads stay in each group, so the ranking is within groups.
    groups = Decision("kv", [1, 3], [1.0, 2.0, 1.0, 2.0], 0.0)
    found = made_up("heads", [2, 6], [9.0, 8.0, 1.0, 0.5], groups)
    assert found["swapped"] == 0 and found["highest_removed"]["unit"] == 3
    found = made_up("heads", [2, 7], [9.0, 8.0, 1.0, 0.5], groups)
    assert found["swapped"] == 1 and found["lowest_kept"] == {"unit": 7, "score": 0.5}
    # How many groups there are isn't known before the run is finished.
    assert made_up("heads", [0, 2], [9.0, 8.0, 1.0, 0.5])["swapped"] is None
    everything = made_up("ffn", [0, 1], [1.0, 2.0])
    assert everything["highest_removed"] is None and everything["swapped"] == 0


def test_folders_with_nothing_to_explain_are_refused_in_one_line(dense, pruned, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; explain takes what comp prune"):
        explain(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"tiny holds nothing to explain; explain takes what comp prune \(finished"):
        explain(dense)
    (tmp_path / "ort_config.json").write_text(json.dumps({"quantization": {}}))
    with pytest.raises(ValueError, match="holds nothing to explain"):
        explain(tmp_path)
    (tmp_path / "ort_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"ort_config.json is damaged"):
        explain(tmp_path)


def test_on_the_command_line(pruned, tmp_path):
    done = run("explain", "--json", tmp_path / "numbers.json", pruned)
    assert done.stdout.startswith("out: tiny, pruned; calibrated on token blocks, 16 samples of 32 tokens.\n")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == json.loads(json.dumps(explain(pruned)))
    refused = run("explain", "--layer", 9, pruned, check=False)
    assert refused.returncode == 1
    assert refused.stderr == "error: layer=9 is not valid: the dense model has layers 0 to 3.\n"


@pytest.mark.onnx
def test_every_part_of_a_compression_is_explained(dense, tmp_path):
    from optimum_comp.compress import compress
    from optimum_comp.evaluation import Settings
    from optimum_comp.stages.quantize import QuantizeSettings, SampleSettings, quantize_folder

    output = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon.\n" * 60)
    nothing = Settings(text=None, prompt_tokens=0)
    compress(dense, output, config=CompConfig(**FIELDS), calibration=str(text), recipe="int4", settings=nothing)
    parts = explain(output)
    assert list(parts) == ["pruned", "pruned-int4"]
    weights = {each["weight"]: each for each in parts["pruned-int4"]["weights"]}
    assert weights["mlp.down_proj"] == {"bits": 4, "block_size": 32, "weight": "mlp.down_proj", "count": 4}
    assert weights["self_attn.q_proj"]["bits"] == weights["lm_head"]["bits"] == 8
    shown = said(output)
    assert "out" not in parts and "pruned: tiny, pruned; calibrated on text.txt" in shown
    assert "pruned-int4: quantized by recipe int4: 4-bit weights rounded with calibration text" in shown
    assert "16 weight matrices in 4 bits, blocks of up to 32: 4 mlp.down_proj, 4 mlp.gate_proj" in shown
    assert "13 weight matrices in 8 bits, blocks of up to 64: 1 lm_head, 4 self_attn.k_proj" in shown
    # --layer is of the pruning alone.
    assert list(explain(output, 0)) == ["pruned"]
    with pytest.raises(ValueError, match="holds no pruning run, which --layer is of"):
        explain(output / "pruned-int4", 0)
    size = sum(path.stat().st_size for path in (output / "pruned-onnx").glob("*.onnx"))
    searched = tmp_path / "searched"
    quantize_folder(
        output / "pruned-onnx",
        searched,
        settings=QuantizeSettings(max_size=int(0.8 * size)),
        samples=SampleSettings(calibration=str(text), num_samples=4, sequence_length=32),
    )
    (found,) = explain(searched).values()
    assert found["left_in_float"] and sum(each["count"] for each in found["weights"]) > 0
    shown = said(searched)
    assert "A search gave each weight its bits by what it was measured to cost" in shown
    assert "Left in float because 8 bits would cost too much: " in shown
