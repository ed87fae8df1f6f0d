"""A small project that logs in every way there is, and what has to be found afterwards."""

from __future__ import annotations

from pathlib import Path

import mlflow
from mlflow.entities import Run

from .projects import Project

# The nodes of a layer don't need each other, so that two workers log at once.
PIPELINE = """
import mlflow
from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LinearRegression


def measure(depth):
    mlflow.set_tag("species", "gentoo")
    for step in range(3):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    return [0.5, 0.75, 0.875], depth / 2


def describe(note):
    mlflow.log_text("from the node", "by_node.txt")
    return note.upper()


def fit():
    return LinearRegression().fit([[0], [1]], [1, 3])


def use(line, report):
    return float(line.predict([[2]])[0]) + len(report)


def create_pipeline():
    return Pipeline([
        Node(measure, "params:depth", ["history", "half"]),
        Node(describe, "params:note", "report"),
        Node(fit, None, "line"),
        Node(use, ["line", "report"], "result"),
    ])
"""

CATALOG = """
history: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
half: {type: PACKAGE.runtime.MlflowMetricDataset}
result: {type: PACKAGE.runtime.MlflowMetricDataset}
report:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: data/08_reporting/report.txt}
line:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {registered_model_name: PACKAGE, pip_requirements: []}
"""

# Writes a file where it runs, so that a test can tell that it didn't.
WITNESS = """
from pathlib import Path

from kedro.pipeline import Node, Pipeline


def see():
    Path("ran").touch()
    return "a text"


def create_pipeline():
    return Pipeline([Node(see, None, "report")])
"""

SECRET = "change-me-to-something-long"

ENTRY = "the entry of credentials.yml that server.credentials names"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN = "MLFLOW_TRACKING_TOKEN"
CA = "MLFLOW_TRACKING_SERVER_CERT_PATH"


def fill(project: Project) -> None:
    """Give a project the pipeline and what it needs."""
    project.pipeline(PIPELINE)
    project.catalog(CATALOG)
    project.parameters({"depth": 3, "note": "a note"})


def check(project: Project, folder: Path) -> Run:
    """Read back every value that the project's one run has to have; gives the run."""
    client = project.client
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"depth": "3", "note": "a note"}
    assert run.data.tags["species"] == "gentoo"
    assert run.data.tags["kedro_command"].startswith("kedro run")
    histories = {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        for key in run.data.metrics
    }
    assert histories == {
        "loss": [(0, 1.0), (1, 0.5), (2, 1 / 3)],
        "history": [(0, 0.5), (1, 0.75), (2, 0.875)],
        "half": [(0, 1.5)],
        "result": [(0, 11.0)],
    }
    listed = {file.path for file in client.list_artifacts(run_id)}
    assert listed == {"report.txt", "by_node.txt"}
    for name, text in (("report.txt", "A NOTE"), ("by_node.txt", "from the node")):
        downloaded = client.download_artifacts(run_id, name, str(folder))
        assert Path(downloaded).read_text() == text
    (version,) = client.search_model_versions(f"name = '{project.package}'")
    assert version.run_id == run_id
    mlflow.set_tracking_uri(project.tracking_uri)
    mlflow.set_registry_uri(project.tracking_uri)
    model = mlflow.sklearn.load_model(f"models:/{project.package}/{version.version}")
    assert round(float(model.predict([[2]])[0]), 6) == 5.0
    return run


def refused(project: Project, pipeline: str = WITNESS, **env: str) -> str:
    """Run a pipeline that the set-up doesn't allow: one sentence, and no node has run."""
    project.pipeline(pipeline)
    ended = project.kedro("run", **{"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **env})
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1, shown
    assert "Traceback" not in shown
    assert not (project.path / "ran").exists(), shown
    (sentence,) = (line for line in shown.splitlines() if line.startswith("Error: "))
    return sentence.removeprefix("Error: ")
