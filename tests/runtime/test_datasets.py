"""Artifacts, metrics and models as datasets, on a real store."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from kedro.io import DatasetError
from mlflow import MlflowClient
from sklearn.linear_model import LinearRegression

from runtime import (
    MlflowArtifactDataset,
    MlflowMetricDataset,
    MlflowMetricHistoryDataset,
    MlflowMetricsDataset,
    MlflowMetricsHistoryDataset,
    MlflowModelRegistryDataset,
    MlflowModelTrackingDataset,
)

from .conftest import Project


@pytest.fixture
def client(project: Project) -> Iterator[MlflowClient]:
    """A client, with a run open as in a notebook."""
    mlflow.set_tracking_uri(project.tracking_uri)
    mlflow.set_experiment(
        experiment_id=project.client.create_experiment(
            "datasets", artifact_location=(project.path / "mlartifacts").as_uri()
        )
    )
    with mlflow.start_run():
        yield project.client


def run_id() -> str:
    run = mlflow.active_run()
    assert run
    return str(run.info.run_id)


def history(client: MlflowClient, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id(), key)]


def file_dataset(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"type": "text.TextDataset", "filepath": str(tmp_path / "note.txt"), **more}


@pytest.mark.parametrize(
    ("dataset", "data"),
    [
        (MlflowMetricDataset(key="m"), 1.0),
        (MlflowMetricHistoryDataset(key="m"), [1.0]),
        (MlflowMetricsDataset(), {"a": 1.0}),
        (MlflowMetricsHistoryDataset(), {"a": {"step": 0, "value": 1.0}}),
        (MlflowModelTrackingDataset("mlflow.sklearn"), LinearRegression()),
    ],
    ids=lambda given: type(given).__name__,
)
def test_without_a_run_a_dataset_says_that_there_is_none(dataset: Any, data: Any) -> None:
    with pytest.raises(DatasetError, match="has no run to use"):
        dataset.save(data)


@pytest.mark.parametrize(
    "dataset",
    [
        MlflowArtifactDataset({"type": "text.TextDataset", "filepath": "note.txt"}, metadata={}),
        MlflowMetricDataset("m", metadata={"a": 1}),
        MlflowMetricHistoryDataset("m", metadata={"a": 1}),
        MlflowMetricsDataset(prefix="p", metadata={"a": 1}),
        MlflowMetricsHistoryDataset(prefix="p", metadata={"a": 1}),
        MlflowModelTrackingDataset("mlflow.sklearn", metadata={"a": 1}),
        MlflowModelRegistryDataset("m", metadata={"a": 1}),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_a_dataset_pickles_deep_copies_and_describes_itself_without_metadata(dataset: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert str(twin) == str(dataset)
        assert twin.metadata == dataset.metadata
    assert "metadata" not in str(dataset)


def test_a_metric_overwrites_at_the_last_step_or_appends_after_it(client: MlflowClient) -> None:
    overwriting = MlflowMetricDataset("m")
    overwriting.save(1)
    overwriting.save(2.5)
    assert history(client, "m") == [(0, 1.0), (0, 2.5)]
    assert overwriting.load() == 2.5

    MlflowMetricDataset("m", save_args={"mode": "append"}).save(3)
    MlflowMetricDataset("m", save_args={"step": 7}).save(4)
    assert history(client, "m")[2:] == [(1, 3.0), (7, 4.0)]
    assert MlflowMetricDataset("m", load_args={"step": 1}).load() == 3.0


def test_a_metric_refuses_what_is_no_number_and_an_unknown_mode(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match="Metric 'm' takes a number, got 'high'"):
        MlflowMetricDataset("m").save("high")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="one of overwrite, append, got 'add'"):
        MlflowMetricDataset("m", save_args={"mode": "add"}).save(1)
    with pytest.raises(DatasetError, match="no metric 'm' at step 3"):
        MlflowMetricDataset("m", load_args={"step": 3}).load()


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("list", [0.1, 0.2, 0.3]),
        ("dict", {0: 0.1, 5: 0.2, 10: 0.3}),
        (
            "history",
            [
                {"step": -1, "value": 0.1, "timestamp": 1000},
                {"step": 3, "value": 0.2, "timestamp": 2000},
            ],
        ),
    ],
)
def test_a_metric_history_loads_as_it_was_saved(client: MlflowClient, mode: str, data: Any) -> None:
    dataset = MlflowMetricHistoryDataset("h", load_args={"mode": mode}, save_args={"mode": mode})

    dataset.save(data)

    assert dataset.load() == data
    assert dataset.exists()


def test_many_metrics_share_a_prefix(client: MlflowClient) -> None:
    flat = MlflowMetricsDataset(prefix="scores")
    flat.save({"a": 1, "b": 0.5})
    assert client.get_run(run_id()).data.metrics == {"scores.a": 1.0, "scores.b": 0.5}
    assert flat.load() == {"a": 1.0, "b": 0.5}

    over_steps = MlflowMetricsHistoryDataset(prefix="fit")
    over_steps.save(
        {
            "one": {"step": 0, "value": 0.5},
            "two": [{"step": 0, "value": 1.0}, {"step": 1, "value": 2.0}],
        }
    )
    assert over_steps.load() == {
        "fit.one": {"step": 0, "value": 0.5},
        "fit.two": [{"step": 0, "value": 1.0}, {"step": 1, "value": 2.0}],
    }
    with pytest.raises(DatasetError, match="got 3"):
        over_steps.save({"wrong": 3})


def test_an_artifact_is_saved_locally_and_copied_to_the_run(
    client: MlflowClient, tmp_path: Path
) -> None:
    dataset = MlflowArtifactDataset(file_dataset(tmp_path), artifact_path="notes")

    dataset.save("hello")

    assert (tmp_path / "note.txt").read_text() == "hello"
    assert [a.path for a in client.list_artifacts(run_id(), "notes")] == ["notes/note.txt"]
    assert dataset.load() == "hello"
    assert dataset.exists()


def test_an_artifact_of_another_run_is_fetched_from_it(
    client: MlflowClient, tmp_path: Path
) -> None:
    MlflowArtifactDataset(file_dataset(tmp_path), artifact_path="notes").save("then")
    (tmp_path / "note.txt").write_text("now")

    earlier = MlflowArtifactDataset(file_dataset(tmp_path), run_id=run_id(), artifact_path="notes")

    assert earlier.load() == "then"
    assert (tmp_path / "note.txt").read_text() == "now"


def test_a_version_and_a_folder_become_artifacts(client: MlflowClient, tmp_path: Path) -> None:
    versioned = MlflowArtifactDataset(file_dataset(tmp_path, versioned=True))
    versioned.save("hello")
    assert versioned.load() == "hello"

    partitioned = MlflowArtifactDataset(
        {
            "type": "partitions.PartitionedDataset",
            "path": str(tmp_path / "parts"),
            "dataset": "text.TextDataset",
        }
    )
    partitioned.save({"a": "1", "b": "2"})

    assert {a.path for a in client.list_artifacts(run_id())} == {"note.txt", "parts"}
    parts = {a.path for a in client.list_artifacts(run_id(), "parts")}
    assert parts == {"parts/a", "parts/b"}


def test_a_dataset_without_a_file_cannot_be_an_artifact(client: MlflowClient) -> None:
    dataset = MlflowArtifactDataset({"type": "MemoryDataset"})
    with pytest.raises(DatasetError, match="MemoryDataset can't be an artifact"):
        dataset.save(1)


def test_a_model_is_logged_registered_and_loaded(client: MlflowClient) -> None:
    model = LinearRegression().fit(pd.DataFrame({"x": [0, 1]}), [1, 3])
    arguments = {"name": "line", "registered_model_name": "line", "pip_requirements": []}
    tracked = MlflowModelTrackingDataset("mlflow.sklearn", save_args=arguments)

    tracked.save(model)

    assert tracked.load().coef_ == pytest.approx([2.0])
    # Another process of the run knows only the run and the name.
    twin = MlflowModelTrackingDataset("mlflow.sklearn", save_args=arguments)
    assert twin.model_uri == tracked.model_uri
    assert twin.exists()
    registered = MlflowModelRegistryDataset("line", flavor="mlflow.sklearn")
    assert registered.load().coef_ == pytest.approx([2.0])
    assert MlflowModelRegistryDataset("line", stage_or_version=1).load().metadata.run_id == run_id()
    client.set_registered_model_alias("line", "best", "1")
    assert MlflowModelRegistryDataset("line", alias="best").load().metadata.run_id == run_id()


def test_a_model_dataset_refuses_wrong_use(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match=r"`flavor` is .* got 'mlflow\.skleran'"):
        MlflowModelTrackingDataset("mlflow.skleran")
    with pytest.raises(DatasetError, match="`pyfunc_workflow`"):
        MlflowModelTrackingDataset("mlflow.pyfunc")
    with pytest.raises(DatasetError, match="exclude each other"):
        MlflowModelRegistryDataset("line", stage_or_version=1, alias="best")
    with pytest.raises(DatasetError, match="only loads"):
        MlflowModelRegistryDataset("line").save(1)
    with pytest.raises(DatasetError, match="no model 'model' yet"):
        MlflowModelTrackingDataset("mlflow.sklearn").load()
    with pytest.raises(DatasetError, match="for loading only"):
        MlflowModelTrackingDataset(
            "mlflow.sklearn", load_args={"model_uri": "models:/line/1"}
        ).save(1)


def test_points_wait_for_one_another_and_are_read_back_in_the_same_run(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def first():
            return [0.5, 0.25], 0.125

        def second(curve, value):
            assert (curve, value) == ([0.5, 0.25], 0.125), (curve, value)
            return "right"

        def create_pipeline():
            return Pipeline([
                Node(first, None, ["curve", "value"]),
                Node(second, ["curve", "value"], "checked"),
            ])
        """
    )
    project.catalog(
        """
        curve: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
        value: {type: PACKAGE.runtime.MlflowMetricDataset}
        """
    )

    assert project.run()["checked"].load() == "right"
    assert project.only_run().data.metrics == {"curve": 0.25, "value": 0.125}
