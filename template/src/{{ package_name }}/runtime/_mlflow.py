"""Every use of something of MLflow that isn't public.

Each function says why there is no public way, and the version of MLflow that it was seen in; a
test named after it (tests/runtime/test_private.py) fails when MLflow has it no more.
"""

from __future__ import annotations


def default_experiment_id() -> str:
    """Return the experiment that `mlflow.start_run()` would use in this process.

    MLflow 3.17 offers it only together with a run. `mlflow.search_runs` uses it too, but asks the
    server that the whole process points at.
    """
    from mlflow.tracking import fluent

    return str(fluent._get_experiment_id())
