"""What the subcommands of `optimum-cli comp` share."""

from __future__ import annotations

import logging
import signal
import sys
from abc import abstractmethod
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand


class CompSubcommand(BaseOptimumCLICommand):
    """Turns what a user can mend into one line, and applies `--quiet`."""

    def parse_args(self, parser: ArgumentParser) -> None:
        """Declare the options as soon as they are needed.

        Optimum makes every command's parser at every start, and what the options are made from takes seconds to
        import.
        """
        parse, tell = parser.parse_known_args, parser.format_help
        declared: list[bool] = []

        def declare() -> None:
            if not declared:
                declared.append(True)
                self.declare(parser)

        def parse_known_args(*args: Any, **kwargs: Any) -> Any:
            declare()
            return parse(*args, **kwargs)

        def format_help() -> str:
            declare()
            return tell()

        parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
        parser.format_help = format_help  # type: ignore[method-assign]

    @abstractmethod
    def declare(self, parser: ArgumentParser) -> None:
        """Add the command's options."""

    def run(self) -> None:
        """Run; exit with 1 and one line where the user's input is at fault, with 130 on Ctrl-C."""
        from optimum_comp.files import check_file

        _configure_logging(self.args.quiet)
        try:
            check_file(self.args.json)
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


def write_json(path: Path | None, data: Any) -> None:
    """Write `data` where `--json` points."""
    import json

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
