"""What samples and windows begin with: found, measured, recorded, and the same wherever it is used."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import run, tiny_blocks, tiny_model, tiny_tokenizer
from test_resume import Stop, digest
from tokenizers.processors import TemplateProcessing

from optimum_comp import CompConfig, CompPruner
from optimum_comp.beginning import Beginning, decide, losses_of_model, losses_of_source, spread, start_tokens
from optimum_comp.calibration.text import Calibration, choose_blocks, prepare_calibration
from optimum_comp.checkpoint.opening import open_source
from optimum_comp.checkpoint.source import ResidentModel
from optimum_comp.compress import compress
from optimum_comp.evaluation import Settings, evaluate, perplexity
from optimum_comp.families import family_of
from optimum_comp.report.table import evaluation_table
from optimum_comp.stages.quantize import QuantizeSettings, SampleSettings, _samples
from optimum_comp.sweep.pruning import PruningRun


BEGIN = 1
TEXT = "The cat sat on the mat and looked at the moon.\n" * 40
SMALL = {"num_samples": 4, "sequence_length": 32, "round_to": 8}


def beginning_tokenizer(template: str = "<s> $A"):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BEGIN), ("</s>", 2)]
    )
    return tokenizer


def model_that_minds(helps: bool):
    """A model that predicts the text above better, or worse, behind `<s>`.

    It isn't trained: what `<s>` adds to later positions is a direction that its head takes for a space, which is
    frequent in the text, or for a token that isn't in it.
    """
    model = tiny_model("llama-untied")
    direction = torch.zeros(64)
    direction[0] = 8.0
    model.model.embed_tokens.weight.data[:, 0] = 0
    model.model.embed_tokens.weight.data[BEGIN] = direction
    attention = model.model.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj):
        # Every position looks at every earlier one alike.
        part.weight.data.zero_()
    attention.v_proj.weight.data.zero_()
    attention.v_proj.weight.data[0, 0] = attention.v_proj.weight.data[16, 0] = 1.0
    attention.o_proj.weight.data.zero_()
    attention.o_proj.weight.data[0, 0] = 40.0
    model.lm_head.weight.data[:, 0] = 0
    frequent = tiny_tokenizer()(" ")["input_ids"][0]
    model.lm_head.weight.data[frequent if helps else 3, 0] = 0.5
    return model


@pytest.fixture(params=[True, False], ids=["helps", "hurts"])
def helps(request) -> bool:
    return request.param


def folder_of(path, helps: bool):
    model_that_minds(helps).save_pretrained(path)
    beginning_tokenizer().save_pretrained(path)
    return path


def brute_force(model, tokens: torch.Tensor, start: list[int], length: int) -> tuple[float, float]:
    """Losses of each piece's tokens 1 to length - len(start), one token and one forward pass after the other."""
    sums = [0.0, 0.0]
    predicted = range(1, length - len(start))
    pieces = spread(tokens, length)
    for piece in pieces.tolist():
        for place in predicted:
            for number, front in enumerate((start, [])):
                with torch.no_grad():
                    logits = model(torch.tensor([front + piece[:place]])).logits[0, -1]
                sums[number] -= float(logits.log_softmax(-1)[piece[place]])
    count = len(pieces) * len(predicted)
    return sums[0] / count, sums[1] / count


@pytest.mark.parametrize(
    ("template", "want"), [("<s> $A", [1]), ("$A", []), ("$A </s>", []), ("<s> </s> $A </s>", [1, 2])]
)
def test_start_tokens_are_what_the_tokenizer_puts_in_front(template, want):
    assert start_tokens(beginning_tokenizer(template)) == want
    assert start_tokens(tiny_tokenizer()) == []


def test_pieces_are_spread_over_the_text():
    assert spread(torch.arange(1000), 100)[:, 0].tolist() == [0, 300, 600, 900]
    assert spread(torch.arange(250), 100).tolist() == [list(range(100)), list(range(150, 250))]
    assert spread(torch.arange(5000), 2048).shape == (4, 512)
    assert spread(torch.arange(7), 100).tolist() == [list(range(7))]
    assert torch.equal(spread(tiny_blocks(9, 40), 32), tiny_blocks(9, 40)[:4, :32])
    assert spread(torch.arange(0), 100).numel() == 0


@pytest.mark.parametrize("template", ["<s> $A", "<s> </s> $A"])
def test_the_decision_is_that_of_brute_force(helps, template, tmp_path):
    model, tokenizer = model_that_minds(helps), beginning_tokenizer(template)
    tokens = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    with_start, without = brute_force(model, tokens, start_tokens(tokenizer), 24)
    assert (with_start < without) == helps and abs(with_start - without) > 0.05
    model.save_pretrained(tmp_path / "model")
    streamed = open_source(str(tmp_path / "model"), model.config, torch.device("cpu"), {}, {})
    resident = ResidentModel(model, family_of(model.config))
    for losses in (losses_of_model(model), losses_of_source(resident), losses_of_source(streamed)):
        found = decide("auto", tokenizer, spread(tokens, 24), losses, "Blocks")
        assert found.loss_with == pytest.approx(with_start, rel=1e-5)
        assert found.loss_without == pytest.approx(without, rel=1e-5)
        assert found.tokens == (tuple(start_tokens(tokenizer)) if helps else ())


def test_logits_in_parts_are_those_of_the_whole(helps, monkeypatch):
    model = model_that_minds(helps)
    samples, spans = list(tiny_blocks(2, 32).split(1)), [(2, 32), (1, 31)]
    want = losses_of_model(model)(samples, spans)
    for logits in (1, 128 * 7, 128 * 64):
        monkeypatch.setattr("optimum_comp.sweep.runner._LOGITS", logits)
        source = ResidentModel(model, family_of(model.config))
        assert losses_of_source(source)(samples, spans) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("behind", "taken"), [(3.0, False), (2.98, False), (2.95, True)])
def test_start_tokens_have_to_help_by_more_than_noise(behind, taken):
    def losses(samples, spans):
        return [behind] * 2 + [3.0] * 2

    found = decide("auto", beginning_tokenizer(), tiny_blocks(2, 16), losses, "Blocks")
    assert found == Beginning((BEGIN,) if taken else (), "<s>", behind, 3.0)


@pytest.mark.parametrize(("begin", "tokenizer"), [("auto", tiny_tokenizer()), ("always", tiny_tokenizer())])
def test_without_start_tokens_nothing_is_measured(begin, tokenizer):
    assert decide(begin, tokenizer, tiny_blocks(2, 16), _never_called, "Blocks") == Beginning()
    assert decide(begin, None, tiny_blocks(2, 16), _never_called, "Blocks") == Beginning()
    assert Beginning().to_dict() == {"begins_with": []}


def _never_called(samples, spans):
    raise AssertionError("nothing is to be measured here")


def test_always_and_never_measure_nothing():
    for begin, want in (("always", (BEGIN,)), ("never", ())):
        found = decide(begin, beginning_tokenizer(), tiny_blocks(2, 16), _never_called, "Blocks")
        assert found == Beginning(want, "<s>")
    with pytest.raises(ValueError, match="begin='maybe' is not valid: begin must be one of auto, always, never"):
        decide("maybe", tiny_tokenizer(), tiny_blocks(2, 16), _never_called, "Blocks")


@pytest.mark.parametrize(
    "found", [Beginning(), Beginning((1,), "<s>"), Beginning((), "<s>"), Beginning((1,), "<s>", 1.25, 0.1)]
)
def test_a_report_keeps_it(found):
    assert Beginning.from_dict({"source": "text", **json.loads(json.dumps(found.to_dict()))}) == found
    assert Beginning.from_dict({"source": "text"}) is None


def test_the_sentence_says_why():
    assert Beginning((2,), "<bos>", 3.61, 4.32).sentence("Blocks") == (
        "Blocks begin with '<bos>': loss 3.610 with it, 4.320 without."
    )
    assert Beginning((), "<s>").sentence("Windows") == "Windows don't begin with '<s>'."


def test_blocks_are_no_longer_and_share_no_text():
    tokens = torch.arange(10, 110)
    blocks = choose_blocks(tokens, 5, 11, 0, "text", (1,))
    assert blocks.shape == (5, 11) and blocks[:, 0].tolist() == [1] * 5
    assert blocks[:, 1:].flatten().unique().numel() == 50
    assert torch.equal(choose_blocks(tokens, 5, 10, 0, "text"), choose_blocks(tokens, 5, 11, 0, "text", (1,))[:, 1:])


def test_calibration_blocks_begin_with_it():
    made = prepare_calibration(
        [TEXT],
        model=None,
        tokenizer=beginning_tokenizer(),
        num_samples=4,
        sequence_length=32,
        begin=lambda pieces: Beginning((BEGIN,), "<s>", 1.0, 2.0),
    )
    assert made.tokens.shape == (4, 32)
    assert made.tokens[:, 0].tolist() == [BEGIN] * 4 and not (made.tokens[:, 1:] == BEGIN).any()
    assert made.describe()["begins_with"] == [BEGIN] and made.describe()["loss_without_start"] == 2.0
    given = prepare_calibration(
        tiny_blocks(4, 32), model=None, tokenizer=beginning_tokenizer(), num_samples=4, sequence_length=32
    )
    assert torch.equal(given.tokens, tiny_blocks(4, 32)) and "begins_with" not in given.describe()


def test_start_tokens_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="sequence_length=2 leaves no room for text behind '<s></s>'"):
        prepare_calibration(
            [TEXT],
            model=None,
            tokenizer=tiny_tokenizer(),
            num_samples=4,
            sequence_length=2,
            begin=lambda pieces: Beginning((1, 2), "<s></s>"),
        )


def test_too_little_text_is_said_before_anything_is_measured():
    def begin(pieces):
        raise AssertionError("measured")

    with pytest.raises(ValueError, match="is too short for calibration"):
        prepare_calibration(
            ["short"], model=None, tokenizer=tiny_tokenizer(), num_samples=4, sequence_length=32, begin=begin
        )


@pytest.mark.parametrize("begin", ["auto", "always", "never"])
def test_self_calibration_keeps_or_drops_what_it_is_written_behind(begin):
    model = tiny_model("llama")

    def blocks(tokenizer, begin):
        pruner = CompPruner.from_pretrained(model, tokenizer)
        return pruner.sample(CompConfig(**SMALL, begin=begin), "self")

    plain, made = blocks(tiny_tokenizer(), begin), blocks(beginning_tokenizer(), begin)
    assert made.tokens.shape == plain.tokens.shape == (4, 32) and plain.describe()["begins_with"] == []
    kept = made.beginning.tokens
    assert kept == {"always": (BEGIN,), "never": ()}.get(begin, kept)
    assert (made.beginning.loss_with is not None) == (begin == "auto")
    # The same text behind the same token.
    assert torch.equal(made.tokens[:, len(kept) :], plain.tokens[:, : 32 - len(kept)])
    assert made.tokens[:, : len(kept)].tolist() == [list(kept)] * 4


@pytest.mark.parametrize("resident", [True, False])
def test_pruning_measures_and_says_it(helps, resident, tmp_path):
    folder = folder_of(tmp_path / "dense", helps)
    model = model_that_minds(helps) if resident else folder
    pruner = CompPruner.from_pretrained(model, beginning_tokenizer() if resident else None)
    report = pruner.prune(CompConfig(**SMALL), [TEXT], output=tmp_path / "out")
    want = [BEGIN] if helps else []
    stored = json.loads((tmp_path / "out" / "comp_report.json").read_text())["calibration"]
    assert stored == report.calibration and stored["begins_with"] == want and stored["start"] == "<s>"
    assert (stored["loss_with_start"] < stored["loss_without_start"]) == helps
    assert (pruner.samples[:, 0] == BEGIN).all() == helps and pruner.samples.shape == (4, 32)
    assert json.loads((tmp_path / "out" / "comp_config.json").read_text())["begin"] == "auto"
    assert ("beginning with `<s>`" in (tmp_path / "out" / "README.md").read_text()) == helps


def test_going_on_comes_out_the_same(helps, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "dense", helps)

    def prune(output, **arguments):
        return CompPruner.from_pretrained(folder).prune(CompConfig(**SMALL), output=output, **arguments)

    prune(tmp_path / "undisturbed", calibration=[TEXT])
    record, calls = PruningRun._record, []

    def stopping(self, *args):
        if len(calls) == 2:
            raise Stop
        calls.append(1)
        return record(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PruningRun, "_record", stopping)
        with pytest.raises(Stop):
            prune(tmp_path / "out", calibration=[TEXT])
    with monkeypatch.context() as patch:
        # Going on takes what was found.
        patch.setattr("optimum_comp.pruner.decide", _never_called)
        prune(tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
    report = json.loads((tmp_path / "out" / "comp_report.json").read_text())
    assert report["calibration"]["begins_with"] == ([BEGIN] if helps else [])


def test_without_start_tokens_all_choices_prune_to_the_same(tiny_folder, tmp_path):
    made = []
    for begin in ("auto", "always", "never"):
        CompPruner.from_pretrained(tiny_folder).prune(
            CompConfig(**SMALL, begin=begin), [TEXT], output=tmp_path / begin
        )
        files = digest(tmp_path / begin)
        assert files.pop("comp_config.json")
        made.append(files)
    assert made[0] == made[1] == made[2]


def test_perplexity_behind_start_tokens():
    model, tokens = tiny_model("llama"), tiny_blocks(1, 100).flatten()
    total = 0.0
    for window in tokens[:93].view(3, 31):
        labels = torch.cat([torch.tensor([-100, -100]), window[1:]])
        with torch.no_grad():
            total += 30 * float(model(torch.cat([torch.tensor([1]), window])[None], labels=labels[None]).loss)
    got, predictions = perplexity(model, tokens, 32, (1,))
    assert predictions == 90 and got == pytest.approx(math.exp(total / 90), rel=1e-5)
    assert perplexity(model, tokens, 32, ())[1] == 93


def settings(text, **given) -> Settings:
    return Settings(**{"text": str(text), "window": 32, "max_tokens": 640, "prompt_tokens": 0, **given})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_windows_begin_as_measured_as_told_and_as_recorded(helps, text, tmp_path):
    folder = folder_of(tmp_path / "model", helps)
    found = {begin: evaluate(folder, settings(text, begin=begin)) for begin in ("auto", "always", "never")}
    assert found["auto"].perplexity == found["always" if helps else "never"].perplexity
    assert (found["always"].perplexity < found["never"].perplexity) == helps
    # 640 tokens of text: 20 windows of 31 and of 32, the first of which isn't predicted.
    assert [found[begin].predictions for begin in ("always", "never")] == [20 * 30, 20 * 31]
    assert found["always"].begins_with == [BEGIN] and found["never"].begins_with == []
    assert "begin with '<s>', which isn't predicted." in evaluation_table({"model": found["always"]})
    assert "don't overlap." in evaluation_table({"model": found["never"]})
    other = "never" if helps else "always"
    wanted = () if helps else (BEGIN,)
    assert evaluate(folder, settings(text, begins_with=wanted)).perplexity == found[other].perplexity
    recorded = {"calibration": {"source": "x", "begins_with": list(wanted)}}
    (folder / "comp_report.json").write_text(json.dumps(recorded))
    assert evaluate(folder, settings(text)).perplexity == found[other].perplexity
    assert evaluate(folder, settings(text, begin="always")).begins_with == [BEGIN]
    # Of token blocks, nothing is recorded.
    (folder / "comp_report.json").write_text(json.dumps({"calibration": {"source": "token blocks"}}))
    assert evaluate(folder, settings(text)).perplexity == found["auto"].perplexity


def test_windows_need_something_to_predict(text, tmp_path):
    folder = folder_of(tmp_path / "model", True)
    with pytest.raises(ValueError, match="window=2 leaves nothing to predict behind '<s>'; take at least 3"):
        evaluate(folder, settings(text, window=2))
    assert evaluate(folder, settings(text, window=2, begin="never")).predictions == 320


def test_quantization_looks_at_the_same(helps, text, tmp_path):
    folder = folder_of(tmp_path / "model", helps)
    own = {"calibration": text, "num_samples": 4, "sequence_length": 32}
    found = {
        begin: _samples(folder, QuantizeSettings(), SampleSettings(**own, begin=begin))
        for begin in ("auto", "always", "never")
    }
    assert torch.equal(found["auto"], found["always" if helps else "never"])
    assert found["always"][:, 0].tolist() == [BEGIN] * 4 and not (found["never"] == BEGIN).any()


@pytest.mark.usefixtures("measured_here")
def test_all_stages_of_a_chain_begin_alike(helps, text, tmp_path):
    pytest.importorskip("optimum.onnxruntime")
    folder = folder_of(tmp_path / "model", helps)
    result = compress(
        folder, tmp_path / "out", config=CompConfig(**SMALL), calibration=text, settings=settings(text, max_tokens=96)
    )
    want = [BEGIN] if helps else []
    assert result.pruning["calibration"]["begins_with"] == want
    assert [stage.begins_with for stage in result.stages.values()] == [want] * 4
    assert list(result.costs) == ["measure", "prune", "export", "quantize"]
    assert all(cost.seconds > 0 for cost in result.costs.values())
    assert result.costs["quantize"].size_bytes == result.stages["pruned-int8"].size_bytes
    assert "- prune: " in result.text() and " of memory, makes " in result.text()


@pytest.mark.parametrize("command", ["prune", "compress", "quantize", "eval", "bench"])
def test_another_word_is_refused_at_once(command, tiny_folder, tmp_path):
    given = {"bench": (tiny_folder,), "eval": ("--model", tiny_folder)}
    done = run(
        command, "--begin", "maybe", *given.get(command, ("--model", tiny_folder, tmp_path / "out")), check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: begin='maybe' is not valid: begin must be one of auto, always, never."]
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_was_found(text, tmp_path):
    folder = folder_of(tmp_path / "model", True)
    small = ("--num-samples", 4, "--sequence-length", 32, "--round-to", 8)
    done = run("prune", "--model", folder, "--calibration", text, *small, tmp_path / "auto")
    assert "Blocks begin with '<s>': loss" in done.stderr
    done = run("prune", "--model", folder, "--calibration", text, *small, "--begin", "never", tmp_path / "never")
    assert "Blocks don't begin with '<s>'." in done.stderr
    assert json.loads((tmp_path / "never" / "comp_config.json").read_text())["begin"] == "never"
    numbers = tmp_path / "numbers.json"
    measured = ("--text", text, "--max-tokens", 640, "--prompt-tokens", 16, "--new-tokens", 2, "--repeats", 1)
    done = run("bench", tmp_path / "never", folder, *measured, "--json", numbers)
    # As the first one's report says.
    assert [each["begins_with"] for each in json.loads(numbers.read_text())] == [[], []]
    done = run("bench", folder, tmp_path / "never", *measured, "--json", numbers)
    assert [each["begins_with"] for each in json.loads(numbers.read_text())] == [[BEGIN], [BEGIN]]


def test_a_calibration_says_what_it_begins_with():
    found = Calibration(tiny_blocks(2, 8), "text", Beginning((1,), "<s>")).describe()
    assert found["begins_with"] == [1] and found["start"] == "<s>"
