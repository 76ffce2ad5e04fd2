"""Perplexity and bits per byte after pruning, and after distillation, on texts that neither was trained on.

    python benchmarks/quality.py --model models/smollm2 --calibration calib.txt self --text wikitext.txt ptb.txt
    python benchmarks/quality.py --model models/smollm2 --calibration a.txt:0:0.8,b.txt --text a.txt:0.8:1 c.txt \
        --preset comp --sparsity 0.1 0.2 --distil 30min

A `FILE:A:B` takes the part of a file from share A to share B, so one file can serve both: `text.txt:0:0.8`
calibrates, `text.txt:0.8:1` measures. Parts with commas between them are mixed in equal shares. What one text
calibrates another has to measure: a table without such a text is no claim.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp import CompConfig, CompPruner
from optimum_comp.beginning import decide, losses_of_model, spread
from optimum_comp.calibration.text import PYDOC, SELF, read_text, tokenize
from optimum_comp.configuration import OPTIONS, PRESETS
from optimum_comp.distillation.run import distil
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.evaluation import bits_per_byte, bytes_predicted, perplexity
from optimum_comp.options import Duration


def part(source: str) -> str:
    """The text that `FILE[:A:B]` names."""
    name, _, share = source.partition(":")
    text, _ = read_text(name)
    low, high = (float(x) for x in share.split(":")) if share else (0.0, 1.0)
    return text[int(low * len(text)) : int(high * len(text))]


def mix_of(sources: str, folder: Path) -> str:
    """Parts with commas between them as a mix of files, which are written into a folder; `self` is itself."""
    names = []
    for number, source in enumerate(sources.split(",")):
        path = folder / f"{number}-{Path(source.partition(':')[0]).name}"
        if source != SELF:
            path.write_text(part(source), encoding="utf-8")
        names.append(SELF if source == SELF else str(path))
    return names[0] if len(names) == 1 else ",".join(f"{name}:1" for name in names)


class Texts:
    """What is measured, and how windows begin.

    Args:
        args: the command line's.
        tokenizer: the model's.
        model: the dense model, which decides it.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any, model: torch.nn.Module):
        self.tokens = {Path(name).name: tokenize(tokenizer, part(name))[: args.max_tokens] for name in args.text}
        self.window = args.window
        pieces = spread(next(iter(self.tokens.values())), args.window)
        self.start = decide("auto", tokenizer, pieces, losses_of_model(model), "Windows").tokens
        self.bytes = {
            name: bytes_predicted(tokenizer, tokens, args.window, len(self.start))
            for name, tokens in self.tokens.items()
        }

    def measure(self, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
        """Perplexity of a token, and bits per byte, of each text."""
        found = {}
        for name, tokens in self.tokens.items():
            value, predictions = perplexity(model, tokens, self.window, self.start)
            found[name] = value, bits_per_byte(value, predictions, self.bytes[name]) or math.nan
        return found


def main() -> None:
    """Prune with everything that was asked for, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", default=[f"{PYDOC}:0:0.6"], metavar="FILE[:A:B][,...]|self")
    parser.add_argument("--text", nargs="+", default=[f"{PYDOC}:0.6:1"], metavar="FILE[:A:B]")
    parser.add_argument("--preset", nargs="+", default=list(PRESETS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.2])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of CompConfig")
    parser.add_argument("--distil", metavar="TIME", help="distil each model for so long, on what calibrated it")
    parser.add_argument("--distil-text", metavar="FILE[:A:B][,...]|self", help="on this text instead")
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = (setting.partition("=") for setting in args.set)
    fields = {key: OPTIONS[key].kind.parse(value) for key, _, value in settings}
    seconds_of_training = None if args.distil is None else Duration().check("distil", args.distil)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    texts = Texts(args, tokenizer, model)
    dense = texts.measure(model)
    del model

    def row(label: str, sparsity: str, source: str, found: dict[str, tuple[float, float]], took: float | None) -> None:
        cells = [f"{value:.2f} ({value / dense[name][0]:.3f}x), {bits:.3f}" for name, (value, bits) in found.items()]
        print(
            f"| {' | '.join([label, sparsity, source, *cells, '' if took is None else f'{took:.0f}'])} |", flush=True
        )

    sizes = ", ".join(f"{name}: {tokens.numel()} tokens" for name, tokens in texts.tokens.items())
    print(f"{sizes}; windows of {args.window}, beginning with {tokenizer.decode(texts.start)!r}")
    print("Perplexity of a token (over that of the dense model), bits per byte\n")
    print("| recipe | sparsity | calibration | " + " | ".join(texts.tokens) + " | s |")
    print("| --- | ---: | --- |" + " ---: |" * (len(texts.tokens) + 1))
    row("dense", "0", "", dense, None)
    with tempfile.TemporaryDirectory() as scratch:
        for number, source in enumerate(args.calibration):
            folder = Path(scratch) / f"text-{number}"
            folder.mkdir()
            calibration = mix_of(source, folder)
            name = ",".join(Path(each).name for each in source.split(","))
            for preset in args.preset:
                for sparsity in args.sparsity:
                    for seed in args.seed:
                        pruned, distilled = Path(scratch) / "pruned", Path(scratch) / "distilled"
                        started = time.perf_counter()
                        config = CompConfig.from_preset(preset, sparsity=sparsity, seed=seed, **fields)
                        pruner = CompPruner.from_pretrained(args.model)
                        report = pruner.prune(config, calibration, output=pruned, overwrite=True)
                        took = time.perf_counter() - started
                        label = f"{preset} {' '.join(args.set)}".strip()
                        row(label, f"{report.achieved_sparsity:.4f}", name, texts.measure(pruner.model), took)
                        if seconds_of_training is None:
                            continue
                        del pruner
                        on = calibration
                        if args.distil_text is not None:
                            (folder / "distil").mkdir(exist_ok=True)
                            on = mix_of(args.distil_text, folder / "distil")
                        chosen = DistilSettings(text=[on], time=seconds_of_training, seed=seed)
                        found = distil(pruned, args.model, distilled, chosen, overwrite=True)
                        model = AutoModelForCausalLM.from_pretrained(distilled).eval()
                        label = f"{label}, distilled"
                        row(label, f"{report.achieved_sparsity:.4f}", name, texts.measure(model), found.seconds)
                        del model


if __name__ == "__main__":
    main()
