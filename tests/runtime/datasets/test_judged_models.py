"""Metrics belong to the model that their node takes or makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import mlflow
import pytest
from kedro.runner import SequentialRunner, ThreadRunner
from mlflow import MlflowClient
from sklearn.linear_model import LinearRegression

from ...support.projects import Project
from ...support.servers import CountingProxy

PIPELINE = """
import mlflow
from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LinearRegression

def before():
    mlflow.log_metric("before", 1, step=1)
    return 1.0

def train(_):
    return LinearRegression().fit([[0], [1]], [1, 3]), 0.5

def judge(model, _):
    mlflow.log_metric("own", model.predict([[2]])[0])
    mlflow.log_metrics({"own2": 2})
    with mlflow.start_run(nested=True):
        mlflow.log_metric("in_child", 3)
    return 0.75, {"f1": 0.25}, [1, 2], {"a": {"step": 1, "value": 2}}

def compare(one, other):
    mlflow.log_metric("own_of_two", 1)
    return 1.0, 2.0

def after(_):
    mlflow.log_metric("after", 1)
    return 1.0

def create_pipeline():
    judged = ["accuracy", "scores", "curve", "steps"]
    return Pipeline([
        Node(before, None, "early"),
        Node(train, "early", ["first", "train_score"], name="train"),
        Node(train, "early", ["second", "second_score"], name="train_second"),
        Node(judge, ["first", "params:x"], judged, name="judge"),
        Node(compare, ["first", "second"], ["of_two", "of_second"], name="compare"),
        Node(after, "of_two", "late"),
    ])
"""
CATALOG = """
early: {type: PACKAGE.runtime.MlflowMetricDataset, save_args: {step: 1}}
"{name}_score": {type: PACKAGE.runtime.MlflowMetricDataset}
accuracy: {type: PACKAGE.runtime.MlflowMetricDataset}
scores: {type: PACKAGE.runtime.MlflowMetricsDataset}
curve: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
steps: {type: PACKAGE.runtime.MlflowMetricsHistoryDataset}
of_two: {type: PACKAGE.runtime.MlflowMetricDataset}
of_second: {type: PACKAGE.runtime.MlflowMetricDataset, model: second}
late: {type: PACKAGE.runtime.MlflowMetricDataset}
first: &model
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {pip_requirements: [scikit-learn]}
second: *model
"""
OF_FIRST = {
    *("train_score", "own", "own2", "in_child"),
    *("accuracy", "scores.f1", "curve", "steps.a"),
}
OF_SECOND = {"second_score", "of_second"}


def metrics_of_models(project: Project) -> dict[str, set[str]]:
    """Return the names of the metrics that belong to each model of the project's experiment."""
    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    models = project.client.search_logged_models([experiment.experiment_id])
    return {model.name: {metric.key for metric in model.metrics or ()} for model in models}


@pytest.mark.parametrize(
    "runner",
    [
        "SequentialRunner",
        pytest.param("ThreadRunner", marks=pytest.mark.thorough),
        "fork",
        pytest.param("spawn", marks=pytest.mark.thorough),
    ],
)
def test_metrics_belong_to_the_one_model_that_their_node_takes_or_makes(
    project: Project, runner: str
) -> None:
    project.pipeline(PIPELINE)
    project.parameters({"x": 1})
    project.catalog(CATALOG)

    if runner in ("fork", "spawn"):  # how the ParallelRunner starts its workers
        ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=runner)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        project.run(runner=ThreadRunner() if runner == "ThreadRunner" else SequentialRunner())

    assert metrics_of_models(project) == {"first": OF_FIRST, "second": OF_SECOND}


def test_metrics_belong_to_a_model_that_is_loaded_from_anywhere(project: Project) -> None:
    registered = "save_args: {registered_model_name: PACKAGE-m, pip_requirements: [scikit-learn]}"
    project.pipeline(PIPELINE)
    project.parameters({"x": 1})
    project.catalog(CATALOG.replace("save_args: {pip_requirements: [scikit-learn]}", registered))
    project.run(to_nodes=["train"])
    run_id = project.all_runs()[0].info.run_id
    registry = "type: PACKAGE.runtime.MlflowModelRegistryDataset, model_name: PACKAGE-m"
    of_run = "type: PACKAGE.runtime.MlflowModelTrackingDataset, flavor: mlflow.sklearn"
    for number, first in enumerate(
        (
            f"{registry}, flavor: mlflow.sklearn",
            registry,
            f"{of_run}, load_args: {{run_id: {run_id}}}",
            f"{of_run}, load_args: {{model_uri: 'models:/PACKAGE-m/1'}}",
        )
    ):
        project.catalog(f"""
        accuracy: {{type: PACKAGE.runtime.MlflowMetricDataset, key: accuracy{number}}}
        first: {{{first}}}
        """)

        project.run(node_names=["judge"])

    (metrics,) = metrics_of_models(project).values()
    assert {"train_score", "own", *(f"accuracy{number}" for number in range(4))} <= metrics


def test_metrics_of_a_model_of_another_store_are_logged_without_it(
    project: Project, tmp_path: Path
) -> None:
    elsewhere = MlflowClient(f"sqlite:///{tmp_path.as_posix()}/other.db")
    experiment = elsewhere.create_experiment("other", (tmp_path / "files").as_uri())
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path.as_posix()}/other.db")
    with mlflow.start_run(experiment_id=experiment):
        model = mlflow.sklearn.log_model(
            LinearRegression().fit([[0], [1]], [1, 3]),
            name="other",
            pip_requirements=["scikit-learn"],
        )
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    folder = elsewhere.get_logged_model(model.model_id).artifact_location
    project.pipeline(PIPELINE)
    project.parameters({"x": 1})
    project.catalog(f"""
    accuracy: {{type: PACKAGE.runtime.MlflowMetricDataset}}
    first:
      type: PACKAGE.runtime.MlflowModelTrackingDataset
      flavor: mlflow.sklearn
      load_args: {{model_uri: "{folder}"}}
    """)

    project.run(node_names=["judge"])

    run = next(run for run in project.all_runs() if "mlflow.parentRunId" not in run.data.tags)
    assert run.data.metrics == {"accuracy": 0.75, "own": pytest.approx(5), "own2": 2.0}
    assert metrics_of_models(project) == {}


def test_the_model_of_a_metric_costs_no_request(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.tracking_uri = server.uri
    project.pipeline(PIPELINE.replace("    with mlflow.start_run(nested=True):\n    ", ""))
    project.parameters({"x": 1})
    project.catalog(CATALOG)

    project.run()

    assert metrics_of_models(project) == {"first": OF_FIRST, "second": OF_SECOND}
    assert not [path for path in server.requests if path.endswith("log-inputs")]


def test_a_model_that_the_node_does_not_have_is_told_before_there_is_a_run(
    project: Project,
) -> None:
    project.pipeline(PIPELINE)
    project.parameters({"x": 1})
    project.catalog(CATALOG.replace("model: second", "model: third"))

    with pytest.raises(
        click.ClickException,
        match=r"^catalog: of_second: model: expected a model that its node takes or makes "
        r"\(first, second\), got 'third'$",
    ):
        project.run()

    assert project.all_runs() == []
