"""Prune a model from Python, and see what that costs on text that it wasn't calibrated on.

    python examples/prune_from_pretrained.py --model models/smollm2 out/pruned

What comes out is a plain checkpoint. More samples keep more of the model: `--samples 64` takes a minute or two.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp import CompConfig, CompPruner
from optimum_comp.calibration.text import read_text, tokenize
from optimum_comp.evaluation import perplexity


def main() -> None:
    """Prune, save, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2", help="local folder or hub id [models/smollm2]")
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the layers' parameters to remove [0.2]")
    parser.add_argument("--samples", type=int, default=32, help="of 256 tokens, to calibrate with [32]")
    parser.add_argument("output", nargs="?", default="out/pruned", help="folder to make [out/pruned]")
    args = parser.parse_args()
    # Python's own documentation: one part calibrates, another measures.
    text, _ = read_text("pydoc")
    cut = int(0.6 * len(text))

    pruner = CompPruner.from_pretrained(args.model)
    config = CompConfig(sparsity=args.sparsity, num_samples=args.samples)
    report = pruner.prune(config, calibration=[text[:cut]], output=args.output)

    # optimum_comp has no part in this any more.
    pruned = AutoModelForCausalLM.from_pretrained(args.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    held_out = tokenize(tokenizer, text[cut : cut + 10_000])
    dense = AutoModelForCausalLM.from_pretrained(args.model).eval()
    before, after = (perplexity(model, held_out, window=256)[0] for model in (dense, pruned))
    print(f"{args.output}: {report.parameters_before / 1e6:.1f} -> {report.parameters_after / 1e6:.1f} M parameters")
    print(f"perplexity {before:.2f} -> {after:.2f} ({after / before:.3f}x)")
    inputs = tokenizer("A list in Python is", return_tensors="pt", return_token_type_ids=False)
    answer = pruned.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
