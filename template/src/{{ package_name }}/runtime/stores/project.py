"""`context.mlflow`: the configuration of a project, which can also ask its server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from .. import _mlflow, state
from ..config import keys
from ..config.checking import load_config
from ..config.hiding import secrets_of
from ..config.loading import mistake, read_credentials
from ..config.uris import ANNOUNCED
from . import credentials
from .embedded import prepare
from .server import Server, experiment_id

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )


class _Server(keys.ServerOptions):
    @property
    def client(self) -> MlflowClient:
        """MLflow's client for these URIs, made on first use."""
        return self.connection.client

    @property
    def connection(self) -> Server:
        """The two URIs, for the runtime."""
        return Server(self.mlflow_tracking_uri or "", self.mlflow_registry_uri or "")


class _Experiment(keys.ExperimentOptions):
    _server: _Server = PrivateAttr(default_factory=_Server)
    _project_path: Path | None = PrivateAttr(None)

    def set_server(self, server: _Server) -> None:
        """Set the server that `entity` asks."""
        self._server = server

    def set_project(self, project_path: Path) -> None:
        """Set the project's folder: a store in it is migrated from an older MLflow."""
        self._project_path = project_path

    @property
    def entity(self) -> Experiment:
        """MLflow's object for the experiment, which is made or restored when need be."""
        server = self._server.connection
        location = self.create_experiment_kwargs.artifact_location
        prepare(server.tracking_uri, location, self._project_path)
        return server.client.get_experiment(experiment_id(server, self))


class _Tracking(keys.TrackingOptions):
    experiment: _Experiment = Field(default_factory=_Experiment)


class MlflowConfig(keys.MlflowConfig):
    """The whole of `mlflow.yml`; a context offers it as `context.mlflow`."""

    server: _Server = Field(default_factory=_Server)
    tracking: _Tracking = Field(default_factory=_Tracking)

    def model_post_init(self, _: Any) -> None:
        """Set the server of the experiment."""
        self.tracking.experiment.set_server(self.server)

    def setup(self, context: KedroContext) -> None:
        """Point `mlflow.…` in this process at the project, as notebooks want it.

        Sets the tracking and registry URI and the experiment, exports the credentials and
        registers the header provider.

        Args:
            context: The Kedro context whose `mlflow` this is.
        """
        import mlflow

        credentials.export("setup", read_credentials(context))
        register_header_provider(context)
        self.server.connection.use()
        mlflow.set_experiment(experiment_id=self.tracking.experiment.entity.experiment_id)

    def announce(
        self, key: str = "notebook", variables: Mapping[str, str | None] | None = None
    ) -> None:
        """Export the project's server and experiment for MLflow, wherever it is used.

        For notebooks, and for what logs before the run is open. Environment variables do this
        without importing MLflow and without a request.

        Args:
            key: What the variables are exported as, for `credentials.take_back`.
            variables: More variables, such as the credentials.
        """
        server, experiment = self.server.connection, self.tracking.experiment
        location = experiment.create_experiment_kwargs.artifact_location
        announced: dict[str, str | None] = {
            "MLFLOW_TRACKING_URI": server.tracking_uri,
            "MLFLOW_REGISTRY_URI": server.registry_uri,
            "MLFLOW_EXPERIMENT_NAME": experiment.name or "",
            "MLFLOW_EXPERIMENT_ID": None,  # MLflow refuses an id and a name that differ
            ANNOUNCED: server.tracking_uri,
        }
        credentials.export(
            key,
            {**announced, **_mlflow.artifact_root_variable(location), **(variables or {})},
        )
        # Nodes of runs in other threads need what is set.
        if "mlflow" in sys.modules and not state.current().started:
            _mlflow.set_active_experiment(None)  # that of another project
            server.use()


def config_of(context: KedroContext) -> MlflowConfig:
    """Read the configuration of a context, for its attribute `mlflow`.

    Raises:
        ConfigError: With one line for each mistake, when `mlflow.yml` has any.
    """
    config = load_config(context, MlflowConfig)
    config.tracking.experiment.set_project(context.project_path)
    return config


def register_header_provider(context: KedroContext) -> RequestHeaderProvider | None:
    """Register the provider that `server.request_header_provider` describes, and return it.

    Raises:
        ConfigError: When it can't be imported or made.
    """
    options = context.mlflow.server.request_header_provider  # type: ignore[attr-defined]
    try:
        return credentials.register_header_provider(options, context)
    except Exception as error:  # the class is the user's code
        what = secrets_of(context).hide_in(f"type {options.type!r} can't be used: {error}")
        raise mistake(context, ("server", "request_header_provider"), what) from error
