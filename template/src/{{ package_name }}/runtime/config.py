"""Read `mlflow.yml` into one validated, frozen configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext

_SECRETS = (
    "*password",
    "*passwd",
    "*secret",
    "*token",
    "*api_key",
    "*apikey",
    "*access_key",
    "*secret_key",
    "*private_key",
    "*credentials",
)


_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:)[^?]+)")


class ConfigError(click.ClickException):
    """A mistake in the configuration, told in one sentence; `kedro` ends with exit status 1."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ServerOptions(_Options):
    """Where runs and models are kept."""

    mlflow_tracking_uri: str | None = None
    mlflow_registry_uri: str | None = None


class DisableTrackingOptions(_Options):
    """What is not tracked."""

    pipelines: list[str] = Field(default_factory=list)


class CreateExperimentOptions(_Options):
    """How the experiment is made when it doesn't exist."""

    artifact_location: str | None = None
    tags: dict[str, str] | None = None


class ExperimentOptions(_Options):
    """The experiment that runs belong to."""

    name: str | None = None
    create_experiment_kwargs: CreateExperimentOptions = CreateExperimentOptions()
    restore_if_deleted: bool = True


class RunOptions(_Options):
    """The run itself: `id` continues a run that exists."""

    id: str | None = None
    name: str | None = None


class DictParamsOptions(_Options):
    """How dictionaries among the parameters are logged."""

    flatten: bool = False
    recursive: bool = True
    sep: str = "."


class ParamsOptions(_Options):
    """How parameters are logged."""

    dict_params: DictParamsOptions = DictParamsOptions()
    long_params_strategy: Literal["fail", "truncate", "tag"] = "fail"


class TrackingOptions(_Options):
    """What is tracked, and as what."""

    disable_tracking: DisableTrackingOptions = DisableTrackingOptions()
    experiment: ExperimentOptions = ExperimentOptions()
    run: RunOptions = RunOptions()
    params: ParamsOptions = ParamsOptions()
    redact: list[str] = Field(default_factory=lambda: list(_SECRETS))


class UiOptions(_Options):
    """Where `kedro mlflow ui` listens; without a port it takes a free one."""

    host: str = "127.0.0.1"
    port: int | str | None = None


class MlflowConfig(_Options):
    """The whole of `mlflow.yml`."""

    server: ServerOptions = ServerOptions()
    tracking: TrackingOptions = TrackingOptions()
    ui: UiOptions = UiOptions()


def load_config(context: KedroContext) -> MlflowConfig:
    """Read `mlflow.yml` of the context's environment, with every URI and name made complete.

    Without the file the defaults hold: the embedded store `mlflow.db` in the project's folder,
    and the package's name as the experiment's.

    Raises:
        ConfigError: When the file has an unknown key or a wrong value.
    """
    from kedro.config import MissingConfigException

    try:
        written = context.config_loader["mlflow"]
    except MissingConfigException:
        written = {}
    config = parse(written)

    tracking_uri = anchor_uri(
        config.server.mlflow_tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or "sqlite:///mlflow.db",
        context.project_path,
    )
    experiment = config.tracking.experiment
    location = experiment.create_experiment_kwargs.artifact_location or _artifact_folder(
        tracking_uri
    )

    return config.model_copy(
        update={
            "server": ServerOptions(
                mlflow_tracking_uri=tracking_uri,
                mlflow_registry_uri=anchor_uri(
                    config.server.mlflow_registry_uri or tracking_uri, context.project_path
                ),
            ),
            "tracking": config.tracking.model_copy(
                update={
                    "experiment": experiment.model_copy(
                        update={
                            "name": experiment.name or package_name(context),
                            "create_experiment_kwargs": CreateExperimentOptions(
                                artifact_location=location
                                and anchor_uri(location, context.project_path),
                                tags=experiment.create_experiment_kwargs.tags,
                            ),
                        }
                    )
                }
            ),
        }
    )


def package_name(context: KedroContext) -> str:
    """Name the project's package; contexts of Kedro 1.0 don't always have it."""
    from kedro.framework import project

    return context._package_name or project.PACKAGE_NAME or context.project_path.name


def parse(written: dict[str, Any]) -> MlflowConfig:
    """Validate what `mlflow.yml` says.

    Raises:
        ConfigError: With one line for each unknown key and wrong value.
    """
    try:
        return MlflowConfig.model_validate(written)
    except ValidationError as error:
        lines = (
            f"mlflow.yml: {'.'.join(map(str, problem['loc']))}: "
            + (
                "unknown key"
                if problem["type"] == "extra_forbidden"
                else f"{problem['msg']}, got {problem['input']!r}"
            )
            for problem in error.errors()
        )
        raise ConfigError("\n".join(lines)) from error


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


def is_database(uri: str) -> bool:
    """Tell whether a tracking URI names a database, which clients of the store open directly."""
    return uri.split(":", 1)[0].split("+", 1)[0] in {"sqlite", "postgresql", "mysql", "mssql"}


def anchor_uri(uri: str, project_path: Path) -> str:
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
