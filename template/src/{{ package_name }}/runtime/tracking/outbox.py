"""Points of metrics, gathered and sent in batches.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .. import _mlflow, state

if TYPE_CHECKING:
    from mlflow.entities import Metric

    from .handle import RunHandle

logger = logging.getLogger(__name__)

# A point waits at most this long, in seconds, for others to share its request with.
FLUSH_AFTER = 1.0


class Point(NamedTuple):
    """One value of a metric; `timestamp` is in milliseconds since 1970.

    `model_id` is the logged model that the value judges.
    """

    key: str
    value: float
    step: int = 0
    timestamp: int | None = None
    model_id: str | None = None


class Outbox:
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
        """Add points, which are sent within a second, or by `flush`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            for key, value, step, timestamp, model_id in points:
                timestamp = now if timestamp is None else timestamp
                self._points.append(Metric(key, value, timestamp, step, model_id=model_id))
                self.last_steps[key] = max(step, self.last_steps.get(key, step))
            if self._points and self._timer is None:
                self._timer = threading.Timer(FLUSH_AFTER, self._flush_in_background)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Send every point that waits."""
        with self._sending:
            with self._lock:
                points, self._points = self._points, []
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            if not points:
                return
            # MLflow takes a point without a model for one of the thread's active model.
            active_model = _mlflow.exchange_active_model(None)
            try:
                self._run.server.client.log_batch(self._run.run_id, metrics=points)
            except BaseException:
                with self._lock:
                    self._points[:0] = points
                raise
            finally:
                _mlflow.restore_active_model(active_model)

    def _flush_in_background(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            # The points are kept: the next flush sends them, or fails in the user's sight.
            logger.warning("Metrics could not be sent yet: %s", error)


def outbox_of(run: RunHandle) -> Outbox:
    """Return what this process has taken for a run."""
    return state.current().outboxes.setdefault(run.key, Outbox(run))
