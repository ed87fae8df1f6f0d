"""Read back all that is kept of an experiment of the example, in a process of its own.

    python -m tests.support.reading ADDRESS EXPERIMENT PACKAGE FILE

The clients of storages keep the first keys that a process has.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run

TABLE = "data/01_raw/penguins.csv"
FEATURES = ["bill_length_mm", "flipper_length_mm", "body_mass_g"]


def read(client: MlflowClient, experiment: str, package: str, folder: Path) -> dict[str, Any]:
    """Read every value, without what differs from run to run: ids, times and places."""
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    names = _names(runs)
    models = client.search_logged_models([found.experiment_id])
    versions = client.search_model_versions(f"name LIKE '{package}-%'")
    read: dict[str, dict[str, Any]] = {
        "runs": {names[run.info.run_id]: _run(client, run, folder) for run in runs},
        "models": {
            f"{names[str(model.source_run_id)]}: {model.name}": _model(model, folder)
            for model in models
        },
        "registered": {
            f"{version.name}/{version.version}": [
                names[str(version.run_id)],
                _predicted(f"models:/{version.name}/{version.version}"),
            ]
            for version in versions
        },
    }
    assert len(read["runs"]) == len(runs)
    assert len(read["models"]) == len(models)
    return read


def _names(runs: list[Run]) -> dict[str, str]:
    """Name each run by its id, and a child after its parent: `service: strength 0.1`."""
    own = {run.info.run_id: str(run.info.run_name) for run in runs}
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    return {
        run_id: f"{own[parent]}: {name}" if (parent := parents[run_id]) else name
        for run_id, name in own.items()
    }


def _run(client: MlflowClient, run: Run, folder: Path) -> dict[str, Any]:
    run_id = run.info.run_id
    own = folder / run_id
    own.mkdir()
    return {
        "status": run.info.status,
        "tags": sorted(run.data.tags),
        "params": run.data.params,
        "metrics": {
            key: sorted([m.step, m.value] for m in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
        "artifacts": _files(client.download_artifacts(run_id, "", str(own))),
    }


def _model(model: LoggedModel, folder: Path) -> dict[str, Any]:
    uri = f"models:/{model.model_id}"
    local = mlflow.artifacts.download_artifacts(uri, dst_path=str(folder / model.model_id))
    return {
        "status": str(model.status),
        "files": sorted(_files(local)),  # in them are ids and times
        "predicted": _predicted(uri),
    }


def _files(folder: str) -> dict[str, str]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _predicted(uri: str) -> list[str]:
    """Load a model, and tell the species of every tenth penguin with it."""
    table = pd.read_csv(TABLE).dropna(subset=FEATURES)[FEATURES][::10]
    predicted = mlflow.pyfunc.load_model(uri).predict(table)
    species = predicted["predicted"] if isinstance(predicted, pd.DataFrame) else predicted
    return [str(one) for one in species]


if __name__ == "__main__":
    address, experiment, package, file = sys.argv[1:]
    mlflow.set_tracking_uri(address)
    with tempfile.TemporaryDirectory() as folder:
        everything = read(MlflowClient(), experiment, package, Path(folder))
    # The packages of two projects have different names.
    text = json.dumps(everything, indent=1, sort_keys=True)
    for name in (package, package.replace("_", "-")):
        text = text.replace(name, "penguins")
    Path(file).write_text(text, encoding="utf-8")
