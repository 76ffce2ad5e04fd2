"""Speeds of several folders, which take turns, so that a machine whose speed drifts is as fast for one as for another.

    python benchmarks/turns.py FOLDER...

PyTorch checkpoints and ONNX folders, all open at once, in one process. Prints tokens a second of each prompt and of
decoding behind the first, the median of the turns, and how many times the first folder's that is: the median of the
ratios within a turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
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
    measures = {
        folder.name: in_folder(folder, args.prompt_tokens, args.new_tokens, args.threads) for folder in args.folders
    }
    speeds = take_turns(measures, args.turns)
    columns = [*(f"prompt of {count}" for count in args.prompt_tokens), "decoding"]
    print(table(speeds, dict.fromkeys(columns, args.folders[0].name)))


def take_turns(measures: Mapping[str, Callable[[], Sequence[float]]], turns: int) -> dict[str, list[Sequence[float]]]:
    """What each measures in every turn, by name.

    Args:
        measures: by name, what gives a model's speeds in tokens a second, as many as every other.
        turns: how many.
    """
    speeds: dict[str, list[Sequence[float]]] = {name: [] for name in measures}
    for _ in range(turns):
        for name, measure in measures.items():
            speeds[name].append(measure())
    return speeds


def ratio(speeds: Mapping[str, Sequence[Sequence[float]]], name: str, against: str, place: int) -> float:
    """How many times as fast one is as another in speed number `place`: the median of the ratios within a turn."""
    pairs = zip(speeds[name], speeds[against], strict=True)
    return statistics.median(one[place] / other[place] for one, other in pairs)


def table(speeds: Mapping[str, Sequence[Sequence[float]]], columns: Mapping[str, str]) -> str:
    """Medians of the turns, and ratios.

    Args:
        speeds: of `take_turns`.
        columns: title of each speed, and the name of the model that it is compared with.
    """
    rows = [("", *columns)]
    for name, found in speeds.items():
        cells = [
            f"{statistics.median(each[place] for each in found):.1f} tok/s ({ratio(speeds, name, other, place):.2f}×)"
            for place, other in enumerate(columns.values())
        ]
        rows.append((name, *cells))
    return markdown_table(rows)


def in_folder(folder: Path, prompts: Sequence[int], new_tokens: int, threads: int) -> Callable[[], list[float]]:
    """What measures a folder's model, which stays open: speeds of each prompt, and of decoding behind the first."""
    is_onnx = (folder / MODEL_NAME).is_file()
    model: Any
    if is_onnx:
        model = load_onnx(folder, threads)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Beside ONNX Runtime's, torch's threads only get in the way.
    return functools.partial(_speeds, model, prompts, new_tokens, 1 if is_onnx else threads)


def _speeds(model: Any, prompts: Sequence[int], new_tokens: int, torch_threads: int) -> list[float]:
    torch.set_num_threads(torch_threads)
    first, *others = prompts
    prompt, decoding = throughput(model, first, new_tokens, 1)
    return [prompt, *(throughput(model, count, 2, 1)[0] for count in others), decoding or float("nan")]


if __name__ == "__main__":
    main()
