"""What replaying uses of MLflow that isn't public."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Trace, TraceInfo


def write_trace(uri: str, info: TraceInfo, trace: Trace) -> None:
    """Write a trace with the id, times and spans that it has in another store.

    The public `mlflow.start_span_no_context` gives each trace a new id, sends it to the global
    tracking URI in a thread, and only logs what goes wrong. `TracingClient` is what MLflow itself
    writes traces with; writing one twice leaves one (seen in MLflow 3.17).

    Args:
        uri: Where to write to.
        info: What is written of the trace as a whole.
        trace: The trace, for its spans.
    """
    from mlflow.tracing.client import TracingClient

    # The store gives its own place, and refuses a second one.
    tags = {key: text for key, text in info.tags.items() if key != "mlflow.artifactLocation"}
    client = TracingClient(uri)
    client.start_trace(replace(info, tags=tags))
    client.log_spans(str(info.experiment_id), trace.data.spans)


def delete_for_good(uri: str, run_ids: Iterable[str], model_ids: Iterable[str]) -> None:
    """Delete runs and logged models from a SQLite store for good, but not their files.

    The public `delete_run` only marks them. What deletes them, `mlflow gc`, is a command that
    removes files too, wherever the store says that they are; it calls these methods (seen in
    MLflow 3.17).
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(uri, "")
    try:
        for model_id in model_ids:
            store._hard_delete_logged_model(model_id)
        for run_id in run_ids:
            store._hard_delete_run(run_id)
    finally:
        store.engine.dispose()
