"""The wheel of a project runs where neither its sources nor its pyproject.toml are."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow import MlflowClient

from .conftest import Shell


def test_the_wheel_of_kedro_package_runs_and_is_tracked_without_the_sources(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project, away = tmp_path / "penguins", tmp_path / "away"
    shell(f"uvx copier copy --defaults {clone} {project}", tmp_path)
    shell("uv run kedro package", project)
    shutil.move(project / "dist", away)
    shutil.move(project / "data", away)
    shutil.rmtree(project)
    shell("uv venv --quiet", away)
    shell("uv pip install --quiet --python=.venv penguins-0.1.0-py3-none-any.whl", away)

    # Kedro packs the configuration beside the wheel.
    shell(".venv/bin/penguins --conf-source=conf-penguins.tar.gz", away)
    shell(".venv/bin/penguins --conf-source=conf-penguins.tar.gz --pipelines=inference", away)

    client = MlflowClient(f"sqlite:///{away.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("penguins")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    inference, training = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert [run.info.status for run in (training, inference)] == ["FINISHED", "FINISHED"]
    assert training.data.metrics["accuracy"] > 0.9
    assert [file.path for file in client.list_artifacts(inference.info.run_id)] == [
        "predictions.csv"
    ]
