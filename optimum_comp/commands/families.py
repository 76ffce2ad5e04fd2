"""`optimum-cli comp families`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_comp.commands.base import CompSubcommand, add_common_arguments, write_json


class FamiliesCommand(CompSubcommand):
    """List what can be pruned."""

    COMMAND = CommandInfo(name="families", help="Which model families are supported, and what of each can be pruned.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-m", "--model", help="Say it of this model alone: local folder or hub id.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the model.")
        add_common_arguments(parser)

    def execute(self) -> None:
        """Print a table, and the reasons for what is missing in it."""
        from optimum_comp.families import FAMILIES, family_of

        args = self.args
        if args.model is not None:
            from transformers import AutoConfig

            from optimum_comp.files import check_model

            check_model(args.model)
            trust = {"trust_remote_code": True} if args.trust_remote_code else {}
            config = AutoConfig.from_pretrained(args.model, **trust)
            rows = {config.model_type: prunable(family_of(config), config)}
        else:
            rows = {name: prunable(family, None) for name, family in sorted(FAMILIES.items())}
        write_json(args.json, rows)
        print(table(rows))


def prunable(family: Any, config: Any) -> dict[str, str]:
    """Axis -> `yes`, or why not.

    Args:
        family: the family.
        config: of one model; `None` for what holds for all of the family.
    """
    from optimum_comp.families import FFN, HEADS, KV, LAYERS

    return {what: family.refusal(what, config) or "yes" for what in (FFN, KV, HEADS, LAYERS)}


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown, reasons below."""
    columns = list(next(iter(rows.values())))
    reasons = sorted({why for row in rows.values() for why in row.values() if why != "yes"})
    lines = [f"| family | {' | '.join(columns)} |", f"| --- | {' | '.join([':---:'] * len(columns))} |"]
    for name, row in rows.items():
        cells = ["yes" if why == "yes" else f"no ({reasons.index(why) + 1})" for why in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"({number}) {why}" for number, why in enumerate(reasons, 1)]
    legend = (
        "ffn: neurons; kv: key-value groups with their query heads; heads: query heads within groups; layers: whole "
        "decoder layers."
    )
    return "\n".join([*lines, "", legend, *notes])
