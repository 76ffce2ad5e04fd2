"""Speeds of several folders, which take turns, so that a machine whose speed drifts is as fast for one as for another.

    python benchmarks/turns.py FOLDER...

PyTorch checkpoints and ONNX folders, all open at once, in one process. Prints tokens a second of each prompt and of
decoding behind the first, the median of the turns, and how many times the first folder's that is: the median of the
ratios within a turn.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from optimum_comp.evaluation import throughput
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.runtime import load_onnx
from optimum_comp.report.table import markdown_table


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    models = {folder: opened(folder, args.threads) for folder in args.folders}
    speeds: dict[Path, list[list[float]]] = {folder: [] for folder in args.folders}
    for _ in range(args.turns):
        for folder, model in models.items():
            # Beside ONNX Runtime's, torch's threads only get in the way.
            torch.set_num_threads(1 if (folder / MODEL_NAME).is_file() else args.threads)
            speeds[folder].append(measure(model, args))
    first = speeds[args.folders[0]]
    rows = [("", *(f"prompt of {count}" for count in args.prompt_tokens), "decoding")]
    for folder, found in speeds.items():
        cells = []
        for place in range(len(found[0])):
            ratios = [one[place] / other[place] for one, other in zip(found, first, strict=True)]
            speed = statistics.median(each[place] for each in found)
            cells.append(f"{speed:.1f} tok/s ({statistics.median(ratios):.2f}×)")
        rows.append((folder.name, *cells))
    print(markdown_table(rows))


def opened(folder: Path, threads: int) -> Any:
    """A model that generates."""
    if (folder / MODEL_NAME).is_file():
        return load_onnx(folder, threads)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(model: Any, args: Any) -> list[float]:
    """Tokens a second of each prompt, and of decoding behind the first."""
    first, *others = args.prompt_tokens
    prompt, decoding = throughput(model, first, args.new_tokens, 1)
    return [prompt, *(throughput(model, count, 2, 1)[0] for count in others), decoding or float("nan")]


if __name__ == "__main__":
    main()
