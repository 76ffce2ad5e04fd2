"""`optimum-cli comp compress`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import (
    CompSubcommand,
    add_common_arguments,
    add_config_arguments,
    add_loading_arguments,
    add_quantization_arguments,
    config_from,
    loading_arguments,
    quantization_arguments,
    write_json,
)
from optimum_comp.commands.evaluate import add_measuring_arguments, settings_from


class CompressCommand(CompSubcommand):
    """Prune, export, quantize, measure, report."""

    COMMAND = CommandInfo(name="compress", help="The whole chain: prune, export, quantize, measure, report.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", required=True, help="Local folder or hub id.")
        add_config_arguments(parser)
        add_quantization_arguments(parser)
        bundle = parser.add_argument_group("for the phone")
        bundle.add_argument(
            "--bundle",
            type=Path,
            metavar="FOLDER",
            help="Write the quantized model there with all that ONNX Runtime and\n"
            "ONNX Runtime GenAI need, a manifest and code to start from.",
        )
        bundle.add_argument("--ort-format", action="store_true", help="With the model in ORT format, too.")
        add_measuring_arguments(parser)
        add_loading_arguments(parser)
        parser.add_argument("--overwrite", action="store_true", help="Replace an earlier result in OUTPUT.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Run the chain and print its table."""
        from optimum_comp.compress import compress, suits_equalization

        args = self.args
        config, quantization = config_from(args), quantization_arguments(args)
        if args.equalize is None and args.config is None:
            config.equalize = suits_equalization(quantization["recipe"], quantization["budget"])
        result = compress(
            args.model,
            args.output,
            config=config,
            calibration=args.calibration,
            text_column=args.text_column,
            batch_size=args.batch_size,
            max_memory=args.max_memory,
            matmul_dtype=args.matmul_dtype,
            settings=settings_from(args, args.text),
            bundle=args.bundle,
            ort_format=args.ort_format,
            overwrite=args.overwrite,
            **quantization,
            **loading_arguments(args),
        )
        write_json(args.json, result.to_dict())
        print(result.text())
