"""Print what a store has, and what its service predicts, as JSON.

Run with a project's own Python: a store is read with the MLflow that it was written with.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

PENGUIN = {"bill_length_mm": 39.1, "flipper_length_mm": 181.0, "body_mass_g": 3750.0}


def as_dict(client: MlflowClient, run: Run) -> dict[str, Any]:
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "parent": run.data.tags.get("mlflow.parentRunId"),
        "runner": run.data.tags.get("runner"),
        "params": run.data.params,
        "metrics": run.data.metrics,
        "steps": len(client.get_metric_history(run.info.run_id, "learning_curve")),
        "files": [
            file.path
            for entry in client.list_artifacts(run.info.run_id)
            for file in (
                client.list_artifacts(run.info.run_id, entry.path) if entry.is_dir else [entry]
            )
        ],
    }


def main(uri: str, *models: str) -> None:
    """Read the store at `uri`; of the named models, the latest versions predict a species."""
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    experiments = [found.experiment_id for found in client.search_experiments()]
    penguins = pd.DataFrame([PENGUIN])
    predictions = {
        name: mlflow.pyfunc.load_model(f"models:/{name}/latest").predict(penguins)
        for name in models
    }
    stored = {
        "runs": [as_dict(client, run) for run in client.search_runs(experiments)],
        "versions": {name: len(client.search_model_versions(f"name='{name}'")) for name in models},
        "predicted": {
            name: str(table["predicted"][0] if isinstance(table, pd.DataFrame) else table[0])
            for name, table in predictions.items()
        },
    }
    print(json.dumps(stored))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
