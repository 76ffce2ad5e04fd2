"""Perplexity after pruning, for each preset and each calibration text, on texts that were not calibrated on.

    python benchmarks/quality.py --model models/smollm2 --calibration calib.txt self --text wikitext.txt ptb.txt

A `FILE:A:B` takes the part of a file from share A to share B, so one file can serve both: `text.txt:0:0.8`
calibrates, `text.txt:0.8:1` measures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp import CompConfig, CompPruner
from optimum_comp.beginning import decide, losses_of_model, spread
from optimum_comp.calibration.text import PYDOC, SELF, read_text, tokenize
from optimum_comp.configuration import PRESETS
from optimum_comp.evaluation import perplexity


def part(source: str) -> str:
    """The text that `FILE[:A:B]` names."""
    name, _, share = source.partition(":")
    text, _ = read_text(name)
    low, high = (float(x) for x in share.split(":")) if share else (0.0, 1.0)
    return text[int(low * len(text)) : int(high * len(text))]


def main() -> None:
    """Prune with everything that was asked for, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", default=[f"{PYDOC}:0:0.6"], metavar="FILE[:A:B]|self")
    parser.add_argument("--text", nargs="+", default=[f"{PYDOC}:0.6:1"], metavar="FILE[:A:B]")
    parser.add_argument("--preset", nargs="+", default=list(PRESETS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="other fields of CompConfig")
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {Path(name).name: tokenize(tokenizer, part(name))[: args.max_tokens] for name in args.text}
    settings = (setting.partition("=") for setting in args.set)
    fields = {key: float(value) if "." in value else int(value) for key, _, value in settings}

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    pieces = spread(next(iter(texts.values())), args.window)
    start = decide("auto", tokenizer, pieces, losses_of_model(model), "Windows").tokens

    def measure(model: torch.nn.Module) -> list[float]:
        return [perplexity(model, tokens, args.window, start)[0] for tokens in texts.values()]

    dense = measure(model)
    del model
    sizes = ", ".join(f"{name}: {tokens.numel()} tokens" for name, tokens in texts.items())
    print(f"{sizes}; windows of {args.window}, beginning with {tokenizer.decode(start)!r}\n")
    print("| recipe | sparsity | calibration | " + " | ".join(texts) + " | s |")
    print("| --- | ---: | --- |" + " ---: |" * (len(texts) + 1))
    print("| dense | 0 | | " + " | ".join(f"{value:.2f}" for value in dense) + " | |", flush=True)
    for preset in args.preset:
        for sparsity in args.sparsity:
            for source in args.calibration:
                for seed in args.seed:
                    pruner = CompPruner.from_pretrained(args.model)
                    started = time.perf_counter()
                    config = CompConfig.from_preset(preset, sparsity=sparsity, seed=seed, **fields)
                    report = pruner.prune(config, SELF if source == SELF else [part(source)])
                    seconds = time.perf_counter() - started
                    values = zip(measure(pruner.model), dense, strict=True)
                    cells = " | ".join(f"{value:.2f} ({value / base:.3f}x)" for value, base in values)
                    label = f"{preset} {' '.join(args.set)}".strip()
                    row = [label, f"{report.achieved_sparsity:.4f}", Path(source).name, cells, f"{seconds:.0f}"]
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
