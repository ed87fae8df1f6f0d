"""The number of requests that a run makes to the server, and that nothing else makes any."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kedro.framework.startup import bootstrap_project

from ...support.projects import Project
from ...support.servers import CountingProxy

PIPELINE = """
from kedro.pipeline import Node, Pipeline

{functions}

def create_pipeline():
    return Pipeline([{nodes}])
"""

TEN_NODES = PIPELINE.format(
    functions="def work(): return 1",
    nodes="Node(work, None, f'out_{i}', name=f'work_{i}') for i in range(10)",
)
TEN_NODES_WITH_PARAMETERS = PIPELINE.format(
    functions="def work(*values): return sum(values)",
    nodes="Node(work, [f'params:n{i}_p{j}' for j in range(20)], f'out_{i}', name=f'work_{i}') "
    "for i in range(10)",
)
FIFTY_METRICS = PIPELINE.format(
    functions="def measure(): return [float(i) for i in range(50)]",
    nodes="Node(measure, None, [f'metric_{i}' for i in range(50)])",
)
ONE_NODE = PIPELINE.format(functions="def work(): return 1", nodes="Node(work, None, 'out')")
THOUSAND_LEAVES = PIPELINE.format(
    functions="def work(x): return len(x)", nodes="Node(work, 'params:x', 'out')"
)
THOUSAND_STEPS = PIPELINE.format(
    functions="def curve(): return [1 / (step + 1) for step in range(1000)]",
    nodes="Node(curve, None, 'history')",
)
TWENTY_FILES = PIPELINE.format(
    functions="def write(): return [str(i % 10) * 1_000_000 for i in range(20)]",
    nodes="Node(write, None, [f'file_{i}' for i in range(20)])",
)

CATALOG = """
"metric_{number}": {type: PACKAGE.runtime.MlflowMetricDataset}
history: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
"file_{number}":
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: "data/08_reporting/{number}.txt"}
model:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
"""


@pytest.fixture
def served(new_project: Callable[..., Project], server: CountingProxy) -> Project:
    """A project whose experiment is on the server."""
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.tracking_uri = server.uri
    project.catalog(CATALOG)
    project.client.create_experiment(project.package)
    project.mlflow_yml("tracking: {params: {dict_params: {flatten: true}}}")
    server.requests.clear()
    return project


@pytest.mark.parametrize(
    ("code", "parameters", "limit"),
    [
        (ONE_NODE, {}, 4),
        (TEN_NODES, {}, 4),
        (TEN_NODES_WITH_PARAMETERS, {f"n{i}_p{j}": j for i in range(10) for j in range(20)}, 6),
        (FIFTY_METRICS, {}, 5),
        (THOUSAND_LEAVES, {"x": {f"k{i}": i for i in range(1000)}}, 14),
        (THOUSAND_STEPS, {}, 5),
        (TWENTY_FILES, {}, 25),
    ],
    ids=[
        "one node",
        "ten nodes",
        "ten nodes with 20 parameters each",
        "50 metrics",
        "a dictionary with 1,000 leaves",
        "a history of 1,000 steps",
        "20 files of 1 MB",
    ],
)
def test_a_run_makes_no_more_requests_than_it_needs(
    served: Project,
    server: CountingProxy,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    parameters: dict[str, Any],
    limit: int,
) -> None:
    served.pipeline(code)
    served.parameters(parameters)
    bootstrap_project(served.path)
    outbox = import_module(f"{served.package}.runtime.tracking.outbox")
    monkeypatch.setattr(outbox, "FLUSH_AFTER", 600)  # on a slow machine points would go apart

    served.run()

    made = list(server.requests)
    assert len(made) <= limit, made
    experiment = served.client.get_experiment_by_name(served.package)
    assert experiment
    (run,) = served.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    flat = {f"x.{k}": v for k, v in parameters.get("x", {}).items()} or parameters
    assert run.data.params == {name: str(value) for name, value in flat.items()}
    fifty = {f"metric_{i}": float(i) for i in range(50)} if code == FIFTY_METRICS else {}
    history = {"history": 1 / 1000} if code == THOUSAND_STEPS else {}
    assert run.data.metrics == fifty | history
    if history:
        points = served.client.get_metric_history(run.info.run_id, "history")
        assert sorted((p.step, p.value) for p in points) == [(i, 1 / (i + 1)) for i in range(1000)]
    files = {f.path: f.file_size for f in served.client.list_artifacts(run.info.run_id)}
    count = 20 if code == TWENTY_FILES else 0
    assert files == {f"{i}.txt": 1_000_000 for i in range(count)}


def imports_mlflow(report: str) -> bool:
    """Tell whether a report of `PYTHONPROFILEIMPORTTIME` names MLflow."""
    assert re.search(r"^import time: .*\| +kedro$", report, re.MULTILINE), report
    return bool(re.search(r"^import time: .*\| +mlflow(\.|$)", report, re.MULTILINE))


@pytest.mark.parametrize(
    "command",
    [
        ["registry", "list"],
        ["catalog", "describe-datasets"],
        ["catalog", "list-patterns"],
        ["catalog", "resolve-patterns"],
        ["ipython", "--", "-c", "catalog.keys(); pipelines['__default__']; print('looked')"],
        # Not among the tests' packages: its plugin slows every command of the other tests.
        pytest.param(
            ["viz", "build"],
            marks=pytest.mark.skipif(
                importlib.util.find_spec("kedro_viz") is None, reason="Kedro-Viz is not installed"
            ),
        ),
    ],
    ids=lambda words: " ".join(words[:2]).removesuffix(" --"),
)
def test_a_command_that_runs_nothing_makes_no_request_and_does_not_import_mlflow(
    served: Project, server: CountingProxy, tmp_path: Path, command: list[str]
) -> None:
    served.pipeline(FIFTY_METRICS)

    ended = served.kedro_anew(
        *command,
        PYTHONPROFILEIMPORTTIME="1",
        IPYTHONDIR=str(tmp_path / "ipython"),
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    if command[0] == "ipython":
        assert "looked" in ended.stdout
    assert server.requests == []
    assert not imports_mlflow(ended.stderr)


def test_a_tracked_run_shows_in_the_requests_and_imports_that_are_counted(
    served: Project, server: CountingProxy
) -> None:
    served.pipeline(TEN_NODES)

    ended = served.kedro_anew("run", PYTHONPROFILEIMPORTTIME="1")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert server.requests
    assert imports_mlflow(ended.stderr)
