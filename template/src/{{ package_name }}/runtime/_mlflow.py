"""Every use of something of MLflow that isn't public.

Each function says why there is no public way, and the version of MLflow that it was seen in; a
test named after it (tests/runtime/test_private.py) fails when MLflow has it no more.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import ActiveRun
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )
    from sqlalchemy.engine import Engine


def active_runs() -> list[ActiveRun]:
    """Return MLflow's own list of the runs that are active in this thread, the innermost last.

    `mlflow.start_run(run_id=…)` and `mlflow.end_run()` make four requests for each node, and end
    the run. Seen in MLflow 3.9 to 3.17.
    """
    from mlflow.tracking import fluent

    runs: list[ActiveRun] = fluent._active_run_stack.get()
    return runs


def set_active_experiment(experiment_id: str | None) -> None:
    """Set the experiment of the runs that `mlflow.start_run` makes in this process.

    `mlflow.set_experiment` makes a request for each node, leaves the id in the environment, and
    can't take the experiment back. Seen in MLflow 3.9 to 3.17.
    """
    from mlflow.tracking import fluent

    fluent._active_experiment_id = experiment_id  # type: ignore[assignment]


def exchange_active_model(model_id: str | None) -> object:
    """Set the model that metrics of this thread belong to; None for no model.

    `mlflow.set_active_model` makes a request, and tells of each model. Seen in MLflow 3.9 to 3.17.

    Returns:
        What `restore_active_model` takes.
    """
    from mlflow.tracking import fluent

    before = fluent._ACTIVE_MODEL_CONTEXT.get()
    fluent._ACTIVE_MODEL_CONTEXT.set(fluent.ActiveModelContext(model_id))
    return before


def restore_active_model(before: object) -> None:
    """Take back what `exchange_active_model` did in this thread."""
    from mlflow.tracking import fluent

    fluent._ACTIVE_MODEL_CONTEXT.set(before)


def artifact_root_variable(location: str | None) -> dict[str, str | None]:
    """Return the variable for where MLflow puts the files of an experiment that it makes itself.

    MLflow has an option for this for its server alone, which hands it to its workers in this
    variable; without it the files go to the working directory. Where nothing has to be set, the
    variable must not be there: it marks the process as a server's. Seen in MLflow 3.10 to
    3.17.
    """
    return {"_MLFLOW_SERVER_ARTIFACT_ROOT": location}


def engines() -> list[Engine]:
    """Return the engines of the databases that MLflow has opened in this process.

    SQLAlchemy wants them disposed of in a forked process, which MLflow doesn't do, and its clients
    don't give them out. Seen in MLflow 3.9 to 3.17.
    """
    modules = (
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
    )
    stores: list[Any] = [
        sys.modules[name].SqlAlchemyStore for name in modules if name in sys.modules
    ]
    return [engine for store in stores for engine in store._engine_map.values()]


def register_header_provider(provider: RequestHeaderProvider) -> None:
    """Let MLflow ask a provider for the headers of each request.

    MLflow takes providers from entry points, which a package has only when it is installed. Seen
    in MLflow 3.9 to 3.17.
    """
    from mlflow.tracking.request_header.registry import _request_header_provider_registry

    _request_header_provider_registry.register(lambda: provider)


def renew_autologging_threads() -> None:
    """Give autologging threads of this process.

    It hands its requests to pools of threads that it makes when it is imported. In a forked process
    those threads don't exist, and a fit would wait for them for ever. Seen in MLflow 3.9 to 3.17.
    """
    from mlflow.utils.autologging_utils import client, metrics_queue

    for module, name in (
        (client, "_AUTOLOGGING_QUEUEING_CLIENT_THREAD_POOL"),
        (metrics_queue, "_thread_pool"),
    ):
        pool: ThreadPoolExecutor = getattr(module, name)
        setattr(module, name, ThreadPoolExecutor(pool._max_workers))


def renew_trace_queue() -> None:
    """Give the traces of this process a queue of its own.

    In a forked process the threads that empty the queue don't exist, and it may hold traces that
    the parent sends. Seen in MLflow 3.9 to 3.17.
    """
    from mlflow.tracing import provider
    from mlflow.tracing.export.async_export_queue import AsyncTraceExportQueue

    exporter: Any = provider._get_trace_exporter()
    if hasattr(exporter, "_async_queue"):
        exporter._async_queue = AsyncTraceExportQueue()


def default_experiment_id() -> str:
    """Return the experiment that `mlflow.start_run()` would use in this process.

    MLflow 3.17 offers it only together with a run. `mlflow.search_runs` uses it too, but asks the
    server that the whole process points at.
    """
    from mlflow.tracking import fluent

    return str(fluent._get_experiment_id())


def replace_folder(uri: str, before: str, now: str) -> None:
    """Change the folder in the URIs of all files that a SQLite store has of its runs and models.

    MLflow can't change where the files of a run are, and a store whose folder was moved has it in
    absolute URIs. Seen in MLflow 3.9 to 3.17.

    Args:
        uri: The store.
        before: URI of the folder that the URIs begin with, without a slash at its end.
        now: URI of the folder that takes its place.
    """
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
    from mlflow.store.tracking.dbmodels.models import (
        SqlExperiment,
        SqlLoggedModel,
        SqlRun,
        SqlTraceTag,
    )
    from sqlalchemy import create_engine, func, literal, update
    from sqlalchemy.pool import NullPool

    columns: list[Any] = [
        SqlExperiment.artifact_location,
        SqlRun.artifact_uri,
        SqlLoggedModel.artifact_location,
        SqlModelVersion.source,
        SqlModelVersion.storage_location,
        SqlTraceTag.value,
    ]
    with create_engine(uri, poolclass=NullPool).begin() as connection:
        for column in columns:
            is_below = column.startswith(f"{before}/", autoescape=True)
            moved = literal(now) + func.substr(column, len(before) + 1)
            connection.execute(update(column.class_).where(is_below).values({column: moved}))
