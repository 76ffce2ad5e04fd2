"""Options of the command line, made from the settings themselves."""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from optimum_comp.configuration import DEFAULTS, FIELDS, CompConfig
from optimum_comp.evaluation import Settings
from optimum_comp.options import Boolean, Option, Texts, defaults_of, options_of
from optimum_comp.stages.export import Export, ExportSettings
from optimum_comp.stages.prune import Prune, Running
from optimum_comp.stages.quantize import QuantizeSettings
from optimum_comp.stages.recipe import LOADING


_HELP_WIDTH = 76


def add_options(
    parser: Any,
    known: Mapping[str, Option],
    defaults: Mapping[str, Any],
    without: Container[str] = (),
    prefix: str = "",
) -> None:
    """One option of the command line for each setting; what isn't given is `None`.

    Args:
        parser: a parser, or a group of one.
        known: the settings.
        defaults: what they are if nothing is given.
        without: settings that the command line leaves out.
        prefix: in front of each name, where two stages have settings of one name.
    """
    for name, each in known.items():
        if name in without:
            continue
        flag = each.flag or f"--{prefix}{name}".replace("_", "-")
        text = "\n".join(textwrap.wrap(each.described(defaults[name]), _HELP_WIDTH)).replace("%", "%%")
        more: dict[str, Any]
        if isinstance(each.kind, Boolean):
            more = {"action": BooleanOptionalAction}
        else:
            more = {"type": each.kind.parse, "metavar": each.metavar}
            if isinstance(each.kind, Texts):
                more["action"] = "append"
        parser.add_argument(flag, dest=f"{prefix}{name}", default=None, help=text, **more)


def given_options(args: Any, known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Settings that the command line gives."""
    found = {name: getattr(args, f"{prefix}{name}", None) for name in known}
    return {name: value for name, value in found.items() if value is not None}


def add_loading_arguments(parser: ArgumentParser) -> None:
    """How `--model` is loaded."""
    group = parser.add_argument_group("loading the model")
    add_options(group, LOADING, dict.fromkeys(LOADING))
    group.add_argument(
        "--trust-remote-code", action="store_true", help="Run code that comes with the model. Off by default."
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="Read weights that only come as a pickle. Off by default."
    )


def loading_arguments(args: Any) -> dict[str, Any]:
    """The loading options that were given, under the names of `from_pretrained`."""
    known = {name: LOADING[name].check(name, value) for name, value in given_options(args, LOADING).items()}
    if args.trust_remote_code:
        known["trust_remote_code"] = True
    if args.allow_pickle:
        known["use_safetensors"] = False
    return known


def add_pruning_arguments(parser: ArgumentParser, without: Container[str] = ()) -> None:
    """One option for each setting of pruning; an option that isn't given keeps the preset's value."""
    group = parser.add_argument_group("pruning")
    group.add_argument("--config", metavar="FOLDER", help="Folder or hub id with a comp_config.json to start from.")
    add_options(group, Prune.options(), {**DEFAULTS, **defaults_of(Running), "preset": None}, without)


def add_memory_argument(parser: ArgumentParser) -> None:
    """`--max-memory`."""
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="What the process may take in all, like 4GB; past it, smaller batches\n"
        "and files are used [what is free].",
    )


def pruning_settings(args: Any) -> dict[str, Any]:
    """Settings of `Prune` that the options describe: those that were given, over those of `--config`.

    Raises:
        ValueError: `--preset` and `--config` exclude each other.
    """
    given = given_options(args, Prune.options())
    if args.config is None:
        return given
    if "preset" in given:
        raise ValueError("--preset and --config exclude each other.")
    return {**CompConfig.from_pretrained(args.config).fields(), **given}


def is_configured(args: Any) -> bool:
    """Whether any option that makes up the `CompConfig` is given."""
    return args.config is not None or bool(given_options(args, (*FIELDS, "preset")))


def add_export_arguments(parser: ArgumentParser) -> None:
    """What makes the graph; with which tolerance it is kept is for recipes to say."""
    group = parser.add_argument_group("export")
    add_options(group, Export.options(), defaults_of(ExportSettings), without={"tolerance"})


def add_quantization_arguments(parser: ArgumentParser) -> None:
    """What the weights become."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--weights", choices=("int8", "int4"), help="Bits of the weights, in place of --recipe [int8].")
    add_options(group, options_of(QuantizeSettings), defaults_of(QuantizeSettings))


def quantization_settings(args: Any) -> dict[str, Any]:
    """Settings of `QuantizeSettings` that the options describe.

    Raises:
        ValueError: two ways to choose the precisions.
    """
    given = given_options(args, options_of(QuantizeSettings))
    is_budget = "max_perplexity_increase" in given or "max_size" in given
    if is_budget and "recipe" in given:
        raise ValueError("--recipe and a budget exclude each other: a budget chooses the precisions itself.")
    if args.weights is not None:
        given.setdefault("recipe", args.weights)
    return given


def add_measuring_arguments(
    parser: ArgumentParser, without: Iterable[str] = (), group: Any = None, **defaults: Any
) -> None:
    """What is measured.

    Args:
        parser: the parser.
        without: settings that the command leaves out.
        group: where to; one of its own if `None`.
        defaults: of the command, where they aren't those of `Settings`.
    """
    group = group or parser.add_argument_group("measuring")
    taken = {"begins_with", *without, *(action.dest for action in parser._actions)}
    add_options(group, options_of(Settings), {**defaults_of(Settings), **defaults}, without=taken)


def measuring_settings(args: Any) -> dict[str, Any]:
    """Settings of `Settings` that the options describe."""
    return given_options(args, options_of(Settings))


def output_behind_texts(args: Namespace) -> Path:
    """The output folder of a command whose `--text` takes several files: right behind them, it is taken for one more.

    Raises:
        ValueError: there is none.
    """
    if args.output is None and args.text is not None and len(args.text) > 1:
        args.output = Path(args.text.pop())
    if args.output is None:
        raise ValueError("OUTPUT is missing: say which folder to make.")
    output: Path = args.output
    return output
