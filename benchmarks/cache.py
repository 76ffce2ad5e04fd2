"""ONNX folders in Optimum's class and in this package's, whose cache stays in its place, side by side.

    python benchmarks/cache.py FOLDER...

Both are opened at once and take turns, on the same prompt, with greedy answers that have to be the same. Prints tokens
a second of decoding, the median of the turns, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM as OptimumModel

from optimum_comp import ORTModelForCausalLM


def main() -> None:
    """Measure each folder, print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        optimums, ours = measure(folder, args)
        print(f"{folder.name}: {optimums:.1f} tok/s in Optimum's class, {ours:.1f} here ({ours / optimums:.2f}×)")


def measure(folder: Path, args: Any) -> list[float]:
    """Tokens a second in Optimum's class, and in this package's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    models = [kind.from_pretrained(folder, session_options=options) for kind in (OptimumModel, ORTModelForCausalLM)]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(models[0].config.vocab_size, (1, args.prompt_tokens), generator=generator)
    speeds: list[list[float]] = [[], []]
    # The first turn, in which memory is found and weights are packed, isn't counted.
    for turn in range(args.repeats + 1):
        answers = []
        for model, found in zip(models, speeds, strict=True):
            seconds = []
            for count in (1, args.new_tokens):
                started = time.perf_counter()
                answer = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
                seconds.append(time.perf_counter() - started)
            answers.append(answer)
            if turn:
                found.append((args.new_tokens - 1) / (seconds[1] - seconds[0]))
        if not torch.equal(*answers):
            raise RuntimeError(f"{folder}: the answers differ.")
    return [statistics.median(found) for found in speeds]


if __name__ == "__main__":
    main()
