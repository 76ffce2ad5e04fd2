"""A pruned folder in Optimum's own tools, unchanged.

python examples/export_and_run.py smollm2-comp20 smollm2-comp20-onnx
"""

from __future__ import annotations

import sys

import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from optimum_comp.onnx.cache import open_cache


def main(checkpoint: str, output: str) -> None:
    """Export, load, generate."""
    main_export(checkpoint, output=output, task="text-generation-with-past", do_validation=False)
    # `ORTModelForCausalLM` refuses heads that aren't hidden size / heads wide, and some families', without it.
    open_cache(output)
    # Torch's threads would get in the way of ONNX Runtime's.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = ORTModelForCausalLM.from_pretrained(output, provider="CPUExecutionProvider")
    inputs = tokenizer("Gravity is", return_tensors="pt", return_token_type_ids=False)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
