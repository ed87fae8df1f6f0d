"""Read the files of a project's configuration through Kedro, and find where a key stands in them.

What is in `mlflow.yml` is checked in `config.checking`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from kedro.config import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import _kedro
from .errors import ConfigError
from .uris import shown_uri

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext


def read_credentials(context: KedroContext) -> dict[str, str]:
    """Read the entry of credentials.yml that `server.credentials` names, as texts.

    Raises:
        ConfigError: When there is no such entry, or it is not one of names and plain values.
    """
    name = context.mlflow.server.credentials  # type: ignore[attr-defined]
    if name is None:
        return {}
    entries = all_credentials(context)
    if name not in entries:
        known = ", ".join(sorted(map(str, entries))) or "none"
        what = f"credentials.yml has no entry {name!r}; its entries: {known}"
        raise mistake(context, ("server", "credentials"), what)
    entry = entries[name]
    if not isinstance(entry, dict) or any(isinstance(v, dict | list) for v in entry.values()):
        what = f"the entry {name!r} has to be environment variables, NAME: value"
        raise mistake(context, ("server", "credentials"), what)
    return {str(key): _plain(value) for key, value in entry.items() if value is not None}


def all_credentials(context: KedroContext) -> dict[str, Any]:
    """Return every entry of credentials.yml; nothing where there is no such file."""
    try:
        return dict(context.config_loader["credentials"])
    except MissingConfigException:
        return {}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def mistake(context: KedroContext, key: tuple[str, ...], what: str) -> ConfigError:
    """Return the error for a key whose value only turned out to be wrong when it was used."""
    return Sources(context).mistake(key, what)


def package_name() -> str:
    """Return the name of the project's package, which this module is a part of."""
    return __name__.partition(".")[0]


class Sources:
    """The files that a project's `mlflow.yml` consists of: on disk, in an archive or a bucket."""

    def __init__(self, context: KedroContext) -> None:
        self._loader: Any = context.config_loader
        self._folder = _kedro.configuration_folder(self._loader)
        self._project = context.project_path

    def read(self) -> Any:
        """Merge and resolve the files as Kedro does; nothing where there are none.

        Raises:
            ConfigError: When a file is no YAML, or an interpolation can't be resolved.
            TypeError: When two files can't be merged, because one has the wrong type for a key.
        """
        if "mlflow" not in self._loader.config_patterns:
            raise ConfigError(
                "settings.py: CONFIG_LOADER_ARGS: config_patterns has no entry for mlflow.yml, "
                'expected "mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"].'
            )
        for file in self.files():
            self._check_syntax(file)
        try:
            return self._loader["mlflow"]
        except MissingConfigException:
            return {}
        except OmegaConfBaseException as error:
            raise self._interpolation_mistake(error) from error
        except ValueError as error:  # the same key in two files of an environment
            raise ConfigError(f"{self.where(())}: {error}") from error

    def files(self) -> list[str]:
        """Return the paths of the files, those of the run's environment first."""
        loader, (file_system, folder, _) = self._loader, self._folder
        ignores_hidden = getattr(loader, "ignore_hidden", True)  # Kedro 1.0 has no choice
        files = [
            file
            for env in (loader.env or loader.default_run_env, loader.base_env)
            for pattern in loader.config_patterns["mlflow"]
            for file in sorted(file_system.glob(f"{folder}/{env}/{pattern}"))
            if file.endswith((".yml", ".yaml"))
            and not (ignores_hidden and "/." in file.removeprefix(folder))
        ]
        return list(dict.fromkeys(files))

    def text(self, file: str) -> io.StringIO:
        """Return what is in a file."""
        return io.StringIO(self._folder.file_system.cat_file(file).decode("utf-8"))

    def place(self, key: tuple[int | str, ...]) -> tuple[str, int]:
        """Return the file and the line that give a key its value."""
        files = self.files()
        for file in files:
            if line := _line(yaml.compose(self.text(file)), key):
                return self._shown(file), line
        return (self._shown(files[0]) if files else "mlflow.yml"), 1

    def where(self, key: tuple[int | str, ...]) -> str:
        """Return the file and the line that give a key its value, as a text."""
        return "{}:{}".format(*self.place(key))

    def mistake(self, key: tuple[int | str, ...], what: str) -> ConfigError:
        """Return the error for a key, with its file and line."""
        return ConfigError(f"{self.where(key)}: {dotted(key)}: {what}")

    def _interpolation_mistake(self, error: Any) -> ConfigError:
        key = tuple(str(error.full_key or "").split("."))
        return self.mistake(key, str(error).splitlines()[0])

    def _check_syntax(self, file: str) -> None:
        shown = self._shown(file)
        try:
            top = yaml.compose(self.text(file))
            if top is None or isinstance(top, yaml.MappingNode):
                for key in OmegaConf.load(self.text(file)):  # refuses one that stands there twice
                    if not isinstance(key, str):
                        raise ConfigError(f"{shown}: {key!r}: expected a name")
        except OmegaConfBaseException as error:
            raise self._interpolation_mistake(error) from error
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ConfigError(f"{shown}{line}: {error.problem}") from error
        except (yaml.YAMLError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{shown}: {reason}") from error
        if not (top is None or isinstance(top, yaml.MappingNode)):
            raise ConfigError(f"{shown}:1: expected keys with values")

    def _shown(self, file: str) -> str:
        """Return the address of a file, or its path from the project's folder if it is in it."""
        _, folder, address = self._folder
        address = f"{address}{file.removeprefix(folder)}"
        if "://" in address:
            return shown_uri(address)
        path = Path(address)
        inside = path.is_relative_to(self._project)
        return (path.relative_to(self._project) if inside else path).as_posix()


def _line(node: yaml.Node | None, key: tuple[int | str, ...]) -> int | None:
    """Return the line of a key, counted from 1; None where the file doesn't have it."""
    line = None
    for part in key:
        if isinstance(node, yaml.MappingNode):
            entries = {name.value: (name, value) for name, value in node.value}
            if str(part) not in entries:
                return None
            name, node = entries[str(part)]
            line = name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break  # the value is an interpolation: its line is the key's
    return line


def dotted(key: tuple[int | str, ...]) -> str:
    """Return a key as it is written in sentences: `tracking.run.name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")
