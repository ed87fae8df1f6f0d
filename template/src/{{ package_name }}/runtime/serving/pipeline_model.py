"""A pipeline as a model of MLflow; this module travels with every model and needs no project."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import kedro.runner
from kedro.io import (
    AbstractDataset,
    DataCatalog,
    DatasetError,
    MemoryDataset,
    SharedMemoryDataCatalog,
    SharedMemoryDataset,
)
from kedro.io.core import is_parameter
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner, ParallelRunner, SequentialRunner
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from .._kedro import uncached
from ..config.hiding import plain
from . import copies
from ._kedro import keep_hooks_out, without_confirms
from .pipeline_ml import PipelineError, PipelineML, check_inference

try:
    from kedro.validation import ParameterValidationError, ParameterValidator, TypeExtractor
except ImportError:  # Kedro before 1.3 hands dictionaries to nodes, whatever their type hints say
    TypeExtractor = None  # type: ignore[assignment, misc]

# How Kedro's MemoryDataset may hand out what it has; None lets it choose by the kind of data.
_COPY_MODES = ("assign", "copy", "deepcopy", None)

# Kedro's runners that a request for a prediction may name.
_RUNNERS = ("SequentialRunner", "ThreadRunner", "ParallelRunner")

# The entry of a prediction's catalog that keeps hooks out of the workers.
_NO_HOOKS = "model:no_hooks"

# Kinds of arguments that need not be given.
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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

    # MLflow takes a type hint of `predict` for the schema of the data, and wants there to be one:
    # no public hint says that any kind of data is fine (MLflow 3.17).
    _skip_type_hint_validation = True

    def __init__(
        self,
        pipeline: Pipeline,
        catalog: DataCatalog,
        input_name: str,
        runner: AbstractRunner | None = None,
        copy_mode: str | Mapping[str, str | None] | None = "assign",
    ) -> None:
        inference = pipeline.inference if isinstance(pipeline, PipelineML) else pipeline
        check_inference(inference, input_name)
        # What a node confirms to have processed is a matter of the project's datasets.
        self.pipeline = Pipeline([without_confirms(node) for node in inference.nodes])
        self.input_name = input_name
        (self.output_name,) = self.pipeline.outputs()
        self.parameters: dict[str, Any] = {}
        self._copy_modes = _copy_modes(self.pipeline, copy_mode)
        self._runner_name = _name_of(type(runner or SequentialRunner()))
        self._make_runner = _maker_of(runner or SequentialRunner())
        self._sources: dict[str, Mapping[str, Any] | None] = {}
        self._datasets = _LocalDatasets()
        self._data: dict[str, Any] | None = None
        for name in sorted(self.pipeline.inputs() - {input_name}):
            dataset = uncached(catalog.get(name))
            if is_parameter(name) and dataset is None:
                raise PipelineError(f"The inference pipeline needs {name!r}, which isn't there.")
            if dataset is None or (is_in_memory(dataset) and not is_parameter(name)):
                raise PipelineError(
                    f"The inference pipeline needs {name!r}, which is only in memory: give it an "
                    "entry in catalog.yml, so that it is there when the model is made."
                )
            if is_parameter(name):
                # The types of the training's nodes are no matter of these nodes.
                self.parameters[name] = plain(dataset.load())
            else:
                self._datasets[name] = dataset
        self._has_types = TypeExtractor is not None and bool(
            TypeExtractor({"inference": self.pipeline}).extract_types_from_pipelines()
        )
        if problem := self._problem_of_types(self.parameters):
            raise PipelineError(f"The inference pipeline can't take its parameters: {problem}")

    @property
    def modules(self) -> set[str]:
        """The modules that its nodes, datasets and runner are from."""
        used = [self._make_runner, *(node.func for node in self.pipeline.nodes)]
        for source in self._sources.values():
            used += _types_in(source)
        return {_module_of(thing) for thing in used}

    @property
    def inference_params(self) -> dict[str, Any]:
        """The parameters that a request may change, with their values here, and the runner."""
        own = {name.removeprefix("params:"): value for name, value in self.parameters.items()}
        return {"runner": self._runner_name, **own}

    def extract_pipeline_artifacts(self, parameters_saving_folder: Path) -> dict[str, str]:
        """Copy the datasets that the pipeline needs, for the argument `artifacts` of `log_model`.

        What is in no file is loaded and pickled.

        Args:
            parameters_saving_folder: Where to copy to; it has to stay until the model is logged.

        Returns:
            The path of each dataset's copy, by the dataset's name.

        Raises:
            DatasetError: When a dataset has nothing to load.
        """
        self._expect(self._datasets, "a model that was pickled has left its datasets behind")
        artifacts = {}
        for name, dataset in self._datasets.items():
            # Characters of two names may be replaced by the same.
            folder = parameters_saving_folder / re.sub(r"[^\w.-]", "_", name)
            while folder.exists():
                folder = folder.with_name(f"{folder.name}_")
            folder.mkdir(parents=True)
            try:
                self._sources[name] = copies.copy(dataset, folder)
            except DatasetError as error:
                raise DatasetError(f"{name!r} can't be copied into the model: {error}") from error
            artifacts[name] = str(folder)
        return artifacts

    def load_context(self, context: PythonModelContext) -> None:
        """Load every dataset that travels with the model into memory."""
        artifacts = context.artifacts or {}
        for given in (self._sources, artifacts):
            self._expect(given, "log_model needs the artifacts of extract_pipeline_artifacts")
        loaded = {
            name: copies.load(source, Path(artifacts[name]))
            for name, source in self._sources.items()
        }
        self._data = {**self._typed(self.parameters), **loaded}
        logging.getLogger("kedro.pipeline.node").addFilter(_is_logged)

    def _expect(self, given: Collection[str], reason: str) -> None:
        persisted = self.pipeline.inputs() - {self.input_name, *self.parameters}
        if missing := sorted(persisted.difference(given)):
            raise PipelineError(f"The model lacks {', '.join(missing)}: {reason}")

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
        runner = None if "params:runner" in self.parameters else given.pop("runner", None)
        make_runner = self._runner_maker(runner)
        data = {**self._data, **self._parameters_of(given), self.input_name: model_input}
        if make_runner is SequentialRunner:
            return self._call_nodes(data)
        return self._run(make_runner(), data)

    def _call_nodes(self, data: dict[str, Any]) -> Any:
        """Do what a SequentialRunner does, without its catalog."""
        before = _is_predicting.set(True)
        try:
            for node in self.pipeline.nodes:
                data.update(node.run({name: self._input(name, data[name]) for name in node.inputs}))
        finally:
            _is_predicting.reset(before)
        return data[self.output_name]

    def _run(self, runner: AbstractRunner, data: Mapping[str, Any]) -> Any:
        datasets = {name: self._in_memory(name, value) for name, value in data.items()}
        if isinstance(runner, ParallelRunner):  # which makes datasets that processes can share
            hooks = MemoryDataset(_NoHooks(), copy_mode="assign")
            catalog: DataCatalog = SharedMemoryDataCatalog({**datasets, _NO_HOOKS: hooks})
        else:
            outputs = {name: self._in_memory(name) for name in self.pipeline.all_outputs()}
            catalog = DataCatalog({**datasets, **outputs})
        return runner.run(self.pipeline, catalog)[self.output_name].load()

    def _in_memory(self, name: str, *value: Any) -> MemoryDataset:
        mode = self._copy_modes[name]
        if mode == "copy" and not all(hasattr(data, "copy") for data in value or [None]):
            mode = None  # Kedro's choice for a number, and for what isn't known yet
        return MemoryDataset(*value, copy_mode=mode)  # type: ignore[arg-type, misc]

    def _input(self, name: str, value: Any) -> Any:
        """Return a value as a node gets it: a copy, if that is how it is handed out."""
        if self._copy_modes[name] == "assign":
            return value
        return self._in_memory(name, value).load()

    def _parameters_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that a request gives, by the names of their datasets."""
        values = {}
        for name, value in given.items():
            dataset = f"params:{name}"
            if name == "parameters" and dataset not in self.parameters:
                dataset = name
            if dataset not in self.parameters:
                expected = " or ".join(map(repr, self.inference_params))
                raise _bad_request(f"params: unknown {name!r}, expected {expected}")
            values[dataset] = value
        if problem := self._problem_of_types(values):
            raise _bad_request(f"params: {problem}")
        return self._typed(values)

    def _typed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters of the types that the nodes' hints name, as Kedro hands them to nodes.

        Raises:
            ParameterValidationError: When a value doesn't fit its type.
        """
        if not self._has_types:
            return dict(values)
        validate = ParameterValidator({"inference": self.pipeline}).validate_raw_params
        typed = {}
        for name, value in values.items():
            key = name.removeprefix("params:")
            typed[name] = validate(value) if name == key else validate({key: value})[key]
        return typed

    def _problem_of_types(self, values: Mapping[str, Any]) -> str | None:
        """Return in one line which parameters don't fit the types of the nodes."""
        try:
            self._typed(values)
        except ParameterValidationError as error:
            return " ".join(str(error).split())
        return None

    def _runner_maker(self, name: str | None) -> Callable[[], AbstractRunner]:
        """Return what makes the runner that a request names, or that the model has."""
        if name in (None, self._runner_name):
            return self._make_runner
        # No other class: a request must not have just anything imported and called.
        if name not in _RUNNERS:
            expected = " or ".join(dict.fromkeys((self._runner_name, *_RUNNERS)))
            raise _bad_request(f"params: runner: expected {expected}, got {name!r}")
        runner: Callable[[], AbstractRunner] = getattr(kedro.runner, name)
        return runner

    def __getstate__(self) -> dict[str, Any]:
        # MLflow may load a model before it pickles it. Its data travels as artifacts.
        return {**self.__dict__, "_data": None if self._datasets else self._data}


def is_in_memory(dataset: AbstractDataset[Any, Any]) -> bool:
    """Check whether the data of a dataset is gone when its run ends."""
    return isinstance(dataset, MemoryDataset | SharedMemoryDataset)


class _LocalDatasets(dict[str, AbstractDataset[Any, Any]]):
    """The datasets of the place where a model is made: their paths and credentials stay there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _LocalDatasets, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _LocalDatasets:
        return self


def _types_in(source: Any) -> Iterator[Any]:
    """Yield the type of a dataset, and of the one inside it, from its configuration."""
    if isinstance(source, Mapping):
        yield source["type"]
        yield from _types_in(source.get("dataset"))
    elif source is not None:
        yield source


def _module_of(thing: Any) -> str:
    """Return the module of a class or function, which may be named as in catalog.yml."""
    while isinstance(thing, partial):
        thing = thing.func
    if isinstance(thing, str):
        return thing
    return str(getattr(thing, "__module__", None) or type(thing).__module__)


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


def _maker_of(runner: AbstractRunner) -> Callable[[], AbstractRunner]:
    """Return what makes such a runner: one that was started can't be pickled, nor shared."""
    kind = type(runner)
    options = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        kept_as = [attribute for attribute in (f"_{name}", name) if hasattr(runner, attribute)]
        if kept_as:
            options[name] = getattr(runner, kept_as[0])
        elif parameter.default is parameter.empty and parameter.kind not in _VARIABLE:
            raise PipelineError(
                f"runner: {kind.__name__} can't travel with a model: expected it to keep its "
                f"argument {name!r} as self.{name} or self._{name}"
            )
    if kind is SequentialRunner and not any(options.values()):
        return SequentialRunner
    return partial(kind, **options)


def _bad_request(what: str) -> MlflowException:
    """Return the error that MLflow's scoring server answers with status 400."""
    return MlflowException.invalid_parameter_value(what)  # type: ignore[no-any-return]


class _NoHooks:
    """Reaches each worker of a prediction within its first task, and keeps hooks out of it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _keep_hooks_out, ()


def _keep_hooks_out() -> _NoHooks:
    keep_hooks_out()
    return _NoHooks()


def _is_logged(record: logging.LogRecord) -> bool:
    """Leave out the line that Kedro logs for each node, while a model predicts.

    A service would log little else, and it takes many times as long as calling the node.
    """
    return record.levelno > logging.INFO or not _is_predicting.get()


_is_predicting = ContextVar("is_predicting", default=False)
