"""Rotary settings in the words of both major versions of transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import GQA, IDS, SIZES, tiny_blocks, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_comp import CompPruner
from optimum_comp.checkpoint.rope import portable, require_portable
from optimum_comp.checkpoint.writer import write_portable_config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 2.5]}
LONG = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default"}
LENGTH = {"max_position_embeddings": 64}

# Model type, `rope_parameters` as version 5 writes them, and the fields that version 4 reads.
SAID = {
    "plain": ("llama", {"rope_theta": 5e5, **PLAIN}, {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": ("llama", {"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "linear": ("qwen3", {"rope_theta": 1e6, **LINEAR}, {"rope_theta": 1e6, "rope_scaling": LINEAR}),
    "partial": (
        "stablelm",
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25, **PLAIN},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_scaling": None},
    ),
    "two ropes": (
        "gemma3_text",
        {"full_attention": {"rope_theta": 1e6, **LINEAR}, "sliding_attention": {"rope_theta": 3e3, **PLAIN}},
        {"rope_theta": 1e6, "rope_local_base_freq": 3e3, "rope_scaling": LINEAR},
    ),
    "names of its own": (
        "gpt_neox",
        {"rope_theta": 5e3, "partial_rotary_factor": 0.5, **LINEAR},
        {
            "rope_theta": 5e3,
            "rotary_emb_base": 5e3,
            "partial_rotary_factor": 0.5,
            "rotary_pct": 0.5,
            "rope_scaling": LINEAR,
        },
    ),
    "longrope": (
        "llama",
        {"rope_theta": 5e5, **LONG},
        {"rope_theta": 5e5, "rope_scaling": LONG, "original_max_position_embeddings": 16},
    ),
    "phi3": (
        "phi3",
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **LONG},
        {
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", **FACTORS},
            "original_max_position_embeddings": 16,
        },
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_one_version_writes_is_said_in_both_tongues(case, tmp_path):
    model_type, parameters, fields = SAID[case]
    shared = {"model_type": model_type, **LENGTH}
    both = {**shared, "rope_parameters": parameters, **fields}
    path = tmp_path / "config.json"
    for written in ({**shared, "rope_parameters": parameters}, {**shared, **fields}, both):
        path.write_text(json.dumps(written))
        write_portable_config(path)
        assert json.loads(path.read_text()) == both


def test_what_has_no_rotary_settings_stays_as_it_is(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "opt"}')
    write_portable_config(path)
    assert path.read_text() == '{"model_type": "opt"}'


THETA = {"rope_theta": 5e5}
BY_LAYER = {"full_attention": {**THETA, **PLAIN}, "sliding_attention": {**THETA, **PLAIN}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {**THETA, "rope_type": "proportional"}}, "'proportional' .* nothing that transformers 4"),
        ({"rope_parameters": LINEAR}, "names no rope_theta"),
        ({"rope_parameters": BY_LAYER}, "'llama': transformers 4 has no rotary settings by kind of layer"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {**BY_LAYER, "sliding_attention": {**THETA, **LINEAR}},
            },
            "a rotary base of their own and nothing else",
        ),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": THETA}}, "by kind of layer"),
        ({"model_type": "phi3", "rope_parameters": {**THETA, **LINEAR}}, "a short_factor and a long_factor, not"),
        ({"model_type": "phi3", "rope_parameters": {**THETA, **LONG, "attention_factor": 2.0}}, "not .*attention_fac"),
        ({"rope_parameters": {**THETA, **LONG, "factor": 3.0}}, "transformers 4 takes 4 for the factor.* it is 3"),
        ({"rope_parameters": {**THETA, "rope_type": "longrope", **FACTORS}}, "'longrope' needs original_max"),
        ({**THETA, "rope_scaling": LONG}, "transformers 4 reads 64 and transformers 5 reads 16"),
        ({**THETA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 8}, "reads 16 and .* reads 8"),
    ],
)
def test_what_cannot_be_said_in_both_tongues_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        portable({"model_type": "llama", **LENGTH, **config})


def test_what_version_4_would_read_wrong_is_refused_there(monkeypatch):
    five = {"model_type": "llama", "rope_parameters": {**THETA, **LINEAR}}
    # As version 4 reads that file: its own defaults in the fields that it knows.
    read = {**five, "rope_theta": 10_000.0, "rope_scaling": None}
    both = {**five, **THETA, "rope_scaling": {"type": "linear", "factor": 4.0}}
    monkeypatch.setattr("optimum_comp.checkpoint.rope._MAJOR", 4)
    for config in (five, read):
        with pytest.raises(ValueError, match=r'the model has .*config.json: .*"rope_theta": 500000.0'):
            require_portable(config, "the model")
    require_portable(both, "the model")
    monkeypatch.setattr("optimum_comp.checkpoint.rope._MAJOR", 5)
    require_portable(five, "the model")


def test_it_is_refused_before_any_work(tiny_folder):
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 3.0}
    config |= {"rope_scaling": scaling, "rope_theta": 5e4, "original_max_position_embeddings": 16}
    path.write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with pytest.raises(ValueError, match="takes 4 for the factor"):
        CompPruner.from_pretrained(tiny_folder)
    model = tiny_model("llama")
    model.config = AutoConfig.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="takes 4 for the factor"):
        CompPruner.from_pretrained(model)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "qwen3": {"rope_theta": 5e5, "rope_scaling": YARN, "head_dim": 16},
    "gemma3_text": {
        "rope_theta": 5e5,
        "rope_local_base_freq": 3e3,
        "rope_scaling": LINEAR,
        "head_dim": 16,
        "layer_types": TWO_KINDS,
        "sliding_window": 8,
    },
    "phi3": {
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0] * 4},
    },
    "smollm3": {"rope_theta": 5e5, "no_rope_layer_interval": 2, "rope_scaling": YARN},
    "gpt_neox": {"rotary_emb_base": 5000, "rotary_pct": 0.5, "rope_scaling": LINEAR},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_whichever_tongue_is_taken_away(name, tmp_path):
    """Version 5 reads either alone, version 4 its own; both at once don't disturb."""
    torch.manual_seed(0)
    sizes = {**SIZES, **GQA, **IDS, **LENGTH, **json.loads(json.dumps(MODELS[name]))}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    for key, parameter in model.named_parameters():
        # Attention that depends on positions: freshly made weights hardly do.
        if any(part in key for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
            parameter.data.mul_(20)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    write_portable_config(path)
    both = json.loads(path.read_text())
    without = [set(), {"rope_parameters"}]
    if int(transformers.__version__.split(".")[0]) >= 5:
        without.append({"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"})
    prompt = tiny_blocks(2, 30)
    with torch.no_grad():
        want = model(prompt).logits
        for gone in without:
            path.write_text(json.dumps({k: v for k, v in both.items() if k not in gone}))
            got = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(prompt).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
