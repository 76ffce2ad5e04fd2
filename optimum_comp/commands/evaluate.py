"""`optimum-cli comp eval` and `optimum-cli comp bench`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import (
    CompSubcommand,
    add_begin_argument,
    add_common_arguments,
    add_loading_arguments,
    loading_arguments,
    write_json,
)


def add_measuring_arguments(parser: ArgumentParser) -> None:
    """What is measured, for `eval` and `compress`."""
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--text",
        default="pydoc",
        metavar="FILE|DATASET",
        help="Text of which perplexity is measured; pydoc: Python's documentation [pydoc].",
    )
    group.add_argument("--window", type=int, default=512, help="Tokens of a window; windows don't overlap [512].")
    group.add_argument("--max-tokens", type=int, default=20480, help="Read at most so many tokens; 0: all [20480].")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="Ask this and print the greedy answer; can be given again."
    )
    add_speed_arguments(group)


def add_speed_arguments(group: Any) -> None:
    """How throughput is measured."""
    group.add_argument(
        "--prompt-tokens", type=int, default=128, help="Prompt length of the throughput; 0: none [128]."
    )
    group.add_argument(
        "--long-prompt-tokens", type=int, default=0, help="Length of a second, longer prompt; 0: none [0]."
    )
    group.add_argument("--new-tokens", type=int, default=32, help="Tokens that are decoded [32].")
    group.add_argument("--repeats", type=int, default=3, help="Throughput is the median of so many runs [3].")
    group.add_argument("--threads", type=int, help="Processor threads; the runtime's default if not given.")


def settings_from(args: Any, text: str | None) -> Any:
    """The `Settings` that the options describe."""
    from optimum_comp.evaluation import Settings

    return Settings(
        text=text,
        text_column=getattr(args, "text_column", None),
        window=getattr(args, "window", 512),
        max_tokens=getattr(args, "max_tokens", None) or None,
        begin=args.begin or "auto",
        prompts=getattr(args, "prompt", None) or (),
        new_tokens=args.new_tokens,
        prompt_tokens=args.prompt_tokens,
        long_prompt_tokens=args.long_prompt_tokens,
        repeats=args.repeats,
        threads=args.threads,
    )


class EvaluateCommand(CompSubcommand):
    """Measure one model."""

    COMMAND = CommandInfo(name="eval", help="Perplexity, speed and memory of a PyTorch or an ONNX folder.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", required=True, help="PyTorch or ONNX folder, or hub id.")
        add_measuring_arguments(parser)
        add_begin_argument(parser)
        parser.add_argument("--text-column", help="Column of the dataset that holds text [text].")
        add_loading_arguments(parser)
        add_common_arguments(parser)

    def execute(self) -> None:
        """Measure and print."""
        from optimum_comp.evaluation import evaluate
        from optimum_comp.report.table import evaluation_table

        args = self.args
        result = evaluate(args.model, settings_from(args, args.text), **loading_arguments(args))
        write_json(args.json, result.to_dict())
        print(evaluation_table({"model": result}))


class BenchCommand(CompSubcommand):
    """Compare the speed and memory of several models, each in a process of its own."""

    COMMAND = CommandInfo(name="bench", help="Speed, memory and perplexity of several folders side by side.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("models", nargs="+", metavar="MODEL", help="PyTorch or ONNX folders, or hub ids.")
        group = parser.add_argument_group("measuring")
        group.add_argument(
            "--text", metavar="FILE|DATASET", help="Measure perplexity on this, too; pydoc for a quick look."
        )
        group.add_argument("--max-tokens", type=int, default=20480, help="Read at most so many tokens of it [20480].")
        add_begin_argument(group)
        add_speed_arguments(group)
        group.add_argument(
            "--report",
            type=Path,
            metavar="FOLDER",
            help="Write report.html there, with plots of size and speed against perplexity.",
        )
        add_common_arguments(parser)

    def execute(self) -> None:
        """Measure one after the other and print."""
        from optimum_comp.evaluation import evaluate_all
        from optimum_comp.files import check_model
        from optimum_comp.report.plots import require_matplotlib, write_report
        from optimum_comp.report.table import evaluation_table

        if self.args.report is not None:
            require_matplotlib()
        settings = settings_from(self.args, self.args.text)
        for model in self.args.models:
            check_model(model)
        results = dict(evaluate_all({model: model for model in self.args.models}, settings))
        write_json(self.args.json, [result.to_dict() for result in results.values()])
        print(evaluation_table(results))
        if self.args.report is not None:
            print(f"\n{write_report(results, self.args.report, 'Models side by side')}")
