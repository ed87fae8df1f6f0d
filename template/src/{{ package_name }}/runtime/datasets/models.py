"""Models logged to a run, models of the registry, and models in a local folder."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractVersionedDataset, DatasetError, Version
from kedro.io.core import get_protocol_and_path

from ..config.uris import local_path
from ..stores.server import Server, all_results
from ..tracking.handle import RunHandle
from .base import ABSENT, TrackedDataset, check, info_of
from .files import has_artifact
from .flavors import Flavor, signature_of, unpack

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models.model import ModelInfo

# Characters that MLflow refuses in the name of a logged model, and in that of a registered one.
_REFUSED_IN_LOGGED = re.compile(r"[/:.%\"']")
_REFUSED_IN_REGISTERED = re.compile(r"[/:]")

# An alias that MLflow can give to a version: `latest` and `v3` mean versions already.
_NEW_ALIAS = re.compile(r"(?!(?:latest|v\d+)$)[\w-]{1,255}", re.IGNORECASE)


def check_names(arguments: Mapping[str, Any], group: str = "save_args.") -> None:
    """Check the names that arguments of `log_model` give a model.

    Args:
        arguments: The arguments, and perhaps a `registered_model_alias`.
        group: What stands before their names where the user has written them.

    Raises:
        DatasetError: When MLflow refuses one, or one is missing beside another.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if {"name", "artifact_path"} <= given.keys():
        raise DatasetError(
            f"`{group}name` and `{group}artifact_path`, MLflow's earlier word for it, exclude each "
            f"other, got {given['name']!r} and {given['artifact_path']!r}."
        )
    for key in given.keys() & {"name", "artifact_path"}:
        is_name = _is_name(given[key], _REFUSED_IN_LOGGED)
        check(is_name, f"{group}{key}", "is a text without / : . % and quotes", given[key])
    registered = given.get("registered_model_name")
    if registered is not None:
        is_name = _is_name(registered, _REFUSED_IN_REGISTERED)
        rule = "is a text without / and :"
        check(is_name, f"{group}registered_model_name", rule, registered)
    alias = given.get("registered_model_alias")
    rule = "has letters, digits, _ and -, and is neither `latest` nor a version such as `v3`"
    is_alias = alias is None or (isinstance(alias, str) and _NEW_ALIAS.fullmatch(alias))
    check(is_alias, f"{group}registered_model_alias", rule, alias)
    if alias and registered is None:
        raise DatasetError(
            "`registered_model_alias` needs a `registered_model_name` beside it, "
            f"got {alias!r} alone."
        )


def _is_name(given: Any, refused: re.Pattern[str]) -> bool:
    return isinstance(given, str) and bool(given.strip()) and not refused.search(given)


class ModelDataset(TrackedDataset):
    """What the datasets of models on a server share: they load by the URI of the model.

    `model_id` is MLflow's id of the model that was last logged or loaded in the current run.
    """

    model_id: str | None = None

    def __init__(
        self,
        flavor: str,
        pyfunc_workflow: str | None,
        load_args: dict[str, Any] | None,
        metadata: dict[str, Any] | None,
    ) -> None:
        self.flavor = Flavor(flavor, pyfunc_workflow)
        self.load_args = dict(load_args or {})
        self.metadata = metadata

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run, and forget which model it had in an earlier one."""
        super().bind(*args)
        self.model_id = None

    @property
    @abstractmethod
    def model_uri(self) -> str:
        """The URI of the model that would be loaded."""

    @property
    def _is_of_run(self) -> bool:
        """Whether the model is one of the current run, and so where that is."""
        return False

    def load(self) -> Any:
        """Load the model."""
        source = self._source()
        model = self.flavor.load(source, self.load_args)
        if self._run and self.model_id is None:
            self.model_id = _id_of(model, source, self._run.server)
        return model

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the model that would be loaded to a local folder.

        Returns:
            The configuration of the dataset that loads the copy.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        target, source = folder / "model", self._source()
        target.mkdir()
        try:
            copied = download_artifacts(source, dst_path=str(target))
        except MlflowException as error:
            raise DatasetError(f"The model {source} can't be fetched: {error.message}") from error
        return {
            "type": MlflowModelLocalFileSystemDataset,
            "filepath": Path(copied).relative_to(folder).as_posix(),
            "flavor": self.flavor.name,
            "pyfunc_workflow": self.flavor.workflow,
            "load_args": self.load_args,
        }

    def _source(self) -> str:
        """Return where MLflow loads the model from: one of another server is downloaded."""
        with self._reading():
            uri = self.model_uri
            if self._other_server and not self._is_of_run:
                return _download(self._other_server, uri)
        self._use_server()
        return uri

    def _use_server(self) -> None:
        """Point `mlflow.…` at where the run is, or at the project's server when there is none."""
        if server := self._run.server if self._run else self._server:
            server.use()

    def _exists(self) -> bool:
        """Check whether the URI leads to a model; only its description is fetched."""
        from mlflow.exceptions import MlflowException
        from mlflow.models import get_model_info

        self._use_server()
        try:
            uri, server = self.model_uri, self._other_server
            get_model_info(_address(server, uri) if server else uri)
        except MlflowException as error:
            # A stage without versions has no code of its own.
            if error.error_code not in ABSENT and "No versions of model" not in error.message:
                raise
            return False
        except OSError:  # a folder that has no model
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {
            **super()._describe(),
            "flavor": self.flavor.name,
            "pyfunc_workflow": self.flavor.workflow,
            "load_args": self.load_args or None,
        }


class MlflowModelTrackingDataset(ModelDataset):
    """A model logged to the run, and loaded from it.

    A node may return `(model, arguments)` for more arguments of `log_model`, such as
    `(model, {"input_example": table.head()})`, from which MLflow infers the signature too.

    When the pipeline isn't tracked, the model is passed on in memory.

    Args:
        flavor: MLflow's module for the kind of model, such as `mlflow.sklearn`.
        pyfunc_workflow: For `mlflow.pyfunc`: `python_model` or `loader_module`.
        load_args: Arguments of the flavor's `load_model`. With a `model_uri` that model is
            loaded, with a `run_id` the model of this name in that run, which may be one of MLflow
            2; with neither, or null, the one last saved in the current run.
        save_args: Arguments of the flavor's `log_model`, such as `registered_model_name`, and
            `registered_model_alias` for the version that it makes. `name` is by default the
            dataset's name in the catalog. `signature` may be `auto`, for which an input example is
            needed, or `inputs`, `outputs` and `params` as in MLflow's file MLmodel.
        metadata: Kept and not used.

    Raises:
        DatasetError: When there is no such flavor or workflow, when both a `model_uri` and a
            `run_id` are given, or MLflow takes no such signature, name or alias.
    """

    SHOWN = ("run_id", "save_args", "registered_model_alias")

    def __init__(
        self,
        flavor: str,
        pyfunc_workflow: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(flavor, pyfunc_workflow, load_args, metadata)
        self._given_uri: str | None = self.load_args.pop("model_uri", None)
        self.run_id = self.load_args.pop("run_id", None)
        if self._given_uri and self.run_id:
            raise DatasetError(
                "`load_args` takes a `model_uri` or a `run_id`, "
                f"got {self._given_uri!r} and {self.run_id!r}."
            )
        self.save_args = dict(save_args or {})
        if not self._given_uri and not self.run_id:  # MLflow 2 took more names
            check_names(self.save_args)
        signature_of(self.save_args.get("signature"))
        self.registered_model_alias = self.save_args.pop("registered_model_alias", None)
        self.model_info: ModelInfo | None = None
        self._untracked: Any = None

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run, and forget what it saved in an earlier one."""
        super().bind(*args)
        self.model_info = self._untracked = None

    def load(self) -> Any:
        """Load the model."""
        return super().load() if self._untracked is None else self._untracked

    def save(self, data: Any) -> None:
        """Log the model, and register it when `save_args` has a `registered_model_name`."""
        if given := self._given_uri or self.run_id:
            raise DatasetError(
                f"A dataset with `load_args.model_uri` or `load_args.run_id` ({given}) is for "
                "loading only: MLflow's models can't be overwritten."
            )
        model, arguments = unpack(data, self.save_args)
        if not self._is_tracked:
            self._untracked = model
            return
        check_names(arguments)
        if not arguments.get("artifact_path"):  # MLflow's earlier word for `name`
            arguments["name"] = arguments.get("name") or self._model_name()
        self.model_info = self._resolve_run().log_model(
            # In a Kedro run they are of other nodes, and may be of other models.
            partial(self.flavor.log, model, arguments, with_metrics=self._run is None),
            arguments.get("registered_model_name"),
            self.registered_model_alias,
        )
        self.model_id = self.model_info.model_id

    @property
    def model_uri(self) -> str:
        """The URI of the model that would be loaded."""
        if self._given_uri:
            return self._given_uri
        if self.model_info:
            return self.model_info.model_uri
        # Another process of this run may have saved it.
        run = self._resolve_run()
        if saved := self._last_saved_in(run):
            if self._run and run.server == self._run.server:
                self.model_id = saved.model_id
            return saved.model_uri
        name = self._model_name()
        if self.run_id and has_artifact(run, PurePosixPath(name, "MLmodel")):
            return f"runs:/{run.run_id}/{name}"  # a model of MLflow 2 is one of the run's artifacts
        raise DatasetError(
            f"The run {run.run_id} has no model '{name}' yet. Save one first, or say in "
            "`load_args.model_uri` or `load_args.run_id` which to load."
        )

    @property
    def _is_of_run(self) -> bool:
        return not (self._given_uri or self.run_id)

    def _last_saved_in(self, run: RunHandle) -> LoggedModel | None:
        from mlflow.entities import LoggedModelStatus

        models = all_results(
            run.server.client.search_logged_models,
            [run.experiment_id or info_of(run).experiment_id],
            filter_string=f"name = '{self._model_name()}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        )
        # Not every server can be asked for the models of a run.
        of_run = (model for model in models if model.source_run_id == run.run_id)
        return next((m for m in of_run if m.status == LoggedModelStatus.READY), None)

    def _model_name(self) -> str:
        given = self.save_args.get("name") or self.save_args.get("artifact_path")
        return str(given or _REFUSED_IN_LOGGED.sub("_", self._name or "model"))

    def _exists(self) -> bool:
        if self._given_uri:
            return super()._exists()
        try:
            return bool(self.model_uri)
        except DatasetError:
            return False

    def _release(self) -> None:
        self._untracked = None

    def _describe(self) -> dict[str, Any]:
        known = self._given_uri or (self.model_info and self.model_info.model_uri)
        return {**super()._describe(), "model_uri": known}


def _id_of(model: Any, source: str, server: Server) -> str | None:
    """Return the id of a model that was loaded, when it is one of a server's; else None.

    MLflow 2 gave models no id, and a copy in a folder or on another server has the id of the
    original, which metrics can't name: a database refuses them then.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    description = getattr(model, "metadata", None)  # of mlflow.pyfunc
    if not isinstance(description, Model):
        # Seen in MLflow 3.17: it looks for a `file:` URI as if it was a path.
        description = Model.load(local_path(source) if source.startswith("file:") else source)
    if not description.model_id:
        return None
    try:
        return str(server.client.get_logged_model(description.model_id).model_id)
    except MlflowException as error:
        if error.error_code not in (*ABSENT, "ENDPOINT_NOT_FOUND"):
            raise
        return None


def _download(server: Server, uri: str) -> str:
    """Download a model from a server, whatever `mlflow.…` in this process is pointed at."""
    from mlflow.artifacts import download_artifacts

    return download_artifacts(
        _address(server, uri), tracking_uri=server.tracking_uri, registry_uri=server.registry_uri
    )


def _address(server: Server, uri: str) -> str:
    """Return where a server has the files of a model: MLflow asks only the one that is in use."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if not uri.startswith("models:"):
        return uri
    model = get_model_name_and_version(server.client, uri)
    if len(model) == 1:  # the id of a logged model
        return str(server.client.get_logged_model(model[0]).artifact_location)
    return _address(server, server.client.get_model_version_download_uri(*model))


class MlflowModelRegistryDataset(ModelDataset):
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
        DatasetError: When both an alias and a version are given, or MLflow has no such names.
    """

    SHOWN = ("model_uri",)

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
        super().__init__(flavor, pyfunc_workflow, load_args, metadata)
        if alias is not None and stage_or_version is not None:
            raise DatasetError(
                "`alias` and `stage_or_version` exclude each other, "
                f"got {alias!r} and {stage_or_version!r}."
            )
        is_name = _is_name(model_name, _REFUSED_IN_REGISTERED)
        check(is_name, "model_name", "is a text without / and :", model_name)
        is_alias = alias is None or re.fullmatch(r"[\w-]+", str(alias))
        check(is_alias, "alias", "has letters, digits, _ and -", alias)
        self.model_name = model_name
        self.stage_or_version = stage_or_version
        self.alias = alias

    @property
    def model_uri(self) -> str:
        """The model's URI in the registry."""
        if self.alias is not None:
            return f"models:/{self.model_name}@{self.alias}"
        version = "latest" if self.stage_or_version is None else self.stage_or_version
        return f"models:/{self.model_name}/{version}"

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Raise an error: a model gets into the registry by being logged."""
        raise DatasetError(
            "MlflowModelRegistryDataset only loads. To register a model, save it with "
            "MlflowModelTrackingDataset and `save_args: {registered_model_name: …}`."
        )


class MlflowModelLocalFileSystemDataset(AbstractVersionedDataset[Any, Any]):
    """A model in a local folder, written by MLflow; no server and no run has a part in it.

    A node may return `(model, arguments)` for more arguments of `save_model`, such as
    `(model, {"input_example": table.head()})`, from which MLflow infers the signature too.

    Args:
        filepath: The folder; with `versioned: true` each version is a folder in it.
        flavor: MLflow's module for the kind of model, such as `mlflow.sklearn`.
        pyfunc_workflow: For `mlflow.pyfunc`: `python_model` or `loader_module`.
        load_args: Arguments of the flavor's `load_model`.
        save_args: Arguments of the flavor's `save_model`. `signature` may be `auto`, for which an
            input example is needed, or `inputs`, `outputs` and `params` as in MLflow's file
            MLmodel.
        log_args: Taken for the sake of catalogs that have it; nothing is logged.
        version: The version to load and to save, as Kedro gives it.
        metadata: Kept and not used.

    Raises:
        DatasetError: When there is no such flavor or workflow, MLflow takes no such signature, or
            the path isn't a local one.
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
        check(protocol == "file", "filepath", "is a local folder", filepath)
        super().__init__(PurePosixPath(path), version)
        self.flavor = Flavor(flavor, pyfunc_workflow)
        self.load_args = dict(load_args or {})
        self.save_args = dict(save_args or {})
        signature_of(self.save_args.get("signature"))
        self.metadata = metadata

    def load(self) -> Any:
        """Load the model."""
        folder = Path(self._get_load_path())
        if not _is_model(folder):
            raise DatasetError(f"There is no model at {folder}. Save one first.")
        return self.flavor.load(str(folder.resolve()), self.load_args)

    def save(self, data: Any) -> None:
        """Write the model; one that is there already stays until the new one is complete."""
        model, arguments = unpack(data, self.save_args)
        target = Path(self._get_save_path())
        if target.exists() and not _is_model(target) and not _is_empty_folder(target):
            raise DatasetError(
                f"{target} isn't replaced, because it isn't a model that MLflow saved. "
                "`filepath` is a folder that holds nothing but the model."
            )
        parent = Path(self._filepath).parent
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{self._filepath.name}.", dir=parent) as folder:
            new = Path(folder, "new")
            self.flavor.save(model, new, arguments)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(folder, "former"))
            new.rename(target)

    def _exists(self) -> bool:
        return _is_model(Path(self._get_load_path()))

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": self._filepath,
            "flavor": self.flavor.name,
            "pyfunc_workflow": self.flavor.workflow,
            "load_args": self.load_args or None,
            "save_args": self.save_args or None,
            "version": self._version,
        }


def _is_model(folder: Path) -> bool:
    return (folder / "MLmodel").is_file()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
