"""Models logged to a run, and models of the registry."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kedro.io import DatasetError

from .tracked import TrackedDataset

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

# Characters that MLflow refuses in the name of a logged model.
_REFUSED_IN_NAME = re.compile(r"[/:.%\"']")


def _is_module(name: str) -> bool:
    """Tell whether a module exists, without the import of MLflow that `find_spec` would do."""
    package, *inner = name.split(".")
    spec = find_spec(package)
    if spec is None or not inner:
        return spec is not None
    return any(
        Path(folder, *inner).is_dir() or Path(folder, *inner).with_suffix(".py").is_file()
        for folder in spec.submodule_search_locations or ()
    )


class _FlavorDataset(TrackedDataset):
    """What the model datasets share: an MLflow flavor, imported when it is first used."""

    def __init__(self, flavor: str, pyfunc_workflow: str | None) -> None:
        if flavor == "mlflow.pyfunc" and pyfunc_workflow not in ("python_model", "loader_module"):
            raise DatasetError(
                "`pyfunc_workflow` of the flavor mlflow.pyfunc is `python_model` or "
                f"`loader_module`, got {pyfunc_workflow!r}."
            )
        if not _is_module(flavor):
            raise DatasetError(f"`flavor` is a module such as mlflow.sklearn, got {flavor!r}.")
        self.flavor = flavor
        self.pyfunc_workflow = pyfunc_workflow

    def _module(self) -> ModuleType:
        try:
            return import_module(self.flavor)
        except ImportError as error:
            raise DatasetError(
                f"The flavor {self.flavor!r} can't be imported, is its library installed? {error}"
            ) from error


class MlflowModelTrackingDataset(_FlavorDataset):
    """A model logged to the run, and loaded from it.

    Args:
        flavor: MLflow's module for the kind of model, such as `mlflow.sklearn`.
        pyfunc_workflow: For `mlflow.pyfunc`: `python_model` or `loader_module`.
        load_args: Arguments of the flavor's `load_model`; with a `model_uri` that model is
            loaded, else the one last saved in the run.
        save_args: Arguments of the flavor's `log_model`, such as `registered_model_name`; `name`
            is by default the dataset's name in the catalog.
        metadata: Kept and not used.
    """

    def __init__(
        self,
        flavor: str,
        pyfunc_workflow: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(flavor, pyfunc_workflow)
        self._load_args = dict(load_args or {})
        self._given_uri: str | None = self._load_args.pop("model_uri", None)
        self._save_args = dict(save_args or {})
        self.metadata = metadata
        self.model_info: ModelInfo | None = None

    def load(self) -> Any:
        """Load the model."""
        self._use_server()
        return self._module().load_model(model_uri=self.model_uri, **self._load_args)

    def save(self, model: Any) -> None:
        """Log the model, and register it when `save_args` has a `registered_model_name`."""
        if self._given_uri:
            raise DatasetError(
                f"A dataset with `load_args.model_uri` ({self._given_uri}) is for loading only: "
                "MLflow's models can't be overwritten."
            )
        if not self._is_tracked:
            return
        run = self._resolve_run()
        run.flush()  # MLflow links the metrics that the run has now with the model
        arguments = {"name": self._model_name(), **self._save_args}
        with run.active():
            if self.flavor == "mlflow.pyfunc":
                arguments[str(self.pyfunc_workflow)] = model
                self.model_info = self._module().log_model(**arguments)
            else:
                self.model_info = self._module().log_model(model, **arguments)

    @property
    def model_uri(self) -> str:
        """The URI given in `load_args`, or that of the model last saved in the run."""
        if self._given_uri:
            return self._given_uri
        if self.model_info:
            return self.model_info.model_uri
        run = self._resolve_run()
        # Another process of this run may have saved it.
        saved = run.server.client.search_logged_models(
            [run.experiment_id],
            filter_string=f"source_run_id = '{run.run_id}' AND name = '{self._model_name()}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
            max_results=1,
        )
        if not saved:
            raise DatasetError(
                f"The run has no model '{self._model_name()}' yet. Save one first, or say in "
                "`load_args.model_uri` which to load."
            )
        return saved[0].model_uri

    def _model_name(self) -> str:
        return str(self._save_args.get("name") or _REFUSED_IN_NAME.sub("_", self._name or "model"))

    def _exists(self) -> bool:
        try:
            return bool(self.model_uri)
        except DatasetError:
            return False

    def _describe(self) -> dict[str, Any]:
        return {
            "flavor": self.flavor,
            "pyfunc_workflow": self.pyfunc_workflow,
            "model_uri": self._given_uri,
            "load_args": self._load_args,
            "save_args": self._save_args,
        }


class MlflowModelRegistryDataset(_FlavorDataset):
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
        super().__init__(flavor, pyfunc_workflow)
        if alias is not None and stage_or_version is not None:
            raise DatasetError(
                "`alias` and `stage_or_version` exclude each other, "
                f"got {alias!r} and {stage_or_version!r}."
            )
        self.model_name = model_name
        self.stage_or_version = "latest" if stage_or_version is None else stage_or_version
        self.alias = alias
        self._load_args = load_args or {}
        self.metadata = metadata

    @property
    def model_uri(self) -> str:
        """The model's URI in the registry."""
        if self.alias is not None:
            return f"models:/{self.model_name}@{self.alias}"
        return f"models:/{self.model_name}/{self.stage_or_version}"

    def load(self) -> Any:
        """Load the model."""
        self._use_server()
        return self._module().load_model(model_uri=self.model_uri, **self._load_args)

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Refuse: a model gets into the registry by being logged.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(
            "MlflowModelRegistryDataset only loads. To register a model, save it with "
            "MlflowModelTrackingDataset and `save_args: {registered_model_name: …}`."
        )

    def _describe(self) -> dict[str, Any]:
        return {"model_uri": self.model_uri, "flavor": self.flavor, "load_args": self._load_args}
