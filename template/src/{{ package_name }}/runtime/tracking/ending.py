"""Every way in which a run ends: by itself, by an error, a signal, an exit, or afterwards.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from inspect import currentframe
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import quote

from .. import state
from ..config.uris import is_http, shown_uri, without_login
from ..stores import credentials
from . import autologging, process, traces
from .handle import RunHandle
from .outbox import outbox_of
from .process import Process

if TYPE_CHECKING:
    from mlflow.entities import Run

    from ..stores.server import Server

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted: the pipeline was left before its end (Ctrl-C, or sys.exit in a node)"

# The folder of a project that notes which of its runs are in progress.
MARKERS = ".mlflow-running"


@dataclass(frozen=True)
class Started:
    """A run that this process started: when, in which thread, and below which call on its stack.

    `markers` is the folder that notes which runs are in progress, `env` Kedro's environment. The
    call is known by the id of its frame, which itself would keep alive all data of a pipeline that
    was left; None when the frame is gone.
    """

    run: RunHandle
    markers: Path
    env: str | None
    thread: int
    call: int | None
    time: float

    def is_abandoned(self) -> bool:
        """Check whether the call that runs the pipeline was left without a hook, as by Ctrl-C."""
        if threading.get_ident() != self.thread:
            return False
        return all(id(frame) != self.call for frame, _ in walk_stack(currentframe()))


def watch(run: RunHandle, markers: Path, env: str | None, frame: FrameType) -> None:
    """Make sure that a run ends with the call that runs its pipeline, and with its process.

    Args:
        run: A run that this process has just opened.
        markers: The folder that notes which runs are in progress.
        env: Kedro's environment, where one was chosen.
        frame: The call that runs the pipeline.
    """
    held = state.current()
    held.started[run.key] = Started(
        run, markers, env, threading.get_ident(), id(frame), time.monotonic()
    )
    if not held.is_watching_exit:
        held.is_watching_exit = True
        atexit.register(_end_all, INTERRUPTED)
    if not run.attached:
        process.mark(markers, run.run_id, shown_uri(run.server.tracking_uri))
    process.watch_signals(_end_all)


def leave_call(run: RunHandle) -> None:
    """Note that the call that runs a pipeline is gone, and take back the run's credentials."""
    held = state.current()
    if started := held.started.get(run.key):  # else the run has ended
        held.started[run.key] = replace(started, call=None)
        credentials.take_back(run.opening)


def finish(run: RunHandle, status: str, reason: str | None = None) -> None:
    """Send what waits and end a run as FINISHED, FAILED or KILLED; only the first call does.

    A run that was attached to is left open for its owner. When what waits can't be sent, the
    run ends as FAILED and the error is raised.
    """
    held = state.current()
    started = held.started.pop(run.key, None)
    if started is None:
        return
    run.leave("pipeline", status)
    if not held.started:
        process.forget_signals()
        autologging.switch_off()
    try:
        with ExitStack() as calls:
            for call in outbox_of(run).before_end.values():
                calls.callback(call)
            run.flush()
        traces.flush()
    except BaseException:
        status = "FAILED"
        raise
    finally:
        held.outboxes.pop(run.key, None)
        try:
            if not run.attached:
                _end(run.server, run.run_id, run.experiment_id, status, reason)
                process.unmark(started.markers, run.run_id)
                duration = duration_in_words(time.monotonic() - started.time)
                logger.info("MLflow run '%s' %s after %s", run.name, status, duration)
                logger.info("Look at it: %s", where_to_look(run, started.env))
        finally:
            credentials.take_back(run.opening)


def duration_in_words(seconds: float) -> str:
    """Return a duration with its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def where_to_look(run: RunHandle, env: str | None) -> str:
    """Return the address of a run's page, or the command that opens MLflow's pages.

    Makes no request: where the workspace of Databricks is known from a file only, it isn't read.
    """
    uri, workspace = run.server.tracking_uri, os.environ.get("DATABRICKS_HOST")
    page = f"experiments/{run.experiment_id}/runs/{run.run_id}"
    if of_server := os.environ.get("MLFLOW_WORKSPACE"):
        page += f"?workspace={quote(of_server, safe='')}"
    if is_http(uri):
        return f"{without_login(uri).rstrip('/')}/#/{page}"
    if uri == "databricks" and workspace:
        return f"{workspace.rstrip('/')}/ml/{page}"
    command = f"kedro mlflow ui --env={env}" if env else "kedro mlflow ui"
    return f"{command} --offline" if run.server.replayed_to else command


def end_abandoned() -> None:
    """End the runs of this thread whose pipeline was interrupted; Kedro calls no hook then."""
    for started in list(state.current().started.values()):
        if started.is_abandoned():
            finish(started.run, "KILLED", INTERRUPTED)


def _end_all(reason: str) -> None:
    for started in list(state.current().started.values()):
        finish(started.run, "KILLED", reason)


def _end(
    server: Server, run_id: str, experiment_id: str, status: str, reason: str | None = None
) -> None:
    """End a run and, where it didn't finish, its child runs that are still open."""
    from mlflow.entities import RunTag

    client = server.client
    if reason:
        client.log_batch(run_id, tags=[RunTag("kedro_error", reason)])
    client.set_terminated(run_id, status)
    if status != "FINISHED":
        end_children(server, run_id, experiment_id, status)


def end_children(server: Server, run_id: str, experiment_id: str, status: str) -> None:
    """End the child runs of a run that are still open."""
    open_children = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
    for child in server.client.search_runs([experiment_id], open_children):
        _end(server, child.info.run_id, experiment_id, status)


def end_orphans(server: Server, markers: Path) -> None:
    """End the runs on this server whose process is gone, as after `kill -9`."""
    from mlflow.exceptions import MlflowException

    for marker in process.orphans(markers, shown_uri(server.tracking_uri)):
        try:
            run = server.client.get_run(marker.run_id)
            if run.info.status == "RUNNING":
                end_killed(server, run, marker.process)
        except MlflowException as error:
            logger.warning("MLflow run %s could not be ended: %s", marker.run_id, error)
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                continue
        process.unmark(markers, marker.run_id)


def end_killed(server: Server, run: Run, gone: Process) -> None:
    """End a run whose process is gone, and the child runs that are still open."""
    run_id = run.info.run_id
    reason = f"the process {gone.pid} on {gone.host} is gone"
    _end(server, run_id, run.info.experiment_id, "KILLED", reason)
    logger.warning("MLflow run %s was still open: %s", run_id, reason)
