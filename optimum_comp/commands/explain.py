"""`optimum-cli comp explain`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


if TYPE_CHECKING:
    from optimum_comp.report.explain import Run

QUANTIZATION_RECORD = "ort_config.json"
_TAKES = "explain takes what comp prune (finished or not), vocabulary, distil, quantize or compress has written"


class ExplainCommand(CompSubcommand):
    """Say what was decided and why."""

    COMMAND = CommandInfo(name="explain", help="What was decided in a pruned or quantized folder, and why.")

    def declare(self, parser: ArgumentParser) -> None:
        """See `CompSubcommand`."""
        parser.add_argument(
            "--layer", type=int, metavar="N", help="Only this decoder layer, by its number in the dense model, from 0."
        )
        add_common_arguments(parser)
        parser.add_argument("output", type=Path, metavar="OUT", help="Folder of comp prune, compress or quantize.")

    def execute(self) -> None:
        """Print the explanation."""
        from optimum_comp.report.explain import explanation_text

        parts = explain(self.args.output, self.args.layer)
        write_json(self.args.json, parts)
        print(explanation_text(parts))


def explain(folder: Path, layer: int | None = None) -> dict[str, dict[str, Any]]:
    """Explain a folder, or the folders in it.

    Args:
        folder: a pruned or quantized model, an unfinished run, or what `compress` has made.
        layer: only this layer of the dense model, and only what pruning decided.

    Returns:
        Name of the folder -> what `explain_vocabulary`, `explain_pruning`, `explain_distillation` or
        `explain_quantization` says.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is nothing in it to explain, a file is damaged, or the dense model has no such layer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {_TAKES}.")
    own = _explain_one(folder, layer)
    if own is not None:
        return {folder.resolve().name: own}
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {path.name: each for path in inside if (each := _explain_one(path, layer)) is not None}
    if not found:
        what = "holds no pruning run, which --layer is of" if layer is not None else "holds nothing to explain"
        raise ValueError(f"{folder} {what}; {_TAKES}.")
    return found


def _explain_one(folder: Path, layer: int | None) -> dict[str, Any] | None:
    from optimum_comp.files import DISTILLATION, VOCABULARY
    from optimum_comp.report.explain import (
        explain_distillation,
        explain_pruning,
        explain_quantization,
        explain_vocabulary,
    )

    # What was done last; how it was pruned is said of the folder that it was made of, and with --layer.
    for name, told in ((VOCABULARY, explain_vocabulary), (DISTILLATION, explain_distillation)):
        if layer is not None or not (folder / name).is_file():
            continue
        try:
            return told(_read(folder / name))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name} is damaged ({type(error).__name__}: {error}).") from error
    run = _pruning_run(folder)
    if run is not None:
        return explain_pruning(run, layer)
    record = None if layer is not None else _quantization_record(folder)
    return None if record is None else explain_quantization(record)


def _pruning_run(folder: Path) -> Run | None:
    """What is recorded of a pruning run, if there was one.

    Raises:
        ValueError: a file is damaged; names it.
    """
    from optimum_comp.configuration import CompConfig
    from optimum_comp.files import JOURNAL
    from optimum_comp.report.explain import Run
    from optimum_comp.report.run import REPORT_NAME, CompReport
    from optimum_comp.sweep.journal import Journal

    places = [folder]
    if (folder / JOURNAL).is_file():
        journal = Journal.read(folder)
        if not journal.has_begun:
            return None
        if not journal.is_finishing:
            return Run.unfinished(journal.state, journal.reports())
        # The result is complete, and on its way from there.
        places = [journal.work / "final", folder]
    for name in (REPORT_NAME, CompConfig.CONFIG_NAME):
        if not any((place / name).is_file() for place in places):
            return None
    report, config = (
        _read(next(place / name for place in places if (place / name).is_file()))
        for name in (REPORT_NAME, CompConfig.CONFIG_NAME)
    )
    return Run.finished(CompReport.of(report), CompConfig(**config))


def _quantization_record(folder: Path) -> dict[str, Any] | None:
    """`ort_config.json`, if this package has written into it."""
    path = folder / QUANTIZATION_RECORD
    record = _read(path) if path.is_file() else {}
    return record if "comp_recipe" in record else None


def _read(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    return found
