"""The class whose cache stays in its place computes what Optimum's does, and leaves to it what it can't."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import need_onnx, tiny_blocks


need_onnx()

import onnx  # noqa: E402
from exports import exporter, outlier_model  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM as OptimumModel  # noqa: E402

import optimum_comp  # noqa: E402
from optimum_comp.onnx import in_place  # noqa: E402
from optimum_comp.onnx.graph import read_without_weights  # noqa: E402
from optimum_comp.onnx.modeling import ORTModelForCausalLM  # noqa: E402
from optimum_comp.onnx.parity import run_model  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402


FUSED = ["llama", "llama-untied", "mistral", "qwen2"]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return exporter(tmp_path_factory, outlier_model, by="genai")


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """A cache is too small every few tokens."""
    monkeypatch.setattr(in_place, "_ROOM", 8)


def opened(folder):
    return ORTModelForCausalLM.from_pretrained(folder), OptimumModel.from_pretrained(folder)


@pytest.mark.parametrize("name", FUSED)
def test_it_computes_what_optimum_does(name, fused, tmp_path):
    """Prompts and what follows, in batches, padded, in parts, and generated; in float and in 8 bits."""
    for folder in (fused(name).folder, quantize_onnx(fused(name).folder, tmp_path / name).output):
        ours, optimums = opened(folder)
        assert ours._in_place is not None and not hasattr(optimums, "_in_place")
        expected, found = run_model(optimums, far=True), run_model(ours, far=True)
        assert torch.equal(found.tokens, expected.tokens)
        assert found.logits.keys() == expected.logits.keys()
        for case, logits in expected.logits.items():
            torch.testing.assert_close(found.logits[case], logits, rtol=0, atol=1e-5, msg=case)


def test_the_cache_stays_in_its_place_until_it_is_full(fused):
    model, _ = opened(fused("llama").folder)
    ids, places, caches = tiny_blocks(1, 21), [], []
    for end in range(1, 22):
        past = caches[-1] if caches else None
        mask = torch.ones(1, end, dtype=torch.long)
        caches.append(model(ids[:, end - 1 : end], attention_mask=mask, past_key_values=past).past_key_values)
        places.append(caches[-1][0][0].data_ptr())
        assert len(caches[-1]) == 4 and caches[-1][3][1].shape == (1, 2, end, 16)
    # Room for 8 tokens, then for twice as many, and again.
    assert [places.index(each) + 1 for each in dict.fromkeys(places)] == [1, 9, 17]
    # What was there before is as it was.
    for end in (1, 8, 9, 16):
        for earlier, later in zip(caches[end - 1], caches[-1], strict=True):
            assert all(torch.equal(a, b[:, :, :end]) for a, b in zip(earlier, later, strict=True))


def test_who_goes_on_from_an_earlier_cache_disturbs_nobody(fused):
    model, _ = opened(fused("llama").folder)
    ids = tiny_blocks(1, 14)

    def following(tokens, past, length):
        mask = torch.ones(1, length + tokens.shape[1], dtype=torch.long)
        return model(tokens, attention_mask=mask, past_key_values=past)

    begun = following(ids[:, :4], None, 0).past_key_values
    one = following(ids[:, 4:5], begun, 4)
    other = following(ids[:, 9:10], begun, 4)
    assert not torch.equal(one.logits, other.logits)
    for first, branch in ((ids[:, 4:5], one), (ids[:, 9:10], other)):
        found = following(ids[:, 10:12], branch.past_key_values, 5).logits
        whole = torch.cat([ids[:, :4], first, ids[:, 10:12]], 1)
        torch.testing.assert_close(found, following(whole, None, 0).logits[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
)
def test_it_generates_what_optimum_does(settings, fused):
    prompts = tiny_blocks(2, 6)
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    found = []
    for model in opened(fused("llama").folder):
        torch.manual_seed(0)
        given = {"max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0, "do_sample": False, **settings}
        found.append(model.generate(prompts, attention_mask=mask, **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("kept", [0, 1, 3, 99, torch.tensor([0, 2])])
@pytest.mark.parametrize("by", ["genai", "optimum"])
def test_as_many_logits_as_are_asked_for(by, kept, fused, tmp_path_factory):
    made = fused if by == "genai" else exporter(tmp_path_factory, outlier_model, by=by)
    model, _ = opened(made("llama").folder)
    ids, mask = tiny_blocks(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    every = model(ids, attention_mask=mask).logits
    found = model(ids, attention_mask=mask, logits_to_keep=kept)
    expected = every[:, kept if isinstance(kept, torch.Tensor) else slice(-kept, None)]
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    assert found.past_key_values[0][0].shape[2] == 6


def test_of_a_prompt_only_the_last_logits_are_made(fused, monkeypatch):
    sizes = []
    original = in_place.Room.run
    monkeypatch.setattr(
        in_place.Room, "run", lambda room, given, logits: (sizes.append(logits.shape), original(room, given, logits))
    )
    model, optimums = opened(fused("llama").folder)
    prompt = tiny_blocks(2, 9)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **given), optimums.generate(prompt, **given))
    assert sizes == [(2, 1, model.config.vocab_size)] * 4


def test_a_cache_of_ones_own_is_taken(fused):
    ours, optimums = opened(fused("llama").folder)
    ids, mask = tiny_blocks(1, 6), torch.ones(1, 6, dtype=torch.long)
    past = optimums(ids[:, :5], attention_mask=mask[:, :5]).past_key_values
    own = ours(ids[:, :5], attention_mask=mask[:, :5]).past_key_values
    expected = optimums(ids[:, 5:], attention_mask=mask, past_key_values=past).logits
    for model, given in ((ours, past), (optimums, own), (ours, copy.deepcopy(own)), (ours, own)):
        assert torch.equal(model(ids[:, 5:], attention_mask=mask, past_key_values=given).logits, expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_other_graphs_are_optimums(name, tmp_path_factory):
    folder = exporter(tmp_path_factory, outlier_model, by="optimum")(name).folder
    ours, optimums = opened(folder)
    assert ours._in_place is None
    prompt = tiny_blocks(1, 5)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompt, **given), optimums.generate(prompt, **given))


@pytest.mark.parametrize("by", ["genai", "optimum"])
def test_a_graph_is_read_without_its_weights(by, fused, tmp_path_factory, tmp_path):
    made = fused if by == "genai" else exporter(tmp_path_factory, outlier_model, by=by)
    for folder in (made("llama").folder, quantize_onnx(made("llama").folder, tmp_path / "int8").output):
        whole = onnx.load(folder / "model.onnx").graph
        found = read_without_weights(folder / "model.onnx")
        assert whole.initializer and not found.initializer
        del whole.initializer[:]
        assert found == whole


def test_it_is_at_the_top():
    assert optimum_comp.ORTModelForCausalLM is ORTModelForCausalLM
