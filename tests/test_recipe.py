"""Recipes: those that come with the package, what they refuse, and what the command line makes of them."""

from __future__ import annotations

import re

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_configuration import goes_together

from optimum_comp.configuration import DEFAULTS, FIELDS, OPTIONS, CompConfig
from optimum_comp.evaluation import Settings
from optimum_comp.onnx.recipes import RECIPES
from optimum_comp.options import Boolean, Choice, Integer, Integers, Number, Subset, defaults_of, options_of
from optimum_comp.stages.quantize import QuantizeSettings
from optimum_comp.stages.recipe import STAGES, Recipe, find, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole(name):
    recipe = find(name)
    assert recipe.description and recipe.model is None
    again = Recipe.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    assert recipe.stage("export") is not None and recipe.stage("quantize") is not None


def test_every_quantization_has_its_recipe():
    assert set(RECIPES) <= set(shipped())
    for name in RECIPES:
        assert find(name).stage("quantize").settings.recipe == name


PRUNED = {"stages": ["prune", "export", "quantize"]}


def with_stage(name: str, **settings) -> dict:
    return {"stages": [{each: settings if each == name else {}} for each in STAGES]}


REFUSED = {
    "nothing": (None, "must be a mapping"),
    "a list": ([], "must be a mapping"),
    "a word": ("prune", "must be a mapping"),
    "no stages": ({}, "stages must be a list"),
    "empty stages": ({"stages": []}, "stages must be a list"),
    "stages by name": ({"stages": {"prune": {}}}, "stages must be a list"),
    "an unknown stage": ({"stages": ["prone"]}, "stages has no field 'prone'. Did you mean 'prune'?"),
    "a stage twice": ({"stages": ["prune", "prune"]}, "each once, in this order"),
    "another order": ({"stages": ["export", "prune"]}, "each once, in this order"),
    "quantize a checkpoint": ({"stages": ["prune", "quantize"]}, "quantize takes an ONNX graph (export)"),
    "bundle a checkpoint": ({"stages": ["bundle"]}, "bundle takes an ONNX graph (export), and before it"),
    "two stages in one": ({"stages": [{"prune": {}, "export": {}}]}, "is no stage"),
    "a number for a stage": ({"stages": [1]}, "1 is no stage"),
    "a list for settings": ({"stages": [{"prune": [1]}]}, "prune must hold settings by name, not [1]"),
    "a word for settings": ({"stages": [{"prune": "much"}]}, "prune must hold settings by name, not 'much'"),
    "an unknown setting": (with_stage("prune", sparsty=0.2), "has no field 'sparsty'. Did you mean 'sparsity'?"),
    "a setting out of range": (with_stage("prune", sparsity=2), "prune: sparsity=2 is not valid"),
    "a setting of another kind": (with_stage("prune", axes="ffn"), "axes='ffn' is not valid"),
    "an unknown preset": (with_stage("prune", preset="best"), "preset='best' is not valid"),
    "an unknown metric": (with_stage("prune", neuron_metric="magic"), "neuron_metric='magic' is not valid"),
    "no batch": (with_stage("prune", batch_size=0), "batch_size=0 is not valid"),
    "an empty calibration": (with_stage("prune", calibration=" "), "calibration=' ' is not valid"),
    "a calibration that is none": (with_stage("prune", calibration=7), "calibration=7 is not valid"),
    "an unknown dtype of products": (with_stage("prune", matmul_dtype="fp8"), "matmul_dtype='fp8' is not valid"),
    "no tolerance": (with_stage("export", tolerance=0), "tolerance=0 is not valid"),
    "a word for a tolerance": (with_stage("export", tolerance="x"), "tolerance='x' is not valid"),
    "an unknown quantization": (with_stage("quantize", recipe="int2"), "recipe='int2' is not valid"),
    "an unknown target": (with_stage("quantize", target="riscv"), "target='riscv' is not valid"),
    "an empty budget": (with_stage("quantize", max_size=0), "max_size=0 is not valid"),
    "a negative budget": (with_stage("quantize", max_size="-1GB"), "max_size='-1GB' is not valid"),
    "a budget of nothing": (with_stage("quantize", max_perplexity_increase="0%"), "max_perplexity_increase='0%'"),
    "an endless budget": (with_stage("quantize", max_perplexity_increase=float("inf")), "max_perplexity_increase=inf"),
    "no sample": (with_stage("quantize", num_samples=0), "num_samples=0 is not valid"),
    "a word for a flag": (with_stage("bundle", ort_format="yes"), "ort_format='yes' is not valid"),
    "an unknown field": ({**PRUNED, "modle": "m"}, "has no field 'modle'. Did you mean 'model'?"),
    "another format": ({**PRUNED, "recipe": 2}, "recipe=2 is not valid: this version reads 1"),
    "a word for the format": ({**PRUNED, "recipe": "1"}, "recipe='1' is not valid"),
    "a model that is none": ({**PRUNED, "model": 7}, "model=7 is not valid"),
    "an empty model": ({**PRUNED, "model": ""}, "model='' is not valid"),
    "a description that is none": ({**PRUNED, "description": []}, "description=[] is not valid"),
    "code from elsewhere": ({**PRUNED, "loading": {"trust_remote_code": True}}, "trust_remote_code isn't taken from"),
    "a pickle": ({**PRUNED, "loading": {"use_safetensors": False}}, "use_safetensors isn't taken from a file"),
    "a pickle by its option": ({**PRUNED, "loading": {"allow_pickle": True}}, "allow_pickle isn't taken from a file"),
    "a token": ({**PRUNED, "loading": {"token": "hf_x"}}, "token isn't taken from a file"),
    "an unknown way to load": ({**PRUNED, "loading": {"cache_dir": "/x"}}, "loading has no field 'cache_dir'"),
    "a list for loading": ({**PRUNED, "loading": [1]}, "loading must hold settings by name"),
    "a dtype that is none": ({**PRUNED, "loading": {"dtype": 16}}, "dtype=16 is not valid"),
    "an unknown measurement": ({**PRUNED, "measure": {"windows": 1}}, "measure has no field 'windows'"),
    "a window of nothing": ({**PRUNED, "measure": {"window": 1}}, "measure: window=1 is not valid"),
    "a number to measure": ({**PRUNED, "measure": 3}, "measure must hold settings by name, not 3"),
    "fewer tokens than a window": ({**PRUNED, "measure": {"max_tokens": 5}}, "max_tokens=5 is not valid"),
    "a word for prompts": ({**PRUNED, "measure": {"prompts": "Hi"}}, "prompts='Hi' is not valid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_recipe_is_refused_in_one_line(case):
    data, said = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        Recipe.from_dict(data)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [", "is not YAML"),
        ("a: b: c", "is not YAML: mapping values are not allowed here (line 1)"),
        ("- prune\n- export\n", "must be a mapping"),
        ("stages: [prune]\nstages: [export]\n", "'stages' is there twice (line 2)"),
        ("1: prune\n", "1 is no name"),
        ("stages: &x [prune]\nmodel: *x\n", "aliases (*name) aren't read"),
        ("!!python/name:os.system\n", "is not YAML"),
        ("\t", "is not YAML"),
    ],
)
def test_bad_yaml_names_the_line(text, said, tmp_path):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        Recipe.read(tmp_path / "my.yaml")
    assert str(refused.value).startswith(str(tmp_path / "my.yaml"))


def test_there_is_no_such_recipe():
    with pytest.raises(ValueError, match="recipe='int5' is not valid: it must be a YAML file, or one of int4"):
        find("int5")


def _values(kind):
    if isinstance(kind, Number):
        low, high = (float(end) for end in kind.interval[1:-1].split(","))
        return st.floats(max(low, 0.01), min(high, 0.4))
    if isinstance(kind, Integer):
        return st.integers(max(kind.low, 1), 600)
    if isinstance(kind, Boolean):
        return st.booleans()
    if isinstance(kind, Choice):
        return st.sampled_from(kind.choices)
    if isinstance(kind, Subset):
        return st.just(list(kind.choices))
    assert isinstance(kind, Integers)
    return st.lists(st.integers(-3, 3), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries({}, optional={name: _values(each.kind) for name, each in OPTIONS.items()}).filter(
        goes_together
    )
)
def test_what_is_written_is_what_is_read(fields, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    recipe = Recipe.from_dict(with_stage("prune", **fields))
    recipe.write(path)
    assert Recipe.read(path).to_dict() == recipe.to_dict()
    assert recipe.stage("prune").config.fields() == CompConfig(**fields).fields()


def test_a_budget_may_be_words_or_numbers():
    words = QuantizeSettings(max_perplexity_increase="2%", max_size="1.5GiB")
    assert words == QuantizeSettings(max_perplexity_increase=0.02, max_size=3 * 2**29)


def test_options_of_the_command_line_are_the_settings():
    shown = run("prune", "--help").stdout
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in shown
        # The default that the help names is the signature's.
        text = " ".join(shown[shown.index(f"  --{name.replace('_', '-')}") :].split())
        default = DEFAULTS[name]
        if not isinstance(default, bool):
            said = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert f"[{said}]" in text.replace("- ", "-")[:1200], name
    shown = run("eval", "--help").stdout
    for name, each in options_of(Settings).items():
        if name != "begins_with":
            assert (each.flag or f"--{name.replace('_', '-')}") in shown
    assert str(defaults_of(Settings)["max_tokens"]) in shown


def test_docstrings_tell_every_setting_and_its_default():
    for name, each in OPTIONS.items():
        assert f"{name} (`{each.kind.type}`, defaults to `{DEFAULTS[name]!r}`)" in CompConfig.__doc__
    for name in options_of(Settings):
        assert f"    {name} (`" in Settings.__doc__
