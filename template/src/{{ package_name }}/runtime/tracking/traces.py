"""MLflow's traces: of a run none is lost, though MLflow sends them in the background.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from multiprocessing.util import Finalize
from threading import Thread

from .. import _mlflow, state
from ..stores import credentials

logger = logging.getLogger(__name__)

# How long traces that can't be sent may hold up the end of a run or of a worker, in seconds.
FLUSH_LIMIT = 10.0

# By default the ids of traces come from Python's `random`: after `random.seed(42)` in two nodes
# they are equal, and both are one trace. MLflow knows the variable since 3.11.
_ISOLATED_IDS = "MLFLOW_TRACE_USE_ISOLATED_RANDOM_ID_GENERATOR"


def variables() -> dict[str, str | None]:
    """Return the environment variables that traces need during a run, unless the user has them."""
    return {} if credentials.original(_ISOLATED_IDS) else {_ISOLATED_IDS: "true"}


def flush() -> bool:
    """Send the traces that this process has ended since the last call.

    Returns:
        Whether they were sent within the limit.
    """
    if "mlflow" not in sys.modules:
        return True
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_TRACE_LOGGING

    held, last = state.current(), mlflow.get_last_active_trace_id()
    if last == held.last_trace or not MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get():
        return True
    held.last_trace = last
    flushing = Thread(target=mlflow.flush_trace_async_logging, name="flush-traces", daemon=True)
    flushing.start()
    flushing.join(FLUSH_LIMIT)
    if flushing.is_alive():
        logger.warning("Not all traces could be sent within %.0f seconds", FLUSH_LIMIT)
    return not flushing.is_alive()


def flush_before_exit() -> None:
    """Send the traces of this worker before it ends, which MLflow does only in other processes."""
    held = state.current()
    if held.is_flushing_traces_before_exit:
        return
    held.is_flushing_traces_before_exit = True
    if "mlflow" in sys.modules:  # a forked worker has what its parent has traced
        import mlflow

        held.last_trace = mlflow.get_last_active_trace_id()
        _mlflow.renew_trace_queue()
    Finalize(None, _flush_and_exit, exitpriority=-1)


def _flush_and_exit() -> None:
    """Flush; a worker whose traces can't be sent would wait for minutes at its end."""
    if not flush():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
