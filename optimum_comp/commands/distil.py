"""`optimum-cli comp distil`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class DistilCommand(CompSubcommand):
    """Train a pruned model on the predictions of the model that it was made from."""

    COMMAND = CommandInfo(name="distil", help="Train a pruned model on the dense model's predictions.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_memory_argument, add_options
        from optimum_comp.distillation.settings import DistilSettings
        from optimum_comp.options import defaults_of, options_of

        parser.add_argument("-m", "--model", required=True, help="The pruned model: a local folder or hub id.")
        parser.add_argument("--teacher", required=True, help="The dense model: a local folder or hub id.")
        known = options_of(DistilSettings)
        parser.add_argument(
            "--text",
            nargs="+",
            action="extend",
            metavar="FILE|DATASET|self",
            help="Text to train on, which needs no labels: text, JSONL, CSV or Parquet files,\n"
            "datasets as name[:config[:split]], pydoc, or self: text that the teacher\n"
            "writes; each with :SHARE if need be [self pydoc].",
        )
        add_options(parser, known, defaults_of(DistilSettings), without={"text"})
        add_memory_argument(parser)
        parser.add_argument("--gguf-file", metavar="FILE", help="Name of a GGUF file in the teacher's folder.")
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="Run code that comes with the teacher. Off by default."
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on after the last checkpoint of an unfinished run, which lies beside OUTPUT.",
        )
        add_common_arguments(parser)
        parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Distil, and print what was achieved."""
        from optimum_comp.commands.arguments import given_options, output_behind_texts
        from optimum_comp.distillation.run import distil
        from optimum_comp.distillation.settings import DistilSettings
        from optimum_comp.options import options_of, parse_bytes

        args = self.args
        output = output_behind_texts(args)
        loading = given_options(args, ("gguf_file",))
        if args.trust_remote_code:
            loading["trust_remote_code"] = True
        found = distil(
            args.model,
            args.teacher,
            output,
            DistilSettings(**given_options(args, options_of(DistilSettings))),
            teacher_arguments=loading,
            max_memory=None if args.max_memory is None else parse_bytes(args.max_memory),
            overwrite=args.overwrite,
            resume=args.resume,
        )
        write_json(args.json, found.to_dict())
        print(found.headline())
