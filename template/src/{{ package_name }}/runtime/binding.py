"""Bind a run to the catalog of one Kedro run, so that whoever has the catalog has the run."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click
from kedro.framework import project
from kedro.io.core import is_parameter

from . import (
    _kedro,
    autologging,
    credentials,
    endings,
    failures,
    outputs,
    params,
    provenance,
    tracking,
)
from .config import MlflowConfig, RequestHeaderProviderOptions
from .datasets.tracked import TrackedDataset
from .loading import (
    ConfigError,
    all_credentials,
    configured_package,
    mistake,
    package_name,
    read_credentials,
    register_header_provider,
)
from .offline import OF_RUNS, replay_after_run
from .offline.disk import Disk, disk_of, open_for_run
from .pipeline_ml import PipelineML
from .server import SettingError, lack_of_models

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline
    from mlflow.models.model import ModelInfo

    from .pipeline_model import KedroPipelineModel

logger = logging.getLogger(__name__)

# The entry of the catalog that holds the binding. Kedro builds a catalog for each run and hands
# it, pickled, to every worker.
ENTRY = "mlflow:run"


@dataclass(frozen=True)
class Binding:
    """What the catalog carries: the run, and what a worker has to know of where it comes from."""

    run: tracking.RunHandle | None  # None where tracking is disabled
    disk: Disk | None  # where the run is before it is replayed to the server
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
    if endings.is_child_of(binding.main_process):
        # It belongs to this run. A forkserver has the environment of the time when it was started.
        credentials.export("worker", binding.variables)
        endings.follow_parent(binding.main_process, binding.managers)
    return binding


def _binding_of(catalog: DataCatalog) -> Binding | None:
    # Not `in catalog`: there a pattern such as "{default}" matches every name.
    if ENTRY not in list(catalog):
        return None
    binding: Binding = catalog[ENTRY].load()
    return binding


def run_of(catalog: DataCatalog) -> tracking.RunHandle | None:
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


def _check_model(pipeline: PipelineML, catalog: DataCatalog, secrets: params.Secrets) -> None:
    """See before the run whether the inference pipeline can be logged as a model at its end."""
    if pipeline.missing:
        names = ", ".join(sorted(pipeline.missing))
        logger.warning("No model will be logged: %s isn't in the part that runs", names)
        return
    from .packing import check

    model = _model_of(pipeline, catalog)
    check(model, catalog, secrets, pipeline.log_model_kwargs, given=pipeline.inputs())


def log_model(catalog: DataCatalog, pipeline: Pipeline) -> None:
    """Log the inference pipeline of a training that has run, when it has one."""
    binding = _binding_of(catalog)
    if isinstance(pipeline, PipelineML) and binding and binding.run and not pipeline.missing:
        from .packing import log

        model, arguments = _model_of(pipeline, catalog), pipeline.log_model_kwargs
        log(binding.run, model, catalog, binding.package_name, arguments)


def _model_of(pipeline: PipelineML, catalog: DataCatalog) -> KedroPipelineModel:
    from .pipeline_model import KedroPipelineModel

    return KedroPipelineModel(
        pipeline.inference, catalog, pipeline.input_name, **pipeline.kpm_kwargs
    )


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
    from . import packing
    from .pipeline_model import KedroPipelineModel

    catalog: DataCatalog = context.catalog  # type: ignore[assignment]
    model = KedroPipelineModel(pipeline, catalog, input_name, copy_mode=copy_mode)
    packing.check(model, catalog, _secrets(context), arguments)
    track(context, run_params, model.pipeline, catalog, ("mlflow", "modelify"), options)
    try:
        run = run_of(catalog)
        assert run, "a command of its own is always tracked"
        info = packing.log(run, model, catalog, package_name(), arguments)
    except BaseException as error:
        fail(catalog, error)
        raise
    end(catalog, "FINISHED")
    return info


def fail(catalog: DataCatalog, error: BaseException) -> None:
    """End the run of a catalog as FAILED, with the reason."""
    report(catalog, error)
    with _warning_of_failures():
        end(catalog, "FAILED")


def end(catalog: DataCatalog, status: str) -> None:
    """End the run of a catalog, and take its credentials back."""
    binding = _binding_of(catalog)
    if binding and binding.run and binding.run.is_ours:
        binding.run.finish(status)
        if binding.disk:
            replay_after_run(binding.disk, binding.run.run_id, binding.variables)
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


def track(
    context: KedroContext,
    run_params: dict[str, Any],
    pipeline: Pipeline,
    catalog: DataCatalog,
    command: Sequence[str] = ("run",),
    options: Sequence[str] = (),
) -> None:
    """Open the run of a pipeline and bind it to the catalog and its Mlflow datasets.

    Another `command` than `kedro run` is tracked also where tracking is disabled.

    Raises:
        ConfigError: When a parameter is too long and `long_params_strategy` is `fail`.
        PipelineError: When a model can't be made of the pipeline's inference.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    typed = set(_typed().get("pipelines") or ())
    if typed and typed == set(run_params.get("pipeline_names") or ()):
        # Kedro passes what was typed in any order, another one each time.
        run_params = {**run_params, "pipeline_names": list(dict.fromkeys(_typed()["pipelines"]))}
    names = provenance.pipeline_names(run_params)
    server = config.server.connection
    # A dataset that can't be made fails here, before there is a run.
    datasets = {name: catalog.get(name) for name in pipeline.datasets()}
    secrets = _secrets(context)
    run = disk = None
    disabled = set(names) <= set(config.tracking.disable_tracking.pipelines)
    if not disabled or command != ("run",):
        variables = read_credentials(context)
        register_header_provider(context)
        if isinstance(pipeline, PipelineML):
            _check_model(pipeline, catalog, secrets)
        logged, tags = _parameters(config, pipeline, catalog, secrets)
        store, options_of_run = server, config.tracking
        if disk := _disk(config, context):
            logger.info(
                "The run is kept on disk until it has ended: `kedro mlflow ui --offline` shows it"
            )
            store, options_of_run = disk.store, open_for_run(disk, config.tracking)
            unset = {key: text for key, text in OF_RUNS.items() if key not in os.environ}
            variables = {**unset, **variables}
        try:
            run = tracking.start(
                store,
                options_of_run,
                name=secrets.hide_in(config.tracking.run.name or "+".join(names)),
                params=logged,
                tags={**_tags(context, run_params, secrets, command, options), **tags},
                variables=variables,
                project_path=context.project_path,
            )
        except SettingError as error:
            raise mistake(context, error.key, secrets.hide_in(str(error))) from error
        if run.server != store:  # an open run elsewhere, which this one is a part of
            disk = None
        if disk is None:
            server = run.server
        if config.tracking.autolog and provenance.runner_name(run_params) == "ThreadRunner":
            logger.warning(
                "MLflow's autologging follows one fit at a time in a process: of fits that overlap "
                "in threads it may lose values. ParallelRunner keeps them all."
            )
    else:
        # Its datasets may still load models or artifacts from the server.
        try:
            credentials.export(_untracked(catalog), read_credentials(context))
            register_header_provider(context)
        except ConfigError as error:
            logger.info("Without credentials, because nothing is tracked: %s", error.message)
        if config.tracking.disable_tracking.disable_autologging and "mlflow" in sys.modules:
            autologging.keep_quiet()  # it would make a run of its own
    catalog[ENTRY] = Binding(
        run,
        disk,
        package_name(),
        config.server.request_header_provider,
        secrets,
        tuple(config.tracking.artifacts.datasets),
        config.tracking.autolog if run else {},
        credentials.exported(run.opening if run else _untracked(catalog)),
        os.getpid(),
        tuple(endings.managers()),
    )

    generators = [node for node in pipeline.nodes if isgeneratorfunction(node.func)]
    in_chunks = {name for node in generators for name in node.outputs}
    try:
        for name, dataset in datasets.items():
            tracked = _kedro.uncached(dataset)
            if isinstance(tracked, TrackedDataset):
                tracked.in_chunks = name in in_chunks
                tracked.bind(server, run, name)
        logs_models = run is not None and _logs_models(pipeline, datasets)
        if logs_models and (lack := lack_of_models(server)):
            raise mistake(context, lack.key, str(lack))
    except BaseException as error:  # a dataset may look at its place, which may not be reachable
        fail(catalog, error)
        raise


def _disk(config: MlflowConfig, context: KedroContext) -> Disk | None:
    """Return the store on disk that runs are recorded in, when the server may go away."""
    if config.tracking.on_unreachable != "offline":
        return None
    restore = config.tracking.experiment.restore_if_deleted
    return disk_of(config.server.connection, context.project_path, restore_if_deleted=restore)


def _logs_models(pipeline: Pipeline, datasets: Mapping[str, Any]) -> bool:
    """Tell whether a pipeline, or one of its datasets, logs a model."""
    from .datasets.models import MlflowModelTrackingDataset

    if isinstance(pipeline, PipelineML) and not pipeline.missing:
        return True
    saved = [_kedro.uncached(datasets[name]) for name in pipeline.all_outputs() & datasets.keys()]
    return any(isinstance(dataset, MlflowModelTrackingDataset) for dataset in saved)


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
            limit=options.max_length or tracking.parameter_limit(),
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


def _secrets(context: KedroContext) -> params.Secrets:
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
        **provenance.run_tags(secrets.hide(run_params), hidden, command),
        **provenance.source_tags(context.project_path, package_name()),
    }
