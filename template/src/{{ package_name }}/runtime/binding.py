"""Bind a run to the catalog of one Kedro run, so that whoever has the catalog has the run."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from inspect import isgeneratorfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click
from kedro.framework import project
from kedro.io.core import is_parameter

from . import _kedro
from .config.errors import ConfigError, SettingError
from .config.keys import ExperimentOptions, RequestHeaderProviderOptions
from .config.loading import (
    all_credentials,
    configured_package,
    mistake,
    package_name,
    read_credentials,
)
from .datasets import outputs
from .datasets.base import TrackedDataset
from .datasets.models import MlflowModelTrackingDataset
from .extras import EXTRAS, hint, present
from .stores import credentials
from .stores import errors as failures
from .stores.project import MlflowConfig, register_header_provider
from .stores.server import Server, lack_of_models
from .tracking import autologging, params, process, provenance
from .tracking.ending import finish
from .tracking.handle import RunHandle
from .tracking.opening import start

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline

logger = logging.getLogger(__name__)

# The entry of the catalog that holds the binding. Kedro builds a catalog for each run and hands
# it, pickled, to every worker.
ENTRY = "mlflow:run"

# Names the version of the template that the runtime is of.
VERSION = Path(__file__).with_name("VERSION")

# The entry that `keep_run_in` leaves for `open_run`.
STORE = "mlflow:store"

# The context whose pipeline this thread is about to run. Kedro gives `before_pipeline_run` no
# context, and a service session shares hooks between threads.
_context: ContextVar[KedroContext] = ContextVar("kedro_context")


def use_context(context: KedroContext) -> None:
    """Take a context for that of the pipeline which this thread runs next."""
    _context.set(context)


def context_of_run() -> KedroContext:
    """Return the context whose pipeline this thread is about to run, for `before_pipeline_run`."""
    return _context.get()


@dataclass(frozen=True)
class Binding:
    """What the catalog carries: the run, and what a worker has to know of where it comes from."""

    run: RunHandle | None  # None where tracking is disabled
    package_name: str
    header_provider: RequestHeaderProviderOptions
    secrets: params.Secrets
    outputs: tuple[str, ...]  # names and patterns of the outputs to log as artifacts
    autolog: autologging.Flavors
    variables: dict[str, str | None] = field(repr=False)  # of the environment: credentials
    main_process: int
    managers: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, tuple(getattr(self, field.name) for field in fields(self))


def _arrive(*values: Any) -> Binding:
    """Unpickle a binding; in a worker that has no settings, take those of the binding's project.

    Kedro's tasks register `settings.HOOKS` in every worker, but in one that was not forked the
    settings are empty, and no hook would be called around the nodes. Kedro's own attempt to
    configure the project there (`kedro.runner.task`) needs a package name that isn't set, and
    must not find one: it fails at the second task of a worker.
    """
    binding = Binding(*values)
    if configured_package() is None and not project.settings.HOOKS:
        project.settings.configure(f"{binding.package_name}.settings")
    if not binding.header_provider.pass_context:  # there is no context in a worker
        credentials.register_header_provider(binding.header_provider, None)
    if os.getpid() != binding.main_process:
        autologging.switch_on_in_worker(binding.autolog)
    if process.is_child_of(binding.main_process):
        # It belongs to this run. A forkserver has the environment of the time when it was started.
        credentials.export("worker", binding.variables)
        process.follow_parent(binding.main_process, binding.managers)
    return binding


def _binding_of(catalog: DataCatalog) -> Binding | None:
    # Not `in catalog`: there a pattern such as "{default}" matches every name.
    if ENTRY not in list(catalog):
        return None
    binding: Binding = catalog[ENTRY].load()
    return binding


def run_of(catalog: DataCatalog) -> RunHandle | None:
    """Give the run that a catalog is bound to, or None when its pipeline isn't tracked."""
    binding = _binding_of(catalog)
    return binding.run if binding else None


@contextmanager
def in_worker(catalog: DataCatalog) -> Iterator[None]:
    """Work for a Kedro run in a process that others use too, such as a worker of Dask.

    The credentials of the run are in the environment for so long, and nothing of it stays.
    """
    binding = _binding_of(catalog)
    task = f"task {uuid4().hex}"
    run = binding.run if binding else None
    credentials.export(task, binding.variables if binding else {})
    try:
        yield
        if run:
            run.leave()  # what a generator has kept
    except BaseException:
        if run:
            run.leave(status="FAILED")  # what an exit has left
        raise
    finally:
        credentials.take_back(task)


def name_datasets(catalog: DataCatalog, config: dict[str, Any]) -> None:
    """Tell the Mlflow datasets of a catalog their names, as a Kedro run would.

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
    binding = _binding_of(catalog)
    run = binding.run if binding else None
    if not (binding and run and outputs.is_wanted(name, binding.outputs)):
        return
    log = partial(outputs.log_output, run, name, catalog[name], data)
    if in_chunks and run.is_ours:
        run.before_end(log, key=name)
    else:
        log()


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


def _untracked(catalog: DataCatalog) -> str:
    """Name what a catalog without a run has exported: it may still load from the server."""
    return f"catalog {id(catalog)}"


def report(catalog: DataCatalog, error: BaseException, node: str | None = None) -> None:
    """Say in the run of a catalog why it fails; once for each error, where it comes up first.

    A worker says it too, because an error may not survive its way to the main process.
    """
    binding = _binding_of(catalog)
    run = binding.run if binding else None
    if binding is None or run is None or getattr(error, _REPORTED, None) == run.opening:
        return
    with suppress(AttributeError):  # an exception with slots is told twice
        setattr(error, _REPORTED, run.opening)
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    error = failures.artifact_error_in(error) or error
    with _warning_of_failures():
        run.report_error(
            binding.secrets.hide_in(f"{type(error).__name__}: {error}"),
            binding.secrets.hide_in("".join(lines)),
            node,
        )


def sentence_of(catalog: DataCatalog, error: BaseException) -> ConfigError | None:
    """Give the sentence to show instead of an error whose cause is in the set-up."""
    binding, told = _binding_of(catalog), failures.artifact_error_in(error)
    return ConfigError(binding.secrets.hide_in(told.message)) if binding and told else None


_REPORTED = "reported_to_mlflow_run"


@contextmanager
def _warning_of_failures() -> Iterator[None]:
    """Don't let what MLflow has to complain of hide the error that it should be told."""
    try:
        yield
    except Exception as error:  # each kind of store for artifacts has errors of its own
        logger.warning("MLflow could not be told why the run fails: %s", error)


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
    """Have the run of a catalog opened in another store than mlflow.yml names.

    For a hook whose `before_pipeline_run` is a wrapper with `tryfirst`, so that it is called before
    the run is opened, wherever it stands in `HOOKS`.

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


def is_tracked(context: KedroContext, run_params: Mapping[str, Any]) -> bool:
    """Check whether a Kedro run is tracked: not where each of its pipelines is disabled."""
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    disabled = config.tracking.disable_tracking.pipelines
    return not set(provenance.pipeline_names(run_params)) <= set(disabled)


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
        ConfigError: When a parameter is too long and `long_params_strategy` is `fail`, or a setting
            names what isn't there.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    for name in pipeline.datasets():
        catalog.get(name)  # one that can't be made fails here, before there is a run
    _refuse_what_no_hook_heeds(context)
    run_params = _in_typed_order(run_params)
    secrets = secrets_of(context)
    variables = read_credentials(context)
    register_header_provider(context)
    logged, tags = _parameters(config, pipeline, catalog, secrets)
    server, tracked_as = config.server.connection, config.tracking
    if STORE in list(catalog):
        store: RunStore = catalog[STORE].load()
        server = store.server
        tracked_as = tracked_as.model_copy(update={"experiment": store.experiment})
        unset = {key: text for key, text in store.variables.items() if key not in os.environ}
        variables = {**unset, **variables}
    name = config.tracking.run.name or "+".join(provenance.pipeline_names(run_params))
    try:
        run = start(
            server,
            tracked_as,
            name=secrets.hide_in(name),
            params=logged,
            tags={**_tags(context, run_params, secrets, command, options), **tags},
            variables=variables,
            project_path=context.project_path,
        )
    except SettingError as error:
        raise mistake(context, error.key, secrets.hide_in(str(error))) from error
    if config.tracking.autolog and provenance.runner_name(run_params) == "ThreadRunner":
        logger.warning(
            "MLflow's autologging follows one fit at a time in a process: of fits that overlap "
            "in threads it may lose values. ParallelRunner keeps them all."
        )
    return run


def _refuse_what_no_hook_heeds(context: KedroContext) -> None:
    """Check that the extras which mlflow.yml asks for are there, with their hooks.

    Raises:
        ConfigError: When one isn't, saying how to get it.
    """
    config: Any = context.mlflow  # type: ignore[attr-defined]
    hooks = {type(hook).__name__ for hook in project.settings.HOOKS}
    for name, extra in EXTRAS.items():
        for key, value in extra.values.items():
            if reduce(getattr, key, config) != value or extra.hook in hooks:
                continue
            if name in present():
                what = f"{value} needs the hook of an extra: add {extra.hook}() to HOOKS"
                raise mistake(context, key, f"{what} in settings.py")
            raise mistake(context, key, hint(name, value))


def prepare_untracked(context: KedroContext, catalog: DataCatalog) -> None:
    """Let the datasets of a catalog without a run load models and artifacts from the server."""
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    try:
        credentials.export(_untracked(catalog), read_credentials(context))
        register_header_provider(context)
    except ConfigError as error:
        logger.info("Without credentials, because nothing is tracked: %s", error.message)
    if config.tracking.disable_tracking.disable_autologging and "mlflow" in sys.modules:
        autologging.keep_quiet()  # it would make a run of its own


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
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    datasets = {name: catalog.get(name) for name in pipeline.datasets()}
    catalog[ENTRY] = Binding(
        run,
        package_name(),
        config.server.request_header_provider,
        secrets_of(context),
        tuple(config.tracking.artifacts.datasets),
        config.tracking.autolog if run else {},
        credentials.exported(run.opening if run else _untracked(catalog)),
        os.getpid(),
        tuple(process.managers()),
    )
    try:
        _bind_datasets(pipeline, datasets, _server_of(context, run), run)
        if run and _saves_models(pipeline, datasets):
            refuse_old_server(context, run)
    except BaseException as error:  # a dataset may look at its place, which may not be reachable
        fail(catalog, error)
        raise


def _bind_datasets(
    pipeline: Pipeline,
    datasets: Mapping[str, Any],
    server: Server,
    run: RunHandle | None,
) -> None:
    """Tell each Mlflow dataset its run, and whether it is saved in chunks."""
    generators = [node for node in pipeline.nodes if isgeneratorfunction(node.func)]
    in_chunks = {name for node in generators for name in node.outputs}
    for name, dataset in datasets.items():
        tracked = _kedro.uncached(dataset)
        if isinstance(tracked, TrackedDataset):
            tracked.in_chunks = name in in_chunks
            tracked.bind(server, run, name)


def _saves_models(pipeline: Pipeline, datasets: Mapping[str, Any]) -> bool:
    """Check whether an output of a pipeline is logged as a model."""
    saved = [_kedro.uncached(datasets[name]) for name in pipeline.all_outputs() & datasets.keys()]
    return any(isinstance(dataset, MlflowModelTrackingDataset) for dataset in saved)


def refuse_old_server(context: KedroContext, run: RunHandle) -> None:
    """Check with one request that the server of a run can keep models.

    Raises:
        ConfigError: When it can't.
    """
    if lack := lack_of_models(_server_of(context, run)):
        raise mistake(context, lack.key, str(lack))


def _server_of(context: KedroContext, run: RunHandle | None) -> Server:
    """Return the server of a run's models and artifacts; that of mlflow.yml where there is none."""
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    # A store whose runs are replayed has those of this run only.
    return run.server if run and not run.server.replayed_to else config.server.connection


def _in_typed_order(run_params: dict[str, Any]) -> dict[str, Any]:
    """Return `run_params` with the pipelines in the order in which they were typed.

    Kedro passes them in any order, another one each time.
    """
    typed = list(dict.fromkeys(_typed().get("pipelines") or ()))
    if typed and set(typed) == set(run_params.get("pipeline_names") or ()):
        return {**run_params, "pipeline_names": typed}
    return run_params


def _parameters(
    config: MlflowConfig, pipeline: Pipeline, catalog: DataCatalog, secrets: params.Secrets
) -> tuple[dict[str, str], dict[str, str]]:
    """Read the parameters that the pipeline uses, ready to log, and those that become tags."""
    inputs = {name for node in pipeline.nodes for name in node.inputs}
    values = params.select(
        {
            name: catalog[name].load()
            for name in sorted(inputs)
            if is_parameter(name)
            if name in catalog
        }
    )
    options = config.tracking.params
    values = {name: secrets.hide(value, name) for name, value in values.items()}
    if options.dict_params.flatten:
        named = params.flatten(
            values, recursive=options.dict_params.recursive, sep=options.dict_params.sep
        )
    else:
        named = iter(values.items())
    texts = {name: secrets.hide_in(str(value)) for name, value in params.rename(named).items()}
    try:
        return params.split_long(
            texts,
            limit=options.max_length or params.parameter_limit(),
            strategy=options.long_params_strategy,
        )
    except ValueError as error:
        raise ConfigError(
            f"Parameters are {error}. Set tracking.params.long_params_strategy in mlflow.yml to "
            "'truncate' or 'tag', or tracking.params.dict_params.flatten to true."
        ) from error


def _typed() -> dict[str, Any]:
    """Give the options of the `kedro run` that this is; nothing when a script runs a session."""
    command = click.get_current_context(silent=True)
    return command.params if command and command.info_name == "run" else {}


def secrets_of(context: KedroContext) -> params.Secrets:
    """Return what is hidden in all that is logged: credentials, and what has a secret's name."""
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    return params.Secrets(
        tuple(config.tracking.redact),
        frozenset(params.secret_values(all_credentials(context))),
    )


def _tags(
    context: KedroContext,
    run_params: dict[str, Any],
    secrets: params.Secrets,
    command: Sequence[str],
    options: Sequence[str],
) -> dict[str, str]:
    options = [*provenance.command_options(_typed(), context.project_path), *options]
    hidden = [secrets.hide_in(option) for option in options]
    return {
        "km_template_version": VERSION.read_text("utf-8").strip(),
        **provenance.run_tags(secrets.hide(run_params), hidden, command),
        **provenance.source_tags(context.project_path, package_name()),
    }
