"""`optimum-cli comp prune`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import (
    CompSubcommand,
    add_common_arguments,
    add_config_arguments,
    add_loading_arguments,
    config_from,
    loading_arguments,
    write_json,
)


class PruneCommand(CompSubcommand):
    """Prune a model and save it as a plain transformers checkpoint."""

    COMMAND = CommandInfo(name="prune", help="Prune a model; writes a plain transformers checkpoint.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", required=True, help="Local folder or hub id.")
        add_config_arguments(parser)
        add_loading_arguments(parser)
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Check everything that can be checked, then load, prune, save."""
        from optimum_comp.atomic import check_folder
        from optimum_comp.pruner import CompPruner

        args = self.args
        config = config_from(args)
        sources = [Path(args.model)] if Path(args.model).exists() else []
        check_folder(args.output, overwrite=args.overwrite, sources=sources)
        pruner = CompPruner.from_pretrained(args.model, **loading_arguments(args))
        report = pruner.prune(config, args.calibration, text_column=args.text_column, batch_size=args.batch_size)
        pruner.save_pretrained(args.output, overwrite=args.overwrite)
        write_json(args.json, report.summary())
        print(report.headline(args.output))
