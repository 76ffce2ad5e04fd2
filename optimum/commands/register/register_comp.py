"""Adds `optimum-cli comp`. Optimum imports this file at every start, so it must stay light."""

from optimum_comp.commands.comp import CompCommand


REGISTER_COMMANDS = [CompCommand]
