"""ONNX folders in Optimum's class and in this package's, side by side.

    python benchmarks/cache.py FOLDER...

Here the cache stays in its place, and of a prompt only the last logits are made. Both are opened at once and take
turns, on the same prompts, with greedy answers that have to be the same. Prints tokens a second of decoding behind the
first prompt and of reading each, the median of the turns, and their ratio.
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
    """Measure each folder, print a line for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        for work, (optimums, ours) in measure(folder, args).items():
            print(f"{folder.name}, {work}: {optimums:.1f} tok/s in Optimum's class, {ours:.1f} here", end="")
            print(f" ({ours / optimums:.2f}×)", flush=True)


def measure(folder: Path, args: Any) -> dict[str, list[float]]:
    """Kind of work -> tokens a second in Optimum's class, and in this package's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    models = [kind.from_pretrained(folder, session_options=options) for kind in (OptimumModel, ORTModelForCausalLM)]
    generator = torch.Generator().manual_seed(0)
    sizes = args.prompt_tokens
    prompts = [torch.randint(models[0].config.vocab_size, (1, size), generator=generator) for size in sizes]
    works = ["decoding", *(f"a prompt of {size}" for size in sizes)]
    speeds: dict[str, list[list[float]]] = {work: [[], []] for work in works}
    # The first turn, in which memory is found and weights are packed, isn't counted.
    for turn in range(args.repeats + 1):
        answers = []
        for place, model in enumerate(models):
            first = [generate(model, prompt, 1)[1] for prompt in prompts]
            answer, whole = generate(model, prompts[0], args.new_tokens)
            answers.append(answer)
            if turn:
                found = [(args.new_tokens - 1) / (whole - first[0])]
                found += [size / seconds for size, seconds in zip(sizes, first, strict=True)]
                for work, speed in zip(works, found, strict=True):
                    speeds[work][place].append(speed)
        if not torch.equal(*answers):
            raise RuntimeError(f"{folder}: the answers differ.")
    return {work: [statistics.median(each) for each in found] for work, found in speeds.items()}


def generate(model: Any, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """A greedy answer of so many tokens, and the seconds that it takes."""
    started = time.perf_counter()
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return answer, time.perf_counter() - started


if __name__ == "__main__":
    main()
