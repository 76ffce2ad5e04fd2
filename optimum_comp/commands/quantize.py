"""`optimum-cli comp quantize`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class QuantizeCommand(CompSubcommand):
    """Quantize a PyTorch or an ONNX folder."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a PyTorch or an ONNX folder for ONNX Runtime.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", required=True, type=Path, help="PyTorch or ONNX folder.")
        parser.add_argument("--recipe", default="int8", help="int8 or int8-dynamic (faster prompts) [int8].")
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Export first where the folder isn't ONNX yet."""
        from optimum_comp.compress import quantize_folder
        from optimum_comp.utils import format_bytes

        args = self.args
        report = quantize_folder(args.model, args.output, recipe=args.recipe, overwrite=args.overwrite)
        data = {**dataclasses.asdict(report), "output": str(args.output)}
        write_json(args.json, data)
        print(
            f"{args.output}: {report.recipe}, {format_bytes(report.size_bytes_before)} -> "
            f"{format_bytes(report.size_bytes)}"
        )
