"""A process that has never heard of this package: opens what was saved with plain transformers, folder by folder.

Reads a JSON object a line, `root` and `names` of the checkpoints in it; tokens are in `root/prompt.pt`, `[2, length]`.
Writes each one's logits to `root/NAME.pt`, and a line: a JSON string, empty or what is wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def look(root: Path, names: list[str]) -> None:
    prompt = torch.load(root / "prompt.pt")
    mask = torch.ones_like(prompt)
    for name in names:
        model, loading = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
        model.eval()
        with torch.no_grad():
            logits = model(prompt).logits
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        runs = [model.generate(prompt, attention_mask=mask, use_cache=cache, **settings) for cache in (True, False)]
        assert torch.equal(*runs), "cached generation differs from uncached"
        torch.save(logits, root / f"{name}.pt")
    assert not any(module.startswith("optimum") for module in sys.modules)


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        wrong = ""
        try:
            look(Path(job["root"]), job["names"])
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps(wrong), flush=True)
