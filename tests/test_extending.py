"""The guides in docs/extending, followed to the letter."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from conftest import tiny_blocks
from tiny_families import GQA, IDS, SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner
from optimum_comp.families import FAMILIES


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
