"""Groups whose commands are imported when they are named: --help and a typing error are instant."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import typer

from mlx_redrafter.cli import net
from mlx_redrafter.cli.flat_options import flat_options
from mlx_redrafter.cli.help_page import Row


class Entry(NamedTuple):
    """What --help of the group says of a command, and where it is if not in a file of its name."""

    section: str
    help: str
    module: str | None = None


class Group(net.Commands):
    """Commands of a package, each a ``command`` in its module: a function, or a Typer group."""

    package: ClassVar[str]
    table: ClassVar[Mapping[str, Entry]]  # as --help lists them

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self.commands.get(cmd_name) is None and cmd_name in self.table:
            place = self.table[cmd_name].module or cmd_name
            module = importlib.import_module(f"{self.package}.{place}")
            self.commands[cmd_name] = _built(cmd_name, module.command)
        return self.commands.get(cmd_name)

    def rows(self, ctx: Any) -> dict[str, list[Row]]:
        sections: dict[str, list[Row]] = {}
        for name, entry in self.table.items():
            sections.setdefault(entry.section, []).append((name, entry.help))
        return sections


def _built(name: str, command: Any) -> Any:
    if not isinstance(command, typer.Typer):
        app = typer.Typer(add_completion=False)
        settings = getattr(command, "context_settings", None)
        app.command(name, cls=net.Command, context_settings=settings)(flat_options(command))
        command = app
    built = typer.main.get_command(command)
    built.name = name
    return built
