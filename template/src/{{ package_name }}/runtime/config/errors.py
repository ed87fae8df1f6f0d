"""Errors that are mistakes in the configuration."""

from __future__ import annotations

import click

# The key of mlflow.yml that says where runs are.
ADDRESS = ("server", "mlflow_tracking_uri")


class ConfigError(click.ClickException):
    """Mistakes in the configuration, one sentence a line; `kedro` ends with exit status 1."""


class SettingError(Exception):
    """A setting that turns out to be wrong when it is used: its key, and what is right."""

    def __init__(self, key: tuple[str, ...], what: str) -> None:
        super().__init__(what)
        self.key = key
