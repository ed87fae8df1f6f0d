"""Models logged to a run, models of the registry, and models in a local folder."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractVersionedDataset, DatasetError, Version
from kedro.io.core import get_protocol_and_path

from ..server import Server
from ..tracking import RunHandle, attach
from .flavors import Flavor, unpack
from .tracked import TrackedDataset

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models.model import ModelInfo

# Characters that MLflow refuses in the name of a logged model.
REFUSED_IN_NAME = re.compile(r"[/:.%\"']")

# What MLflow answers when a run, a model, a version or an alias isn't there.
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


class MlflowModelTrackingDataset(TrackedDataset):
    """A model logged to the run, and loaded from it.

    A node may return `(model, arguments)` for more arguments of `log_model`, such as
    `(model, {"input_example": table.head()})`, from which MLflow infers the signature too.

    When the pipeline isn't tracked, the model is passed on in memory.

    Args:
        flavor: MLflow's module for the kind of model, such as `mlflow.sklearn`.
        pyfunc_workflow: For `mlflow.pyfunc`: `python_model` or `loader_module`.
        load_args: Arguments of the flavor's `load_model`. With a `model_uri` that model is
            loaded, with a `run_id` the model of this name in that run; with neither, or null,
            the one last saved in the current run.
        save_args: Arguments of the flavor's `log_model`, such as `registered_model_name`, and
            `registered_model_alias` for the version that it makes. `name` is by default the
            dataset's name in the catalog. `signature` may be `auto`: an input example is needed.
        metadata: Kept and not used.

    Raises:
        DatasetError: When there is no such flavor or workflow, when both a `model_uri` and a
            `run_id` are given, or an alias without a `registered_model_name`.
    """

    def __init__(
        self,
        flavor: str,
        pyfunc_workflow: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._flavor = Flavor(flavor, pyfunc_workflow)
        self._load_args = dict(load_args or {})
        self._given_uri: str | None = self._load_args.pop("model_uri", None)
        self._given_run: str | None = self._load_args.pop("run_id", None)
        if self._given_uri and self._given_run:
            raise DatasetError(
                "`load_args` takes a `model_uri` or a `run_id`, "
                f"got {self._given_uri!r} and {self._given_run!r}."
            )
        self._save_args = dict(save_args or {})
        self._alias: str | None = self._save_args.pop("registered_model_alias", None)
        if self._alias and not self._save_args.get("registered_model_name"):
            raise DatasetError(
                "`registered_model_alias` needs a `registered_model_name` beside it, "
                f"got {self._alias!r} alone."
            )
        self.metadata = metadata
        self.model_info: ModelInfo | None = None
        self._untracked: Any = None

    def bind(self, *args: Any) -> None:
        """Tie the dataset to a Kedro run, and forget what it saved in an earlier one."""
        super().bind(*args)
        self.model_info = self._untracked = None

    def load(self) -> Any:
        """Load the model."""
        if self._untracked is not None:
            return self._untracked
        return self._flavor.load(self._place(self.model_uri), self._load_args)

    def save(self, data: Any) -> None:
        """Log the model, and register it when `save_args` has a `registered_model_name`."""
        if given := self._given_uri or self._given_run:
            raise DatasetError(
                f"A dataset with `load_args.model_uri` or `load_args.run_id` ({given}) is for "
                "loading only: MLflow's models can't be overwritten."
            )
        model, arguments = unpack(data, self._save_args)
        if not self._is_tracked:
            self._untracked = model
            return
        if "artifact_path" not in arguments:  # MLflow's earlier word for `name`
            arguments.setdefault("name", self._model_name())
        self.model_info = self._resolve_run().log_model(
            partial(self._flavor.log, model, arguments),
            arguments.get("registered_model_name"),
            self._alias,
        )

    @property
    def model_uri(self) -> str:
        """The URI of the model that would be loaded."""
        if self._given_uri:
            return self._given_uri
        if self.model_info:
            return self.model_info.model_uri
        if self._given_run:
            run = attach(self._server, self._given_run) or self._resolve_run()
        else:
            run = self._resolve_run()
        # Another process of this run may have saved it.
        saved = self._last_saved_in(run)
        if saved is None:
            raise DatasetError(
                f"The run {run.run_id} has no model '{self._model_name()}' yet. Save one first, or "
                "say in `load_args.model_uri` or `load_args.run_id` which to load."
            )
        return saved.model_uri

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the model that would be loaded to a local folder."""
        return _copy_model(self._place(self.model_uri), folder, self._flavor, self._load_args)

    def _place(self, uri: str) -> str:
        """Return where MLflow loads the model from; one of another run may be elsewhere."""
        with self._reading():
            if self._other_server and (self._given_uri or self._given_run):
                return fetch_model(self._other_server, uri)
        self._use_server()
        return uri

    def _last_saved_in(self, run: RunHandle) -> LoggedModel | None:
        from mlflow.entities import LoggedModelStatus

        client, token = run.server.client, None
        experiment = run.experiment_id or _experiment_of(run)
        while True:
            # Not every server can be asked for the models of a run.
            page = client.search_logged_models(
                [experiment],
                filter_string=f"name = '{self._model_name()}'",
                order_by=[{"field_name": "creation_timestamp", "ascending": False}],
                page_token=token,
            )
            for model in page:
                if model.source_run_id == run.run_id and model.status == LoggedModelStatus.READY:
                    return model
            token = page.token
            if not token:
                return None

    def _model_name(self) -> str:
        given = self._save_args.get("name") or self._save_args.get("artifact_path")
        return str(given or REFUSED_IN_NAME.sub("_", self._name or "model"))

    def _exists(self) -> bool:
        if self._given_uri:
            self._use_server()
            return _is_there(self._given_uri, self._other_server)
        try:
            return bool(self.model_uri)
        except DatasetError:
            return False

    def _release(self) -> None:
        self._untracked = None

    def _describe(self) -> dict[str, Any]:
        return {
            "flavor": self._flavor.name,
            "pyfunc_workflow": self._flavor.workflow,
            "model_uri": self._given_uri or (self.model_info and self.model_info.model_uri),
            "run_id": self._given_run,
            "load_args": self._load_args or None,
            "save_args": self._save_args or None,
            "registered_model_alias": self._alias,
        }


def _experiment_of(run: RunHandle) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(run.server.client.get_run(run.run_id).info.experiment_id)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise DatasetError(f"There is no run {run.run_id!r} to load a model of.") from error


def _is_there(uri: str, elsewhere: Server | None) -> bool:
    """Check whether a URI leads to a model; only its description is fetched."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import get_model_info

    try:
        get_model_info(_location(elsewhere, uri) if elsewhere else uri)
    except MlflowException as error:
        # A stage without versions has no code of its own.
        if error.error_code not in _ABSENT and "No versions of model" not in error.message:
            raise
        return False
    except OSError:  # a folder that has no model
        return False
    return True


class MlflowModelRegistryDataset(TrackedDataset):
    """A registered model, to load.

    Args:
        model_name: Name of the registered model.
        stage_or_version: A version or a stage; by default the latest version.
        alias: An alias, instead of a version.
        flavor: MLflow's module to load with; `mlflow.pyfunc` gives a model with `predict`.
        pyfunc_workflow: Taken for the sake of catalogs that have it; loading needs none.
        load_args: Arguments of the flavor's `load_model`.
        metadata: Kept and not used.

    Raises:
        DatasetError: When both an alias and a version are given.
    """

    def __init__(
        self,
        model_name: str,
        stage_or_version: str | int | None = None,
        alias: str | None = None,
        flavor: str = "mlflow.pyfunc",
        pyfunc_workflow: str | None = "python_model",
        load_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if alias is not None and stage_or_version is not None:
            raise DatasetError(
                "`alias` and `stage_or_version` exclude each other, "
                f"got {alias!r} and {stage_or_version!r}."
            )
        self._flavor = Flavor(flavor, pyfunc_workflow)
        self._load_args = dict(load_args or {})
        self.model_name = model_name
        self.stage_or_version = stage_or_version
        self.alias = alias
        self.metadata = metadata

    @property
    def model_uri(self) -> str:
        """The model's URI in the registry."""
        if self.alias is not None:
            return f"models:/{self.model_name}@{self.alias}"
        version = "latest" if self.stage_or_version is None else self.stage_or_version
        return f"models:/{self.model_name}/{version}"

    def load(self) -> Any:
        """Load the model."""
        return self._flavor.load(self._place(), self._load_args)

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the registered model to a local folder."""
        return _copy_model(self._place(), folder, self._flavor, self._load_args)

    def _place(self) -> str:
        """Return where MLflow loads the model from."""
        with self._reading():
            if self._other_server:
                return fetch_model(self._other_server, self.model_uri)
        self._use_server()
        return self.model_uri

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Refuse: a model gets into the registry by being logged.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(
            "MlflowModelRegistryDataset only loads. To register a model, save it with "
            "MlflowModelTrackingDataset and `save_args: {registered_model_name: …}`."
        )

    def _exists(self) -> bool:
        self._use_server()
        return _is_there(self.model_uri, self._other_server)

    def _describe(self) -> dict[str, Any]:
        return {
            "model_uri": self.model_uri,
            "flavor": self._flavor.name,
            "load_args": self._load_args or None,
        }


class MlflowModelLocalFileSystemDataset(AbstractVersionedDataset[Any, Any]):
    """A model in a local folder, written by MLflow; no server and no run has a part in it.

    A node may return `(model, arguments)` for more arguments of `save_model`, such as
    `(model, {"input_example": table.head()})`, from which MLflow infers the signature too.

    Args:
        filepath: The folder; with `versioned: true` each version is a folder in it.
        flavor: MLflow's module for the kind of model, such as `mlflow.sklearn`.
        pyfunc_workflow: For `mlflow.pyfunc`: `python_model` or `loader_module`.
        load_args: Arguments of the flavor's `load_model`.
        save_args: Arguments of the flavor's `save_model`. `signature` may be `auto`: an input
            example is needed.
        log_args: Taken for the sake of catalogs that have it; nothing is logged.
        version: The version to load and to save, as Kedro gives it.
        metadata: Kept and not used.

    Raises:
        DatasetError: When there is no such flavor or workflow, or the path isn't a local one.
    """

    def __init__(
        self,
        filepath: str,
        flavor: str,
        pyfunc_workflow: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        log_args: dict[str, Any] | None = None,  # noqa: ARG002
        version: Version | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        protocol, path = get_protocol_and_path(filepath)
        if protocol != "file":
            raise DatasetError(
                f"`filepath` is a local folder, got {filepath!r}: MLflow saves models to local "
                "disks. For other places there is MlflowModelTrackingDataset."
            )
        super().__init__(PurePosixPath(path), version)
        self._flavor = Flavor(flavor, pyfunc_workflow)
        self._load_args = dict(load_args or {})
        self._save_args = dict(save_args or {})
        self.metadata = metadata

    def load(self) -> Any:
        """Load the model."""
        folder = Path(self._get_load_path())
        if not _is_model(folder):
            raise DatasetError(f"There is no model at {folder}. Save one first.")
        return self._flavor.load(str(folder.resolve()), self._load_args)

    def save(self, data: Any) -> None:
        """Write the model; one that is there already stays until the new one is complete."""
        model, arguments = unpack(data, self._save_args)
        target = Path(self._get_save_path())
        if _is_something_else(target):
            raise DatasetError(
                f"{target} isn't replaced, because it isn't a model that MLflow saved. "
                "`filepath` is a folder that holds nothing but the model."
            )
        place = Path(self._filepath).parent
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{self._filepath.name}.", dir=place) as folder:
            draft, former = Path(folder, "new"), Path(folder, "former")
            self._flavor.save(model, draft, arguments)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(former)
            try:
                draft.rename(target)
            except OSError:
                if former.exists():
                    former.rename(target)
                raise

    def _exists(self) -> bool:
        return _is_model(Path(self._get_load_path()))

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": self._filepath,
            "flavor": self._flavor.name,
            "pyfunc_workflow": self._flavor.workflow,
            "load_args": self._load_args or None,
            "save_args": self._save_args or None,
            "version": self._version,
        }


def fetch_model(server: Server, uri: str) -> str:
    """Download a model from a server, whatever `mlflow.…` in this process is pointed at.

    Args:
        server: Where the model is.
        uri: `models:/…`, `runs:/…` or the address of a folder.

    Returns:
        The folder that it is in now.
    """
    from mlflow.artifacts import download_artifacts

    return download_artifacts(
        _location(server, uri),
        tracking_uri=server.tracking_uri,
        registry_uri=server.registry_uri,
    )


def _location(server: Server, uri: str) -> str:
    """Return where a server has the files of a model: MLflow asks only the one that is in use."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    client = server.client
    if uri.startswith("models:"):
        found = get_model_name_and_version(client, uri)
        if len(found) == 2:
            uri = client.get_model_version_download_uri(*found)
            found = get_model_name_and_version(client, uri) if uri.startswith("models:") else found
        if len(found) == 1:
            return str(client.get_logged_model(found[0]).artifact_location)
    return uri


def _copy_model(
    uri: str, folder: Path, flavor: Flavor, load_args: dict[str, Any]
) -> dict[str, Any]:
    """Fetch a model into a folder; gives the dataset that loads it from there."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    target = folder / "model"
    target.mkdir()
    try:
        download_artifacts(uri, dst_path=str(target))
    except MlflowException as error:
        raise DatasetError(f"The model {uri} can't be fetched: {error.message}") from error
    return {
        "type": MlflowModelLocalFileSystemDataset,
        "filepath": target.name,
        "flavor": flavor.name,
        "pyfunc_workflow": flavor.workflow,
        "load_args": load_args,
    }


def _is_model(folder: Path) -> bool:
    return (folder / "MLmodel").is_file()


def _is_something_else(target: Path) -> bool:
    """Tell whether there is something that a model must not replace."""
    if target.is_dir():
        return any(target.iterdir()) and not _is_model(target)
    return target.exists()
