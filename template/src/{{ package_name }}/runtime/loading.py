"""Read `mlflow.yml` of a context: through Kedro's config loader, checked, with whole URIs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points, version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import yaml
from pydantic import BaseModel, ValidationError

from . import credentials
from .config import MlflowConfig

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

# Names the tracking URI that a notebook's environment has from a project, not from its user.
ANNOUNCED = "KEDRO_MLFLOW_ANNOUNCED_URI"

_Model = TypeVar("_Model", bound=BaseModel)

_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:)[^?]+)")

_EXPECTED = {
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "int_type": "expected a whole number",
    "list_type": "expected a list",
    "dict_type": "expected keys with values",
    "model_type": "expected keys with values",
}


class ConfigError(click.ClickException):
    """Mistakes in the configuration, one sentence a line; `kedro` ends with exit status 1."""


def load_config(context: KedroContext) -> MlflowConfig:
    """Read `mlflow.yml` of the context's environment, with every URI and name made complete.

    Without the file the defaults hold: the embedded store `mlflow.db` in the project's folder,
    and the package's name as the experiment's.

    Raises:
        ConfigError: With one line for each mistake, when the file has any.
    """
    sources = _Sources(context)
    config = sources.check(sources.read())
    assert config, "a mistake would have been raised"
    project = context.project_path

    tracking_uri = anchor_uri(
        config.server.mlflow_tracking_uri or uri_of_environment() or "sqlite:///mlflow.db",
        project,
    )
    registry_uri = anchor_uri(config.server.mlflow_registry_uri or tracking_uri, project)
    for key, uri, plugins in (
        ("mlflow_tracking_uri", tracking_uri, "mlflow.tracking_store"),
        ("mlflow_registry_uri", registry_uri, "mlflow.model_registry_store"),
    ):
        if not _has_store(uri, plugins):
            raise ConfigError(
                f"{sources.where(('server', key))}: server.{key}: expected a path, a database or "
                f"an address with http:// or https://, got {shown_uri(uri)!r}"
            )
        if uri.startswith("file:") and not _takes_file_store():
            raise ConfigError(
                f"{sources.where(('server', key))}: server.{key}: MLflow no longer keeps runs in "
                f"a folder, got {uri!r}. Write sqlite:///mlflow.db, or set the environment "
                "variable MLFLOW_ALLOW_FILE_STORE=true."
            )
    experiment = config.tracking.experiment
    location = experiment.create_experiment_kwargs.artifact_location or _artifact_folder(
        tracking_uri
    )
    server = _changed(
        config.server, mlflow_tracking_uri=tracking_uri, mlflow_registry_uri=registry_uri
    )
    experiment = _changed(
        experiment,
        name=experiment.name or package_name(),
        create_experiment_kwargs=_changed(
            experiment.create_experiment_kwargs,
            artifact_location=location and anchor_uri(location, project),
        ),
    )
    experiment.set_server(server)
    return _changed(
        config, server=server, tracking=_changed(config.tracking, experiment=experiment)
    )


def uri_of_environment() -> str | None:
    """Give the tracking URI that the user's environment names, not that which `announce` left."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return None if uri == os.environ.get(ANNOUNCED) else uri


def read_credentials(context: KedroContext) -> dict[str, str]:
    """Read the entry of credentials.yml that `server.credentials` names, as texts.

    Raises:
        ConfigError: When there is no such entry, or it is not one of names and plain values.
    """
    name = context.mlflow.server.credentials  # type: ignore[attr-defined]
    if name is None:
        return {}
    entries = all_credentials(context)
    where = f"{_Sources(context).where(('server', 'credentials'))}: server.credentials"
    if name not in entries:
        known = ", ".join(sorted(map(str, entries))) or "none"
        raise ConfigError(f"{where}: credentials.yml has no entry {name!r}; its entries: {known}")
    entry = entries[name]
    if not isinstance(entry, dict) or any(isinstance(v, dict | list) for v in entry.values()):
        raise ConfigError(
            f"{where}: the entry {name!r} has to be environment variables, NAME: value"
        )
    return {str(key): _plain(value) for key, value in entry.items() if value is not None}


def all_credentials(context: KedroContext) -> dict[str, Any]:
    """Return every entry of credentials.yml; nothing where there is no such file."""
    from kedro.config import MissingConfigException

    try:
        return dict(context.config_loader["credentials"])
    except MissingConfigException:
        return {}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def register_header_provider(context: KedroContext) -> RequestHeaderProvider | None:
    """Register the provider that `server.request_header_provider` describes, and return it.

    Raises:
        ConfigError: When it can't be imported or made.
    """
    options = context.mlflow.server.request_header_provider  # type: ignore[attr-defined]
    try:
        return credentials.register_header_provider(options, context)
    except Exception as error:
        what = f"type {options.type!r} can't be used: {error}"
        raise mistake(context, ("server", "request_header_provider"), what) from error


def mistake(context: KedroContext, key: tuple[str, ...], what: str) -> ConfigError:
    """Make the error for a key whose value only turned out to be wrong when it was used."""
    return ConfigError(f"{_Sources(context).where(key)}: {_key(key)}: {what}")


def _changed(options: _Model, **update: Any) -> _Model:
    return options.model_copy(update=update)


def package_name() -> str:
    """Return the name of the project's package, which this module is a part of."""
    return __name__.partition(".")[0]


def configured_package() -> str | None:
    """Name the package of the project that Kedro is configured for, if it is for any."""
    from kedro.framework import project

    return cast("str | None", project.PACKAGE_NAME)


class _Sources:
    """The files that a configuration comes from: where to read it, and where a mistake stands."""

    def __init__(self, context: KedroContext) -> None:
        self._loader: Any = context.config_loader
        self._project = context.project_path

    def read(self) -> Any:
        """Merge and resolve the files as Kedro does; nothing where there are none."""
        from kedro.config import MissingConfigException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if "mlflow" not in self._loader.config_patterns:
            raise ConfigError(
                "settings.py: CONFIG_LOADER_ARGS: config_patterns has no entry for mlflow.yml, "
                'expected "mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"].'
            )
        for file in self._files():
            self._check_syntax(file)
        try:
            return self._loader["mlflow"]
        except MissingConfigException:
            return {}
        except OmegaConfBaseException as error:
            raise self._interpolation(error) from error
        except ValueError as error:  # the same key in two files of an environment
            raise ConfigError(f"{self.where(())}: {error}") from error
        except TypeError as error:  # files that can't be merged: one has the wrong type for a key
            for file in self._files():
                self.check(OmegaConf.to_container(OmegaConf.load(file)), unresolved=True)
            raise ConfigError(f"{self.where(())}: {error}") from error

    def _interpolation(self, error: Any) -> ConfigError:
        key = tuple(str(error.full_key or "").split("."))
        return ConfigError(f"{self.where(key)}: {_key(key)}: {str(error).splitlines()[0]}")

    def check(self, written: Any, *, unresolved: bool = False) -> MlflowConfig | None:
        """Make the configuration, or tell every mistake with file, line, key and value.

        With `unresolved`, a value that is an interpolation is taken for right.
        """
        try:
            return MlflowConfig.model_validate(written)
        except ValidationError as error:
            found = [
                (*self._place(problem["loc"]), f"{_key(problem['loc'])}: {_mistake(problem)}")
                for problem in error.errors()
                if not (unresolved and "${" in str(problem["input"]))
            ]
            # In the order in which a reader of the files meets them.
            lines = [f"{file}:{line}: {what}" for file, line, what in sorted(found)]
            if lines:
                raise ConfigError("\n".join(lines)) from error
            return None

    def where(self, key: tuple[int | str, ...]) -> str:
        """Name the file and line that give a key its value; the environment's file goes first."""
        file, line = self._place(key)
        return f"{file}:{line}"

    def _place(self, key: tuple[int | str, ...]) -> tuple[str, int]:
        files = self._files()
        for file in files:
            if line := _line(yaml.compose(file.read_text("utf-8")), key):
                return self._shown(file), line
        return (self._shown(files[0]) if files else "mlflow.yml"), 1

    def _files(self) -> list[Path]:
        loader = self._loader
        folders = [
            Path(loader.conf_source, env)
            for env in (loader.env or loader.default_run_env, loader.base_env)
        ]
        found = {
            file: None
            for folder in folders
            for pattern in loader.config_patterns["mlflow"]
            for file in sorted(folder.glob(pattern))
            if file.suffix in (".yml", ".yaml")
        }
        return list(found)

    def _check_syntax(self, file: Path) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            top = yaml.compose(file.read_text("utf-8"))
            if top is None or isinstance(top, yaml.MappingNode):
                for key in OmegaConf.load(file):  # refuses a key that stands there twice
                    if not isinstance(key, str):
                        raise ConfigError(f"{self._shown(file)}: {key!r}: expected a name")
        except OmegaConfBaseException as error:
            raise self._interpolation(error) from error
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ConfigError(f"{self._shown(file)}{line}: {error.problem}") from error
        except (yaml.YAMLError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self._shown(file)}: {reason}") from error
        if not (top is None or isinstance(top, yaml.MappingNode)):
            raise ConfigError(f"{self._shown(file)}:1: expected keys with values")

    def _shown(self, file: Path) -> str:
        if file.is_relative_to(self._project):
            file = file.relative_to(self._project)
        return file.as_posix()


def written_values(files: Iterable[Path]) -> dict[str, str]:
    """Collect what files say of each key, as it stands there; the first file goes first."""
    values: dict[str, str] = {}
    for file in files:
        top = yaml.compose(file.read_text("utf-8")) if file.exists() else None
        entries = top.value if isinstance(top, yaml.MappingNode) else []
        # Other values may refer to a name with an underscore, which is no key of ours.
        helpers = [name.value for name, _ in entries if name.value.startswith("_")]
        for key in [*_keys(MlflowConfig), *helpers]:
            node: yaml.Node | None = top
            for name in key.split("."):
                entries = node.value if isinstance(node, yaml.MappingNode) else []
                node = next((value for known, value in entries if known.value == name), None)
            if node is not None:
                value = yaml.safe_load(yaml.serialize(node))
                values.setdefault(key, json.dumps(value, ensure_ascii=False))
    return values


def _line(node: yaml.Node | None, key: tuple[int | str, ...]) -> int | None:
    """Find the line of a key, counted from 1; None where the file doesn't have it."""
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


def _key(key: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def _mistake(problem: Any) -> str:
    kind, shown = problem["type"], repr(problem["input"])
    if kind == "extra_forbidden":
        return f"unknown key, {_nearest(problem['loc'])}"
    expected = _EXPECTED.get(kind) or re.sub(
        r"^(Input should be|String should have|String should)", "expected", problem["msg"]
    )
    return f"{expected}, got {shown if len(shown) <= 60 else shown[:59] + '…'}"


def _nearest(key: tuple[int | str, ...]) -> str:
    """Say which key was meant, or which there are."""
    *path, wrong = map(str, key)
    group: type[BaseModel] = MlflowConfig
    for name in path:
        group = type(group.model_fields[name].default)
    if close := get_close_matches(wrong, group.model_fields, n=1):
        return f"did you mean {close[0]!r}?"
    elsewhere = [known for known in _keys(MlflowConfig) if known.rpartition(".")[2] == wrong]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"expected one of {', '.join(group.model_fields)}"


def _keys(group: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in group.model_fields.items():
        yield f"{path}{name}"
        if isinstance(field.default, BaseModel):
            yield from _keys(type(field.default), f"{path}{name}.")


def _artifact_folder(tracking_uri: str) -> str | None:
    """Say where the artifacts go by default: beside a SQLite file, or where a server decides.

    For a database MLflow's own default is a folder of the working directory.
    """
    if not is_database(tracking_uri):
        return None
    file = sqlite_file(tracking_uri)
    return file.with_name("mlartifacts").as_uri() if file else "mlartifacts"


def sqlite_file(uri: str) -> Path | None:
    """Give the file of a `sqlite:///` URI; None for any other URI."""
    found = _SQLITE_FILE.match(uri)
    return Path(found["path"]) if found else None


def shown_uri(uri: str) -> str:
    """Write a URI without the user and password in it, for logs and messages."""
    uri = re.sub(r"([?&][^=&#]*password=)[^&#]*", r"\1***", uri)
    return re.sub(r"//[^/?#]*@", "//***@", uri)


def is_database(uri: str) -> bool:
    """Tell whether a tracking URI names a database, which clients of the store open directly."""
    return uri.split(":", 1)[0].split("+", 1)[0] in {"sqlite", "postgresql", "mysql", "mssql"}


def is_http(uri: str) -> bool:
    """Check whether a tracking URI names a server that is reached by HTTP."""
    return uri.startswith(("http://", "https://"))


def anchor_uri(uri: str, project_path: PurePath) -> str:
    """Make a relative path or `sqlite:///` URI start at the project's folder.

    Other URIs, and the words `databricks` and `databricks-uc`, stay as they are.
    """
    if found := _SQLITE_FILE.match(uri):
        path = found["path"]
        if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
            return uri
        return f"{found['scheme']}{(project_path / path).as_posix()}{uri[found.end() :]}"
    if uri.startswith("databricks") or re.match(r"[\w+.-]{2,}:", uri):
        return uri
    return (project_path / uri).as_uri()


def _has_store(uri: str, plugins: str) -> bool:
    """Tell whether MLflow, or one of a group of its plugins, has a store for a URI."""
    scheme = uri.split(":", 1)[0]
    known = {"http", "https", "file", "databricks", "databricks-uc", "uc"}
    return scheme in known or is_database(uri) or scheme in entry_points(group=plugins).names


def _takes_file_store() -> bool:
    """Tell whether MLflow still opens a folder as a store: by default not from 3.13 on."""
    installed = tuple(int(part) for part in version("mlflow").split(".")[:2])
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    return installed < (3, 13) or allowed
