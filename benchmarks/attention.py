"""The same share of a model from neurons alone, and with a part of it from attention: quality, size, cache and speed.

    python benchmarks/attention.py --model models/smollm2 --calibration text.txt --text other.txt --text third.txt

Prunes once for each setting, exports each, and measures all in one run: perplexity of the checkpoint on each text,
size of the key-value cache, and speed of the ONNX model in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_comp import CompConfig, CompPruner
from optimum_comp.beginning import decide, losses_of_model, spread
from optimum_comp.calibration.text import read_text, tokenize
from optimum_comp.evaluation import Settings, evaluate_apart, perplexity
from optimum_comp.onnx.export import export_onnx
from optimum_comp.report.run import CompReport


def settings(shares: list[str]) -> dict[str, dict[str, Any]]:
    """Fields of `CompConfig` by name, from `AXIS:SHARE` of each setting."""
    found: dict[str, dict[str, Any]] = {"neurons alone": {}}
    for given in shares:
        axis, _, share = given.partition(":")
        found[f"{axis} take {float(share):.0%}"] = {"axes": ["ffn", axis], "attention_fraction": float(share)}
    return found


def main() -> None:
    """Prune, export, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--text", action="append", required=True, help="a text file to measure; can be given again")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--share", action="append", help="AXIS:SHARE [kv:0.28, heads:0.21]")
    parser.add_argument("--max-tokens", type=int, default=10240)
    parser.add_argument("--work", type=Path, help="keep the models here, and use those that are here already")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {Path(name).name: tokenize(tokenizer, read_text(name)[0])[: args.max_tokens] for name in args.text}
    dense = AutoModelForCausalLM.from_pretrained(args.model).eval()
    pieces = spread(next(iter(texts.values())), 512)
    start = decide("auto", tokenizer, pieces, losses_of_model(dense), "Windows").tokens
    names = " | ".join(f"{name} ({len(tokens)} tokens)" for name, tokens in texts.items())
    print(f"windows of 512, beginning with {tokenizer.decode(start)!r}\n")
    print(f"| | sizes | parameters | {names} | cache a token | decode tok/s | prefill tok/s |")
    print(f"| --- | --- | ---: |{' ---: |' * (len(texts) + 3)}", flush=True)
    known: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for name, fields in {"dense": None, **settings(args.share or ["kv:0.28", "heads:0.21"])}.items():
            folder = Path(args.model)
            if fields is not None:
                folder = work / name.replace(" ", "-").replace("%", "")
                if not folder.exists():
                    config = CompConfig(sparsity=args.sparsity, **fields)
                    CompPruner.from_pretrained(args.model).prune(config, args.calibration, output=folder)
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            found = [perplexity(model, tokens, 512, start)[0] for tokens in texts.values()]
            known = known or found
            parameters = sum(parameter.numel() for parameter in model.parameters())
            del model
            graph = work / f"{name.replace(' ', '-').replace('%', '')}-onnx"
            if not graph.exists():
                export_onnx(folder, graph)
            speed = evaluate_apart(graph, Settings(text=None, new_tokens=64, threads=2))
            sizes = "" if fields is None else CompReport.load(folder).sizes()
            quality = [f"{value:.2f} ({value / first:.3f}×)" for value, first in zip(found, known, strict=True)]
            cells = [name, sizes, f"{parameters / 1e6:.1f} M", *quality, f"{cache_bytes(folder) / 1000:.1f} kB"]
            cells += [f"{speed.decode_tokens_per_second:.1f}", f"{speed.prefill_tokens_per_second:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def cache_bytes(folder: Path) -> int:
    """Bytes of a token's keys and values in float32."""
    config = AutoConfig.from_pretrained(folder)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * int(head)


if __name__ == "__main__":
    main()
