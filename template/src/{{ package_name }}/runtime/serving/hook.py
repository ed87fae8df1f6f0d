"""The hook that logs the inference pipeline of a training that has run as a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kedro.framework.hooks import hook_impl

from ..binding import context_of_run, fail, is_tracked, refuse_old_server, run_of, secrets_of_run
from ..config.loading import package_name
from .pipeline_ml import PipelineML

if TYPE_CHECKING:
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline

    from .pipeline_model import KedroPipelineModel

logger = logging.getLogger(__name__)


class ServingHook:
    """Make a model of the inference pipeline of `pipeline_ml_factory` when its training has run.

    Whether that can be done is checked before `MlflowHook` opens the run, and the model is logged
    before it ends the run, whatever the order in `HOOKS`.
    """

    @hook_impl(wrapper=True, tryfirst=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> Iterator[None]:
        """Check whether the inference pipeline can be logged as a model when all has run."""
        context = context_of_run()
        if not (isinstance(pipeline, PipelineML) and is_tracked(context, run_params)):
            return (yield)
        if pipeline.missing:
            names = ", ".join(sorted(pipeline.missing))
            logger.warning("No model will be logged: %s isn't in the part that runs", names)
            return (yield)
        model = _model_of(pipeline, catalog)
        import_packing().check(
            model,
            catalog,
            secrets_of_run(context, model.pipeline, catalog),
            pipeline.log_model_kwargs,
            given=pipeline.inputs(),
        )
        result = yield
        if run := run_of(catalog):
            try:
                refuse_old_server(context, run)
            except BaseException as error:
                fail(catalog, error)
                raise
        return result

    @hook_impl(trylast=True)
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Log the model, when there is one."""
        run = run_of(catalog)
        if run and isinstance(pipeline, PipelineML) and not pipeline.missing:
            model, arguments = _model_of(pipeline, catalog), pipeline.log_model_kwargs
            import_packing().log(run, model, catalog, package_name(), arguments)


def import_packing() -> Any:
    """Import what makes a model of a pipeline: its classes are MLflow's, whose import is slow."""
    return import_module(f"{__package__}.packing")


def _model_of(pipeline: PipelineML, catalog: DataCatalog) -> KedroPipelineModel:
    model: KedroPipelineModel = import_packing().KedroPipelineModel(
        pipeline.inference, catalog, pipeline.input_name, **pipeline.kpm_kwargs
    )
    return model
