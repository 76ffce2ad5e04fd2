"""The guides in docs/extending, followed to the letter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_blocks
from tiny_families import GQA, IDS, SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner
from optimum_comp.compress import run
from optimum_comp.families import FAMILIES
from optimum_comp.stages.recipe import STAGES, Recipe


GUIDES = Path(__file__).parent.parent / "docs" / "extending"


def test_a_family_in_20_lines(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (GUIDES / "family.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    for name, family in list(FAMILIES.items()):
        monkeypatch.setitem(FAMILIES, name, family)
    exec(code, {})
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["nemotron"](**SIZES, **IDS, **GQA)).eval()
        pruner = CompPruner.from_pretrained(model)
        settings = {"num_samples": 8, "sequence_length": 32, "round_to": 8}
        pruner.prune(CompConfig(sparsity=0.4, attention_fraction=0.9, **settings), tiny_blocks())
        assert pruner.report.units["kv"] == [2, 1] and pruner.report.width < 96
        folder = pruner.save_pretrained(tmp_path / "out")
        prompt = tiny_blocks(2, 12, seed=9)
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(folder).eval()(prompt).logits
            torch.testing.assert_close(again, pruner.model(prompt).logits, rtol=0, atol=1e-5)
    finally:
        FAMILIES.pop("nemotron", None)


def test_a_stage_of_the_chain(tiny_folder, tmp_path, monkeypatch):
    text = (GUIDES / "stage.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.setitem(STAGES, "convert", None)
    exec(code, {})
    read = Recipe.from_text(recipe.replace("MODEL", str(tiny_folder)) + "measure: false\n")
    first = run(read, tmp_path / "out")
    made = tmp_path / "out" / "dense-bfloat16"
    assert (
        AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == torch.bfloat16
        and not first.costs["convert"].earlier
    )
    assert run(read, tmp_path / "out").costs["convert"].earlier
    with pytest.raises(ValueError, match="dtype='int8' is not valid: dtype must be one of bfloat16, float16"):
        Recipe.from_dict({"stages": [{"convert": {"dtype": "int8"}}]})
