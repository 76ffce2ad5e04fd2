"""Generation with ONNX Runtime GenAI against Optimum: speed, perplexity and size.

    python benchmarks/genai.py --model models/smollm2 --pruned out/pruned --text text.txt

The first rows are the dense model in float32: as Optimum exports it, and GenAI's graph of it in `ORTModelForCausalLM`
and in GenAI; the others are the pruned one (or the dense one, if none is given): what GenAI's own builder makes of it
at 8 and 4 bits, and our recipes on the one graph, in both runtimes. The same threads, prompt and number of tokens for
all; medians after a warm-up. Perplexity is that of the very graph, run by ONNX Runtime. The last rows measure the
speed of the first ones again: what the machine has changed in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shutil
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
    """Prefill and decode tokens per second with GenAI."""
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

    def in_optimum(self, name: str, folder: Path, *, speed_only: bool = False) -> Row:
        """Everything with `ORTModelForCausalLM`."""
        result = self._evaluate(folder, self.args.prompt_tokens, speed_only=speed_only)
        prefill, decode = result.prefill_tokens_per_second, result.decode_tokens_per_second
        assert prefill is not None and decode is not None
        return Row(name, result.size_bytes, result.perplexity, prefill, decode)

    def in_genai(self, name: str, folder: Path, *, speed_only: bool = False) -> Row:
        """Speed with GenAI, perplexity of the same graph with Optimum."""
        import torch
        from transformers import AutoConfig

        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        generator = torch.Generator().manual_seed(0)
        job = {
            "folder": str(folder.resolve()),
            "threads": self.args.threads,
            "prompt": torch.randint(vocabulary, (self.args.prompt_tokens,), generator=generator).tolist(),
            "new_tokens": self.args.new_tokens,
            "repeats": self.args.repeats,
        }
        command = [sys.executable, __file__, "--here", json.dumps(job)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        prefill, decode = json.loads(done.stdout.splitlines()[-1])
        result = self._evaluate(folder, 0, speed_only=speed_only)
        return Row(name, result.size_bytes, result.perplexity, prefill, decode)

    def _evaluate(self, folder: Path, prompt_tokens: int, *, speed_only: bool) -> Any:
        from optimum_comp.evaluation import evaluate_apart

        settings = self.settings(prompt_tokens)
        return evaluate_apart(folder, dataclasses.replace(settings, text=None) if speed_only else settings)

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

        from optimum_comp.bundle import write_bundle
        from optimum_comp.calibration.text import choose_blocks, read_text, tokenize
        from optimum_comp.onnx.export import export_onnx
        from optimum_comp.onnx.quantization import quantize_onnx
        from optimum_comp.onnx.recipes import find_recipe

        args, pruned = self.args, self.args.pruned or self.args.model
        label = "pruned" if args.pruned else "dense"
        plain = export_onnx(args.model, scratch / "plain", exporter="optimum").output
        yield self.in_optimum("dense, float32, Optimum's graph", plain)
        exported = export_onnx(args.model, scratch / "dense", exporter="genai").output
        dense = write_bundle(exported, scratch / "dense-bundle", target="any").output
        yield self.in_optimum("dense, float32, Optimum", dense)
        yield self.in_genai("dense, float32, GenAI", dense)
        for bits in (8, 4):
            yield self.in_genai(
                f"{label}, GenAI's own {bits} bits, GenAI", build(pruned, scratch / f"built{bits}", bits)
            )
        if args.pruned:
            exported = export_onnx(pruned, scratch / "pruned", exporter="genai").output
        for recipe in args.recipe:
            tokens = None
            if find_recipe(recipe).rounding == "compensated":
                text = tokenize(AutoTokenizer.from_pretrained(pruned), read_text(args.calibration)[0])
                tokens = choose_blocks(text, 64, 512, 0, args.calibration)
            quantized = quantize_onnx(exported, scratch / recipe, recipe=recipe, tokens=tokens).output
            bundle = write_bundle(quantized, scratch / f"{recipe}-bundle", target="any").output
            yield self.in_optimum(f"{label}, {recipe}, Optimum", bundle)
            yield self.in_genai(f"{label}, {recipe}, GenAI", bundle)
        yield self.in_optimum("dense, float32, Optimum's graph, again", plain, speed_only=True)
        yield self.in_genai("dense, float32, GenAI, again", dense, speed_only=True)


def build(checkpoint: Path, folder: Path, bits: int) -> Path:
    """What GenAI's builder makes by itself, with its own rounding."""
    from optimum_comp.onnx.folders import copy_companions
    from optimum_comp.onnx.fused import run_builder

    # At 8 bits, its way to store a tied embedding once makes a graph that doesn't load (0.15).
    options = {"shared_embeddings": "false"} if bits == 8 else {}
    run_builder(checkpoint, folder, f"int{bits}", **options)
    copy_companions(checkpoint, folder)
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    return folder


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
