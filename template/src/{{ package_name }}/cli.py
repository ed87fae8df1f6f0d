"""The commands that this project adds to `kedro`."""

import click
from kedro.framework.cli.project import run

from .runtime.cli import mlflow

__all__ = ["cli", "run"]  # Kedro looks for `run` here when the project runs as a package


@click.group()
def cli() -> None:
    """Commands of this project."""


cli.add_command(mlflow)
