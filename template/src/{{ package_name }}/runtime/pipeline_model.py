"""A pipeline as a model of MLflow; this module travels with every model and needs no project."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped] # comes with MLflow
import kedro.runner
from kedro.io import (
    AbstractDataset,
    DataCatalog,
    DatasetError,
    MemoryDataset,
    SharedMemoryDataCatalog,
)
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner, ParallelRunner, SequentialRunner
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from .datasets.files import copy_files, load_copy, uncached
from .datasets.tracked import TrackedDataset
from .pipeline_ml import PipelineError, PipelineML, check_inference, is_parameter

# How Kedro's MemoryDataset may hand out what it has; None lets it choose by the kind of data.
_COPY_MODES = ("assign", "copy", "deepcopy", None)

# Kedro's runners that a request for a prediction may name.
_RUNNERS = ("SequentialRunner", "ThreadRunner", "ParallelRunner")

# Where a dataset that is in no file has its data.
_PICKLE = "data.pkl"


class KedroPipelineModel(PythonModel):
    """Predict by running a pipeline in memory.

    What the pipeline takes besides the input to predict from is copied from the catalog by
    `extract_pipeline_artifacts`, and loaded when the model is. A prediction touches no disk, no
    hook and no MLflow; predictions may be made in several threads at once.

    Args:
        pipeline: The inference pipeline, or what `pipeline_ml_factory` made of it.
        catalog: Where its parameters and its persisted datasets are.
        input_name: The input that is given for each prediction.
        runner: The runner to predict with; by default the nodes are called one after another.
        copy_mode: How data is handed to nodes: `assign` as it is, which is fastest and right for
            nodes that change nothing in place, `copy`, `deepcopy`, or None for Kedro's choice by
            the kind of data; a dictionary has one for each dataset that isn't to get None.

    Raises:
        PipelineError: When the pipeline can't be a model, naming the dataset that is in the way.
    """

    # MLflow takes a type hint of `predict` for the schema of the data, and wants there to be one.
    _skip_type_hint_validation = True

    def __init__(
        self,
        pipeline: Pipeline,
        catalog: DataCatalog,
        input_name: str,
        runner: AbstractRunner | None = None,
        copy_mode: str | Mapping[str, str | None] | None = "assign",
    ) -> None:
        self.pipeline = pipeline.inference if isinstance(pipeline, PipelineML) else pipeline
        check_inference(self.pipeline, input_name)
        self.input_name = input_name
        (self.output_name,) = self.pipeline.outputs()
        self.parameters: dict[str, Any] = {}
        self._copy_modes = _copy_modes(self.pipeline, copy_mode)
        self._runner_name = _name_of(type(runner or SequentialRunner()))
        self._make_runner = _recipe(runner or SequentialRunner())
        self._sources: dict[str, Mapping[str, Any] | None] = {}
        self._datasets: dict[str, AbstractDataset[Any, Any]] = {}
        self._data: dict[str, Any] | None = None
        for name in sorted(self.pipeline.inputs() - {input_name}):
            dataset = uncached(catalog.get(name))
            if dataset is None and is_parameter(name):
                raise PipelineError(f"The inference pipeline needs {name!r}, which isn't there.")
            if dataset is None or (dataset._EPHEMERAL and not is_parameter(name)):
                raise PipelineError(
                    f"The inference pipeline needs {name!r}, which is only in memory: give it an "
                    "entry in catalog.yml, so that it is there when the model is made."
                )
            if is_parameter(name):
                self.parameters[name] = dataset.load()
            else:
                self._datasets[name] = dataset

    @property
    def inference_params(self) -> dict[str, Any]:
        """The parameters that a request may change, with their values here, and the runner."""
        own = {name.removeprefix("params:"): value for name, value in self.parameters.items()}
        return {"runner": self._runner_name, **own}

    def extract_pipeline_artifacts(self, parameters_saving_folder: Path) -> dict[str, str]:
        """Copy the datasets that the pipeline needs, for the argument `artifacts` of `log_model`.

        Takes a folder to copy to, which has to stay until the model is logged. Gives the path of
        each dataset's copy. What is in no file is loaded and pickled.

        Raises:
            DatasetError: When a dataset has nothing to load.
        """
        artifacts = {}
        for number, (name, dataset) in enumerate(self._datasets.items()):
            folder = parameters_saving_folder / _file_name(name)
            if folder.exists():  # another name that differs in what files can't have
                folder = folder.with_name(f"{folder.name}_{number}")
            folder.mkdir(parents=True)
            try:
                self._sources[name] = _copy(dataset, folder)
            except DatasetError as error:
                raise DatasetError(f"{name!r} can't be copied into the model: {error}") from error
            artifacts[name] = str(folder)
        return artifacts

    def load_context(self, context: PythonModelContext) -> None:
        """Load every dataset that travels with the model into memory."""
        artifacts = context.artifacts or {}
        if missing := self._sources.keys() ^ artifacts.keys():
            raise PipelineError(
                "The model and its artifacts don't fit: expected as artifacts what "
                f"extract_pipeline_artifacts gives, got another set of {sorted(missing)}"
            )
        loaded = {name: _load(self._sources[name], Path(artifacts[name])) for name in artifacts}
        self._data = {**self.parameters, **loaded}
        logging.getLogger("kedro.pipeline.node").addFilter(_no_nodes)

    def predict(  # type: ignore[no-untyped-def]
        self,
        context: PythonModelContext | None,  # noqa: ARG002
        model_input,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the pipeline on an input.

        Takes the data for the dataset `input_name`, and in `params` other values of parameters
        (`x` for `params:x`) and the name of another `runner`. Gives the pipeline's output.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, when `params` has what isn't known.
        """
        if self._data is None:
            raise PipelineError("The model isn't loaded: use mlflow.pyfunc.load_model.")
        given = dict(params or {})
        wanted = None if "params:runner" in self.parameters else given.pop("runner", None)
        make_runner = self._runner_named(wanted)
        data = {**self._data, **self._overridden(given), self.input_name: model_input}
        if make_runner is SequentialRunner:
            return self._call_nodes(data)
        return self._run(make_runner(), data)

    def _call_nodes(self, data: dict[str, Any]) -> Any:
        """Do what a SequentialRunner does, without its catalog."""
        before = _predicting.set(True)
        try:
            for node in self.pipeline.nodes:
                inputs = {name: self._handed(name, data[name]) for name in node.inputs}
                data.update(node.run(inputs))
        finally:
            _predicting.reset(before)
        return data[self.output_name]

    def _run(self, runner: AbstractRunner, data: Mapping[str, Any]) -> Any:
        kind = SharedMemoryDataCatalog if isinstance(runner, ParallelRunner) else DataCatalog
        catalog = kind(
            datasets={
                name: MemoryDataset(value, copy_mode=self._copy_modes[name])  # type: ignore[arg-type]
                for name, value in data.items()
            }
        )
        return runner.run(self.pipeline, catalog)[self.output_name].load()

    def _handed(self, name: str, value: Any) -> Any:
        mode = self._copy_modes[name]
        if mode == "assign":
            return value
        return MemoryDataset(value, copy_mode=mode).load()  # type: ignore[arg-type]

    def _overridden(self, given: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in given.items():
            dataset = name if name == "parameters" else f"params:{name}"
            if dataset not in self.parameters:
                raise _refused(f"params: unknown {name!r}, expected {self._known_params()}")
            values[dataset] = value
        return values

    def _known_params(self) -> str:
        return " or ".join(repr(name) for name in self.inference_params)

    def _runner_named(self, name: str | None) -> Callable[[], AbstractRunner]:
        if name in (None, self._runner_name):
            return self._make_runner
        # No other class: a request must not have just anything imported and called.
        if name not in _RUNNERS:
            known = dict.fromkeys((self._runner_name, *_RUNNERS))
            raise _refused(f"params: runner: expected {' or '.join(known)}, got {name!r}")
        runner: Callable[[], AbstractRunner] = getattr(kedro.runner, name)
        return runner

    def __getstate__(self) -> dict[str, Any]:
        # The datasets of the place where it was made, with its paths and credentials, stay there.
        return {**self.__dict__, "_datasets": {}, "_data": None}


def _copy(dataset: AbstractDataset[Any, Any], folder: Path) -> Mapping[str, Any] | None:
    """Copy what a dataset would load; gives the dataset that loads the copy, None for a pickle."""
    if isinstance(dataset, TrackedDataset):
        source = dataset.copy_to(folder)
    else:
        source = copy_files(dataset, folder)
    if source is None:
        (folder / _PICKLE).write_bytes(cloudpickle.dumps(dataset.load()))
    return source


def _load(source: Mapping[str, Any] | None, folder: Path) -> Any:
    if source is None:
        return cloudpickle.loads((folder / _PICKLE).read_bytes())
    return load_copy(source, folder)


def _file_name(dataset: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in dataset)


def _copy_modes(
    pipeline: Pipeline, given: str | Mapping[str, str | None] | None
) -> dict[str, str | None]:
    names = pipeline.datasets()
    modes = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, mode in modes.items():
        if mode not in _COPY_MODES or name not in names:
            raise PipelineError(
                "copy_mode: expected assign, copy, deepcopy or nothing, or a dictionary of them by "
                f"the names of datasets of the inference pipeline, got {given!r}"
            )
    return {**dict.fromkeys(names), **modes}


def _name_of(runner: type[AbstractRunner]) -> str:
    if runner.__name__ in _RUNNERS and getattr(kedro.runner, runner.__name__) is runner:
        return str(runner.__name__)
    return f"{runner.__module__}.{runner.__qualname__}"


def _recipe(runner: AbstractRunner) -> Callable[[], AbstractRunner]:
    """Give what makes such a runner: one that was started can't travel, nor be shared."""
    kind = type(runner)
    options = {
        name: getattr(runner, f"_{name}")
        for name in inspect.signature(kind).parameters
        if hasattr(runner, f"_{name}")
    }
    if kind is SequentialRunner and not any(options.values()):
        return SequentialRunner
    return partial(kind, **options)


def _refused(what: str) -> MlflowException:
    """Make the error that MLflow's scoring server answers with status 400."""
    return MlflowException.invalid_parameter_value(what)  # type: ignore[no-any-return]


class _NoNodes(logging.Filter):
    """Hide the line that Kedro tells at each node, while a model predicts.

    A service would tell little else, and it takes many times as long as calling the node.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not _predicting.get()


_predicting = ContextVar("predicting", default=False)
_no_nodes = _NoNodes()
