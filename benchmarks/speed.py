"""Dense and pruned, float32, 8 and 4 bits, side by side in ONNX Runtime, and the dense one in llama.cpp.

Speed, memory, size and perplexity:

    python benchmarks/speed.py --model models/smollm2 --calibration text.txt --text other.txt --report out/speed

Without `--calibration`, the first 60 % of the text calibrate and the rest is measured. Prunes twice (with equalization
for 8 bits, without for 4), exports, quantizes, also with Optimum's own preset, and measures each model in a process of
its own, all in one run on the same prompts and tokens with as many threads. Then all of them, open at once (some 6 GB
for a model of 135M parameters), take turns, and the ratios of speeds are those within a turn: a machine's speed may
drift by a third from one process to the next. llama.cpp comes from npm into the folder of the models (see
llama_cpp.py); where it can't be had, one line says why, and the rest is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import turns
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from transformers import AutoConfig, AutoTokenizer

import llama_cpp
from optimum_comp import CompConfig, CompPruner
from optimum_comp.beginning import decide, losses_of_model, spread
from optimum_comp.calibration.text import PYDOC, choose_blocks, read_text, tokenize
from optimum_comp.evaluation import Evaluation, Settings, evaluate_all
from optimum_comp.files import check_file
from optimum_comp.onnx.export import export_onnx
from optimum_comp.onnx.folders import copy_companions
from optimum_comp.onnx.quantization import quantize_onnx
from optimum_comp.onnx.runtime import load_onnx
from optimum_comp.report.plots import require_matplotlib, write_report
from optimum_comp.report.table import evaluation_table
from optimum_comp.utils import ROOT_LOGGER


DENSE, TORCH, IN_LLAMA_CPP = "dense float32", "dense float32, PyTorch", "dense, llama.cpp "
LLAMA_CPP = "llama.cpp"
"""Folder of its models and packages."""

Speeds = dict[str, list[Sequence[float]]]


def main() -> None:
    """Make every model, measure it, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", help="text to calibrate with; a part of --text if not given")
    parser.add_argument("--text", default=PYDOC, help="perplexity is measured on this")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--preset", default="arm64", choices=("arm64", "avx2"), help="Optimum's, to compare with")
    parser.add_argument("--target", default="any")
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the models here, and use those that are here already")
    parser.add_argument("--turns", type=int, default=5, help="that all models take, for the ratios of their speeds")
    parser.add_argument("--llama-cpp", action=argparse.BooleanOptionalAction, default=True, help="measure it, too")
    parser.add_argument("--report", type=Path, help="folder for report.html")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_file(args.json)
    if args.report is not None:
        require_matplotlib()
    logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        if args.calibration is None:
            args.calibration, args.text = split(args.text, Path(scratch))
        settings = Settings(
            text=args.text, max_tokens=args.max_tokens, long_prompt_tokens=512, new_tokens=64, threads=args.threads
        )
        work = args.work or Path(scratch)
        models = make(args, work)
        results = dict(evaluate_all(models, settings))
        if args.llama_cpp:
            results |= in_llama_cpp(args.model, work / LLAMA_CPP, settings.as_with(results[DENSE]))
        print(evaluation_table(results))
        if any(result.runtime == llama_cpp.RUNTIME for result in results.values()):
            print(f"\n{llama_cpp.NOTE}\n")
        if args.report is not None:
            print(write_report(results, args.report, f"{Path(args.model).name}: size and speed against perplexity"))
        # What an hour has measured isn't lost with what follows.
        write(args.json, results)
        speeds = in_turns(models, [name for name in results if name not in models], work, settings, args)
    print(f"\nTaking turns, medians of {args.turns}; prompts against PyTorch:\n")
    prompts = dict.fromkeys((f"prompt of {settings.prompt_tokens}", f"prompt of {settings.long_prompt_tokens}"), TORCH)
    print(turns.table(speeds, {**prompts, "decoding": DENSE}), end="\n\n")
    for name in speeds:
        smaller = 1 - results[name].size_bytes / results[DENSE].size_bytes
        print(f"{name}: {smaller:.1%} smaller, decodes {turns.ratio(speeds, name, DENSE, -1):.2f} times as fast")
    write(args.json, results, speeds)


def write(path: Path | None, results: Mapping[str, Evaluation], speeds: Speeds | None = None) -> None:
    """What was measured, as JSON; the speeds of each turn, too, once they are there."""
    if path is not None:
        found = {name: result.to_dict() for name, result in results.items()}
        for name, measured in (speeds or {}).items():
            found[name]["turns"] = measured
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))


def in_turns(models: Mapping[str, Path], formats: Iterable[str], work: Path, settings: Settings, args: Any) -> Speeds:
    """Tokens a second of both prompts and of decoding, in every turn, by name.

    Args:
        models: folders by name.
        formats: of llama.cpp, that have been measured there.
        work: has llama.cpp's models.
        settings: what was measured before.
        args: of the command line.
    """
    prompts = [settings.prompt_tokens, settings.long_prompt_tokens]
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    measures: dict[str, Callable[[], Sequence[float]]] = {
        name: turns.in_folder(path, prompts, settings.new_tokens, args.threads) for name, path in models.items()
    }
    for name in formats:
        measures[name] = functools.partial(
            llama_cpp.turn, work / LLAMA_CPP, name.removeprefix(IN_LLAMA_CPP), vocabulary, settings
        )
    return turns.take_turns(measures, args.turns)


def split(source: str, folder: Path) -> tuple[str, str]:
    """Two files: the first part of a text, and the rest."""
    text, _ = read_text(source)
    cut = text.find("\n", int(0.6 * len(text))) + 1
    parts = {"calibration.txt": text[:cut], "held-out.txt": text[cut:]}
    for name, content in parts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return str(folder / "calibration.txt"), str(folder / "held-out.txt")


def make(args: Any, folder: Path) -> dict[str, Path]:
    """Folders of the models by name."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenize(tokenizer, read_text(args.calibration)[0])
    paths: dict[str, Path] = {DENSE: folder / "dense", TORCH: Path(args.model)}
    if not paths[DENSE].exists():
        export_onnx(args.model, paths[DENSE], exporter="optimum")
    fused = folder / "dense-fused"
    if not fused.exists():
        export_onnx(args.model, fused)
    losses = losses_of_model(load_onnx(paths[DENSE]))
    start = decide("auto", tokenizer, spread(tokens, 512), losses, "Blocks").tokens
    blocks = choose_blocks(tokens, 32, 512, 0, args.calibration, start)
    paths[f"dense, Optimum's {args.preset}"] = stock = folder / f"dense-{args.preset}"
    if not stock.exists():
        preset = getattr(AutoQuantizationConfig, args.preset)(is_static=False, per_channel=True)
        ORTQuantizer.from_pretrained(paths[DENSE]).quantize(preset, stock, file_suffix=None)
        copy_companions(paths[DENSE], stock)
    exported = {}
    for equalize in (True, False):
        pruned = folder / f"pruned-{'even' if equalize else 'plain'}"
        exported[equalize] = pruned.with_name(f"{pruned.name}-onnx")
        if not pruned.exists():
            config = CompConfig(sparsity=args.sparsity, equalize=equalize)
            CompPruner.from_pretrained(args.model).prune(config, args.calibration, output=pruned)
        if not exported[equalize].exists():
            export_onnx(pruned, exported[equalize])
    sources = {
        "dense float32, fused": (fused, None),
        "dense int8": (fused, "int8"),
        "dense int4": (fused, "int4"),
        "pruned float32": (exported[True], None),
        "pruned int8": (exported[True], "int8"),
        "pruned int8-dynamic": (exported[True], "int8-dynamic"),
        "pruned int4": (exported[False], "int4"),
    }
    for name, (source, recipe) in sources.items():
        paths[name] = source if recipe is None else folder / name.replace(" ", "-")
        if recipe is not None and not paths[name].exists():
            quantize_onnx(source, paths[name], recipe=recipe, target=args.target, tokens=blocks)
    return paths


def in_llama_cpp(model: str, folder: Path, settings: Settings) -> dict[str, Evaluation]:
    """Measurements of the dense model by the names of llama.cpp's formats; none, with a line that says why."""
    results = {}
    try:
        for name, result in llama_cpp.measure(model, folder, settings):
            results[f"{IN_LLAMA_CPP}{name}"] = result
    except llama_cpp.LlamaCppUnavailableError as error:
        print(f"without llama.cpp: {error}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
