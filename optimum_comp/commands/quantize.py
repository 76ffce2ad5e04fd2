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

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_export_arguments, add_options, add_quantization_arguments
        from optimum_comp.options import defaults_of, options_of
        from optimum_comp.stages.quantize import SampleSettings

        parser.add_argument("-m", "--model", required=True, type=Path, help="PyTorch or ONNX folder.")
        add_export_arguments(parser)
        add_quantization_arguments(parser)
        text = parser.add_argument_group("calibration, for int4 and for a budget")
        add_options(text, options_of(SampleSettings), defaults_of(SampleSettings))
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Export first where the folder isn't ONNX yet."""
        from optimum_comp.commands.arguments import given_options, quantization_settings
        from optimum_comp.options import options_of
        from optimum_comp.stages.quantize import QuantizeSettings, SampleSettings, quantize_folder
        from optimum_comp.utils import format_bytes

        args = self.args
        report = quantize_folder(
            args.model,
            args.output,
            settings=QuantizeSettings(**quantization_settings(args)),
            samples=SampleSettings(**given_options(args, options_of(SampleSettings))),
            exporter=args.exporter,
            overwrite=args.overwrite,
        )
        data = {**dataclasses.asdict(report), "output": str(args.output)}
        write_json(args.json, data)
        print(
            f"{args.output}: {report.recipe}, {format_bytes(report.size_bytes_before)} -> "
            f"{format_bytes(report.size_bytes)}"
        )
