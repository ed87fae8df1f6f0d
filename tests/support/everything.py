"""A pipeline that records everything that a run can have, each time exactly the same."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient

from .faults import Fault, FaultyProxy, faulty_proxy
from .forks import Fork
from .projects import Project, copy_of
from .stores import content

# When the points of all metrics were measured: by the clock no two runs would have the same.
PIPELINE = """
import mlflow
import numpy as np
import pandas as pd
from kedro.pipeline import Node, Pipeline

NOON = 1_700_000_000_000


def measure(depth, colour):
    mlflow.set_tag("species", "gentoo")
    mlflow.log_param("colour", colour)
    mlflow.log_text("from the node", "notes/by_node.txt")
    for step in range(3):
        mlflow.log_metric("loss", depth / (step + 1), step=step, timestamp=NOON + step)
    mlflow.log_metric("loss", 0.25, step=2, timestamp=NOON + 7)
    mlflow.log_input(mlflow.data.from_numpy(np.arange(4.0), name="pool"), context="training")
    points = [{"step": i, "value": i / 4, "timestamp": NOON + 10 * i} for i in range(3, 6)]
    return points, pd.DataFrame({"bill": [1.5, 2.5]})


def tune(points):
    for depth in (1, 2):
        with mlflow.start_run(nested=True, run_name=f"depth {depth}"):
            mlflow.log_params({"depth": depth, "points": len(points)})
            mlflow.log_metric("score", depth / 8, step=depth, timestamp=NOON)
            mlflow.set_tag("kind", "trial")
            with mlflow.start_run(nested=True, run_name=f"fold of {depth}"):
                mlflow.log_metric("score", depth / 16, step=0, timestamp=NOON)
                mlflow.log_text("a fold", "fold.txt")
    return len(points)


def fit(report, tuned):
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit([[0], [1]], [1, 3])


def use(line):
    mlflow.log_metric("slope", float(line.coef_[0]), step=0, timestamp=NOON)
    mlflow.log_dict({"intercept": float(line.intercept_)}, "line.json")
    mlflow.set_tag("done", "yes")


def create_pipeline():
    return Pipeline([
        Node(measure, ["params:depth", "params:colour"], ["history", "report"]),
        Node(tune, "history", "tuned"),
        Node(fit, ["report", "tuned"], "line"),
        Node(use, "line", None),
    ])
"""

CATALOG = """
history:
  type: PACKAGE.runtime.MlflowMetricHistoryDataset
  save_args: {mode: history}
report:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: pandas.CSVDataset, filepath: data/08_reporting/report.csv}
  artifact_path: reports
line:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args:
    registered_model_name: PACKAGE
    registered_model_alias: champion
    pip_requirements: []
    serialization_format: cloudpickle  # each time the same bytes
    tags: {kind: straight}
"""

# A client that gives up at once: what hangs is over in a second.
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}


def fill(project: Project, uri: str, on_unreachable: str | None = "offline") -> Project:
    """Give a project the pipeline, and a server to send its runs to."""
    project.tracking_uri = uri
    project.pipeline(PIPELINE)
    project.catalog(CATALOG)
    project.parameters({"depth": 3, "colour": "blue"})
    reach(project, uri, on_unreachable)
    return project


def reach(project: Project, uri: str, on_unreachable: str | None = "offline") -> None:
    """Write an mlflow.yml that says where runs go, and what to do when that is not there."""
    values: dict[str, Any] = {"server": {"mlflow_tracking_uri": uri}}
    if on_unreachable:
        values["tracking"] = {"on_unreachable": on_unreachable}
    project.mlflow_yml(yaml.safe_dump(values))


def at(fault: Fault, index: int) -> Fault:
    """Let a fault strike at a request, or at the first one after it that it can strike."""
    return replace(fault, at=index)


def on_disk(project: Project) -> list[str]:
    """Give the ids of the runs on disk that have no parent, the oldest first."""
    (file,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    client = MlflowClient(f"sqlite:///{file.as_posix()}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]


def sync(project: Project, *options: str, status: int | None = 0) -> str:
    """Run `kedro mlflow sync` in this process; gives what it says."""
    metadata = bootstrap_project(project.path)
    group = importlib.import_module(f"{project.package}.runtime.cli").mlflow
    ended = CliRunner().invoke(group, ["sync", *options], obj=metadata)
    assert ended.exit_code in ((0, 1) if status is None else (status,)), ended.output
    assert ended.exception is None or isinstance(ended.exception, SystemExit), (
        ended.output,
        ended.exception,
    )
    output: str = ended.output
    return output


def stand_ins(project: Project, uri: str) -> dict[str, str]:
    """Give what two projects that do the same don't have alike, for `stores.content`."""
    # What MLflow takes for the program that runs, here and in `kedro run`.
    programs = dict.fromkeys([sys.argv[0], "python -m kedro"], "PROGRAM")
    return {project.package: "PACKAGE", str(project.path): "FOLDER", uri: "SERVER", **programs}


@contextmanager
def process(project: Project, *words: str, **env: str) -> Iterator[Fork]:
    """Start `kedro …`, and end it at the end of the block."""
    started = project.start(*words, new_session=False, **env)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def on_server(port: int, project: Project, uri: str) -> dict[str, Any]:
    """Read what the server has of a project that knows it by an address of a proxy."""
    direct = f"http://127.0.0.1:{port}"
    client = MlflowClient(direct, direct)  # whatever this process uses else
    return content(client, project.package, names=stand_ins(project, uri))


@dataclass(frozen=True)
class Recorded:
    """A project that has done its run while the server was away, to copy and replay.

    `content` is what the same run leaves on the server that logs to it directly, `requests` are
    those of a replay that nothing disturbs.
    """

    project: Project
    port: int
    proxy: FaultyProxy
    content: dict[str, Any]
    requests: list[str]

    def copy(self, folder: Path) -> Project:
        """Copy the project, with its store on disk."""
        # Each in a folder of its own: MLflow keeps the file of a store open in this process.
        path = folder / uuid4().hex / self.project.package
        shutil.copytree(self.project.path, path)
        return replace(self.project, path=path)

    def replayed(self) -> dict[str, Any]:
        """Read what the server has."""
        return on_server(self.port, self.project, self.proxy.uri)

    def put_away(self) -> None:
        """Give what the server has another name, so that the next replay begins anew."""
        client = MlflowClient(f"http://127.0.0.1:{self.port}")
        name, other = self.project.package, f"before-{uuid4().hex}"
        if experiment := client.get_experiment_by_name(name):
            client.rename_experiment(experiment.experiment_id, other)
        if client.search_registered_models(f"name = '{name}'"):
            client.rename_registered_model(name, other)


@contextmanager
def record(port: int, pattern: Path, folder: Path) -> Iterator[Recorded]:
    """Do the run once with a server, and once without, on disk."""
    direct, package = f"http://127.0.0.1:{port}", f"recorded_{uuid4().hex[:8]}"
    projects = []
    with faulty_proxy(port) as proxy:
        for name, uri in ((f"{package}_direct", direct), (package, proxy.uri)):
            copy_of(pattern, folder / name, name)
            shutil.rmtree(folder / name / "src" / name / "pipelines" / "first")
            project = fill(Project(folder / name, name), uri, None if uri == direct else "offline")
            proxy.plan(Fault("refuse"))
            ended = project.kedro("run")
            assert ended.returncode == 0, ended.stdout + ended.stderr
            projects.append(project)
        proxy.heal()
        whole = on_server(port, projects[0], direct)
        recorded = Recorded(projects[1], port, proxy, whole, [])
        before = len(proxy.requests)
        sync(recorded.copy(folder / "copy"))
        recorded.put_away()
        yield replace(recorded, requests=proxy.requests[before:])
