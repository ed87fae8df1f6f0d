"""MLflow's active run: the runs that the user's own `mlflow.log_metric(…)` lands in.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING

from .. import _mlflow, state

if TYPE_CHECKING:
    from mlflow import ActiveRun

    from .handle import RunHandle


def active_run_id() -> str | None:
    """Return the id of MLflow's active run in this thread."""
    stack = _mlflow.active_runs() if "mlflow" in sys.modules else []
    return stack[-1].info.run_id if stack else None


def enter(run: RunHandle, scope: str, model_id: str | None = None) -> None:
    """Make a run MLflow's active run in this thread, without a request.

    Args:
        run: The run.
        scope: Says for how long: for `leave` to find what belongs to it.
        model_id: The model that metrics belong to for so long; one that the user has set goes
            before it.
    """
    from mlflow import get_active_model_id

    run.server.use()
    # Runs that the user's code nests in this one belong to the same experiment.
    _mlflow.set_active_experiment(run.experiment_id)
    active = _active_run(run, scope, model_id)
    if model_id and get_active_model_id() is None:
        active.model_before = _mlflow.exchange_active_model(model_id)  # type: ignore[attr-defined]
    _mlflow.active_runs().append(active)
    held = state.current()
    if not held.is_clearing_active_runs:
        held.is_clearing_active_runs = True
        # MLflow has registered its own by now: what is registered later is called first.
        atexit.register(_clear)


def leave(run: RunHandle, scope: str, status: str) -> None:
    """Take back what `enter` did; a run that was opened since and left open is ended."""
    if "mlflow" not in sys.modules:
        return
    stack = _mlflow.active_runs()
    mine = [getattr(active, "entered", None) == (run.run_id, scope) for active in stack]
    if any(mine):  # else the user's code has ended it, or this is another thread
        _cut(stack, len(mine) - 1 - mine[::-1].index(True), status)


def _clear() -> None:
    """Empty MLflow's stack at exit: MLflow would end what is open as FINISHED."""
    stack = _mlflow.active_runs()
    entered = [hasattr(run, "entered") for run in stack]
    if any(entered):
        _cut(stack, entered.index(True), "KILLED")


def _cut(stack: list[ActiveRun], length: int, status: str) -> None:
    """Shorten MLflow's stack of active runs; those that the user's code opened are ended."""
    import mlflow

    while len(stack) > length:
        if hasattr(stack[-1], "entered"):
            active = stack.pop()
            if hasattr(active, "model_before"):
                _mlflow.restore_active_model(active.model_before)
        else:
            mlflow.end_run(status)


def _active_run(run: RunHandle, scope: str, model_id: str | None) -> ActiveRun:
    """Return MLflow's own object for a run, made from the handle without a request."""
    from mlflow import ActiveRun
    from mlflow.entities import (
        LifecycleStage,
        LoggedModelInput,
        Run,
        RunData,
        RunInfo,
        RunInputs,
        RunStatus,
    )

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
    # With a model that it doesn't know of yet, MLflow makes a request for each metric.
    inputs = RunInputs([], [LoggedModelInput(model_id)]) if model_id else None
    active = ActiveRun(Run(info, RunData(), inputs))
    active.entered = (run.run_id, scope)  # type: ignore[attr-defined]
    return active
