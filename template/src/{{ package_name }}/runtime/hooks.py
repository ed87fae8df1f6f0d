"""Kedro's events, each handed to the run handle."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kedro.framework.hooks import hook_impl

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline
    from kedro.pipeline.node import Node

# The context whose pipeline this thread is about to run. Kedro gives `before_pipeline_run` no
# context, and a service session shares this hook between threads.
_context: ContextVar[KedroContext] = ContextVar("kedro_context")


class MlflowHook:
    """Track every pipeline that runs as one MLflow run. For `HOOKS` in settings.py.

    Whatever the order in `HOOKS`, the run is there before other hooks are called and ends after
    them, so that they can log to it too.
    """

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read `mlflow.yml` and offer it as `context.mlflow`."""
        from .loading import load_config

        config = load_config(context)
        context.mlflow = config  # type: ignore[attr-defined]
        _context.set(context)
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
            from .tracking import announce

            announce(config.server.connection, config.tracking.experiment)

    @hook_impl(tryfirst=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Open the run with all parameters and tags, and bind it to the run's catalog."""
        from .binding import track

        track(_context.get(), run_params, pipeline, catalog)

    @hook_impl(tryfirst=True)
    def before_node_run(self, catalog: DataCatalog) -> None:
        """Let the node's own `mlflow.log_metric(…)` land in the run."""
        from .binding import run_of

        if run := run_of(catalog):
            run.enter()

    @hook_impl(trylast=True)
    def after_node_run(self, catalog: DataCatalog) -> None:
        """Take the run back from the thread."""
        from .binding import run_of

        if run := run_of(catalog):
            run.leave()

    @hook_impl(trylast=True)
    def on_node_error(self, error: Exception, node: Node, catalog: DataCatalog) -> None:
        """Say which node failed, and why."""
        from .binding import run_of

        if run := run_of(catalog):
            run.leave()
            run.report_error(error, node.name)

    @hook_impl(trylast=True)
    def after_pipeline_run(self, catalog: DataCatalog) -> None:
        """End the run."""
        from .binding import run_of

        if run := run_of(catalog):
            run.finish("FINISHED")

    @hook_impl(trylast=True)
    def on_pipeline_error(self, catalog: DataCatalog) -> None:
        """End the run as failed."""
        from .binding import run_of

        if run := run_of(catalog):
            run.finish("FAILED")
