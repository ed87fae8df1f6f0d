"""Kedro's events, each handed to the run handle."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cached_property
from importlib.metadata import entry_points
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any

from kedro.framework.hooks import hook_impl

from . import binding, stores
from .config.errors import ConfigError
from .tracking import traces
from .tracking.ending import end_abandoned, leave_call

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline
    from kedro.pipeline.node import Node

# The catalog of the node whose outputs this thread is about to save: Kedro gives
# `after_dataset_saved` none.
_catalog: ContextVar[DataCatalog | None] = ContextVar("kedro_catalog", default=None)


class MlflowHook:
    """Track every pipeline that runs as one MLflow run. For `HOOKS` in settings.py.

    Its methods go around those of other hooks, whatever the order in `HOOKS`: they can log to the
    run too, and when one of them fails the run ends as well. What has to happen before the run is
    open, or after it has ended, is a wrapper with `tryfirst`.
    """

    @hook_impl(wrapper=True)
    def after_context_created(self, context: KedroContext) -> Iterator[None]:
        """Offer `context.mlflow`, and point MLflow at the project for what logs before the run."""
        _refuse_kedro_mlflow()
        _offer_config(context)
        binding.use_context(context)
        if shell := _shell():
            context.mlflow.announce(variables=traces.variables())  # type: ignore[attr-defined]
            if _after_cell not in shell.events.callbacks["post_run_cell"]:
                shell.events.register("post_run_cell", _after_cell)
            return (yield)
        with binding.announcing():
            return (yield)

    @hook_impl(wrapper=True)
    def after_catalog_created(
        self, catalog: DataCatalog, conf_catalog: dict[str, Any]
    ) -> Iterator[None]:
        """Set the names of a notebook's datasets; else as `after_context_created`."""
        if _shell():
            binding.name_datasets(catalog, conf_catalog)
            return (yield)
        with binding.announcing():
            return (yield)

    @hook_impl(wrapper=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> Iterator[None]:
        """Open the run with all parameters and tags, and bind it to the run's catalog."""
        context, part, run = binding.context_of_run(), pipeline, None
        if binding.is_tracked(context, run_params):
            part = binding.part_that_runs(context, run_params, pipeline, catalog)
            run = binding.open_run(context, run_params, part, catalog)
            # With Ctrl-C the pipeline goes away with Kedro's call, and no hook is called.
            weakref.finalize(pipeline, leave_call, run)
        else:
            binding.prepare_untracked(context, catalog)
        binding.bind(context, part, catalog, run)
        try:
            return (yield)
        except BaseException as error:  # Kedro calls no hook for it
            binding.fail(catalog, error)
            raise

    @hook_impl(wrapper=True)
    def before_node_run(self, node: Node, catalog: DataCatalog) -> Iterator[None]:
        """Make the run MLflow's active run, for the node's own `mlflow.log_metric(…)`."""
        run = binding.run_of(catalog)
        if run is None:
            return (yield)
        run.leave()  # what a generator has kept
        run.enter(model_id=binding.model_judged_by(node, catalog))
        try:
            return (yield)
        except BaseException as error:
            run.leave(status="FAILED")
            binding.report(catalog, error, node.name)
            raise

    @hook_impl(wrapper=True)
    def after_node_run(self, node: Node, catalog: DataCatalog) -> Iterator[None]:
        """Take back what `before_node_run` did."""
        _catalog.set(catalog)
        try:
            return (yield)
        finally:
            # The body of a generator only runs while its chunks are saved, until the next node.
            if not isgeneratorfunction(node.func) and (run := binding.run_of(catalog)):
                run.leave()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        """Log an output that `tracking.artifacts.datasets` asks for."""
        if catalog := _catalog.get():
            binding.log_output(
                catalog, dataset_name, data, in_chunks=isgeneratorfunction(node.func)
            )

    @hook_impl(wrapper=True)
    def on_node_error(self, error: Exception, node: Node, catalog: DataCatalog) -> Iterator[None]:
        """Log which node failed, and why."""
        try:
            return (yield)
        finally:
            if run := binding.run_of(catalog):
                run.leave(status="FAILED")
                binding.report(catalog, error, node.name)

    @hook_impl(wrapper=True)
    def after_pipeline_run(self, catalog: DataCatalog) -> Iterator[None]:
        """End the run."""
        try:
            result = yield
        except BaseException as error:
            binding.fail(catalog, error)
            raise
        _catalog.set(None)
        binding.end(catalog, "FINISHED")
        return result

    @hook_impl(wrapper=True)
    def on_pipeline_error(self, error: Exception, catalog: DataCatalog) -> Iterator[None]:
        """End the run as failed; show an error in one sentence where there is one for it."""
        try:
            result = yield
        finally:
            _catalog.set(None)
            binding.fail(catalog, error)
        if sentence := binding.sentence_of(catalog, error):
            raise sentence from error
        return result


def _refuse_kedro_mlflow() -> None:
    """Raise an error where the plugin would track the same runs, before it reads mlflow.yml."""
    from kedro.framework.project import settings  # its import sets up Kedro's logging

    modules = [type(hook).__module__ for hook in settings.HOOKS] + [
        plugin.module
        for plugin in entry_points(group="kedro.hooks")
        if plugin.dist and plugin.dist.name not in settings.DISABLE_HOOKS_FOR_PLUGINS
    ]
    if any(module.partition(".")[0] == "kedro_mlflow" for module in modules):
        raise ConfigError(
            "kedro-mlflow is installed, and would track every run a second time: uninstall it, or "
            'write DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow",) into settings.py.'
        )


def _offer_config(context: KedroContext) -> None:
    """Add the attribute `mlflow` to a context; it is read on first use, so commands stay fast."""
    kind = type(context)
    # A class for this context alone: those of other projects in the process have their own runtime.
    mlflow = cached_property(lambda context: stores.project.config_of(context))
    names = {"__module__": kind.__module__, "mlflow": mlflow}
    context.__class__ = type(kind.__name__, (kind,), names)


def _shell() -> Any:
    """Return IPython's shell in a notebook; nothing elsewhere."""
    # Another thread may be importing IPython, as MLflow does.
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython() if get_ipython else None


def _after_cell(result: Any) -> None:  # noqa: ARG001
    """End a run whose cell was interrupted, as soon as that cell has ended."""
    if "mlflow" in sys.modules:
        end_abandoned()
