"""A pipeline that records everything that a run can have, each time exactly the same."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient

from ..runtime.conftest import Project
from .faults import Fault, FaultyProxy, faulty_proxy
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


def sync(project: Project, *options: str, status: int = 0) -> str:
    """Run `kedro mlflow sync` in this process; gives what it says."""
    metadata = bootstrap_project(project.path)
    group = importlib.import_module(f"{project.package}.runtime.cli").mlflow
    ended = CliRunner().invoke(group, ["sync", *options], obj=metadata)
    assert ended.exit_code == status, (ended.output, ended.exception)
    output: str = ended.output
    return output


def stand_ins(project: Project, uri: str) -> dict[str, str]:
    """Give what two projects that do the same don't have alike, for `stores.content`."""
    # What MLflow takes for the program that runs, here and in `kedro run`.
    programs = dict.fromkeys([sys.argv[0], "python -m kedro"], "PROGRAM")
    return {project.package: "PACKAGE", str(project.path): "FOLDER", uri: "SERVER", **programs}


@contextmanager
def process(project: Project, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start `kedro …`, and see to it that it ends."""
    started = subprocess.Popen(
        [sys.executable, "-m", "kedro", *words],
        cwd=project.path,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stdout
        started.stdout.close()


def on_server(port: int, project: Project, proxy: FaultyProxy) -> dict[str, Any]:
    """Read what the server has of a project, past the proxy."""
    uri = f"http://127.0.0.1:{port}"
    client = MlflowClient(uri, uri)  # whatever this process uses else
    return content(client, project.package, names=stand_ins(project, proxy.uri))


@dataclass(frozen=True)
class Undisturbed:
    """What is in the store after a run that nothing disturbs, and the requests that it makes.

    `to_sync` is the number of those that send a run later which was recorded without a server.
    """

    content: dict[str, Any]
    requests: list[str]
    to_sync: int


_undisturbed: dict[int, Undisturbed] = {}


def undisturbed(port: int, new_project: Callable[..., Project]) -> Undisturbed:
    """Run the pipeline twice on a server, once for all tests: while it answers, and sent later."""
    if port not in _undisturbed:
        with faulty_proxy(port) as proxy:
            project = fill(new_project(), proxy.uri)
            project.run()
            found, requests = on_server(port, project, proxy), list(proxy.requests)
        with faulty_proxy(port, Fault("refuse")) as proxy:
            project = fill(new_project(), proxy.uri)
            project.run()
            proxy.heal()
            sync(project)
            _undisturbed[port] = Undisturbed(found, requests, len(proxy.requests))
    return _undisturbed[port]
