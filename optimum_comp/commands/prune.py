"""`optimum-cli comp prune`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class PruneCommand(CompSubcommand):
    """Prune a model and save it as a plain transformers checkpoint."""

    COMMAND = CommandInfo(name="prune", help="Prune a model; writes a plain transformers checkpoint.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands.arguments import add_loading_arguments, add_memory_argument, add_pruning_arguments

        parser.add_argument("-m", "--model", help="Local folder or hub id; not needed with --resume.")
        add_pruning_arguments(parser)
        add_loading_arguments(parser)
        add_memory_argument(parser)
        parser.add_argument("--max-shard-size", default="5GB", help="Of the files in OUTPUT [5GB].")
        parser.add_argument("--overwrite", action="store_true", help="Replace a model that is in OUTPUT already.")
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on with the unfinished run in OUTPUT, if there is one; what isn't\n"
            "given is taken from it. The result is that of an undisturbed run.",
        )
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Check everything that can be checked, then prune."""
        from optimum_comp.commands.arguments import is_configured, loading_arguments, pruning_settings
        from optimum_comp.files import check_folder
        from optimum_comp.pruner import CompPruner
        from optimum_comp.report.run import CompReport
        from optimum_comp.stages.prune import Prune
        from optimum_comp.sweep.journal import find_run
        from optimum_comp.sweep.ranks import is_first_process

        args = self.args
        unfinished, is_complete = find_run(args.output) if args.resume else (None, False)
        stage = Prune.from_settings(**pruning_settings(args)).with_answers(0.0)
        model, device, loading = args.model, stage.running.device, loading_arguments(args)
        config = None if unfinished is not None and not is_configured(args) else stage.config
        if unfinished is not None:
            # What isn't given is as it was when the run began.
            model, loading = unfinished.opening(model, loading)
            device = device or unfinished.run["device"]
        elif model is None and is_complete:
            if is_first_process():
                there = CompReport.load(args.output)
                write_json(args.json, there.summary())
                print(there.headline(args.output))
            return
        if model is None:
            raise ValueError(f"--model is missing, and {args.output} holds no unfinished run to take it from.")
        if not args.resume and is_first_process():
            # `prune` looks too, but only after a model may have been downloaded.
            check_folder(args.output, overwrite=args.overwrite, sources=[model], in_place=True)
        pruner = CompPruner.from_pretrained(model, device=device, **loading)
        try:
            report = pruner.prune(
                config,
                stage.calibration,
                output=args.output,
                text_column=stage.running.text_column,
                batch_size=stage.running.batch_size,
                max_memory=args.max_memory,
                matmul_dtype=stage.running.matmul_dtype,
                max_shard_size=args.max_shard_size,
                overwrite=args.overwrite,
                resume=args.resume,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_what_remains(args.output)) from None
        if is_first_process():
            write_json(args.json, report.summary())
            print(report.headline(args.output))


def _what_remains(output: Path) -> Any:
    from optimum_comp.sweep.journal import Journal

    journal = Journal.find(output)
    return "" if journal is None else journal.hint()
