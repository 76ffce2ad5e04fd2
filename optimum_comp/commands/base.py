"""What the subcommands of `optimum-cli comp` share."""

from __future__ import annotations

import logging
import signal
import sys
from abc import abstractmethod
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand


class CompSubcommand(BaseOptimumCLICommand):
    """Turns what a user can mend into one line, and applies `--quiet`."""

    def run(self) -> None:
        """Run; exit with 1 and one line where the user's input is at fault, with 130 on Ctrl-C."""
        _configure_logging(self.args.quiet)
        try:
            self.execute()
        except KeyboardInterrupt as interrupt:
            print(f"interrupted; {str(interrupt) or 'nothing was written.'}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
            if self.args.debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    @abstractmethod
    def execute(self) -> None:
        """The command's work."""


def add_common_arguments(parser: ArgumentParser) -> None:
    """`--json`, `--quiet` and `--debug`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the numbers to FILE as JSON.")
    parser.add_argument("--quiet", action="store_true", help="No progress bars and no notes, only the result.")
    parser.add_argument("--debug", action="store_true", help=SUPPRESS)


def add_loading_arguments(parser: ArgumentParser) -> None:
    """How `--model` is loaded."""
    group = parser.add_argument_group("loading the model")
    group.add_argument("--revision", help="Branch, tag or commit of a model on the hub.")
    group.add_argument("--dtype", help="auto, float32, bfloat16 or float16; the checkpoint's own by default.")
    group.add_argument("--gguf-file", help="Name of a GGUF file in the model's folder.")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="Run code that comes with the model. Off by default."
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="Read weights that only come as a pickle. Off by default."
    )


def add_begin_argument(parser: Any) -> None:
    """`--begin`."""
    parser.add_argument(
        "--begin",
        help="Whether each sample and window begins with what the tokenizer puts in\n"
        "front of a text, like <bos>: auto (unless the model does as well without),\n"
        "always or never; the same where it puts nothing there [auto].",
    )


def add_config_arguments(parser: ArgumentParser) -> None:
    """One option for each field of `CompConfig`; an option that isn't given keeps the preset's value."""
    group = parser.add_argument_group("pruning")
    group.add_argument("--preset", help="comp (default: least squares), comp-mask (mask tuning) or fasp.")
    group.add_argument("--config", metavar="FOLDER", help="Folder or hub id with a comp_config.json to start from.")
    group.add_argument("--sparsity", type=float, help="Share of decoder-layer parameters to remove [0.2].")
    group.add_argument(
        "--calibration",
        metavar="FILE|DATASET|self",
        help="Text, JSONL, CSV or Parquet file; dataset as name[:config[:split]];\n"
        "self: text that the model writes; pydoc: Python's documentation [self].",
    )
    group.add_argument("--text-column", help="Column of the dataset that holds text [text].")
    group.add_argument("--num-samples", type=int, help="Calibration samples [64].")
    group.add_argument("--sequence-length", type=int, help="Tokens of a sample [512].")
    add_begin_argument(group)
    group.add_argument("--batch-size", type=int, help="Samples that go through a layer at a time [about 1024 tokens].")
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="What the process may take in all, like 4GB; past it, smaller batches\n"
        "and files are used [what is free].",
    )
    group.add_argument(
        "--matmul-dtype",
        default="auto",
        help="Round factors of matrix products to this while layers run on a CPU: float32\n"
        "(not at all), bfloat16, or auto: bfloat16 where the processor has it [auto].",
    )
    group.add_argument("--seed", type=int, help="Seed of everything random [0].")
    group.add_argument("--neuron-metric", help="condition, condition_gram, condition_mask, wanda, magnitude, random.")
    group.add_argument("--recovery", help="least_squares, mask or none.")
    group.add_argument("--elimination-block", type=int, help="Neurons removed between two evaluations [32].")
    group.add_argument("--alignment", type=float, help="How far repairs lean on the dense model [0.5].")
    group.add_argument("--ridge", type=float, help="Regularisation of the solves, relative [0.001].")
    group.add_argument("--layer-fraction", type=float, help="Share of the sparsity that whole layers take [0].")
    group.add_argument(
        "--axes",
        type=_names,
        metavar="AXIS,AXIS",
        help="What may go inside layers: ffn (neurons), kv (key-value groups with their\n"
        "query heads), heads (query heads within groups) [ffn,kv].",
    )
    group.add_argument("--attention-fraction", type=float, help="Share of the sparsity that attention takes [0].")
    group.add_argument("--layer-metric", help="cosine or loss.")
    group.add_argument(
        "--protected-layers", type=_layer_numbers, metavar="N,N", help="Layers that are never removed [0,-1]."
    )
    group.add_argument("--no-bridge", dest="bridge", action="store_false", default=None, help="Don't bridge gaps.")
    group.add_argument(
        "--equalize",
        action=BooleanOptionalAction,
        help="Fold scales into the weights that even out activations, for 8 bits\n"
        "afterwards; the same model [compress: with 8 bits; prune: no].",
    )
    group.add_argument("--round-to", type=int, help="The FFN width becomes a multiple of this [32].")


def add_quantization_arguments(parser: ArgumentParser) -> None:
    """What the weights become."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--weights", choices=("int8", "int4"), default="int8", help="Bits of the weights [int8].")
    group.add_argument(
        "--recipe",
        help="A recipe by name, in place of --weights: int8, int8-dynamic (faster prompts),\n"
        "int4, int4-hqq, int4-rtn.",
    )
    group.add_argument(
        "--target", default="any", help="Processor: arm64, arm64-i8mm, x86-vnni, x86, or any of them [any]."
    )
    group.add_argument(
        "--max-perplexity-increase",
        type=_share,
        metavar="SHARE",
        help="Search for the smallest mix of 4 bits, 8 bits and float that keeps\nthis, like 2%%.",
    )
    group.add_argument("--max-size", metavar="SIZE", help="Search for the best mix of this size, like 110MB.")


def quantization_arguments(args: Any) -> dict[str, Any]:
    """Recipe, target and budget that the options describe.

    Raises:
        ValueError: a budget that is none.
    """
    from optimum_comp.onnx.search import Budget
    from optimum_comp.sweep.memory import parse_bytes

    budget = None
    if args.max_perplexity_increase is not None or args.max_size is not None:
        if args.recipe is not None:
            raise ValueError("--recipe and a budget exclude each other: a budget chooses the precisions itself.")
        size = None if args.max_size is None else parse_bytes(args.max_size, "max_size")
        budget = Budget(args.max_perplexity_increase, size)
    return {"recipe": args.recipe or args.weights, "target": args.target, "budget": budget}


def is_configured(args: Any) -> bool:
    """Whether any option of `add_config_arguments` that makes up the `CompConfig` is given."""
    from optimum_comp.configuration import FIELDS

    return any(getattr(args, name, None) is not None for name in (*FIELDS, "preset", "config"))


def config_from(args: Any) -> Any:
    """The `CompConfig` that the options describe.

    Raises:
        ValueError: a field is out of range.
    """
    from optimum_comp.configuration import FIELDS, CompConfig

    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name, None) is not None}
    if args.config is not None:
        if args.preset is not None:
            raise ValueError("--preset and --config exclude each other.")
        stored = CompConfig.from_pretrained(args.config)
        return CompConfig(**{**{name: getattr(stored, name) for name in FIELDS}, **given})
    return CompConfig.from_preset(args.preset or "comp", **given)


def loading_arguments(args: Any) -> dict[str, Any]:
    """The loading options that were given, under the names of `from_pretrained`."""
    given = {"revision": args.revision, "dtype": args.dtype, "gguf_file": args.gguf_file}
    known = {key: value for key, value in given.items() if value is not None}
    if args.trust_remote_code:
        known["trust_remote_code"] = True
    if args.allow_pickle:
        known["use_safetensors"] = False
    return known


def write_json(path: Path | None, data: Any) -> None:
    """Write `data` where `--json` points."""
    import json

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _share(text: str) -> float:
    """`2%` or `0.02`."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _layer_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _configure_logging(quiet: bool) -> None:
    from transformers.utils import logging as transformers_logging

    from optimum_comp.utils import ROOT_LOGGER

    if quiet:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        from datasets import disable_progress_bars

        disable_progress_bars()
    else:
        logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
