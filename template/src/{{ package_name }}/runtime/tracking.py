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
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from . import credentials
from .loading import ANNOUNCED, shown_uri, sqlite_file

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient
    from mlflow.entities import Experiment, Metric, Run

    from .config import ExperimentOptions, TrackingOptions

logger = logging.getLogger(__name__)

# A point waits at most this long, in seconds, for others to share its request with.
FLUSH_AFTER = 1.0


@dataclass(frozen=True)
class Server:
    """Where runs (`tracking_uri`) and registered models (`registry_uri`) are kept."""

    tracking_uri: str
    registry_uri: str

    @property
    def client(self) -> MlflowClient:
        """The MLflow client for this server."""
        return _client(self.tracking_uri, self.registry_uri)

    def use(self) -> None:
        """Point `mlflow.…` in this process at this server, without a request.

        The environment stays as it is: another project in this process must not take this
        project's server for one that the user has chosen.
        """
        import mlflow

        if mlflow.get_tracking_uri() != self.tracking_uri:
            before = os.environ.get("MLFLOW_TRACKING_URI")
            mlflow.set_tracking_uri(self.tracking_uri)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            if before is not None:
                os.environ["MLFLOW_TRACKING_URI"] = before
        if mlflow.get_registry_uri() != self.registry_uri:
            mlflow.set_registry_uri(self.registry_uri)


@lru_cache
def _client(tracking_uri: str, registry_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, registry_uri)


class SettingError(Exception):
    """A setting that the server shows to be wrong: the key in `mlflow.yml`, and what is right."""

    def __init__(self, key: tuple[str, ...], what: str) -> None:
        super().__init__(what)
        self.key = key


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
    made for this Kedro run, so that nothing can have been logged to it before; `exported` names
    its credentials in the environment of the process that started it.
    """

    server: Server
    run_id: str
    experiment_id: str
    artifact_uri: str
    name: str = ""
    attached: bool = False
    fresh: bool = False
    exported: str = ""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log parameters, at most 100 a request (MLflow's limit)."""
        from mlflow.entities import Param

        self.server.client.log_batch(self.run_id, params=[Param(k, v) for k, v in params.items()])

    def log_metrics(self, points: Iterable[Point]) -> None:
        """Log points of metrics, at most 1,000 a request (MLflow's limit).

        In the process that started the run they are gathered and sent within a second, or by
        `flush`; a worker sends them at once, because nothing tells it when it will end.
        """
        outbox = _outbox(self)
        outbox.add(points)
        if not _is_ours(self):
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
        outbox = _outbox(self)
        if key not in outbox.last_steps and not (self.fresh and _is_ours(self)):
            steps = [metric.step for metric in self.metric_history(key)]
            if steps:
                outbox.last_steps[key] = max(steps)
        return outbox.last_steps.get(key)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        self.server.client.log_batch(
            self.run_id, tags=[RunTag(k, v) for k, v in _fitting(tags).items()]
        )

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Copy a local file, or a folder with all that is in it, to the run's artifacts."""
        self.server.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Write a text to the run's artifacts."""
        self.server.client.log_text(self.run_id, text, artifact_file)

    def flush(self) -> None:
        """Send every point that waits in this process."""
        _outbox(self).flush()

    def enter(self) -> None:
        """Make this MLflow's active run in this thread, without a request."""
        from mlflow.tracking import fluent

        self.server.use()
        # Runs that the user's code nests in this one belong to the same experiment.
        fluent._active_experiment_id = self.experiment_id  # type: ignore[assignment]
        fluent._active_run_stack.get().append(_active_run(self))

    def leave(self) -> None:
        """Take back what `enter` did; a run that was opened since and left open is ended."""
        from mlflow.tracking import fluent

        stack = fluent._active_run_stack.get()
        if not any(run.info.run_id == self.run_id for run in stack):
            return  # the user's code has called mlflow.end_run()
        while stack[-1].info.run_id != self.run_id:
            fluent.end_run()
        stack.pop()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold the run as MLflow's active run in this thread."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def finish(self, status: str) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED.

        A run that was attached to is left open for its owner. When what waits can't be sent, the
        run ends as FAILED and the error is raised.
        """
        try:
            self.flush()
        except BaseException:
            status = "FAILED"
            raise
        finally:
            _forget(self)
            try:
                if not self.attached:
                    self.server.client.set_terminated(self.run_id, status)
                    logger.info("MLflow run '%s' (%s) %s", self.name, self.run_id, status)
            finally:
                credentials.take_back(self.exported)

    def report_error(self, error: BaseException, node: str | None = None) -> None:
        """Say in tags and in the artifact `traceback.txt` why the run fails."""
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        tags = {"kedro_error": f"{type(error).__name__}: {error}"}
        if node:
            tags["kedro_failed_node"] = node
        self.set_tags(tags)
        self.log_text("".join(lines), "traceback.txt")


class _Outbox:
    """The points of one run that this process has taken and not sent yet."""

    def __init__(self, run: RunHandle) -> None:
        self.last_steps: dict[str, int] = {}
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


# What this process holds of runs, by process id and run id: a forked worker inherits the
# dictionaries, and must neither send the parent's points again nor end its runs.
_outboxes: dict[tuple[int, str], _Outbox] = {}
_started: dict[tuple[int, str], RunHandle] = {}


def _outbox(run: RunHandle) -> _Outbox:
    return _outboxes.setdefault((os.getpid(), run.run_id), _Outbox(run))


def _is_ours(run: RunHandle) -> bool:
    return (os.getpid(), run.run_id) in _started


def _forget(run: RunHandle) -> None:
    _outboxes.pop((os.getpid(), run.run_id), None)
    _started.pop((os.getpid(), run.run_id), None)


@atexit.register
def _kill_unfinished() -> None:
    """End the runs whose pipeline was interrupted; Kedro tells hooks only of an `Exception`."""
    for (pid, _), run in list(_started.items()):
        if pid == os.getpid():
            run.finish("KILLED")


def start(
    server: Server,
    options: TrackingOptions,
    *,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    variables: Mapping[str, str],
) -> RunHandle:
    """Open the run of a pipeline with all its parameters and tags.

    That is the run already active in this thread, the one that `MLFLOW_RUN_ID` names (both are
    left to their owners to end), the one that `tracking.run.id` names, or a new one. `variables`
    are in the environment until the run ends.
    """
    exported = uuid4().hex
    if shown_uri(server.tracking_uri) != server.tracking_uri:
        # MLflow prints the address of each run, password and all.
        variables = {**variables, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    credentials.export(exported, variables)
    try:
        handle = replace(_open(server, options, name, tags), exported=exported)
    except BaseException:
        credentials.take_back(exported)
        raise
    _started[os.getpid(), handle.run_id] = handle
    try:
        if not handle.fresh:
            if handle.attached:  # user and source of somebody else's run stay theirs
                tags = {k: v for k, v in tags.items() if not k.startswith("mlflow.")}
            handle.set_tags(tags)
        handle.log_params(params)
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


def _open(
    server: Server, options: TrackingOptions, name: str, tags: Mapping[str, str]
) -> RunHandle:
    import mlflow
    from mlflow.exceptions import MlflowException

    if options.disable_tracking.disable_autologging:
        mlflow.autolog(disable=True)
    active = mlflow.active_run()
    # A node that starts a Kedro run of its own is in a run of ours.
    outer = active if active and (os.getpid(), active.info.run_id) in _started else None
    if active and not outer:
        server = Server(mlflow.get_tracking_uri(), mlflow.get_registry_uri())
        return _handle(server, active, attached=True)
    _prepare(server, options.experiment)
    server.use()
    if outer:
        parent = {"mlflow.parentRunId": outer.info.run_id} if options.run.nested else {}
        tags = {**tags, **parent}
    elif given := os.environ.get("MLFLOW_RUN_ID"):
        return _handle(server, server.client.get_run(given), attached=True)
    elif continued := options.run.id:
        try:
            server.client.update_run(continued, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            what = f"there is no such run on {shown_uri(server.tracking_uri)}, got {continued!r}"
            raise SettingError(("tracking", "run", "id"), what) from error
        return _handle(server, server.client.get_run(continued))
    experiment = _experiment_id(server, options.experiment)
    run = server.client.create_run(experiment, tags=_fitting(tags), run_name=name)
    return _handle(server, run, fresh=True)


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


def set_up(server: Server, options: ExperimentOptions, variables: Mapping[str, str]) -> None:
    """Point `mlflow.…` in this process at the project's server and experiment, for good.

    The experiment is made, or restored, when there is none.
    """
    import mlflow

    credentials.export("set_up", variables)
    server.use()
    mlflow.set_experiment(experiment_id=experiment_of(server, options).experiment_id)


def experiment_of(server: Server, options: ExperimentOptions) -> Experiment:
    """Give the experiment that runs belong to; make or restore it when need be."""
    _prepare(server, options)
    return server.client.get_experiment(_experiment_id(server, options))


def announce(server: Server, options: ExperimentOptions) -> None:
    """Let MLflow find the project's server and experiment when somebody uses it.

    For notebooks. Environment variables do this without importing MLflow and without a request.
    """
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow refuses an id and a name that differ
    os.environ.update(
        MLFLOW_TRACKING_URI=server.tracking_uri,
        MLFLOW_REGISTRY_URI=server.registry_uri,
        MLFLOW_EXPERIMENT_NAME=options.name or "",
        # Where MLflow puts the files of an experiment that it makes itself.
        _MLFLOW_SERVER_ARTIFACT_ROOT=options.create_experiment_kwargs.artifact_location or "",
        **{ANNOUNCED: server.tracking_uri},
    )
    if "mlflow" in sys.modules:
        from mlflow.tracking import fluent

        fluent._active_experiment_id = None  # that of another project
        server.use()


def attach(server: Server | None = None, run_id: str | None = None) -> RunHandle | None:
    """Make a handle for a run by its id, or for MLflow's active run; without a request."""
    import mlflow

    server = server or Server(mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    if run_id:
        return RunHandle(server, run_id, experiment_id="", artifact_uri="", attached=True)
    run = mlflow.active_run()
    return _handle(server, run, attached=True) if run else None


def parameter_limit() -> int:
    """Tell how many characters a parameter's value may have, from MLflow."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    return MAX_PARAM_VAL_LENGTH


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

    return {
        key: value if len(value) <= MAX_TAG_VAL_LENGTH else f"{value[: MAX_TAG_VAL_LENGTH - 1]}…"
        for key, value in tags.items()
    }


def _active_run(run: RunHandle) -> ActiveRun:
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
    return ActiveRun(Run(info, RunData()))


def _prepare(server: Server, experiment: ExperimentOptions) -> None:
    """Make an embedded store that doesn't exist yet, whole before anybody can see it.

    MLflow makes one on first use too, but where two processes start at once each meets the
    other's half-made tables.
    """
    file = sqlite_file(server.tracking_uri)
    if file is None or file.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logger.info("Creating the embedded MLflow store %s", server.tracking_uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        with _quiet("alembic"):
            # MLflow's experiment "Default" comes with it: its artifacts go where the others go.
            location = experiment.create_experiment_kwargs.artifact_location
            store = SqlAlchemyStore(f"sqlite:///{draft.as_posix()}", location)
        store.engine.dispose()
        try:
            # Unlike a renaming, a link never replaces the store that another process has made.
            os.link(draft, file)
        except FileExistsError:
            logger.info("Another process has made the store meanwhile")
        except OSError:  # a file system without links
            if not file.exists():
                draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide what a logger tells below a warning, such as a line for each of forty migrations."""
    noisy = logging.getLogger(name)
    before = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        yield
    finally:
        noisy.setLevel(before)


def _experiment_id(server: Server, options: ExperimentOptions) -> str:
    from mlflow.exceptions import MlflowException

    name = options.name or "Default"
    found: Experiment | None = server.client.get_experiment_by_name(name)
    if found is None:
        try:
            return server.client.create_experiment(
                name,
                artifact_location=options.create_experiment_kwargs.artifact_location,
                tags=options.create_experiment_kwargs.tags,
            )
        except MlflowException as error:
            # Another process has made it since.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = server.client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        if not options.restore_if_deleted:
            what = f"the experiment {name!r} is deleted; expected true, or another name, got False"
            raise SettingError(("tracking", "experiment", "restore_if_deleted"), what)
        server.client.restore_experiment(found.experiment_id)
    return found.experiment_id
