"""The extras of a project: what each brings, and how to get one that isn't there.

An extra is a folder of the runtime. Nothing of the core imports one: they are named here only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from .config.errors import ConfigError, SettingError


@dataclass(frozen=True)
class Extra:
    """The parts of an extra.

    Commands of `kedro mlflow` and public names, by their modules; a hook of `HOOKS` in settings.py;
    and values of keys in mlflow.yml that this hook heeds.
    """

    commands: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    hook: str = ""
    values: Mapping[tuple[str, ...], str] = field(default_factory=dict)


EXTRAS = {
    "console": Extra(commands={"doctor": "command", "runs": "command"}),
    "offline": Extra(
        commands={"sync": "command"},
        names={"OfflineHook": "hook"},
        hook="OfflineHook",
        values={("tracking", "on_unreachable"): "offline"},
    ),
    "serving": Extra(
        commands={"modelify": "command"},
        names={
            "KedroPipelineModel": "pipeline_model",
            "ServingHook": "hook",
            "pipeline_ml_factory": "pipeline_ml",
        },
        hook="ServingHook",
    ),
}


class MissingExtraError(click.ClickException, ImportError):
    """A command or a name comes with an extra that this project doesn't have."""


def present() -> list[str]:
    """Return the extras that this project has."""
    # Not its folder: Python may have left its bytecode there.
    runtime = Path(__file__).parent
    return [name for name in EXTRAS if (runtime / name / "__init__.py").is_file()]


def load(extra: str, module: str, asked_for: str) -> Any:
    """Import a module of an extra.

    Args:
        extra: Its name.
        module: The name of the module in it.
        asked_for: What is asked for, to be named where the extra isn't there.

    Raises:
        MissingExtraError: When the project doesn't have the extra.
    """
    if extra not in present():
        raise MissingExtraError(hint(extra, asked_for))
    return import_module(f"{__package__}.{extra}.{module}")


def hint(extra: str, asked_for: str) -> str:
    """Return the sentence on how to get an extra."""
    extras = ", ".join(sorted([*present(), extra]))
    command = f"uvx copier update --vcs-ref :current: --defaults --data extras='[{extras}]'"
    return f"{asked_for} comes with the extra `{extra}`: `{command}`"


def check_hooks(config: Any, pipeline: Any, hooks: Iterable[object]) -> None:
    """Check that the extras which mlflow.yml and the pipeline ask for are there, with their hooks.

    A pipeline names its hook in the attribute `needed_hook`.

    Raises:
        SettingError: When that of mlflow.yml isn't there, saying how to get it.
        ConfigError: When that of the pipeline isn't there.
    """
    classes = [type(hook).__name__ for hook in hooks]
    for name, extra in EXTRAS.items():
        for key, value in extra.values.items():
            if reduce(getattr, key, config) == value and extra.hook not in classes:
                if name not in present():
                    raise SettingError(key, hint(name, value))
                what = f"{value} needs the hook of an extra: add {extra.hook}() to HOOKS"
                raise SettingError(key, f"{what} in settings.py")
    needed = getattr(pipeline, "needed_hook", None)
    if needed and needed not in classes:
        raise ConfigError(
            f"settings.py: HOOKS: expected {needed}() beside MlflowHook(), because this pipeline "
            f"is a {type(pipeline).__name__}, got {', '.join(classes)}"
        )


def public_names() -> dict[str, str]:
    """Return the public names of the extras that are there, each with its module."""
    return {
        name: f"{extra}.{module}"
        for extra in present()
        for name, module in EXTRAS[extra].names.items()
    }


def owner_of_name(name: str) -> str | None:
    """Return the extra that a public name comes with."""
    return next((extra for extra in EXTRAS if name in EXTRAS[extra].names), None)


def owner_of_command(name: str) -> str | None:
    """Return the extra that a command comes with."""
    return next((extra for extra in EXTRAS if name in EXTRAS[extra].commands), None)
