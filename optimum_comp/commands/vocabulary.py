"""`optimum-cli comp vocabulary`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class VocabularyCommand(CompSubcommand):
    """Keep only the tokens that some scripts, or a text, need."""

    COMMAND = CommandInfo(name="vocabulary", help="Keep only the tokens that some scripts, or a text, need.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_options
        from optimum_comp.options import defaults_of, options_of
        from optimum_comp.stages.recipe import LOADING
        from optimum_comp.vocabulary.settings import VocabularySettings

        parser.add_argument("-m", "--model", required=True, help="Local folder or hub id.")
        known = options_of(VocabularySettings)
        add_options(parser, known, defaults_of(VocabularySettings), without={"text"})
        parser.add_argument(
            "--text",
            nargs="+",
            action="extend",
            metavar="FILE|DATASET",
            help="Keep every token that this text has: text, JSONL, CSV or Parquet files, datasets as\n"
            "name[:config[:split]], or pydoc. With --max-tokens, it says which are frequent.",
        )
        group = parser.add_argument_group("loading the model")
        add_options(group, LOADING, dict.fromkeys(LOADING), without={"dtype", "gguf_file"})
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        add_common_arguments(parser)
        parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Write the model, and print what went."""
        from optimum_comp.commands.arguments import given_options, output_behind_texts
        from optimum_comp.options import options_of
        from optimum_comp.stages.recipe import LOADING
        from optimum_comp.vocabulary.run import shrink_vocabulary
        from optimum_comp.vocabulary.settings import VocabularySettings

        args = self.args
        output = output_behind_texts(args)
        found = shrink_vocabulary(
            args.model,
            output,
            VocabularySettings(**given_options(args, options_of(VocabularySettings))),
            loading=given_options(args, LOADING),
            overwrite=args.overwrite,
        )
        write_json(args.json, found.to_dict())
        print(found.headline())
