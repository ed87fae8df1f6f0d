"""Bind a run to the catalog of one Kedro run: decide whether it is tracked, open it, bind it.

Whoever has the catalog has the run: a hook, a dataset, a worker that the catalog was pickled for.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from kedro.framework import project
from kedro.io import MemoryDataset

from . import _kedro, stores
from .config.errors import ConfigError, SettingError
from .config.hiding import Secrets, hide_in_output
from .config.hiding import secrets_of as secrets_of  # for hooks and commands of extras
from .config.loading import mistake, package_name, read_credentials
from .datasets import outputs
from .datasets.base import TrackedDataset
from .datasets.metrics import MetricDataset
from .datasets.models import MlflowModelTrackingDataset, ModelDataset
from .datasets.validation import tags_of_refusal
from .extras import check_hooks
from .stores import credentials
from .stores.errors import artifact_error_in
from .stores.server import Server, lack_of_models
from .tracking import autologging, params, process, provenance, traces
from .tracking.active import active_run_id
from .tracking.ending import end_abandoned, finish
from .tracking.handle import RunHandle
from .tracking.opening import start

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline
    from kedro.pipeline.node import Node

    from .config.keys import ExperimentOptions, RequestHeaderProviderOptions
    from .stores.project import MlflowConfig

logger = logging.getLogger(__name__)

# The entry of the catalog that holds the binding. Kedro builds a catalog for each run and hands
# it, pickled, to every worker.
ENTRY = "mlflow:run"

# The entry that `keep_run_in` leaves for `open_run`.
STORE = "mlflow:store"

# The attribute of an error that has been reported: the opening of the run that it is reported to.
_REPORTED = "reported_to_mlflow_run"

# The context whose pipeline this thread is about to run. Kedro gives `before_pipeline_run` no
# context, and a service session shares hooks between threads.
_context: ContextVar[KedroContext] = ContextVar("kedro_context")

# The run that was active when that context was made: one that is active later is of a hook.
_run_before: ContextVar[str | None] = ContextVar("run_before_context", default=None)


def use_context(context: KedroContext) -> None:
    """Set the context of the pipeline that this thread runs next."""
    end_abandoned()  # or its run would be taken for one that somebody has opened
    _context.set(context)
    _run_before.set(active_run_id())


@contextmanager
def announcing() -> Iterator[None]:
    """Point MLflow at the project while other hooks may log, before the run is open.

    MLflow then opens a run by itself, which `open_run` goes on with. Not where a run of somebody
    else is open, which such hooks log to. MLflow stays at the project's server afterwards.
    """
    key, server, context = uuid4().hex, None, _context.get(None)
    if context and not _run_before.get() and not os.environ.get("MLFLOW_RUN_ID"):
        _announce(context, key)
    try:
        yield
        if credentials.exported(key) and "mlflow" in sys.modules:
            server = Server.in_use()
    finally:
        credentials.take_back(key)
    if server:
        server.use()


def _announce(context: KedroContext, key: str) -> None:
    try:
        config, variables = _config_of(context), read_credentials(context)
        stores.project.register_header_provider(context)
        more = {**traces.variables(), "MLFLOW_RUN_ID": config.tracking.run.id}
        config.announce(key, {**more, **variables})
    except Exception as error:  # the run says it, and a command without a run needs no MLflow
        logger.debug("MLflow isn't pointed at the project yet: %s", error)
    finally:
        vars(context).pop("mlflow", None)  # other hooks may still change what it is read from


def context_of_run() -> KedroContext:
    """Return the context whose pipeline this thread is about to run, for `before_pipeline_run`."""
    return _context.get()


def _config_of(context: KedroContext) -> MlflowConfig:
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    return config


def is_tracked(context: KedroContext, run_params: Mapping[str, Any]) -> bool:
    """Check whether a Kedro run is tracked: not where each of its pipelines is disabled."""
    disabled = _config_of(context).tracking.disable_tracking.pipelines
    return not set(provenance.pipeline_names(run_params)) <= set(disabled)


@dataclass(frozen=True)
class RunStore:
    """Where a run is kept instead of on the server that mlflow.yml names."""

    server: Server
    experiment: ExperimentOptions
    variables: Mapping[str, str]


def keep_run_in(
    catalog: DataCatalog,
    server: Server,
    experiment: ExperimentOptions,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Open the run of a catalog in another store than the one that mlflow.yml names.

    For a hook whose `before_pipeline_run` is a wrapper with `tryfirst`: it is called before the run
    is opened, wherever it stands in `HOOKS`.

    Args:
        catalog: The catalog of the Kedro run.
        server: The store. Where its `replayed_to` is set, the Mlflow datasets still load models and
            artifacts of other runs from the project's server.
        experiment: The experiment in that store.
        variables: Environment variables for the run, where neither the environment nor the
            credentials have them.

    Raises:
        RuntimeError: When the run is open already.
    """
    if _binding_of(catalog):
        raise RuntimeError(
            "keep_run_in: the run is open already, expected a call before that: in a "
            "before_pipeline_run with @hook_impl(wrapper=True, tryfirst=True)"
        )
    catalog[STORE] = RunStore(server, experiment, dict(variables or {}))


def open_run(
    context: KedroContext,
    run_params: dict[str, Any],
    pipeline: Pipeline,
    catalog: DataCatalog,
    command: Sequence[str] = ("run",),
    options: Sequence[str] = (),
) -> RunHandle:
    """Open the MLflow run of a Kedro run, with its parameters and tags.

    Args:
        context: The project's.
        run_params: What Kedro passes to hooks.
        pipeline: The part of the pipeline that runs.
        catalog: Its catalog.
        command: The words after `kedro` of the command that repeats the run.
        options: What that command has besides what was typed for `kedro run`.

    Raises:
        ConfigError: When a parameter is too long and `long_params_strategy` is `fail`, a setting
            names what isn't there, a hook of an extra is missing, or metrics name a wrong model.
    """
    config = _config_of(context)
    # One that can't be made fails here, before there is a run.
    datasets = {name: _kedro.uncached(catalog.get(name)) for name in pipeline.datasets()}
    _join_models_and_metrics(pipeline, datasets)
    secrets = secrets_of_run(context, pipeline, catalog)
    hide_in_output(secrets)
    variables = read_credentials(context)
    stores.project.register_header_provider(context)
    store = RunStore(config.server.connection, config.tracking.experiment, {})
    if STORE in list(catalog):
        store = catalog[STORE].load()
    unset = {key: text for key, text in store.variables.items() if key not in os.environ}
    run_params = provenance.in_typed_order(run_params)
    name = config.tracking.run.name or "+".join(provenance.pipeline_names(run_params))
    tags = provenance.run_tags(run_params, context.project_path, secrets, command, options)
    logged, long = params.of_pipeline(pipeline, catalog, config.tracking.params, secrets)
    try:
        check_hooks(config, pipeline, project.settings.HOOKS)
        run = start(
            store.server,
            config.tracking.model_copy(update={"experiment": store.experiment}),
            name=secrets.hide_in(name),
            params=logged,
            tags={**tags, **long},
            variables={**unset, **variables},
            project_path=context.project_path,
            env=context.env,
            run_before=_run_before.get(),
        )
    except SettingError as error:
        raise mistake(context, error.key, secrets.hide_in(str(error))) from error
    if config.tracking.autolog and provenance.runner_name(run_params) == "ThreadRunner":
        logger.warning(
            "MLflow's autologging follows one fit at a time in a process: of fits that overlap "
            "in threads it may lose values. ParallelRunner keeps them all."
        )
    return run


def secrets_of_run(context: KedroContext, pipeline: Pipeline, catalog: DataCatalog) -> Secrets:
    """Return what is hidden in a run: not the names in it."""
    parameters = catalog["parameters"].load() if "parameters" in list(catalog) else {}
    names = [*project.pipelines, *pipeline.datasets()]
    for node in pipeline.nodes:
        names += [node.name, str(node.func.__module__), *node.tags]
    return secrets_of(context, parameters, names)


def part_that_runs(
    context: KedroContext,
    run_params: Mapping[str, Any],
    pipeline: Pipeline,
    catalog: DataCatalog,
) -> Pipeline:
    """Return the part of a pipeline whose nodes run: `--only-missing-outputs` leaves some out."""
    if not run_params.get("only_missing_outputs"):
        return pipeline
    prepare_untracked(context, catalog)
    try:
        bind(context, pipeline, catalog, None)  # what there is already is of other runs
        return _kedro.part_that_runs(pipeline, catalog)
    finally:
        credentials.take_back(_untracked(catalog))


def prepare_untracked(context: KedroContext, catalog: DataCatalog) -> None:
    """Export the credentials with which a catalog without a run loads from the server."""
    config = _config_of(context)
    try:
        credentials.export(_untracked(catalog), read_credentials(context))
        stores.project.register_header_provider(context)
    except ConfigError as error:
        logger.info("Without credentials, because nothing is tracked: %s", error.message)
    if config.tracking.disable_tracking.disable_autologging and "mlflow" in sys.modules:
        autologging.keep_quiet()  # it would make a run of its own


def _untracked(catalog: DataCatalog) -> str:
    """Return what the variables of a catalog without a run are exported as."""
    return f"catalog {id(catalog)}"


@dataclass(frozen=True)
class Binding:
    """The entry of the catalog: the run, and what a worker needs to log to it."""

    run: RunHandle | None  # None where tracking is disabled
    package_name: str
    header_provider: RequestHeaderProviderOptions
    secrets: Secrets
    outputs: tuple[str, ...]  # names and patterns of the outputs to log as artifacts
    autolog: autologging.Flavors
    models: Mapping[str, tuple[str, ...]]  # by node, the datasets of models that it takes
    variables: dict[str, str | None] = field(repr=False)  # of the environment: credentials
    main_process: int
    managers: tuple[int, ...]

    def __setstate__(self, values: Mapping[str, Any]) -> None:
        """Unpickle a binding, and prepare the process for its run where that is a worker."""
        self.__dict__.update(values)
        if os.getpid() != self.main_process:
            hide_in_output(self.secrets)
        # Kedro's tasks register `settings.HOOKS` in every worker, but in one that was not forked
        # the settings are empty, and no hook would be called around the nodes. Kedro's own attempt
        # to configure the project there (`kedro.runner.task`) needs a package name that isn't set,
        # and must not find one: it fails at the second task of a worker.
        configured_package = cast("str | None", project.PACKAGE_NAME)
        if configured_package is None and not project.settings.HOOKS:
            project.settings.configure(f"{self.package_name}.settings")
        if not self.header_provider.pass_context:  # there is no context in a worker
            credentials.register_header_provider(self.header_provider, None)
        if os.getpid() != self.main_process:
            autologging.switch_on_in_worker(self.autolog)
        if process.is_child_of(self.main_process):
            # It belongs to this run. A forkserver has the environment of when it was started.
            credentials.export("worker", self.variables)
            process.follow_parent(self.main_process, self.managers)
            traces.flush_before_exit()


def bind(
    context: KedroContext,
    pipeline: Pipeline,
    catalog: DataCatalog,
    run: RunHandle | None,
) -> None:
    """Bind a run, or None where nothing is tracked, to a catalog and its Mlflow datasets.

    Raises:
        ConfigError: When the server is too old for the models that datasets log.
    """
    config = _config_of(context)
    datasets = {name: _kedro.uncached(catalog.get(name)) for name in pipeline.datasets()}
    binding = Binding(
        run,
        package_name(),
        config.server.request_header_provider,
        secrets_of_run(context, pipeline, catalog),
        tuple(config.tracking.artifacts.datasets),
        config.tracking.autolog if run else {},
        _models_by_node(pipeline, datasets),
        credentials.exported(run.opening if run else _untracked(catalog)),
        os.getpid(),
        tuple(process.managers()),
    )
    catalog[ENTRY] = MemoryDataset(binding, copy_mode="assign")
    generators = [node for node in pipeline.nodes if isgeneratorfunction(node.func)]
    in_chunks = {name for node in generators for name in node.outputs}
    saved = [datasets.get(name) for name in pipeline.all_outputs()]
    try:
        for name, dataset in datasets.items():
            if isinstance(dataset, TrackedDataset):
                dataset.in_chunks = name in in_chunks
                dataset.bind(_server_of(context, run), run, name)
        if run and any(isinstance(dataset, MlflowModelTrackingDataset) for dataset in saved):
            refuse_old_server(context, run)
    except BaseException as error:  # a dataset may look at its place, which may not be reachable
        fail(catalog, error)
        raise


def _models_by_node(
    pipeline: Pipeline, datasets: Mapping[str, Any]
) -> Mapping[str, tuple[str, ...]]:
    taken = {
        node.name: tuple(name for name in node.inputs if isinstance(datasets[name], ModelDataset))
        for node in pipeline.nodes
    }
    return {name: models for name, models in taken.items() if models}


def _join_models_and_metrics(pipeline: Pipeline, datasets: Mapping[str, Any]) -> None:
    """Let the datasets of metrics know the models that the same node takes or makes.

    Raises:
        ConfigError: When one names as its model what is none of them.
    """
    for node in pipeline.nodes:
        models = {
            name: datasets[name]
            for name in (*node.inputs, *node.outputs)
            if isinstance(datasets[name], ModelDataset)
        }
        for name in node.outputs:
            dataset = datasets[name]
            if not isinstance(dataset, MetricDataset):
                continue
            if dataset.model not in (None, *models):
                raise ConfigError(
                    f"catalog: {name}: model: expected a model that its node takes or makes "
                    f"({', '.join(models) or 'there is none'}), got {dataset.model!r}"
                )
            dataset.models = [m for n, m in models.items() if dataset.model in (None, n)]


def model_judged_by(node: Node, catalog: DataCatalog) -> str | None:
    """Return the id of the one model that a node takes; None when it takes several or none."""
    binding = _binding_of(catalog)
    names = binding.models.get(node.name, ()) if binding else ()
    ids = {_kedro.uncached(catalog.get(name)).model_id for name in names}
    return ids.pop() if len(ids) == 1 else None


def refuse_old_server(context: KedroContext, run: RunHandle) -> None:
    """Check with one request that the server of a run can keep models.

    Raises:
        ConfigError: When it can't.
    """
    if lack := lack_of_models(_server_of(context, run)):
        raise mistake(context, lack.key, str(lack))


def _server_of(context: KedroContext, run: RunHandle | None) -> Server:
    """Return the server of a run's models and artifacts; that of mlflow.yml where there is none."""
    if run and not run.server.replayed_to:  # a store on disk has the models of this run only
        return run.server
    return _config_of(context).server.connection


def _binding_of(catalog: DataCatalog) -> Binding | None:
    # Not `in catalog`: there a pattern such as "{default}" matches every name.
    return catalog[ENTRY].load() if ENTRY in list(catalog) else None


def run_of(catalog: DataCatalog) -> RunHandle | None:
    """Return the run that a catalog is bound to, or None when its pipeline isn't tracked."""
    binding = _binding_of(catalog)
    return binding.run if binding else None


@contextmanager
def in_worker(catalog: DataCatalog) -> Iterator[None]:
    """Work for a Kedro run in a process that others use too, such as a worker of Dask.

    The credentials of the run are in the environment for so long, and nothing of it stays.
    """
    binding, run = _binding_of(catalog), run_of(catalog)
    with credentials.exporting(binding.variables if binding else {}):
        try:
            yield
            if run:
                run.leave()  # what a generator has kept
        except BaseException:
            if run:
                run.leave(status="FAILED")  # what an exit has left
            raise
        finally:
            traces.flush()


def name_datasets(catalog: DataCatalog, config: dict[str, Any]) -> None:
    """Set the names of the Mlflow datasets of a catalog, as a Kedro run would.

    Takes what catalog.yml says too, so that no other dataset is made.
    """
    ours = f"{__name__.rpartition('.')[0]}.Mlflow"
    for name, entry in config.items():
        if isinstance(entry, dict) and str(entry.get("type")).startswith(ours):
            dataset = catalog.get(name)
            if isinstance(dataset, TrackedDataset):
                dataset.bind(None, None, name)


def log_output(catalog: DataCatalog, name: str, data: Any, *, in_chunks: bool = False) -> None:
    """Log what was saved to a dataset, when `tracking.artifacts.datasets` asks for it.

    What is saved in chunks is logged when the run ends, unless this is a worker, which doesn't
    know when that is.
    """
    binding, run = _binding_of(catalog), run_of(catalog)
    if not (binding and run and outputs.is_wanted(name, binding.outputs)):
        return
    log = partial(outputs.log_output, run, name, catalog[name], data)
    if in_chunks and run.is_ours:
        run.before_end(log, key=name)
    else:
        log()


def report(catalog: DataCatalog, error: BaseException, node: str | None = None) -> None:
    """Log to the run of a catalog why it fails; once for each error, where it comes up first.

    A worker does so too, because an error may not survive its way to the main process.
    """
    binding, run = _binding_of(catalog), run_of(catalog)
    if binding is None or run is None or getattr(error, _REPORTED, None) == run.opening:
        return
    with suppress(AttributeError):  # an exception with slots is reported twice
        setattr(error, _REPORTED, run.opening)
    hidden, lines = binding.secrets.hide_in, "".join(traceback.format_exception(error))
    cause = artifact_error_in(error) or error
    tags = {"kedro_error": f"{type(cause).__name__}: {cause}", **tags_of_refusal(error)}
    if node:
        tags["kedro_failed_node"] = node
    with _warning_of_failures():
        run.report_error({name: hidden(text) for name, text in tags.items()}, hidden(lines))


def fail(catalog: DataCatalog, error: BaseException) -> None:
    """End the run of a catalog as FAILED, with the reason."""
    report(catalog, error)
    with _warning_of_failures():
        end(catalog, "FAILED")


def end(catalog: DataCatalog, status: str) -> None:
    """End the run of a catalog, and take its credentials back."""
    run = run_of(catalog)
    if run and run.is_ours:
        finish(run, status)
    credentials.take_back(_untracked(catalog))


@contextmanager
def _warning_of_failures() -> Iterator[None]:
    """Log an error of MLflow as a warning: it must not hide the one that is reported to it."""
    try:
        yield
    except Exception as error:  # each kind of store for artifacts has errors of its own
        logger.warning("MLflow could not be told why the run fails: %s", error)


def sentence_of(catalog: DataCatalog, error: BaseException) -> ConfigError | None:
    """Return the sentence to show instead of an error whose cause is in the set-up."""
    binding, cause = _binding_of(catalog), artifact_error_in(error)
    return ConfigError(binding.secrets.hide_in(cause.message)) if binding and cause else None
