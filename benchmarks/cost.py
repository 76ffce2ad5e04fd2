"""Wall time of `prune` over wall time of one plain forward pass over the same calibration tokens, with its breakdown.

    python benchmarks/cost.py --model models/smollm2

Pruning reads the checkpoint layer by layer and writes the pruned one to a folder, journal and all. The forward pass is
that of the whole model in memory, logits included, with the same threads and tokens, before and after the pruning, in
the batches that pruning takes; the mean of the two is the unit. Each pruning has a process of its own, whose peak
memory is shown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp.calibration.text import PYDOC, choose_blocks, read_text, tokenize
from optimum_comp.configuration import PRESETS
from optimum_comp.utils import format_bytes


BATCH = 2
KINDS = ("read", "forward", "gram", "solve", "write")


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """One forward pass of the whole model, logits included, over all tokens."""
    started = time.perf_counter()
    for batch in tokens.split(BATCH):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def prune_here(model: str, preset: str, tokens: Path, folder: Path, max_memory: str | None, threads: int) -> None:
    """Prune, and leave the summary as JSON."""
    from optimum_comp import CompConfig, CompPruner

    torch.set_num_threads(threads)
    blocks = load_file(tokens)["tokens"]
    config = CompConfig.from_preset(preset, num_samples=blocks.shape[0], sequence_length=blocks.shape[1])
    report = CompPruner.from_pretrained(model).prune(config, blocks, output=folder / "out", max_memory=max_memory)
    (folder / "summary.json").write_text(json.dumps(report.summary()))


def prune_apart(*arguments: object) -> dict[str, Any]:
    """The same in a process of its own; returns the summary."""
    with tempfile.TemporaryDirectory() as folder:
        given = [str(argument) if argument is not None else "" for argument in arguments]
        subprocess.run([sys.executable, __file__, "--here", folder, *given], check=True)
        found: dict[str, Any] = json.loads((Path(folder) / "summary.json").read_text())
        return found


def main() -> None:
    """Time both and print the ratio, for each preset."""
    if sys.argv[1:2] == ["--here"]:
        folder, model, preset, blocks, max_memory, threads = sys.argv[2:8]
        prune_here(model, preset, Path(blocks), Path(folder), max_memory or None, int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--preset", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--max-memory", nargs="+", default=[None], metavar="SIZE", help="limits to try beside none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = AutoModelForCausalLM.from_pretrained(args.model).eval()
    text = tokenize(AutoTokenizer.from_pretrained(args.model), read_text(args.text)[0])
    tokens = choose_blocks(text, args.num_samples, args.sequence_length, 0, args.text)
    print(f"{args.num_samples} x {args.sequence_length} tokens, {args.threads} threads\n")
    print(f"| preset | max memory | one forward pass | prune | ratio | {' | '.join(KINDS)} | peak memory |")
    print("| --- | --- |" + " ---: |" * (4 + len(KINDS)))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokens.safetensors"
        save_file({"tokens": tokens.contiguous()}, file)
        before = forward_seconds(dense, tokens)
        for name in args.preset:
            for limit in args.max_memory if None in args.max_memory else [None, *args.max_memory]:
                report = prune_apart(args.model, name, file, limit, args.threads)
                after = forward_seconds(dense, tokens)
                forward, before = (before + after) / 2, after
                parts = " | ".join(f"{report['timings'].get(kind, 0):.1f} s" for kind in KINDS)
                print(
                    f"| {name} | {limit or 'none'} | {forward:.1f} s | {report['seconds']:.1f} s | "
                    f"{report['seconds'] / forward:.2f} | {parts} | {format_bytes(report['peak_memory_bytes'])} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
