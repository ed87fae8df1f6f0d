"""A training pipeline that knows the inference pipeline to make a model of at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import update_wrapper
from inspect import isgeneratorfunction
from typing import Any, Concatenate, ParamSpec

import click
from kedro.io.core import is_parameter
from kedro.pipeline import Node, Pipeline

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")

# Arguments of MLflow's `log_model` that the pipeline itself is given as, and those of
# `KedroPipelineModel` that can be chosen.
_GIVEN_BY_PIPELINE = {"python_model", "artifacts", "loader_module", "data_path"}
_KPM_KWARGS = {"runner", "copy_mode"}


class PipelineError(click.ClickException):
    """A pipeline that can't become a model; `kedro` prints the sentence, with exit status 1."""


def pipeline_ml_factory(
    training: Pipeline,
    inference: Pipeline,
    input_name: str,
    kpm_kwargs: Mapping[str, Any] | None = None,
    log_model_kwargs: Mapping[str, Any] | None = None,
) -> PipelineML:
    """Return a training pipeline that logs an inference pipeline as a model when its run ends.

    What the inference needs of the training's datasets and parameters is logged with it.

    Args:
        training: The pipeline to run.
        inference: The pipeline to predict with. It has one output, and its inputs are
            `input_name`, datasets of the training (each with an entry in the catalog, because what
            is only in memory is gone when the training ends), and parameters.
        input_name: The input of the inference that is given for each prediction.
        kpm_kwargs: Arguments of `KedroPipelineModel`: `runner`, `copy_mode`.
        log_model_kwargs: Arguments of `mlflow.pyfunc.log_model`. By default `name` is `model`,
            and `signature` is `auto`: inferred from the data of `input_name`, the output and the
            parameters. There may be a `registered_model_alias` beside a `registered_model_name`.

    Returns:
        The training pipeline, to be used like any other.

    Raises:
        PipelineError: When that can't be done, naming the dataset or argument.
    """
    check_inference(inference, input_name)
    pipeline = PipelineML(
        training.nodes,
        inference=inference,
        input_name=input_name,
        kpm_kwargs=kpm_kwargs,
        log_model_kwargs=log_model_kwargs,
    )
    if pipeline.missing:
        raise PipelineError(
            f"The inference pipeline needs {_quoted(pipeline.missing)}, which the training "
            "pipeline neither makes nor takes: expected its inputs to be the input_name "
            f"{input_name!r}, parameters and datasets of the training."
        )
    return pipeline


class PipelineML(Pipeline):
    """A training pipeline with its inference pipeline; made by `pipeline_ml_factory`.

    Kedro filters and tags pipelines before it runs them: what comes out is one of these again.
    Pipelines that others are added to are plain ones, and say so.
    """

    needed_hook = "ServingHook"  # without it no model would be logged

    def __init__(
        self,
        nodes: Iterable[Node | Pipeline],
        *,
        inference: Pipeline,
        input_name: str,
        kpm_kwargs: Mapping[str, Any] | None = None,
        log_model_kwargs: Mapping[str, Any] | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> None:
        super().__init__(nodes, tags=tags)
        self.inference = inference
        self.input_name = input_name
        self.kpm_kwargs = dict(kpm_kwargs or {})
        self.log_model_kwargs = _log_model_kwargs(log_model_kwargs)
        if unknown := self.kpm_kwargs.keys() - _KPM_KWARGS:
            expected = " or ".join(sorted(_KPM_KWARGS))
            raise PipelineError(f"kpm_kwargs: unexpected {_quoted(unknown)}, expected {expected}")

    @property
    def training(self) -> Pipeline:
        """The training as a plain pipeline."""
        return Pipeline(self.nodes)

    @property
    def missing(self) -> set[str]:
        """Inputs that the inference lacks, when of the training only these nodes run."""
        known = {_without_transcoding(name) for name in self.datasets()}
        return {
            name
            for name in self.inference.inputs() - {self.input_name}
            if not is_parameter(name) and _without_transcoding(name) not in known
        }

    @staticmethod
    def _keeping(
        method: Callable[Concatenate[Pipeline, _P], Pipeline],
    ) -> Callable[Concatenate[PipelineML, _P], PipelineML]:
        """Return a method that does the same to the training, and keeps the inference."""

        def keep(self: PipelineML, /, *args: _P.args, **kwargs: _P.kwargs) -> PipelineML:
            return PipelineML(
                method(self.training, *args, **kwargs).nodes,
                inference=self.inference,
                input_name=self.input_name,
                kpm_kwargs=self.kpm_kwargs,
                log_model_kwargs=self.log_model_kwargs,
            )

        return update_wrapper(keep, method)

    filter = _keeping(Pipeline.filter)
    tag = _keeping(Pipeline.tag)
    from_inputs = _keeping(Pipeline.from_inputs)
    from_nodes = _keeping(Pipeline.from_nodes)
    to_outputs = _keeping(Pipeline.to_outputs)
    to_nodes = _keeping(Pipeline.to_nodes)
    only_nodes = _keeping(Pipeline.only_nodes)
    only_nodes_with_tags = _keeping(Pipeline.only_nodes_with_tags)
    only_nodes_with_inputs = _keeping(Pipeline.only_nodes_with_inputs)
    only_nodes_with_outputs = _keeping(Pipeline.only_nodes_with_outputs)
    only_nodes_with_namespaces = _keeping(Pipeline.only_nodes_with_namespaces)
    __and__ = _keeping(Pipeline.__and__)

    def __add__(self, other: Any) -> Pipeline:
        if not isinstance(other, Pipeline):
            return NotImplemented
        if not other.nodes:  # what Kedro adds the pipelines of `--pipelines` to
            return self
        return self._plain_sum(self.training + other)

    def __radd__(self, other: Any) -> Pipeline:
        return self if other == 0 else self.__add__(other)  # 0 is where `sum` begins

    def __or__(self, other: Any) -> Pipeline:
        return self.__add__(other)

    __ror__ = __or__

    def __sub__(self, other: Any) -> Pipeline:
        if not isinstance(other, Pipeline):
            return NotImplemented
        return self._plain_sum(self.training - other)

    def _plain_sum(self, pipeline: Pipeline) -> Pipeline:
        logger.warning(
            "No model is made of an inference pipeline at the end of this one: a pipeline of "
            "pipeline_ml_factory became a plain one when another was added to it or taken from it."
        )
        return pipeline


def check_inference(inference: Pipeline, input_name: str) -> None:
    """Check that an inference pipeline can be a model.

    Raises:
        PipelineError: When it can't, saying why.
    """
    outputs, inputs = inference.outputs(), inference.inputs()
    if len(outputs) != 1:
        raise PipelineError(
            f"The inference pipeline has {len(outputs)} outputs, {_quoted(outputs)}: expected one, "
            "the prediction."
        )
    if input_name not in inputs:
        raise PipelineError(
            f"input_name: expected an input of the inference pipeline, one of {_quoted(inputs)}, "
            f"got {input_name!r}"
        )
    saved = inference.all_outputs()
    for node in inference.nodes:
        if isgeneratorfunction(node.func):
            raise PipelineError(
                f"The node {node.name!r} of the inference pipeline yields its output in chunks: "
                "expected one that returns it, because a prediction is made in memory."
            )
        for name in node.inputs:
            if name not in saved and name not in inputs:  # the same dataset by another name
                plain = _without_transcoding(name)
                raise PipelineError(
                    f"The inference pipeline saves {plain!r} and loads it as {name!r}: expected "
                    "one name, because a prediction is made in memory."
                )


def _log_model_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    kwargs = dict(given or {})
    if refused := kwargs.keys() & _GIVEN_BY_PIPELINE:
        raise PipelineError(
            f"log_model_kwargs: unexpected {_quoted(refused)}, the pipeline is the model"
        )
    if "artifact_path" in kwargs:  # MLflow's earlier word for `name`
        if "name" in kwargs:
            raise PipelineError(
                "log_model_kwargs: expected name or artifact_path, which is MLflow's earlier word "
                f"for it, got {kwargs['name']!r} and {kwargs['artifact_path']!r}"
            )
        kwargs["name"] = kwargs.pop("artifact_path")
    if kwargs.get("registered_model_alias") and not kwargs.get("registered_model_name"):
        raise PipelineError(
            "log_model_kwargs: expected a registered_model_name beside registered_model_alias, got "
            f"{kwargs['registered_model_alias']!r} alone"
        )
    return {"name": "model", "signature": "auto", **kwargs}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _without_transcoding(name: str) -> str:
    return name.partition("@")[0]
