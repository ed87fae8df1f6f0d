"""The run handle, which logs to a run from any process.

The only code that changes a run. MLflow is imported inside functions, so that importing this
module costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from .. import state
from ..config.errors import ConfigError
from ..stores.errors import translate_artifact_errors
from ..stores.server import Server
from . import active
from .outbox import Point, outbox_of

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.models.model import ModelInfo

    from ..state import RunKey

logger = logging.getLogger(__name__)


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
    def key(self) -> RunKey:
        """The key of the run in the state of this process."""
        return self.run_id, self.opening

    @property
    def is_ours(self) -> bool:
        """Check whether this process has opened the run and not ended it yet."""
        return self.key in state.current().started

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
        outbox = outbox_of(self)
        outbox.add(points)
        if self.server.replayed_to or not self.is_ours:
            outbox.flush()

    def metric_history(self, key: str) -> list[Metric]:
        """Return all points of a metric, ordered by time, then by step."""
        self.flush()
        history = self.server.client.get_metric_history(self.run_id, key)
        return sorted(history, key=lambda metric: (metric.timestamp, metric.step))

    def metrics(self) -> dict[str, float]:
        """Return the value of each metric, which is the last one at its highest step."""
        self.flush()
        return dict(self.server.client.get_run(self.run_id).data.metrics)

    def last_step(self, key: str) -> int | None:
        """Return the highest step of a metric, asking the server only about what it can't know."""
        if self.fresh and self.is_ours:
            return outbox_of(self).last_steps.get(key)
        return max((metric.step for metric in self.metric_history(key)), default=None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        self.server.client.log_batch(
            self.run_id, tags=[RunTag(k, v) for k, v in fitting_tags(tags).items()]
        )

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Log a local file, or a folder with all that is in it, as artifacts."""
        with translate_artifact_errors(self.artifact_uri, self.server):
            self.server.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Log a text as an artifact of the run."""
        with translate_artifact_errors(self.artifact_uri, self.server):
            self.server.client.log_text(self.run_id, text, artifact_file)

    def log_model(
        self, log: Callable[[], ModelInfo], registered_name: str | None, alias: str | None
    ) -> ModelInfo:
        """Log a model by a function that logs to MLflow's active run.

        The version that gets registered by it, as `registered_name`, is given the alias.
        """
        with self.active(), translate_artifact_errors(self.artifact_uri, self.server):
            info = log()
        if alias and registered_name:
            self.server.client.set_registered_model_alias(
                registered_name, alias, str(info.registered_model_version)
            )
        return info

    def flush(self) -> None:
        """Send every point that waits in this process."""
        outbox_of(self).flush()

    def enter(self, scope: str = "node", model_id: str | None = None) -> None:
        """Make this MLflow's active run in this thread, for as long as `scope` says.

        Metrics that are logged with MLflow's functions for so long belong to a model.
        """
        active.enter(self, scope, model_id)

    def leave(self, scope: str = "node", status: str = "FINISHED") -> None:
        """Take back what `enter` did; a run that was opened since and left open is ended."""
        active.leave(self, scope, status)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hold the run as MLflow's active run in this thread."""
        self.enter("block")
        try:
            yield
        finally:
            self.leave("block")

    def before_end(self, call: Callable[[], object], key: str | None = None) -> None:
        """Register a call for when the run is about to end; the last one is called first.

        A call with the `key` of an earlier one replaces it. Only in the process
        where the run `is_ours`: others don't know when it ends.
        """
        calls = outbox_of(self).before_end
        calls.pop(key or "", None)
        calls[key or uuid4().hex] = call

    def report_error(self, tags: Mapping[str, str], traceback: str) -> None:
        """Log in tags and in the artifact `traceback.txt` why the run fails."""
        self.set_tags(tags)
        self.log_text(traceback, "traceback.txt")


def handle_of(
    server: Server, run: Run, *, attached: bool = False, fresh: bool = False
) -> RunHandle:
    """Return a handle for MLflow's own object of a run."""
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
    """Return a handle for a run by its id, or for MLflow's active run; without a request."""
    import mlflow

    server = server or Server.in_use()
    if run_id:
        return RunHandle(server, run_id, experiment_id="", artifact_uri="", attached=True)
    run = mlflow.active_run()
    return handle_of(server, run, attached=True) if run else None


def fitting_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags, each cut to what MLflow takes."""
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH as LIMIT

    fitting = {k: v if len(v) <= LIMIT else f"{v[: LIMIT - 1]}…" for k, v in tags.items()}
    if cut := ", ".join(key for key, value in tags.items() if value != fitting[key]):
        logger.warning("Cut to the %d characters that MLflow takes: tags %s", LIMIT, cut)
    return fitting
