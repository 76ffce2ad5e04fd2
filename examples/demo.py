"""The whole chain on a real model: prune, export, quantize, let it talk, print one table.

    python examples/demo.py --model models/smollm2 out/demo

Needs no text from outside: Python's own documentation is split in two, one part calibrates, the other measures
perplexity. `--text FILE` does the same with a text of yours; `--distil 10min` distils on the first part after pruning.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from transformers import AutoTokenizer

from optimum_comp import CompConfig, DistilSettings
from optimum_comp.calibration.text import PYDOC, read_text, tokenize
from optimum_comp.compress import compress
from optimum_comp.evaluation import Settings
from optimum_comp.options import Duration
from optimum_comp.utils import ROOT_LOGGER


CALIBRATION_SHARE = 0.6

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France, and what is it known for?",
    "Name three things to take along on a rainy day.",
)
BEGINNINGS = ("Gravity is", "Photosynthesis is the process by which", "On a rainy day, you should always take along")
"""The same for a model that has no chat template: it goes on with what it is given."""


def main() -> None:
    """Split the text, run the chain, print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--distil", default="none", help="how long to distil, like 10min [not at all]")
    parser.add_argument("--text", default=PYDOC, help="a text file; Python's documentation by default")
    parser.add_argument("--prompt", action="append", help="ask this; can be given several times")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    # Stages, and what they need, on the screen.
    logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
    try:
        print(run(args))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> str:
    """The report."""
    config = CompConfig(sparsity=args.sparsity, equalize=True)
    text, _ = read_text(args.text)
    share = int(len(text) * CALIBRATION_SHARE)
    cut = text.rfind("\n", 0, share) + 1 or share
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenize(tokenizer, text[:cut]).numel()
    samples = min(config.num_samples, tokens // config.sequence_length)
    if samples == 0:
        raise ValueError(
            f"{args.text} is too short: its first part has {tokens} tokens, a sample takes {config.sequence_length}."
        )
    config.num_samples = samples
    # Kept beside the result: an interrupted demo goes on with them.
    folder = args.output.with_name(f"{args.output.name}-text")
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = folder / "calibration.txt", folder / "held-out.txt"
    calibration.write_text(text[:cut], encoding="utf-8")
    held_out.write_text(text[cut:], encoding="utf-8")
    distil = None if args.distil == "none" else DistilSettings(time=Duration().check("distil", args.distil))
    prompts = args.prompt or (QUESTIONS if tokenizer.chat_template else BEGINNINGS)
    settings = Settings(text=str(held_out), max_tokens=10240, prompts=prompts, new_tokens=32)
    result = compress(
        args.model,
        args.output,
        config=config,
        calibration=calibration,
        distil=distil,
        settings=settings,
        overwrite=True,
    )
    return result.text()


if __name__ == "__main__":
    main()
