"""Log a pipeline as a model to a run of its own, with the data that is there now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..binding import bind, end, fail, open_run, secrets_of
from ..config.loading import package_name
from . import packing
from .pipeline_model import KedroPipelineModel

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline
    from mlflow.models.model import ModelInfo


def modelify(
    context: KedroContext,
    run_params: dict[str, Any],
    pipeline: Pipeline,
    input_name: str,
    copy_mode: str,
    arguments: dict[str, Any],
    options: Sequence[str],
) -> ModelInfo:
    """Log a pipeline as a model to a run of its own, with what the catalog has for it now.

    Args:
        context: The project's.
        run_params: What Kedro would pass to hooks if the pipeline ran.
        pipeline: The pipeline, or one of `pipeline_ml_factory`, whose inference is taken.
        input_name: The input that is given for each prediction.
        copy_mode: See `KedroPipelineModel`.
        arguments: See `packing.log`.
        options: What the command that repeats this has besides pipeline, environment and
            parameters.
    """
    catalog: DataCatalog = context.catalog  # type: ignore[assignment]
    model = KedroPipelineModel(pipeline, catalog, input_name, copy_mode=copy_mode)
    packing.check(model, catalog, secrets_of(context), arguments)
    run = open_run(context, run_params, model.pipeline, catalog, ("mlflow", "modelify"), options)
    bind(context, model.pipeline, catalog, run)
    try:
        info = packing.log(run, model, catalog, package_name(), arguments)
    except BaseException as error:
        fail(catalog, error)
        raise
    end(catalog, "FINISHED")
    return info
