"""`optimum-cli comp eval` and `optimum-cli comp bench`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class EvaluateCommand(CompSubcommand):
    """Measure one model."""

    COMMAND = CommandInfo(name="eval", help="Perplexity, speed and memory of a PyTorch or an ONNX folder.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_loading_arguments, add_measuring_arguments

        parser.add_argument("-m", "--model", required=True, help="PyTorch or ONNX folder, or hub id.")
        add_measuring_arguments(parser)
        add_loading_arguments(parser)
        add_common_arguments(parser)

    def execute(self) -> None:
        """Measure and print."""
        from optimum_comp.commands.arguments import loading_arguments, measuring_settings
        from optimum_comp.evaluation import Settings, evaluate
        from optimum_comp.report.table import evaluation_table

        args = self.args
        result = evaluate(args.model, Settings(**measuring_settings(args)), **loading_arguments(args))
        write_json(args.json, result.to_dict())
        print(evaluation_table({"model": result}))


class BenchCommand(CompSubcommand):
    """Compare the speed and memory of several models, each in a process of its own."""

    COMMAND = CommandInfo(name="bench", help="Speed, memory and perplexity of several folders side by side.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_measuring_arguments

        parser.add_argument("models", nargs="+", metavar="MODEL", help="PyTorch or ONNX folders, or hub ids.")
        add_measuring_arguments(parser, text=None)
        parser.add_argument(
            "--report",
            type=Path,
            metavar="FOLDER",
            help="Write report.html there, with plots of size and speed against perplexity.",
        )
        add_common_arguments(parser)

    def execute(self) -> None:
        """Measure one after the other and print."""
        from optimum_comp.commands.arguments import measuring_settings
        from optimum_comp.evaluation import Settings, evaluate_all
        from optimum_comp.files import check_file, check_model
        from optimum_comp.report.plots import require_matplotlib, write_report
        from optimum_comp.report.table import evaluation_table

        if self.args.report is not None:
            require_matplotlib()
            check_file(self.args.report / "report.html")
        settings = Settings(**{"text": None, **measuring_settings(self.args)})
        for model in self.args.models:
            check_model(model)
        results = dict(evaluate_all({model: model for model in self.args.models}, settings))
        write_json(self.args.json, [result.to_dict() for result in results.values()])
        print(evaluation_table(results))
        if self.args.report is not None:
            print(f"\n{write_report(results, self.args.report, 'Models side by side')}")
