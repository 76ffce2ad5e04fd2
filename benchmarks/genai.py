"""Generation with ONNX Runtime GenAI against Optimum: speed, perplexity and size.

    python benchmarks/genai.py --model models/smollm2 --pruned out/pruned --python genai-env/bin/python --text text.txt

The first rows are the dense model in float32, with `ORTModelForCausalLM` and in GenAI; the others are the pruned one
(or the dense one, if none is given): what GenAI's own builder makes of it at 8 and 4 bits, and bundles of ours, whose
exported graph and whose fused graph are run by Optimum and by GenAI. The same threads, prompt and number of tokens for
all; medians after a warm-up. Perplexity is that of the very graph, run by ONNX Runtime. The last rows measure the
speed of the first ones again: what the machine has changed in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def measure_here(job: dict[str, Any]) -> tuple[float, float]:
    """Prefill and decode tokens per second with GenAI, in an environment that has nothing else of this package's."""
    genai: Any = importlib.import_module("onnxruntime_genai")
    config = genai.Config(job["folder"])
    threads = {"session_options": {"intra_op_num_threads": job["threads"]}}
    config.overlay(json.dumps({"model": {"decoder": threads}}))
    model, prompt = genai.Model(config), job["prompt"]

    def seconds(count: int) -> tuple[float, float]:
        settings = genai.GeneratorParams(model)
        length = len(prompt) + count
        settings.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = genai.Generator(model, settings)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - started, time.perf_counter() - first

    seconds(2)
    runs = [seconds(job["new_tokens"]) for _ in range(job["repeats"])]
    prefill, decode = (statistics.median(values) for values in zip(*runs, strict=True))
    return len(prompt) / prefill, (job["new_tokens"] - 1) / decode


@dataclass
class Row:
    """A line of the table."""

    name: str
    size_bytes: int
    perplexity: float | None
    prefill: float
    decode: float


class Bench:
    """Measures folders, each in processes of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def in_optimum(self, name: str, folder: Path, graph: str = "model.onnx", *, speed_only: bool = False) -> Row:
        """Everything with `ORTModelForCausalLM`."""
        from optimum_comp.evaluation import evaluate_apart

        settings = self.settings(self.args.prompt_tokens)
        settings = dataclasses.replace(settings, text=None) if speed_only else settings
        result = evaluate_apart(folder, settings, file_name=graph)
        prefill, decode = result.prefill_tokens_per_second, result.decode_tokens_per_second
        assert prefill is not None and decode is not None
        return Row(name, result.size_bytes, result.perplexity, prefill, decode)

    def in_genai(self, name: str, folder: Path, graph: str, *, speed_only: bool = False) -> Row:
        """Speed with GenAI, perplexity of the same graph with Optimum."""
        import torch
        from transformers import AutoConfig

        from optimum_comp.evaluation import evaluate_apart
        from optimum_comp.onnx.genai import require_environment

        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        generator = torch.Generator().manual_seed(0)
        job = {
            "folder": str(folder.resolve()),
            "threads": self.args.threads,
            "prompt": torch.randint(vocabulary, (self.args.prompt_tokens,), generator=generator).tolist(),
            "new_tokens": self.args.new_tokens,
            "repeats": self.args.repeats,
        }
        python = require_environment(self.args.python).python
        command = [str(python), "-I", __file__, "--here", json.dumps(job)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        prefill, decode = json.loads(done.stdout.splitlines()[-1])
        settings = self.settings(0)
        settings = dataclasses.replace(settings, text=None) if speed_only else settings
        result = evaluate_apart(folder, settings, file_name=graph)
        return Row(name, result.size_bytes, result.perplexity, prefill, decode)

    def settings(self, prompt_tokens: int) -> Any:
        """What to measure with Optimum."""
        from optimum_comp.evaluation import Settings

        return Settings(
            text=self.args.text,
            max_tokens=self.args.max_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=self.args.new_tokens,
            repeats=self.args.repeats,
            threads=self.args.threads,
        )

    def rows(self, scratch: Path) -> Iterator[Row]:
        """Make each folder and measure it."""
        from transformers import AutoTokenizer

        from optimum_comp.bundle import FUSED_NAME, write_bundle
        from optimum_comp.calibration.text import choose_blocks, read_text, tokenize
        from optimum_comp.onnx.export import export_onnx
        from optimum_comp.onnx.folders import MODEL_NAME
        from optimum_comp.onnx.fused import build_genai
        from optimum_comp.onnx.quantization import quantize_onnx
        from optimum_comp.onnx.recipes import find_recipe

        args, pruned = self.args, self.args.pruned or self.args.model
        label = "pruned" if args.pruned else "dense"
        dense = export_onnx(args.model, scratch / "dense").output
        yield self.in_optimum("dense, float32, Optimum", dense)
        built = build_genai(args.model, scratch / "built32", bits=32, python=args.python).output
        yield self.in_genai("dense, float32, fused, GenAI", built, MODEL_NAME)
        for bits in (8, 4):
            folder = build_genai(pruned, scratch / f"built{bits}", bits=bits, python=args.python).output
            yield self.in_genai(f"{label}, GenAI's own {bits} bit, GenAI", folder, MODEL_NAME)
        exported = export_onnx(pruned, scratch / "pruned").output if args.pruned else dense
        for recipe in args.recipe:
            tokens = None
            if find_recipe(recipe).rounding == "compensated":
                text = tokenize(AutoTokenizer.from_pretrained(pruned), read_text(args.calibration)[0])
                tokens = choose_blocks(text, 64, 512, 0, args.calibration)
            quantized = quantize_onnx(exported, scratch / recipe, recipe=recipe, tokens=tokens).output
            plain = write_bundle(quantized, scratch / f"{recipe}-plain", target="any", genai=False).output
            yield self.in_optimum(f"{label}, {recipe}, Optimum", plain)
            yield self.in_genai(f"{label}, {recipe}, GenAI", plain, MODEL_NAME)
            fused = write_bundle(
                quantized,
                scratch / f"{recipe}-fused",
                target="any",
                genai=True,
                checkpoint=pruned,
                genai_python=args.python,
            ).output
            yield self.in_optimum(f"{label}, {recipe}, fused, Optimum", fused, FUSED_NAME)
            yield self.in_genai(f"{label}, {recipe}, fused, GenAI", fused, FUSED_NAME)
        yield self.in_optimum("dense, float32, Optimum, again", dense, speed_only=True)
        yield self.in_genai("dense, float32, fused, GenAI, again", built, MODEL_NAME, speed_only=True)


def main() -> None:
    """Measure everything and print one table, row by row."""
    if sys.argv[1:2] == ["--here"]:
        print(json.dumps(measure_here(json.loads(sys.argv[2]))))
        return
    from optimum_comp.calibration.text import PYDOC
    from optimum_comp.utils import format_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="the dense checkpoint")
    parser.add_argument("--pruned", type=Path, help="the checkpoint to compress; the dense one if not given")
    parser.add_argument("--python", type=Path, help="of an environment with GenAI [$COMP_GENAI_PYTHON, or this one]")
    parser.add_argument("--recipe", nargs="*", default=["int8"], help="of the bundles")
    parser.add_argument("--calibration", default=PYDOC, help="text for recipes that round with text")
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--max-tokens", type=int, default=10240)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"{args.threads} threads, prompt {args.prompt_tokens}, {args.new_tokens} new tokens\n")
    print("| model, weights, runtime | file size | perplexity | prefill tok/s | decode tok/s | ratio |")
    print("| --- |" + " ---: |" * 5)
    base = None
    with tempfile.TemporaryDirectory() as scratch:
        for row in Bench(args).rows(Path(scratch)):
            base = base or row
            perplexity = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
            cells = [row.name, format_bytes(row.size_bytes), perplexity]
            cells += [f"{row.prefill:.0f}", f"{row.decode:.1f}", f"{row.decode / base.decode:.2f}x"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
