"""`optimum-cli comp quantize`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import (
    CompSubcommand,
    add_begin_argument,
    add_common_arguments,
    add_quantization_arguments,
    quantization_arguments,
    write_json,
)


class QuantizeCommand(CompSubcommand):
    """Quantize a PyTorch or an ONNX folder."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a PyTorch or an ONNX folder for ONNX Runtime.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", required=True, type=Path, help="PyTorch or ONNX folder.")
        add_quantization_arguments(parser)
        text = parser.add_argument_group("calibration, for int4 and for a budget")
        text.add_argument(
            "--calibration",
            metavar="FILE|DATASET|self",
            help="Text, JSONL, CSV or Parquet file; dataset as name[:config[:split]];\n"
            "self: text that the model writes; pydoc: Python's documentation [pydoc].",
        )
        text.add_argument("--text-column", help="Column of the dataset that holds text [text].")
        text.add_argument("--num-samples", type=int, default=32, help="Calibration samples [32].")
        text.add_argument("--sequence-length", type=int, default=512, help="Tokens of a sample [512].")
        add_begin_argument(text)
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Export first where the folder isn't ONNX yet."""
        from optimum_comp.compress import quantize_folder
        from optimum_comp.utils import format_bytes

        args = self.args
        report = quantize_folder(
            args.model,
            args.output,
            calibration=args.calibration,
            text_column=args.text_column,
            num_samples=args.num_samples,
            sequence_length=args.sequence_length,
            begin=args.begin or "auto",
            overwrite=args.overwrite,
            **quantization_arguments(args),
        )
        data = {**dataclasses.asdict(report), "output": str(args.output)}
        write_json(args.json, data)
        print(
            f"{args.output}: {report.recipe}, {format_bytes(report.size_bytes_before)} -> "
            f"{format_bytes(report.size_bytes)}"
        )
