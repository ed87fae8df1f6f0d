"""The run handle: start or attach to an MLflow run, log to it, end it.

The only code that changes a run. MLflow is imported inside functions, so that importing this
module costs nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import currentframe
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from . import _mlflow, autologging, credentials, endings, failures
from .loading import ConfigError, anchor_uri, shown_uri, uri_of_environment
from .server import Server, SettingError, experiment_id, find_run, open_server

if TYPE_CHECKING:
    from mlflow import ActiveRun
    from mlflow.entities import Metric, Run
    from mlflow.models.model import ModelInfo

    from .config import TrackingOptions

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted: the pipeline was left before its end (Ctrl-C, or sys.exit in a node)"

# The folder of a project that notes which of its runs are in progress.
MARKERS = ".mlflow-running"

# A point waits at most this long, in seconds, for others to share its request with.
FLUSH_AFTER = 1.0


class Point(NamedTuple):
    """One value of a metric; `timestamp` is in milliseconds since 1970."""

    key: str
    value: float
    step: int = 0
    timestamp: int | None = None


@dataclass(frozen=True)
class RunHandle:
    """A run, named by strings alone: it pickles, and logs to the same run from any process.

    `attached` marks a run that somebody else opened and will end. `fresh` marks one that was
    made for this Kedro run, so that nothing can have been logged to it before; `opening` tells
    this Kedro run from others that log to the same run.
    """

    server: Server
    run_id: str
    experiment_id: str
    artifact_uri: str
    name: str = ""
    attached: bool = False
    fresh: bool = False
    opening: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether this process started the run, or attached to it, and has not ended it yet."""
        return _key(self) in _started

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log parameters, at most 100 a request (MLflow's limit)."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self.server.client.log_batch(
                self.run_id, params=[Param(k, v) for k, v in params.items()]
            )
        except MlflowException as error:
            if self.fresh or error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError(
                f"The run {self.run_id} exists and has other parameters: {error.message}"
            ) from error

    def log_metrics(self, points: Iterable[Point]) -> None:
        """Log points of metrics, at most 1,000 a request (MLflow's limit).

        In the process that started the run they are gathered and sent within a second, or by
        `flush`; a worker sends them at once, because nothing tells it when it will end. Where they
        are recorded on the disk that is done at once too.
        """
        outbox = _outbox(self)
        outbox.add(points)
        if self.server.replayed_to or not self.is_ours:
            outbox.flush()

    def metric_history(self, key: str) -> list[Metric]:
        """Read all points of a metric, ordered by time, then by step."""
        self.flush()
        history = self.server.client.get_metric_history(self.run_id, key)
        return sorted(history, key=lambda metric: (metric.timestamp, metric.step))

    def metric_keys(self) -> list[str]:
        """Name the metrics that the run has."""
        self.flush()
        return list(self.server.client.get_run(self.run_id).data.metrics)

    def last_step(self, key: str) -> int | None:
        """Tell the highest step of a metric, asking the server only about what it can't know."""
        if self.fresh and self.is_ours:
            return _outbox(self).last_steps.get(key)
        return max((metric.step for metric in self.metric_history(key)), default=None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        self.server.client.log_batch(
            self.run_id, tags=[RunTag(k, v) for k, v in _fitting(tags).items()]
        )

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Copy a local file, or a folder with all that is in it, to the run's artifacts."""
        with failures.translate_artifact_errors(self.artifact_uri, self.server):
            self.server.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Write a text to the run's artifacts."""
        with failures.translate_artifact_errors(self.artifact_uri, self.server):
            self.server.client.log_text(self.run_id, text, artifact_file)

    def log_model(
        self, log: Callable[[], ModelInfo], registered_name: str | None, alias: str | None
    ) -> ModelInfo:
        """Log a model by a function that logs to MLflow's active run.

        The version that gets registered by it, as `registered_name`, is given the alias.
        """
        self.flush()  # MLflow links the metrics that the run has now with the model
        with self.active(), failures.translate_artifact_errors(self.artifact_uri, self.server):
            info = log()
        if alias and registered_name:
            self.server.client.set_registered_model_alias(
                registered_name, alias, str(info.registered_model_version)
            )
        return info

    def flush(self) -> None:
        """Send every point that waits in this process."""
        _outbox(self).flush()

    def enter(self, scope: str = "node") -> None:
        """Make this MLflow's active run in this thread, without a request.

        `scope` says for how long: for `leave` to find what belongs to it.
        """
        self.server.use()
        # Runs that the user's code nests in this one belong to the same experiment.
        _mlflow.set_active_experiment(self.experiment_id)
        _mlflow.active_runs().append(_active_run(self, scope))
        _watch_exit(os.getpid())

    def leave(self, scope: str = "node", status: str = "FINISHED") -> None:
        """Take back what `enter` did; a run that was opened since and left open is ended."""
        if "mlflow" not in sys.modules:
            return
        stack = _mlflow.active_runs()
        mine = [getattr(run, "entered", None) == (self.run_id, scope) for run in stack]
        if any(mine):  # else the user's code has ended it, or this is another thread
            _cut(stack, len(mine) - 1 - mine[::-1].index(True), status)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold the run as MLflow's active run in this thread."""
        self.enter("block")
        try:
            yield
        finally:
            self.leave("block")

    def before_end(self, call: Callable[[], object], key: str | None = None) -> None:
        """Have something called when the run is about to end, the last that was asked for first.

        Of what has a `key` the latest replaces what was asked for before. Only in the process
        where the run `is_ours`: others don't know when it ends.
        """
        calls = _outbox(self).before_end
        calls.pop(key or "", None)
        calls[key or uuid4().hex] = call

    def finish(self, status: str, reason: str | None = None) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED; only the first call does.

        A run that was attached to is left open for its owner. When what waits can't be sent, the
        run ends as FAILED and the error is raised.
        """
        started = _started.pop(_key(self), None)
        if started is None:
            return
        self.leave("pipeline", status)
        if not _started:
            endings.forget_signals()
            autologging.switch_off()
        try:
            with ExitStack() as calls:
                for call in _outbox(self).before_end.values():
                    calls.callback(call)
                self.flush()
        except BaseException:
            status = "FAILED"
            raise
        finally:
            _outboxes.pop(_key(self), None)
            try:
                if not self.attached:
                    _end(self.server, self.run_id, self.experiment_id, status, reason)
                    logger.info("MLflow run '%s' (%s) %s", self.name, self.run_id, status)
                    endings.unmark(started.markers, self.run_id)
            finally:
                credentials.take_back(self.opening)

    def end_children(self, status: str) -> None:
        """End the child runs that are still open, and theirs."""
        _end_children(self.server, self.run_id, self.experiment_id, status)

    def report_error(self, error: str, traceback: str, node: str | None = None) -> None:
        """Say in tags and in the artifact `traceback.txt` why the run fails."""
        tags = {"kedro_error": error, **({"kedro_failed_node": node} if node else {})}
        self.set_tags(tags)
        self.log_text(traceback, "traceback.txt")


class _Outbox:
    """The points of one run that this process has taken and not sent yet."""

    def __init__(self, run: RunHandle) -> None:
        self.last_steps: dict[str, int] = {}
        self.before_end: dict[str, Callable[[], object]] = {}
        self._run = run
        self._points: list[Metric] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # held over a request, so that order is kept

    def add(self, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            for key, value, step, timestamp in points:
                self._points.append(
                    Metric(key, value, now if timestamp is None else timestamp, step)
                )
                self.last_steps[key] = max(step, self.last_steps.get(key, step))
            if self._points and self._timer is None:
                self._timer = threading.Timer(FLUSH_AFTER, self._flush_in_background)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        with self._sending:
            with self._lock:
                points, self._points = self._points, []
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            if not points:
                return
            try:
                self._run.server.client.log_batch(self._run.run_id, metrics=points)
            except BaseException:
                with self._lock:
                    self._points[:0] = points
                raise

    def _flush_in_background(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            # The points are kept: the next flush sends them, or fails in the user's sight.
            logger.warning("Metrics could not be sent yet: %s", error)


# What this process holds of runs: a forked worker inherits the dictionaries, and must neither
# send the parent's points again nor end its runs.
_Key = tuple[int, str, str]
_outboxes: dict[_Key, _Outbox] = {}
_started: dict[_Key, _Started] = {}


def _key(run: RunHandle) -> _Key:
    return os.getpid(), run.run_id, run.opening


def _outbox(run: RunHandle) -> _Outbox:
    return _outboxes.setdefault(_key(run), _Outbox(run))


@dataclass(frozen=True)
class _Started:
    """A run that this process started: in which thread, and below which call on its stack.

    `markers` is the folder that notes which runs are in progress.
    """

    run: RunHandle
    markers: Path
    thread: int
    frame: FrameType

    def is_abandoned(self) -> bool:
        """Tell whether the call that runs the pipeline was left without a word, as by Ctrl-C."""
        if threading.get_ident() != self.thread:
            return False
        return all(frame is not self.frame for frame, _ in walk_stack(currentframe()))


def end_abandoned() -> None:
    """End the runs of this thread whose pipeline was interrupted; Kedro tells no hook of it."""
    for started in list(_started.values()):
        if started.is_abandoned():
            started.run.finish("KILLED", INTERRUPTED)


@lru_cache
def _watch_exit(pid: int) -> None:  # noqa: ARG001
    """See to it, once in a process, that what is open at its exit doesn't end as FINISHED.

    MLflow does that. It has to be imported by now: what is registered later is called first.
    """
    atexit.register(_interrupt)


def _interrupt() -> None:
    _end_all(INTERRUPTED)
    stack = _mlflow.active_runs()  # in a worker, where the run is not ours to end
    entered = [hasattr(run, "entered") for run in stack]
    if any(entered):
        _cut(stack, entered.index(True), "KILLED")


def _cut(stack: list[ActiveRun], length: int, status: str) -> None:
    """Shorten MLflow's stack of active runs; those that the user's code opened are ended."""
    import mlflow

    while len(stack) > length:
        if hasattr(stack[-1], "entered"):
            stack.pop()
        else:
            mlflow.end_run(status)


def _end_all(reason: str) -> None:
    for (pid, *_), started in list(_started.items()):
        if pid == os.getpid():
            started.run.finish("KILLED", reason)


def _end(
    server: Server, run_id: str, experiment_id: str, status: str, reason: str | None = None
) -> None:
    """End a run; one that didn't finish takes the child runs that are still open with it."""
    from mlflow.entities import RunTag

    client = server.client
    if reason:
        client.log_batch(run_id, tags=[RunTag("kedro_error", reason)])
    client.set_terminated(run_id, status)
    if status != "FINISHED":
        _end_children(server, run_id, experiment_id, status)


def _end_children(server: Server, run_id: str, experiment_id: str, status: str) -> None:
    from mlflow.entities import ViewType

    of_this = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
    for child in server.client.search_runs([experiment_id], of_this, ViewType.ACTIVE_ONLY):
        _end(server, child.info.run_id, experiment_id, status)


def end_orphans(server: Server, markers: Path) -> None:
    """End the runs on this server whose process is gone, as after `kill -9`."""
    from mlflow.exceptions import MlflowException

    for marker in endings.orphans(markers, shown_uri(server.tracking_uri)):
        try:
            run = server.client.get_run(marker.run_id)
            if run.info.status == "RUNNING":
                end_killed(server, run, marker.process)
        except MlflowException as error:
            logger.warning("MLflow run %s could not be ended: %s", marker.run_id, error)
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                continue
        endings.unmark(markers, marker.run_id)


def end_killed(server: Server, run: Run, process: endings.Process) -> None:
    """End a run whose process is gone, and the child runs that are still open."""
    run_id = run.info.run_id
    reason = f"the process {process.pid} on {process.host} ended without a word"
    _end(server, run_id, run.info.experiment_id, "KILLED", reason)
    logger.warning("MLflow run %s was still open: %s", run_id, reason)


# How often MLflow asks a server again: not where what can't be sent now is sent later.


def start(
    server: Server,
    options: TrackingOptions,
    *,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    variables: Mapping[str, str],
    project_path: Path,
) -> RunHandle:
    """Open the run of a pipeline with all its parameters and tags.

    That is the run already active in this thread, the one that `MLFLOW_RUN_ID` names (both are
    left to their owners to end), the one that `tracking.run.id` names, or a new one.

    Args:
        server: Where the project's runs are.
        options: The part `tracking` of mlflow.yml.
        name: Name of a new run.
        params: Parameters, each short enough for the store.
        tags: Tags; those that a run of somebody else has already stay as they are.
        variables: What is in the environment until the run ends.
        project_path: The project's folder; it keeps note of the runs that are in progress.

    Raises:
        SettingError: When a setting in mlflow.yml names what isn't there.
        ConfigError: When `MLFLOW_RUN_ID` does, or the run has other values of these parameters.
    """
    opening, markers = uuid4().hex, project_path / MARKERS
    given = credentials.original("MLFLOW_RUN_ID")
    # MLflow would take up that run where the user's code asks for a child of it.
    exported: dict[str, str | None] = {**variables, "MLFLOW_RUN_ID": None}
    if shown_uri(server.tracking_uri) != server.tracking_uri:
        # MLflow prints the address of each run, password and all.
        exported["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    credentials.export(opening, exported)
    if given and not server.replayed_to:
        server = _server_of_environment(server, project_path)
    try:
        autologging.switch_on(options.autolog)
        with failures.translate_server_errors(server, variables):
            tags = {**tags, **endings.this_process().tags()}
            handle, tags = _open(server, options, name, tags, given)
        handle = replace(handle, opening=opening)
    except BaseException:
        credentials.take_back(opening)
        if not _started:
            autologging.switch_off()
        raise
    _started[_key(handle)] = _Started(handle, markers, threading.get_ident(), _caller())
    with failures.translate_server_errors(handle.server, variables):
        try:
            _watch(handle, markers)
            if tags:
                handle.set_tags(tags)
            handle.log_params(params)
            handle.enter("pipeline")
            end_orphans(handle.server, markers)
        except BaseException:
            handle.finish("FAILED")
            raise
    logger.info(
        "MLflow run '%s' (%s) %s on %s",
        handle.name,
        handle.run_id,
        "attached to" if handle.attached else "started",
        shown_uri(handle.server.tracking_uri),
    )
    return handle


def _watch(run: RunHandle, markers: Path) -> None:
    """See to it that a run ends however its process does."""
    if not run.attached:
        endings.mark(markers, run.run_id, shown_uri(run.server.tracking_uri))
    endings.watch_signals(_end_all)


def _caller() -> FrameType:
    """Give the call that runs the pipeline: the first one outside of this package and pluggy."""
    inside = (f"{__name__.rpartition('.')[0]}.", "pluggy.")
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
    given: str | None,
) -> tuple[RunHandle, Mapping[str, str]]:
    """Open the run; tells which tags it still has to get."""
    import mlflow

    if options.disable_tracking.disable_autologging:
        autologging.keep_quiet()
    end_abandoned()
    active = mlflow.active_run()
    if active and not any(s.run.run_id == active.info.run_id for s in _started.values()):
        return _attach(Server.in_use(), active.info.run_id, tags)
    if given and not active:
        return _attach(server, given, tags)
    open_server(server, options.experiment)
    server.use()
    if options.run.id and not active:
        handle = _handle(server, _continued(server, options.run.id))
        return handle, tags
    if active and options.run.nested:  # a node starts a Kedro run of its own
        tags["mlflow.parentRunId"] = active.info.run_id
    experiment = experiment_id(server, options.experiment)
    run = server.client.create_run(experiment, tags=_fitting(tags), run_name=name)
    return _handle(server, run, fresh=True), {}


def _attach(
    server: Server, run_id: str, tags: Mapping[str, str]
) -> tuple[RunHandle, Mapping[str, str]]:
    run = _existing(server, run_id)
    if run is None and server.replayed_to:
        raise ConfigError(f"MLFLOW_RUN_ID: {_NOT_OFFLINE}, got {run_id!r}")
    if run is None:
        raise ConfigError(
            f"MLFLOW_RUN_ID: expected the id of a run on {shown_uri(server.tracking_uri)} "
            f"that is not deleted, got {run_id!r}"
        )
    # User, source and process of somebody else's run stay theirs.
    unset = {k: v for k, v in tags.items() if k not in run.data.tags and k not in _OWNERS_TAGS}
    unset = {k: v for k, v in unset.items() if not k.startswith("mlflow.")}
    return _handle(server, run, attached=True), unset


_NOT_OFFLINE = (
    "with tracking.on_unreachable: offline a run of the server can't be continued: expected no id, "
    "or on_unreachable: fail"
)

_OWNERS_TAGS = {"host", "pid", "process_start"}


def _continued(server: Server, run_id: str) -> Run:
    run = _existing(server, run_id)
    if run is None and server.replayed_to:
        raise SettingError(("tracking", "run", "id"), f"{_NOT_OFFLINE}, got {run_id!r}")
    if run is None:
        what = f"there is no such run on {shown_uri(server.tracking_uri)}, got {run_id!r}"
        raise SettingError(("tracking", "run", "id"), what)
    server.client.update_run(run_id, status="RUNNING")
    return run


def _existing(server: Server, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = find_run(server, run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _server_of_environment(server: Server, project_path: Path) -> Server:
    """Give the server of whoever set `MLFLOW_RUN_ID`: the environment names it, or mlflow.yml."""
    given = uri_of_environment()
    if given is None:
        return server
    tracking_uri = anchor_uri(given, project_path)
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri
    return Server(tracking_uri, registry_uri)


def _handle(server: Server, run: Run, *, attached: bool = False, fresh: bool = False) -> RunHandle:
    return RunHandle(
        server=server,
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        artifact_uri=run.info.artifact_uri or "",
        name=run.info.run_name or "",
        attached=attached,
        fresh=fresh,
    )


def attach(server: Server | None = None, run_id: str | None = None) -> RunHandle | None:
    """Make a handle for a run by its id, or for MLflow's active run; without a request."""
    import mlflow

    server = server or Server.in_use()
    if run_id:
        return RunHandle(server, run_id, experiment_id="", artifact_uri="", attached=True)
    run = mlflow.active_run()
    return _handle(server, run, attached=True) if run else None


def parameter_limit() -> int:
    """Tell how many characters a parameter's value may have, from MLflow."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    return MAX_PARAM_VAL_LENGTH


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH as LIMIT

    fitting = {k: v if len(v) <= LIMIT else f"{v[: LIMIT - 1]}…" for k, v in tags.items()}
    if cut := ", ".join(key for key, value in tags.items() if value != fitting[key]):
        logger.warning("Cut to the %d characters that MLflow takes: tags %s", LIMIT, cut)
    return fitting


def _active_run(run: RunHandle, scope: str) -> ActiveRun:
    """Build MLflow's own object for a run from the handle, which saves the request for it."""
    from mlflow import ActiveRun
    from mlflow.entities import LifecycleStage, Run, RunData, RunInfo, RunStatus

    info = RunInfo(
        run_id=run.run_id,
        experiment_id=run.experiment_id,
        user_id="",
        status=RunStatus.to_string(RunStatus.RUNNING),
        start_time=0,
        end_time=None,
        lifecycle_stage=LifecycleStage.ACTIVE,
        artifact_uri=run.artifact_uri,
        run_name=run.name,
    )
    active = ActiveRun(Run(info, RunData()))
    active.entered = (run.run_id, scope)  # type: ignore[attr-defined]
    return active
