"""`optimum-cli comp frontier`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class FrontierCommand(CompSubcommand):
    """Try every lever, and choose by a budget."""

    COMMAND = CommandInfo(
        name="frontier", help="Size, speed and quality of every way to make a model small; the best for a budget."
    )

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands import arguments
        from optimum_comp.frontier import FrontierSettings
        from optimum_comp.options import defaults_of, options_of
        from optimum_comp.stages.quantize import QuantizeSettings

        parser.add_argument("-m", "--model", required=True, help="Local folder or hub id.")
        arguments.add_options(parser, options_of(FrontierSettings), defaults_of(FrontierSettings))
        parser.add_argument(
            "--report", type=Path, metavar="FOLDER", help="Write report.html there, with plots of size and speed."
        )
        arguments.add_pruning_arguments(parser, without={"sparsity"})
        arguments.add_export_arguments(parser)
        group = parser.add_argument_group("quantization")
        quantizing = {name: each for name, each in options_of(QuantizeSettings).items() if name == "target"}
        arguments.add_options(group, quantizing, defaults_of(QuantizeSettings))
        arguments.add_measuring_arguments(parser, without={"prompts"})
        arguments.add_loading_arguments(parser)
        arguments.add_memory_argument(parser)
        parser.add_argument("--overwrite", action="store_true", help="Replace what was made otherwise in OUTPUT.")
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Try, and print the table; a budget that nothing keeps to is an error, with what comes nearest."""
        from optimum_comp.commands.arguments import given_options
        from optimum_comp.files import check_file
        from optimum_comp.frontier import FrontierSettings
        from optimum_comp.options import options_of
        from optimum_comp.report.plots import require_matplotlib, write_report

        args = self.args
        if args.report is not None:
            require_matplotlib()
            check_file(args.report / "report.html")
        found = search(args, FrontierSettings(**given_options(args, options_of(FrontierSettings))))
        if args.report is not None:
            results = {point.candidate.name: point.evaluations[0] for point in found.points}
            print(f"\n{write_report(results, args.report, f'{Path(args.model).name}: what each lever is worth')}")
        require_chosen(found)


def search(args: Any, settings: Any) -> Any:
    """Make and measure what is to be tried, and print the table.

    Args:
        args: of a command that has the options of pruning, export, measuring, loading and memory.
        settings: `FrontierSettings`.

    Returns:
        A `Frontier`.
    """
    from optimum_comp.commands.arguments import given_options, loading_arguments, pruning_settings
    from optimum_comp.evaluation import Settings
    from optimum_comp.frontier import find_frontier
    from optimum_comp.options import options_of, parse_bytes
    from optimum_comp.stages.prune import Prune

    pruning = pruning_settings(args)
    prune = Prune.from_settings(**pruning)
    measuring = given_options(args, set(options_of(Settings)) - {"text", "begin"})
    found = find_frontier(
        args.model,
        args.output,
        settings,
        config=prune.config,
        running=prune.running,
        target=args.target or "any",
        exporter=args.exporter or "auto",
        measuring=Settings(**measuring),
        max_memory=None if args.max_memory is None else parse_bytes(args.max_memory),
        overwrite=args.overwrite,
        **loading_arguments(args),
    )
    write_json(args.json, found.to_dict())
    print(found.text())
    return found


def require_chosen(found: Any) -> None:
    """Make an error of a budget that nothing keeps to.

    Raises:
        ValueError: so it is.
    """
    if found.settings.has_budget and found.chosen is None:
        raise ValueError("the budget isn't kept by anything that was made; all of it is kept.")
