"""`optimum-cli comp`."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_comp.commands.compress import CompressCommand
from optimum_comp.commands.distil import DistilCommand
from optimum_comp.commands.evaluate import BenchCommand, EvaluateCommand
from optimum_comp.commands.explain import ExplainCommand
from optimum_comp.commands.families import FamiliesCommand
from optimum_comp.commands.frontier import FrontierCommand
from optimum_comp.commands.prune import PruneCommand
from optimum_comp.commands.quantize import QuantizeCommand
from optimum_comp.commands.vocabulary import VocabularyCommand


class CompCommand(BaseOptimumCLICommand):
    """Holds the subcommands."""

    COMMAND = CommandInfo(name="comp", help="Make language models small: COMP pruning, ONNX, int8.")
    SUBCOMMANDS = tuple(
        CommandInfo(command.COMMAND.name, command.COMMAND.help, subcommand_class=command)
        for command in (
            VocabularyCommand,
            PruneCommand,
            DistilCommand,
            QuantizeCommand,
            CompressCommand,
            FrontierCommand,
            EvaluateCommand,
            BenchCommand,
            ExplainCommand,
            FamiliesCommand,
        )
    )
