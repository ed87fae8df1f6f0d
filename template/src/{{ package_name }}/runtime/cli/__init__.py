"""`kedro mlflow …`: the commands that go with tracking, each imported when it is used."""

from __future__ import annotations

import click
from kedro.framework.cli.utils import LazyGroup

from ..extras import EXTRAS, MissingExtraError, hint, owner_of_command, present

_RUNTIME = __name__.rpartition(".")[0]

# Each command with its import path.
_COMMANDS = {
    "init": f"{__name__}.configuration.init",
    "ui": f"{__name__}.pages.ui",
    **{
        command: f"{_RUNTIME}.{extra}.{module}.{command}"
        for extra in present()
        for command, module in EXTRAS[extra].commands.items()
    },
}


class _Commands(LazyGroup):
    """A group that says how to get a command of an extra that isn't there."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command | None = super().get_command(ctx, cmd_name)
        if command is None and (extra := owner_of_command(cmd_name)):
            raise MissingExtraError(hint(extra, f"`kedro mlflow {cmd_name}`"))
        return command


@click.group(name="mlflow", cls=_Commands, lazy_subcommands=_COMMANDS)
def mlflow() -> None:
    """Look at the runs of this project."""
