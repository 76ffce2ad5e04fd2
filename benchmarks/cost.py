"""Wall time of `prune` over wall time of one plain forward pass over the same calibration tokens.

    python benchmarks/cost.py --model models/smollm2

Both run in this process, with the same threads, batch size and tokens; the forward pass runs before and after the
pruning, and the mean of the two is the unit.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner
from optimum_comp.calibration import PYDOC, prepare_calibration
from optimum_comp.configuration import PRESETS


BATCH = 8


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """One forward pass of the whole model, logits included, over all tokens."""
    started = time.perf_counter()
    for batch in tokens.split(BATCH):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    """Time both and print the ratio, for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--preset", nargs="+", default=list(PRESETS), choices=PRESETS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = {"num_samples": args.num_samples, "sequence_length": args.sequence_length}
    print(f"{args.num_samples} x {args.sequence_length} tokens, {torch.get_num_threads()} threads\n")
    print("| preset | one forward pass | prune | ratio |\n| --- | ---: | ---: | ---: |")
    for name in args.preset:
        dense = AutoModelForCausalLM.from_pretrained(args.model).eval()
        pruner = CompPruner.from_pretrained(args.model)
        samples = prepare_calibration(args.text, model=dense, tokenizer=pruner.tokenizer, **shape)
        before = forward_seconds(dense, samples.tokens)
        config = CompConfig.from_preset(name, **shape)
        report = pruner.prune(config, samples.tokens, batch_size=BATCH)
        forward = (before + forward_seconds(dense, samples.tokens)) / 2
        print(f"| {name} | {forward:.1f} s | {report.seconds:.1f} s | {report.seconds / forward:.2f} |", flush=True)


if __name__ == "__main__":
    main()
