"""Check the configuration of `mlflow.yml`, and make its URIs and names complete."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from .errors import ConfigError
from .hiding import Secrets
from .keys import MlflowConfig
from .loading import Sources, dotted, package_name
from .uris import (
    anchor_uri,
    artifact_folder,
    has_store,
    shown_uri,
    takes_file_store,
    uri_of_environment,
)

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from pydantic_core import ErrorDetails

_Config = TypeVar("_Config", bound=MlflowConfig)

_EXPECTED = {
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "string_too_short": "expected a text that isn't empty",
    "int_type": "expected a whole number",
    "list_type": "expected a list",
    "dict_type": "expected keys with values",
    "model_type": "expected keys with values",
}


def load_config(context: KedroContext, kind: type[_Config]) -> _Config:
    """Read `mlflow.yml` of the context's environment, with every URI and name made complete.

    Without the file the defaults hold: the embedded store `mlflow.db` in the project's folder,
    and the package's name as the experiment's.

    Args:
        context: The project's.
        kind: The class of the configuration.

    Raises:
        ConfigError: With one line for each mistake, when the file has any.
    """
    sources, project = Sources(context), context.project_path
    config = _checked(sources)
    server, experiment = config.server, config.tracking.experiment
    given = server.mlflow_tracking_uri or uri_of_environment() or "sqlite:///mlflow.db"
    tracking_uri = anchor_uri(given, project)
    registry_uri = anchor_uri(server.mlflow_registry_uri or tracking_uri, project)
    _check_uri(sources, "mlflow_tracking_uri", tracking_uri, "mlflow.tracking_store")
    _check_uri(sources, "mlflow_registry_uri", registry_uri, "mlflow.model_registry_store")
    location = experiment.create_experiment_kwargs.artifact_location
    location = location or artifact_folder(tracking_uri)

    values = config.model_dump()
    values["server"] |= {"mlflow_tracking_uri": tracking_uri, "mlflow_registry_uri": registry_uri}
    values["tracking"]["experiment"]["name"] = experiment.name or package_name()
    values["tracking"]["experiment"]["create_experiment_kwargs"]["artifact_location"] = (
        location and anchor_uri(location, project)
    )
    return kind.model_validate(values)


def _checked(sources: Sources) -> MlflowConfig:
    """Return the configuration as the files say it.

    Raises:
        ConfigError: With one line for each mistake: its file, line, key and value.
    """
    try:
        return MlflowConfig.model_validate(sources.read())
    except ValidationError as error:
        raise _mistakes(sources, error.errors()) from error
    except TypeError as error:  # files that can't be merged: one has the wrong type for a key
        if problems := [p for file in sources.files() for p in _problems_of(sources, file)]:
            raise _mistakes(sources, problems) from error
        raise ConfigError(f"{sources.where(())}: {error}") from error


def _problems_of(sources: Sources, file: str) -> list[ErrorDetails]:
    """Return what pydantic finds in a file alone; an interpolation may stand for a right value."""
    try:
        MlflowConfig.model_validate(OmegaConf.to_container(OmegaConf.load(sources.text(file))))
    except ValidationError as error:
        return [problem for problem in error.errors() if "${" not in str(problem["input"])]
    return []


def _mistakes(sources: Sources, problems: Iterable[ErrorDetails]) -> ConfigError:
    """Return the error for mistakes, in the order in which a reader of the files meets them."""
    lines = sorted((*sources.place(p["loc"]), dotted(p["loc"]), _sentence(p)) for p in problems)
    return ConfigError(
        "\n".join(f"{file}:{line}: {key}: {what}" for file, line, key, what in lines)
    )


def _sentence(problem: ErrorDetails) -> str:
    kind, value = problem["type"], problem["input"]
    name = dotted(problem["loc"]) if isinstance(value, dict | list) else ""
    value = shown_uri(repr(Secrets(tuple(MlflowConfig().tracking.redact)).hide(value, name)))
    if kind == "extra_forbidden":
        return f"unknown key, {_nearest(problem['loc'])}"
    expected = _EXPECTED.get(kind) or re.sub(
        r"^(Input should be|String should have|String should)", "expected", problem["msg"]
    )
    return f"{expected}, got {value if len(value) <= 60 else value[:59] + '…'}"


def _nearest(key: tuple[int | str, ...]) -> str:
    """Return which key was meant, or which there are."""
    *path, wrong = map(str, key)
    group: type[BaseModel] = MlflowConfig
    for name in path:
        group = type(group.model_fields[name].default)
    elsewhere = [known for known in _keys(MlflowConfig) if known.rpartition(".")[2] == wrong]
    if close := get_close_matches(wrong, group.model_fields, n=1) or elsewhere:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(group.model_fields)}"


def _keys(group: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in group.model_fields.items():
        yield f"{path}{name}"
        if isinstance(field.default, BaseModel):
            yield from _keys(type(field.default), f"{path}{name}.")


def _check_uri(sources: Sources, key: str, uri: str, plugins: str) -> None:
    """Raise an error for a URI that MLflow, and a group of its plugins, have no store for."""
    if not has_store(uri, plugins):
        raise sources.mistake(
            ("server", key),
            "expected a path, a database or an address with http:// or https://, got "
            f"{shown_uri(uri)!r}",
        )
    if uri.startswith("file:") and not takes_file_store():
        raise sources.mistake(
            ("server", key),
            f"MLflow no longer keeps runs in a folder, got {uri!r}. Write sqlite:///mlflow.db, or "
            "set the environment variable MLFLOW_ALLOW_FILE_STORE=true.",
        )
