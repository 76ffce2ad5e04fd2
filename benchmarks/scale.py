"""Peak memory and time of pruning checkpoints of a 7B model's shape with few and many layers.

    python benchmarks/scale.py --layers 2 4 8
    python benchmarks/scale.py --paper

Writes LLaMA-2-7B-shaped checkpoints with random bfloat16 weights to a temporary folder (405 MB a layer), prunes each
in a process of its own and extrapolates to the full depth. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from optimum_comp import CompConfig, CompPruner
from optimum_comp.checkpoint.source import ResidentModel, empty_model
from optimum_comp.families import family_of
from optimum_comp.sweep.memory import MemoryPlan, Workload, disk_bytes, good_batch_size, predict, workload_of
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.utils import file_bytes, format_bytes, parameter_count


DEPTH = 32
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
PAPER: dict[str, dict[str, int]] = {
    "LLaMA-2 7B": {"num_hidden_layers": 32},
    "LLaMA-2 13B": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
    },
    "LLaMA-2 70B": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes, by what differs from LLaMA-2-7B's in `SHAPE`."""


def write_checkpoint(folder: Path, layers: int, **shape: int) -> None:
    """A Llama checkpoint with random bfloat16 weights, a file for each layer, without ever holding two of them.

    Args:
        folder: where to; made here.
        layers: decoder layers.
        shape: sizes that differ from LLaMA-2-7B's.
    """
    config = LlamaConfig(num_hidden_layers=layers, dtype=torch.bfloat16, **{**SHAPE, **shape})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, width = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(layers)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * hidden**-0.5).to(torch.bfloat16)

    square = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    placed: dict[str, str] = {}
    for number in range(layers + 1):
        if number < layers:
            prefix = f"model.layers.{number}."
            tensors = {f"{prefix}{name}.weight": random(hidden, hidden) for name in square}
            tensors |= {f"{prefix}mlp.{name}.weight": random(width, hidden) for name in ("gate_proj", "up_proj")}
            tensors[f"{prefix}mlp.down_proj.weight"] = random(hidden, width)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        else:
            tensors = {
                name: random(config.vocab_size, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")
            }
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune_here(folder: Path, samples: int, length: int, max_memory: str | None) -> None:
    """Prune, and leave the summary as JSON."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0))
    config = CompConfig(num_samples=samples, sequence_length=length)
    pruner = CompPruner.from_pretrained(folder / "dense")
    report = pruner.prune(config, tokens, output=folder / "pruned", max_memory=max_memory)
    (folder / "summary.json").write_text(json.dumps(report.summary()))


def operations(work: Workload, kept: int) -> tuple[float, float]:
    """Floating-point operations of one layer of the default recipe: over the tokens, and in the solves.

    Both streams of hidden states pass the layer (the pruned one without its consumer), then come the upper blocks of
    the Gram matrix, the cross moment, and the repaired consumer; solved are the inverse, its products with the weight,
    and the eliminations.
    """
    tokens, hidden, width = work.samples * work.length, work.hidden, work.width
    consumer = hidden * width
    attention = 2 * work.length * hidden
    passing = 2 * (2 * work.layer_parameters - consumer) + 2 * attention
    moments = 1.25 * width**2 + 2 * consumer
    solving = width**3 + 4 * hidden * width**2 + 2 * (width - kept) * (width**2 + consumer)
    return tokens * (passing + moments + 2 * hidden * kept), solving


def measured_rate() -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    left, right = torch.randn(2048, 4096), torch.randn(4096, 4096)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * 2048 * 4096 * 4096 / min(times)


def on_paper(samples: int, length: int, rate: float) -> None:
    """Memory, disk and time of known sizes, from the formulas that a run announces itself with."""
    base = psutil.Process().memory_info().rss
    batch = good_batch_size(length, torch.device("cpu"))
    print(f"{samples} x {length} tokens, 20 % of the layers; {rate / 1e9:.0f} GFLOP/s, {format_bytes(base)} at rest\n")
    print("| model | checkpoint | peak memory | at the least | disk | time | 2 processes | forward pass |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    config = CompConfig(num_samples=samples, sequence_length=length)
    for name, shape in PAPER.items():
        llama = LlamaConfig(**{**SHAPE, **shape})
        source = ResidentModel(empty_model(llama, torch.bfloat16), family_of(llama))
        allocation = CompPruner(source).plan(config)
        # As if it were streamed, and widened to float32 while a layer runs.
        work = replace(workload_of(source, config, [allocation], Ranks()), compute=4, whole_model=0)
        parameters = parameter_count(source.model)
        plans = [
            predict(work, MemoryPlan(batch, False, False, 0), base),
            predict(work, MemoryPlan(1, True, True, 0), base),
        ]
        disk = disk_bytes(work, plans[0], parameters - allocation.parameters, resumable=True)
        over_tokens, solving = operations(work, allocation.width)
        seconds = [work.layers * (over_tokens / ranks + solving) / rate for ranks in (1, 2)]
        forward = work.layers * samples * length * 2 * (work.layer_parameters + length * work.hidden) / rate
        cells = [format_bytes(2 * parameters)]
        cells += [format_bytes(plan.peak_bytes) for plan in plans] + [format_bytes(disk)]
        cells += [f"{each / 3600:.1f} h" for each in (*seconds, forward)]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Prune each and print the table."""
    if sys.argv[1:2] == ["--here"]:
        prune_here(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] or None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-memory")
    parser.add_argument("--folder", help="where the checkpoints are written for a while [the system's temporary one]")
    parser.add_argument("--paper", action="store_true", help="print what 7B, 13B and 70B will need, and prune nothing")
    parser.add_argument("--gflops", type=float, help="float32 rate to reckon with [measured]")
    args = parser.parse_args()
    if args.paper:
        on_paper(args.num_samples, args.sequence_length, args.gflops * 1e9 if args.gflops else measured_rate())
        return
    print(f"{args.num_samples} x {args.sequence_length} tokens, {torch.get_num_threads()} threads\n")
    print("| layers | checkpoint | peak memory | seconds | of it read, forward, Gram, solve, write |")
    print("| ---: | ---: | ---: | ---: | --- |")
    points: list[tuple[int, float]] = []
    peaks: list[int] = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            folder = Path(scratch)
            write_checkpoint(folder / "dense", layers)
            size = file_bytes(folder / "dense", ["*.safetensors"])
            given = [scratch, str(args.num_samples), str(args.sequence_length), args.max_memory or ""]
            subprocess.run([sys.executable, __file__, "--here", *given], check=True)
            report = json.loads((folder / "summary.json").read_text())
        points.append((layers, report["seconds"]))
        peaks.append(report["peak_memory_bytes"])
        kinds = ", ".join(f"{report['timings'].get(k, 0):.0f}" for k in ("read", "forward", "gram", "solve", "write"))
        print(
            f"| {layers} | {format_bytes(size)} | {format_bytes(peaks[-1])} | {report['seconds']:.0f} | {kinds} |",
            flush=True,
        )
    if len(points) > 1:
        (few, short), (many, long) = points[0], points[-1]
        each = (long - short) / (many - few)
        print(f"\nPeak memory of {many} layers over that of {few}: {peaks[-1] / peaks[0]:.3f}.")
        print(f"{each:.0f} s a layer, so {DEPTH} layers take about {(short + (DEPTH - few) * each) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
