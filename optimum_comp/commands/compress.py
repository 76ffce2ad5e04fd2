"""`optimum-cli comp compress`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class CompressCommand(CompSubcommand):
    """Prune, export, quantize, measure, report."""

    COMMAND = CommandInfo(name="compress", help="The whole chain: prune, export, quantize, measure, bundle.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        from optimum_comp.commands import arguments
        from optimum_comp.distillation.settings import DistilSettings
        from optimum_comp.frontier import FrontierSettings
        from optimum_comp.options import defaults_of, options_of
        from optimum_comp.stages.distil import Distil
        from optimum_comp.stages.quantize import QuantizeSettings
        from optimum_comp.stages.recipe import shipped
        from optimum_comp.stages.vocabulary import Vocabulary
        from optimum_comp.vocabulary.settings import VocabularySettings

        parser.add_argument("-m", "--model", help="Local folder or hub id; not needed if the recipe names it.")
        parser.add_argument(
            "--recipe",
            metavar="NAME|FILE",
            help="What to do, as a YAML file or by name: "
            + ", ".join(shipped())
            + ";\nother options change it [that of --weights].",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on with what is in OUTPUT, by the recipe that lies there; other options\nchange it.",
        )
        group = parser.add_argument_group("vocabulary")
        group.add_argument(
            "--vocabulary",
            dest="vocabulary_scripts",
            type=options_of(VocabularySettings)["scripts"].kind.parse,
            metavar="SCRIPT,...",
            help="Keep only tokens of these scripts, like ascii or latin,cyrillic, before anything\n"
            "else is done (see comp vocabulary --help).",
        )
        known, defaults = Vocabulary.options(), defaults_of(VocabularySettings)
        arguments.add_options(group, known, defaults, without={"scripts"}, prefix="vocabulary_")
        arguments.add_pruning_arguments(parser)
        group = parser.add_argument_group("distillation")
        group.add_argument(
            "--distil",
            action=BooleanOptionalAction,
            help="Train the pruned model on the dense one's predictions, without labels, before\nit is exported. "
            "--no-distil is for a search: without training.",
        )
        defaults = {"teacher": None, **defaults_of(DistilSettings)}
        arguments.add_options(group, Distil.options(), defaults, without={"teacher"}, prefix="distil_")
        arguments.add_export_arguments(parser)
        group = parser.add_argument_group("quantization")
        group.add_argument("--weights", choices=("int8", "int4"), help="Bits of the weights [int8].")
        quantizing, defaults = options_of(QuantizeSettings), defaults_of(QuantizeSettings)
        arguments.add_options(group, quantizing, defaults, without={"recipe"})
        group = parser.add_argument_group(
            "search over all levers",
            "A budget (--max-size, --max-perplexity-increase, --min-speedup) with nothing said of\n"
            "how to keep it (--recipe, --weights, --sparsity, --preset, --config, --distil,\n"
            "--bundle) is searched for as comp frontier does, and the best is chosen; with\n"
            "--vocabulary with fewer tokens, too, with --distil-time training each so long.\n"
            "Otherwise it is the quantization's, relative to the model that is quantized.",
        )
        known, defaults = options_of(FrontierSettings), defaults_of(FrontierSettings)
        arguments.add_options(group, known, defaults, without=set(known) - {"sparsities", "min_speedup", "time"})
        measured = parser.add_argument_group("measuring")
        text = dataclasses.replace(known["text"], help=f"{known['text'].help} A chain is measured on one.")
        arguments.add_options(measured, {"text": text}, defaults)
        bundle = parser.add_argument_group("for the phone")
        bundle.add_argument(
            "--bundle",
            type=Path,
            metavar="FOLDER",
            help="Write the quantized model there with all that ONNX Runtime and\n"
            "ONNX Runtime GenAI need, a manifest and code to start from\n"
            "[a recipe with a bundle: OUTPUT/bundle].",
        )
        bundle.add_argument("--ort-format", action="store_true", help="With the model in ORT format, too.")
        arguments.add_measuring_arguments(parser, group=measured)
        parser.add_argument("--no-measure", action="store_true", help="Measure nothing.")
        arguments.add_loading_arguments(parser)
        arguments.add_memory_argument(parser)
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace, stage by stage, what was made otherwise in OUTPUT."
        )
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Output folder.")

    def execute(self) -> None:
        """Run the chain and print its table, or search for what keeps a budget."""
        from optimum_comp.commands.arguments import loading_arguments
        from optimum_comp.commands.frontier import require_chosen, search
        from optimum_comp.compress import run
        from optimum_comp.stages.recipe import LOADING

        args = self.args
        searched = self._searched()
        if searched is not None:
            require_chosen(search(args, searched))
            return
        loading = loading_arguments(args)
        result = run(
            self._recipe({name: value for name, value in loading.items() if name in LOADING}),
            args.output,
            loading={name: value for name, value in loading.items() if name not in LOADING},
            bundle=args.bundle,
            max_memory=args.max_memory,
            overwrite=args.overwrite,
        )
        write_json(args.json, result.to_dict())
        print(result.text())

    def _searched(self) -> Any:
        """What is to be searched for; `None` if it is said how to do it.

        Raises:
            ValueError: a search is asked for, and how to do it is said, too; or what only a search can do.
        """
        from optimum_comp.commands.arguments import given_options
        from optimum_comp.frontier import FrontierSettings
        from optimum_comp.stages.distil import Distil
        from optimum_comp.stages.vocabulary import Vocabulary

        args = self.args
        asked = given_options(args, ("max_size", "max_perplexity_increase", "min_speedup", "sparsities", "time"))
        names = ("recipe", "resume", "weights", "sparsity", "preset", "config", "distil", "bundle", "ort_format")
        said = [f"--{name}".replace("_", "-") for name in names if getattr(args, name)]
        more = {"vocabulary": args.vocabulary_scripts, "distil_time": args.distil_time, "distil": args.distil}
        for prefix, options in (("distil_", Distil.options()), ("vocabulary_", Vocabulary.options())):
            given = given_options(args, set(options) - {"time", "scripts"}, prefix=prefix)
            said += [f"--{prefix}{name}".replace("_", "-") for name in sorted(given)]
        if asked and not said:
            if args.model is None:
                raise ValueError("give the model (--model).")
            if args.no_measure:
                raise ValueError("a budget is searched for by measuring: leave --no-measure away.")
            asked |= {name: value for name, value in more.items() if value is not None}
            return FrontierSettings(**asked, **given_options(args, ("text",)))
        if args.distil is False:
            raise ValueError(
                "--no-distil is for a search over all levers, and this isn't one; choose a recipe that doesn't distil."
            )
        only = [name for name in asked if name in ("min_speedup", "sparsities", "time")]
        if only:
            raise ValueError(
                f"{', '.join(only)} asks for a search over all levers, and {', '.join(said)} says how to do it; leave "
                "one of them away."
            )
        return None

    def _measured_text(self) -> dict[str, str]:
        """The text that a chain is measured on.

        Raises:
            ValueError: there are several.
        """
        texts = self.args.text or []
        if len(texts) > 1:
            raise ValueError(
                f"--text is given {len(texts)} times ({', '.join(texts)}), and a chain is measured on one; several "
                "are for a search (--max-size, --min-speedup, --max-perplexity-increase, with nothing said of how to "
                "keep it), or for comp eval, one after the other."
            )
        return {"text": texts[0]} if texts else {}

    def _recipe(self, loading: dict[str, Any]) -> Any:
        """The recipe with what the options change in it.

        Raises:
            ValueError: there is no such recipe, or it has no stage for an option.
        """
        from optimum_comp.commands.arguments import given_options, measuring_settings, pruning_settings
        from optimum_comp.files import RECIPE
        from optimum_comp.options import options_of
        from optimum_comp.stages.distil import Distil
        from optimum_comp.stages.export import Export
        from optimum_comp.stages.quantize import QuantizeSettings, SampleSettings
        from optimum_comp.stages.recipe import Recipe, find
        from optimum_comp.stages.vocabulary import Vocabulary

        args = self.args
        if args.resume and args.recipe is not None:
            raise ValueError("--resume takes the recipe that lies in OUTPUT; leave --recipe away.")
        if args.recipe is not None and args.weights is not None:
            raise ValueError("--recipe and --weights exclude each other.")
        if args.resume and not (args.output / RECIPE).is_file():
            raise ValueError(f"{args.output} holds nothing to go on with: it has no {RECIPE}.")
        recipe = (
            Recipe.read(args.output / RECIPE)
            if args.resume
            else find(args.weights or "int8" if args.recipe is None else args.recipe)
        )
        quantize = given_options(args, set(options_of(QuantizeSettings)) - {"recipe"})
        if args.weights is not None:
            quantize["recipe"] = args.weights
        prune = pruning_settings(args)
        if recipe.stage("prune") is None:
            # Then quantization makes its own samples.
            quantize |= {name: prune.pop(name) for name in options_of(SampleSettings) if name in prune}
        export = given_options(args, Export.options())
        stages: dict[str, dict[str, Any]] = {"prune": prune, "export": export, "quantize": quantize}
        for stage, settings in stages.items():
            if settings and recipe.stage(stage) is None:
                raise ValueError(
                    f"the recipe has no {stage}, which {', '.join(settings)} would be for; choose another recipe."
                )
        distil = given_options(args, Distil.options(), prefix="distil_")
        if {"time", "steps"} & distil.keys():
            # One takes the place of the other, which the recipe may have.
            distil = {"time": None, "steps": None, **distil}
        if args.distil or distil:
            stages["distil"] = distil
        vocabulary = given_options(args, Vocabulary.options(), prefix="vocabulary_")
        if vocabulary:
            stages["vocabulary"] = vocabulary
        if args.bundle is not None or args.ort_format:
            stages["bundle"] = {"ort_format": True} if args.ort_format else {}
        changes: dict[str, Any] = {
            "stages": {
                name: settings for name, settings in stages.items() if settings or name in ("bundle", "distil")
            },
            "measure": False if args.no_measure else {**measuring_settings(args), **self._measured_text()},
            "loading": loading,
        }
        if args.model is not None:
            changes["model"] = args.model
        return recipe.changed(changes)
