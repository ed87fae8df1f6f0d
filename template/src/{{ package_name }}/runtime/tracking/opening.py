"""Open the run of a pipeline: start a new one, continue one, or attach to one that is open.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from inspect import currentframe
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import TYPE_CHECKING
from uuid import uuid4

from .. import _mlflow, state
from ..config.errors import ConfigError, SettingError
from ..config.uris import anchor_uri, shown_uri, uri_of_environment
from ..stores import credentials
from ..stores import errors as failures
from ..stores.embedded import prepare
from ..stores.server import Server, experiment_id, find_run
from . import autologging, process, traces
from .ending import MARKERS, end_abandoned, end_orphans, finish, watch
from .handle import RunHandle, fitting_tags, handle_of

if TYPE_CHECKING:
    from mlflow.entities import Run

    from ..config.keys import TrackingOptions

logger = logging.getLogger(__name__)


def start(
    server: Server,
    options: TrackingOptions,
    *,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    variables: Mapping[str, str],
    project_path: Path,
    env: str | None,
    run_before: str | None = None,
) -> RunHandle:
    """Open the run of a pipeline with all its parameters and tags.

    That is the run already active in this thread, the one that `MLFLOW_RUN_ID` names (both are
    left to their owners to end), the one that `tracking.run.id` names, the one that a hook has
    logged to since the context was made, or a new one.

    Args:
        server: Where the project's runs are.
        options: The part `tracking` of mlflow.yml.
        name: Name of a new run.
        params: Parameters, each short enough for the store.
        tags: Tags; those that a run of somebody else has already stay as they are.
        variables: What is in the environment until the run ends.
        project_path: The project's folder; it keeps note of the runs that are in progress.
        env: Kedro's environment, where one was chosen.
        run_before: The run that was active when the context was made.

    Raises:
        SettingError: When a setting in mlflow.yml names what isn't there.
        ConfigError: When `MLFLOW_RUN_ID` does, or the run has other values of these parameters.
    """
    opening, markers = uuid4().hex, project_path / MARKERS
    given_id = credentials.original("MLFLOW_RUN_ID")
    # MLflow would take up that run where the user's code asks for a child of it.
    exported: dict[str, str | None] = {**traces.variables(), **variables, "MLFLOW_RUN_ID": None}
    if workspace := os.environ.get("MLFLOW_WORKSPACE"):  # for workers on other machines
        exported.setdefault("MLFLOW_WORKSPACE", workspace)
    if shown_uri(server.tracking_uri) != server.tracking_uri:
        # MLflow prints the address of each run, password and all.
        exported["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    credentials.export(opening, exported)
    if given_id and not server.replayed_to:
        server = _server_of_environment(server, project_path)
    try:
        autologging.switch_on(options.autolog)
        with failures.translate_server_errors(server, variables):
            tags = {**tags, **_context_tags(), **process.this_process().tags()}
            handle, tags = _open(server, options, name, tags, given_id, project_path, run_before)
        handle = replace(handle, opening=opening)
    except BaseException:
        credentials.take_back(opening)
        if not state.current().started:
            autologging.switch_off()
        raise
    with failures.translate_server_errors(handle.server, variables):
        try:
            watch(handle, markers, env, _caller())
            if tags:
                handle.set_tags(tags)
            handle.log_params(params)
            handle.enter("pipeline")
            if not handle.attached:
                _log_system_metrics(handle)
            end_orphans(handle.server, markers)
        except BaseException:
            finish(handle, "FAILED")
            raise
    logger.info(
        "MLflow run '%s' (%s) %s",
        handle.name,
        handle.run_id,
        "attached to" if handle.attached else "started",
    )
    return handle


def _context_tags() -> dict[str, str]:
    """Return the tags of MLflow's run-context providers: Databricks' and those of plug-ins.

    Without its own for user, script and git: ours are of the project.
    """
    from mlflow.tracking.context.default_context import DefaultRunContext
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags

    tags = resolve_tags(ignore=[DefaultRunContext, GitRunContext])  # type: ignore[list-item]
    return {key: str(value) for key, value in tags.items()}


def _log_system_metrics(run: RunHandle) -> None:
    """Log what the machine does to a run, where MLflow is told to; as `mlflow.start_run` does."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking.fluent import run_id_to_system_metrics_monitor

    monitor = run_id_to_system_metrics_monitor.pop(run.run_id, None)  # of a run that a hook opened
    try:
        if monitor is None:
            monitor = SystemMetricsMonitor(run.run_id, resume_logging=not run.fresh)
            monitor.start()
    except Exception as error:  # each kind of machine has errors of its own, and no psutil is one
        logger.warning("System metrics are not logged: %s", error)
    else:
        run.before_end(monitor.finish)


def _caller() -> FrameType:
    """Return the call that runs the pipeline: the first one outside of this package and pluggy."""
    inside = (f"{__name__.partition('.tracking.')[0]}.", "pluggy.")
    return next(
        frame
        for frame, _ in walk_stack(currentframe())
        if not frame.f_globals["__name__"].startswith(inside)
    )


def _open(
    server: Server,
    options: TrackingOptions,
    name: str,
    tags: dict[str, str],
    given_id: str | None,
    project_path: Path,
    run_before: str | None,
) -> tuple[RunHandle, Mapping[str, str]]:
    """Open the run, and return it with the tags that it still has to get."""
    import mlflow

    if options.disable_tracking.disable_autologging:
        autologging.keep_quiet()
    end_abandoned()
    active = mlflow.active_run()
    if active and not any(
        s.run.run_id == active.info.run_id for s in state.current().started.values()
    ):
        if active.info.run_id in (run_before, given_id):
            return _attach(Server.in_use(), active.info.run_id, tags)
        _mlflow.active_runs().pop()
        server, run_id = Server.in_use(), active.info.run_id
        new_name = name if run_id != options.run.id else None
        server.client.update_run(run_id, status="RUNNING", name=new_name)
        return handle_of(server, _existing(server, run_id)), tags
    if given_id and not active:
        return _attach(server, given_id, tags)
    location = options.experiment.create_experiment_kwargs.artifact_location
    prepare(server.tracking_uri, location, project_path)
    server.use()
    if options.run.id and not active:
        run = _existing(server, options.run.id, ("tracking", "run", "id"))
        server.client.update_run(options.run.id, status="RUNNING")
        return handle_of(server, run), tags
    if active and options.run.nested:  # a node starts a Kedro run of its own
        tags["mlflow.parentRunId"] = active.info.run_id
    experiment = experiment_id(server, options.experiment)
    run = server.client.create_run(experiment, tags=fitting_tags(tags), run_name=name)
    return handle_of(server, run, fresh=True), {}


def _attach(
    server: Server, run_id: str, tags: Mapping[str, str]
) -> tuple[RunHandle, Mapping[str, str]]:
    run = _existing(server, run_id)
    # User, source and process of somebody else's run stay theirs.
    of_owner = {*run.data.tags, *process.this_process().tags()}
    unset = {k: v for k, v in tags.items() if k not in of_owner and not k.startswith("mlflow.")}
    return handle_of(server, run, attached=True), unset


def _existing(server: Server, run_id: str, key: tuple[str, ...] = ()) -> Run:
    """Return a run to go on with.

    Raises:
        SettingError: When it isn't there, and the key of mlflow.yml names it.
        ConfigError: When it isn't there, and `MLFLOW_RUN_ID` names it.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = find_run(server, run_id)
        if run.info.lifecycle_stage == "active":
            return run
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    where = shown_uri(server.tracking_uri)
    what = f"expected the id of a run on {where} that is not deleted, got {run_id!r}"
    if server.replayed_to:
        what = (
            "with tracking.on_unreachable: offline a run of the server can't be continued: "
            f"expected no id, or on_unreachable: fail, got {run_id!r}"
        )
    raise SettingError(key, what) if key else ConfigError(f"MLFLOW_RUN_ID: {what}")


def _server_of_environment(server: Server, project_path: Path) -> Server:
    """Return the server of whoever set `MLFLOW_RUN_ID`: the environment names it, or mlflow.yml."""
    given = uri_of_environment()
    if given is None:
        return server
    tracking_uri = anchor_uri(given, project_path)
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri
    return Server(tracking_uri, registry_uri)
