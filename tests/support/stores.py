"""The content of an MLflow store as plain data, equal for two stores that hold the same."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModel, Metric, Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

# Tags that no two runs have alike.
OF_ONE_RUN = re.compile(
    r"run_id|session_id|host|pid|process_start(_ticks)?|kedro_recorded_as|mlflow\.source\.git\..*"
)

# The tag of a logged model that says which versions were registered from it.
VERSIONS = "mlflow.modelVersions"

# Where a server keeps what belongs to an experiment, with the number of the experiment.
PLACE = re.compile(r"mlflow-artifacts:/(\w+/)?\d+/")

# Times in descriptions of models.
TIME = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?")


def content(
    client: MlflowClient, *experiments: str, names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Read experiments, their runs and logged models, and the models registered from them.

    An id is given as the name of what it stands for, and times, processes and places are left
    out. An id of something else stays as it is, so that a link into another store shows.

    Args:
        client: A client of the store.
        experiments: Names of the experiments.
        names: Texts to give as others wherever they occur, such as the name of a project.
    """
    found = [client.get_experiment_by_name(name) for name in experiments]
    existing = [experiment for experiment in found if experiment]
    ids = [experiment.experiment_id for experiment in existing]
    runs = every(client.search_runs, ids) if ids else []
    models = every(client.search_logged_models, ids) if ids else []
    known = {run.info.run_id: f"<run {run.info.run_name}>" for run in runs}
    known |= {model.model_id: f"<model {model.name}>" for model in models}
    reader = _Reader(client, {**known, **names})
    return {
        "experiments": [reader.experiment(experiment) for experiment in existing],
        "runs": _sorted(map(reader.run, runs)),
        "models": _sorted(map(reader.model, models)),
        "registered": reader.registered({*known}),
    }


def every(search: Any, *arguments: Any) -> list[Any]:
    """Collect all pages of a search."""
    found: list[Any] = []
    token = None
    while True:
        page = search(*arguments, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _sorted(entries: Any) -> list[Any]:
    return sorted(entries, key=lambda entry: json.dumps(entry, sort_keys=True))


@dataclass(frozen=True)
class _Reader:
    client: MlflowClient
    names: Mapping[str, str]

    def text(self, value: Any) -> Any:
        """Give a text without what no two stores have alike; anything else as it is."""
        if not isinstance(value, str):
            return value
        for old in sorted(self.names, key=len, reverse=True):
            value = value.replace(old, self.names[old])
        return TIME.sub("<time>", PLACE.sub("<place>/", value))

    def texts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.text(key): self.text(value) for key, value in sorted(values.items())}

    def tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        tags = {k: v for k, v in tags.items() if not OF_ONE_RUN.fullmatch(k)}
        if VERSIONS in tags:  # MLflow notes a version here when it is made, and once more
            versions = {(v["name"], str(v["version"])) for v in json.loads(tags[VERSIONS])}
            tags[VERSIONS] = json.dumps(sorted(versions))
        return self.texts(tags)

    def experiment(self, experiment: Experiment) -> dict[str, Any]:
        return {
            "name": self.text(experiment.name),
            "tags": self.tags(experiment.tags),
            "stage": experiment.lifecycle_stage,
        }

    def run(self, run: Run) -> dict[str, Any]:
        run_id = run.info.run_id
        inputs, outputs = run.inputs, run.outputs
        return {
            "name": self.text(run.info.run_name),
            "status": run.info.status,
            "ended": bool(run.info.end_time),
            "params": self.texts(run.data.params),
            "tags": self.tags(run.data.tags),
            "metrics": {
                key: self.points(self.client.get_metric_history(run_id, key))
                for key in sorted(run.data.metrics)
            },
            "datasets": _sorted(
                {
                    **self.texts(vars_of(entry.dataset)),
                    "tags": self.texts({tag.key: tag.value for tag in entry.tags}),
                }
                for entry in (inputs.dataset_inputs if inputs else [])
            ),
            "used": sorted(
                self.text(entry.model_id) for entry in (inputs.model_inputs if inputs else [])
            ),
            "made": sorted(
                [self.text(entry.model_id), entry.step]
                for entry in (outputs.model_outputs if outputs else [])
            ),
            "artifacts": self.files(run.info.artifact_uri),
        }

    def points(self, history: list[Metric]) -> list[list[Any]]:
        return sorted([point.step, point.timestamp, point.value] for point in history)

    def model(self, model: LoggedModel) -> dict[str, Any]:
        return {
            "name": self.text(model.name),
            "type": model.model_type or "",
            "status": str(model.status),
            "run": self.text(model.source_run_id),
            "params": self.texts(model.params or {}),
            "tags": self.tags(model.tags or {}),
            "metrics": sorted(
                [metric.key, metric.step, metric.timestamp, metric.value, self.text(metric.run_id)]
                for metric in model.metrics or []
            ),
            "artifacts": self.files(model.artifact_location),
        }

    def registered(self, sources: set[str]) -> list[dict[str, Any]]:
        """Read the registered models that have a version of one of these runs or models."""
        versions = every(self.client.search_model_versions)
        ours = {v.name for v in versions if {v.run_id, v.model_id} & sources}
        return _sorted(
            {
                "name": self.text(name),
                "tags": self.tags(self.client.get_registered_model(name).tags),
                "aliases": {
                    alias: str(version)
                    for alias, version in self.client.get_registered_model(name).aliases.items()
                },
                "versions": _sorted(
                    {
                        "version": str(version.version),
                        "description": version.description,
                        "status": version.status,
                        "tags": self.tags(version.tags),
                        "run": self.text(version.run_id),
                        "model": self.text(version.model_id),
                        "source": self.text(version.source),
                    }
                    for version in versions
                    if version.name == name
                ),
            }
            for name in ours
        )

    def files(self, uri: str) -> dict[str, str]:
        """Give each file below an address: its text, or the hash of what is no text."""
        with tempfile.TemporaryDirectory() as folder:
            # Without `runs:/` or `models:/`, which would ask the server once more for each file.
            repository = get_artifact_repository(uri, self.client.tracking_uri)
            if not repository.list_artifacts():
                return {}
            path = Path(repository.download_artifacts("", folder))
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return {
                self.text(file.relative_to(path).as_posix()): self.text(_read(file))
                for file in files
            }


def vars_of(entity: Any) -> dict[str, Any]:
    """Give the fields of one of MLflow's entities."""
    return dict(entity)


def _read(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return hashlib.sha256(data).hexdigest()


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """List where two contents of stores differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return [
            line
            for key in sorted({*found, *expected})
            for line in differences(found.get(key), expected.get(key), f"{path}/{key}")
        ]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [
            line
            for index, pair in enumerate(zip(found, expected, strict=True))
            for line in differences(*pair, f"{path}/{index}")
        ]
    return [] if found == expected else [f"{path}: {found!r}, not {expected!r}"]
