"""A checkpoint in Optimum's own tools, with and without this package's quantization.

    python examples/chain_with_quantization.py --model out/pruned out/quantized

Optimum exports, its `ORTQuantizer` makes 8 bits by a configuration of Optimum's, `comp quantize` makes them from the
same export, and `ORTModelForCausalLM` runs all three. `prune_from_pretrained.py` makes a checkpoint to begin with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from transformers import AutoTokenizer

from optimum_comp.calibration.text import read_text, tokenize
from optimum_comp.evaluation import perplexity
from optimum_comp.onnx.quantization import quantize_onnx
from optimum_comp.utils import format_bytes


def main() -> None:
    """Export, quantize twice, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/pruned", help="checkpoint, pruned or not [out/pruned]")
    parser.add_argument("--tokens", type=int, default=4096, help="of Python's documentation, to measure on [4096]")
    parser.add_argument("output", nargs="?", type=Path, default=Path("out/quantized"), help="[out/quantized]")
    args = parser.parse_args()
    folders = {name: args.output / name for name in ("float32", "optimum-int8", "comp-int8")}
    main_export(args.model, output=folders["float32"], task="text-generation-with-past", do_validation=False)

    # Products of two activations (attention) ruin the model in 8 bits: only weights are multiplied in them.
    graph = onnx.load(folders["float32"] / "model.onnx", load_external_data=False).graph
    made = {name for node in graph.node if node.op_type != "Transpose" for name in node.output}
    both = [n.name for n in graph.node if n.op_type == "MatMul" and made.issuperset(n.input)]
    config = AutoQuantizationConfig.arm64(is_static=False, per_channel=True, nodes_to_exclude=both)
    quantizer = ORTQuantizer.from_pretrained(folders["float32"])
    quantizer.quantize(config, folders["optimum-int8"], file_suffix=None)
    quantize_onnx(folders["float32"], folders["comp-int8"], recipe="int8", overwrite=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenize(tokenizer, read_text("pydoc")[0][-8 * args.tokens :])[: args.tokens]
    inputs = tokenizer("A list in Python is", return_tensors="pt", return_token_type_ids=False)
    for name, folder in folders.items():
        model = ORTModelForCausalLM.from_pretrained(folder, provider="CPUExecutionProvider")
        size = format_bytes(sum(path.stat().st_size for path in folder.glob("model.onnx*")))
        print(f"{name}: {size}, perplexity {perplexity(model, tokens, window=256)[0]:.2f}")
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        print(f"  {tokenizer.decode(answer, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
