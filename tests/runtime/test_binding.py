"""One Kedro run is one MLflow run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click import ClickException
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.io import DatasetError
from mlflow.tracking.context import registry

from runtime.stores.server import Server
from runtime.tracking.handle import RunHandle

from ..support.projects import ONE_NODE, Project, for_kedro, has
from ..support.servers import CountingProxy
from .conftest import put_store

CATALOG = """
"{name}_metric":
  type: PACKAGE.runtime.MlflowMetricDataset
"{name}_history":
  type: PACKAGE.runtime.MlflowMetricHistoryDataset
"{name}_text":
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset:
    type: text.TextDataset
    filepath: data/08_reporting/{name}.txt
"""

# Waits until the first system metrics are there.
MEASURED = """
import time

import mlflow
from kedro.pipeline import Node, Pipeline

def work():
    run_id = mlflow.active_run().info.run_id
    end = time.monotonic() + 30
    while not mlflow.get_run(run_id).data.metrics and time.monotonic() < end:
        pass
    return 1

def create_pipeline():
    return Pipeline([Node(work, None, "y")])
"""


def test_a_run_has_name_parameters_tags_status_and_times(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 3, "unused": 4})

    project.run(pipeline_names=["work"], tags=None, params={"x": 5})

    run = project.only_run()
    assert run.info.run_name == "work"
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time > 0
    assert run.data.params == {"x": "5"}
    tags = run.data.tags
    assert tags["kedro_command"] == for_kedro("kedro run --pipelines=work --params=x=5")
    assert tags["pipeline_names" if has("kedro", "1.2") else "pipeline_name"] == "work"
    assert tags["runtime_params"] == '{"x": 5}'
    assert tags["runner"] == "SequentialRunner"
    assert tags["mlflow.source.name"] == project.package
    assert {"kedro_version", "project_path", "mlflow.user", "host"} <= tags.keys()


def test_the_first_run_makes_the_store_and_the_experiment_in_the_project(
    new_project: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = new_project()
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    project.run()

    assert list(elsewhere.iterdir()) == []
    assert (project.path / "mlflow.db").exists()
    experiments = {e.name: e for e in project.client.search_experiments()}
    assert experiments.keys() == {project.package, "Default"}  # MLflow makes the latter itself
    for experiment in experiments.values():
        assert experiment.artifact_location.startswith((project.path / "mlartifacts").as_uri())
    assert project.only_run().info.status == "FINISHED"


def test_processes_that_start_at_once_on_an_empty_store_all_succeed(
    new_project: Callable[..., Project],
) -> None:
    project = new_project()
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda _: project.kedro("run"), range(4)))

    assert [e.returncode for e in ended] == [0] * 4, "".join(e.stdout + e.stderr for e in ended)
    assert [run.info.status for run in project.all_runs()] == ["FINISHED"] * 4
    assert [file.name for file in project.path.glob("mlflow.db*")] == ["mlflow.db"]


def test_a_store_is_made_on_a_file_system_without_links(
    new_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    project = new_project()
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    project.run()

    assert project.only_run().info.status == "FINISHED"
    assert [file.name for file in project.path.glob("mlflow.db*")] == ["mlflow.db"]


class Company:
    """A plug-in of MLflow that knows who runs what where."""

    def in_context(self) -> bool:
        return True

    def tags(self) -> dict[str, str]:
        return {"company.cost_centre": "4711", "mlflow.user": "ada@example.org"}


def test_a_run_has_the_tags_of_run_context_providers(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry._run_context_provider_registry, "_registry", [Company()])
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    project.run()

    tags = project.only_run().data.tags
    assert tags["company.cost_centre"] == "4711"
    assert tags["mlflow.user"] == "ada@example.org"
    assert tags["mlflow.source.name"] == project.package


def test_a_run_has_the_context_that_a_launcher_gives(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"mlflow.source.type": "JOB", "mlflow.databricks.jobID": "7"}
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", json.dumps(given))
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    project.run()

    assert given.items() <= project.only_run().data.tags.items()


def test_a_run_has_system_metrics_where_mlflow_is_told_to_log_them(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    project.pipeline(MEASURED)

    project.run()

    run = project.only_run()
    assert run.info.status == "FINISHED"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


def test_two_runs_in_one_process_are_two_runs(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    project.run()
    project.run(params={"x": 2})

    assert [run.data.params["x"] for run in project.all_runs()] == ["2", "1"]


def test_a_run_is_in_its_projects_store_beside_a_context_of_another_project(
    new_project: Callable[..., Project], empty_store: Path
) -> None:
    other, project = new_project(), new_project()
    for made in (other, project):
        put_store(empty_store, made)
        made.pipeline(ONE_NODE)
        made.parameters({"x": 2})
    bootstrap_project(other.path)
    with KedroSession.create(project_path=other.path) as session:
        assert isinstance(session, KedroSession)
        context = session.load_context()

        project.run()

    assert context.project_path == other.path
    assert (len(project.all_runs()), other.all_runs()) == (1, [])


@pytest.mark.parametrize(
    "metric",
    [
        "{type: PACKAGE.runtime.MlflowMetricDataset, key: 'no%name'}",
        "{type: PACKAGE.runtime.MlflowMetricsDataset, prefix: 'no%name'}",
    ],
)
def test_a_metric_that_mlflow_refuses_fails_the_run_before_a_node_runs(
    project: Project, metric: str
) -> None:
    project.pipeline(
        """
        from pathlib import Path
        from kedro.pipeline import Node, Pipeline

        def work():
            Path("has run").touch()
            return 1

        def create_pipeline():
            return Pipeline([Node(work, None, "y")])
        """
    )
    project.catalog(f"y: {metric}")

    with pytest.raises(DatasetError, match="MLflow refuses the metric name 'no%name"):
        project.run()

    assert project.only_run().info.status == "FAILED"
    assert not Path("has run").exists()


def test_a_dataset_that_cannot_be_made_fails_before_there_is_a_run(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.catalog("y: {type: PACKAGE.runtime.MlflowMetricDataset, keey: m}")

    with pytest.raises(DatasetError, match="keey"):
        project.run()

    assert project.all_runs() == []


def test_a_run_on_a_server_has_its_files_and_model_there(
    new_project: Callable[..., Project], server: CountingProxy, tmp_path: Path
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.tracking_uri = server.uri
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline
        from sklearn.linear_model import LinearRegression

        def fit():
            return LinearRegression().fit([[0], [1]], [1, 3]), "a line"

        def use(model):
            return float(model.coef_[0])

        def create_pipeline():
            return Pipeline([
                Node(fit, None, ["line", "line_text"]), Node(use, "line", "slope")
            ])
        """
    )
    project.catalog(
        CATALOG
        + """
line:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {registered_model_name: PACKAGE-line, pip_requirements: []}
slope: {type: PACKAGE.runtime.MlflowMetricDataset}
"""
    )

    project.run()

    client = project.client
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.data.metrics == {"slope": pytest.approx(2)}
    file = client.download_artifacts(run.info.run_id, "line.txt", str(tmp_path))
    assert Path(file).read_text() == "a line"
    (version,) = client.search_model_versions(f"name = '{project.package}-line'")
    assert version.run_id == run.info.run_id
    assert not (project.path / "mlflow.db").exists()
    assert not (project.path / "mlartifacts").exists()


def test_a_disabled_pipeline_makes_no_run_and_logs_nothing(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def make():
            return 1.0, [0.5], "text"

        def create_pipeline():
            return Pipeline([Node(make, None, ["m_metric", "h_history", "t_text"])])
        """
    )
    project.catalog(CATALOG)
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [__default__]}}")

    project.run()

    assert project.all_runs() == []
    assert (project.path / "data/08_reporting/t.txt").read_text() == "text"


def test_a_disabled_pipeline_loads_with_the_credentials_of_the_server(project: Project) -> None:
    project.pipeline(
        """
        import os
        from kedro.pipeline import Node, Pipeline

        def look():
            return os.environ.get("MLFLOW_TRACKING_TOKEN", "none")

        def create_pipeline():
            return Pipeline([Node(look, None, "seen")])
        """
    )
    disabled = "tracking: {disable_tracking: {pipelines: [__default__]}}\n"
    project.mlflow_yml(disabled + "server: {credentials: mlflow}")
    project.write("conf/local/credentials.yml", "mlflow: {MLFLOW_TRACKING_TOKEN: t0ken}")

    assert project.run()["seen"].load() == "t0ken"
    assert "MLFLOW_TRACKING_TOKEN" not in os.environ
    # Where there are none, nothing needs them.
    project.mlflow_yml(disabled + "server: {credentials: nowhere}")
    assert project.run()["seen"].load() == "none"


def test_nothing_but_a_tracked_run_imports_mlflow_or_needs_the_store(
    new_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = new_project()
    project.pipeline(ONE_NODE)
    project.catalog(CATALOG)
    # A package that can't be imported stands in MLflow's way.
    guard = tmp_path / "guard" / "mlflow" / "__init__.py"
    guard.parent.mkdir(parents=True)
    guard.write_text("raise SystemExit('MLflow was imported')")
    path = os.pathsep.join([str(guard.parents[1]), str(project.path / "src")])

    for command in ("registry list", "catalog describe-datasets", "mlflow --help", "--help"):
        ended = project.kedro_anew(*command.split(), PYTHONPATH=path)
        assert ended.returncode == 0, command + ended.stdout + ended.stderr
    assert "MLflow was imported" in project.kedro_anew("run", PYTHONPATH=path).stderr
    assert not (project.path / "mlflow.db").exists()


@pytest.mark.parametrize("disabled", [False, True])
def test_no_run_begins_where_kedro_mlflow_would_track_it_too(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    plugin = tmp_path / "site" / "kedro_mlflow-2.0.3.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: kedro_mlflow\nVersion: 2.0.3\n")
    (plugin / "entry_points.txt").write_text("[kedro.hooks]\nkedro_mlflow = kedro_mlflow:hook\n")
    (plugin.parent / "kedro_mlflow.py").write_text("hook = type('Hook', (), {})()\n")
    monkeypatch.syspath_prepend(plugin.parent)
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    if disabled:
        settings = project.path / "src" / project.package / "settings.py"
        with settings.open("a") as file:
            file.write('DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow",)\n')

    if disabled:
        project.run()
    else:
        with pytest.raises(ClickException, match="kedro-mlflow is installed"):
            project.run()

    assert len(project.all_runs()) == disabled


def test_parameters_that_are_too_long_fail_before_there_is_a_run(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": "long" * 2000})

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert "'x' (8000)" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert project.all_runs() == []


def test_a_handle_pickles() -> None:
    handle = RunHandle(Server("sqlite:///a", "sqlite:///a"), "run", "1", "file:///a")

    assert pickle.loads(pickle.dumps(handle)) == handle
