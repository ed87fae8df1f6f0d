"""Runs that share a process: each is an MLflow run of its own, and nothing is mixed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from kedro.framework.startup import bootstrap_project
from kedro.runner import SequentialRunner, ThreadRunner
from mlflow.entities import Run
from mlflow.tracking import fluent

from ....support.projects import Project, has
from ....support.servers import free_port, running

if not has("kedro", "1.4"):
    pytest.skip("Kedro 1.4 brought sessions of services", allow_module_level=True)
from kedro.framework.session import KedroServiceSession

THREADS = 8
RUNS = 40

# Each value says which run it belongs to. `late` needs what `early` made, so that the runs of
# all threads are between two nodes at some time.
WORK = """
import mlflow
from kedro.pipeline import Node, Pipeline


def log(node, x):
    mlflow.log_param(f"{node}_param", x)
    mlflow.log_metric(f"{node}_fluent", x, step=0)
    with mlflow.start_run(nested=True, run_name=f"{node} {x}"):
        mlflow.log_metric("inner", x)
    mlflow.log_metric(f"{node}_fluent", x + 0.5, step=1)
    mlflow.log_text(f"{node} {x}", f"{node}.txt")


def early(x):
    log("early", x)
    return x


def late(x, same):
    assert x == same
    log("late", x)
    if x % 10 == 7:
        raise ValueError(f"no penguins for {x}")
    return float(x), [x + 0.5, x + 0.25], f"text {x}"


def create_pipeline():
    return Pipeline([
        Node(early, "params:x", "same", name="early"),
        Node(late, ["params:x", "same"], ["value", "history", "text"], name="late"),
    ])
"""

CATALOG = """
value: {type: PACKAGE.runtime.MlflowMetricDataset}
history: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
text:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: "data/08_reporting/${km.random_name:}.txt"}
"""

QUIET = """
import mlflow
from kedro.pipeline import Node, Pipeline

def look(x):
    return str(mlflow.active_run())

def create_pipeline():
    return Pipeline([Node(look, "params:x", f"seen_{i}", name=f"look_{i}") for i in range(4)])
"""


def fails(x: int) -> bool:
    return x % 10 == 7


@pytest.fixture
def serviced(project: Project) -> Project:
    """A project with the pipelines `work`, which fails for some values, and `quiet`."""
    project.pipeline(WORK, "work")
    project.pipeline(QUIET, "quiet")
    project.catalog(CATALOG)
    project.parameters({"x": -1})
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [quiet]}}")
    return project


def session_of(project: Project, env: str | None = None) -> KedroServiceSession:
    """Open a session as a server does."""
    bootstrap_project(project.path)
    return KedroServiceSession.create(project_path=project.path, env=env, serving_mode=True)


def check_each_has_its_own(project: Project, values: range, folder: Path) -> None:
    """Check that there is a whole run for each value of `x`, and no other run."""
    runs = project.all_runs()
    mains = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children: dict[str, list[Run]] = {run.info.run_id: [] for run in mains}
    for run in runs:
        if run not in mains:
            children[run.data.tags["mlflow.parentRunId"]].append(run)
    assert sorted(int(run.data.params["x"]) for run in mains) == list(values)
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED"}

    for run in mains:
        x = int(run.data.params["x"])
        tags, run_id = run.data.tags, run.info.run_id
        assert run.data.params == dict.fromkeys(("x", "early_param", "late_param"), str(x))
        assert json.loads(tags["runtime_params"])["x"] == x
        metrics = {"early_fluent": x + 0.5, "late_fluent": x + 0.5}
        files = {"early.txt": f"early {x}", "late.txt": f"late {x}"}
        if fails(x):
            assert run.info.status == "FAILED"
            assert tags["kedro_error"] == f"ValueError: no penguins for {x}"
            assert tags["kedro_failed_node"] == "late"
        else:
            assert run.info.status == "FINISHED"
            assert not {"kedro_error", "kedro_failed_node"} & tags.keys()
            metrics |= {"value": x, "history": x + 0.25}
            files["saved"] = f"text {x}"
        assert run.data.metrics == metrics
        for key in ("early_fluent", "late_fluent"):
            history = project.client.get_metric_history(run_id, key)
            assert sorted((m.step, m.value) for m in history) == [(0, x), (1, x + 0.5)]
        own = folder / run_id
        own.mkdir(parents=True)
        project.client.download_artifacts(run_id, "", str(own))
        # The dataset's file has another name in each run.
        known = {"early.txt", "late.txt", "traceback.txt"}
        found = {f.name if f.name in known else "saved": f.read_text() for f in own.iterdir()}
        traceback = found.pop("traceback.txt", "")
        assert (f"no penguins for {x}" in traceback) == fails(x)
        assert found == files

        of_it = {child.info.run_name: child for child in children[run_id]}
        assert sorted(of_it) == [f"early {x}", f"late {x}"]
        assert len(children[run_id]) == 2
        for child in of_it.values():
            assert (child.info.status, child.data.metrics) == ("FINISHED", {"inner": x})
            assert child.info.experiment_id == run.info.experiment_id


def test_forty_runs_in_eight_threads_of_a_session_are_forty_runs(
    serviced: Project, tmp_path: Path
) -> None:
    together = threading.Barrier(THREADS)

    with closing(session_of(serviced)) as session:

        def run_five(first: int) -> None:
            together.wait(60)
            for x in range(first, RUNS, THREADS):
                runner = ThreadRunner() if x % 2 else SequentialRunner()
                how: dict[str, Any] = {"runner": runner, "runtime_params": {"x": x}}
                if fails(x):
                    with pytest.raises(ValueError, match=f"no penguins for {x}"):
                        session.run(pipeline_names=["work"], **how)
                else:
                    session.run(pipeline_names=["work"], **how)
                assert mlflow.active_run() is None

        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(run_five, first) for first in range(THREADS)]:
                future.result()

    stacks = fluent._active_run_stack.get_all_thread_values().values()
    assert not any(stacks)
    check_each_has_its_own(serviced, range(RUNS), tmp_path / "artifacts")


def test_a_pipeline_without_tracking_runs_beside_tracked_ones_and_sees_no_run(
    serviced: Project,
) -> None:
    together = threading.Barrier(4)

    with closing(session_of(serviced)) as session:

        def run_both(first: int) -> list[str]:
            together.wait(60)
            seen = []
            for x in (first, first + 10, first + 20):
                # Two threads are at a tracked pipeline while the others aren't.
                for name in ("work", "quiet") if first % 2 else ("quiet", "work"):
                    found = session.run(pipeline_names=[name], runtime_params={"x": x})
                    seen += [data.load() for data in found.values() if name == "quiet"]
            return seen

        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(run_both, range(4)))

    assert seen == [["None"] * 12] * 4
    runs = serviced.all_runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 36
    mains = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.tags["pipeline_names"] for run in mains} == {"work"}
    assert len(mains) == 12


def test_runs_at_once_each_read_their_own_parameters_in_the_configuration(
    serviced: Project,
) -> None:
    serviced.mlflow_yml('tracking: {run: {name: "run ${runtime_params:x, none}"}}')
    together = threading.Barrier(THREADS)

    with closing(session_of(serviced)) as session:

        def run_two(first: int) -> None:
            together.wait(60)
            for x in (first, first + 10):
                if not fails(x):
                    session.run(pipeline_names=["work"], runtime_params={"x": x})

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(run_two, range(THREADS)))

    mains = [run for run in serviced.all_runs() if "mlflow.parentRunId" not in run.data.tags]
    assert len(mains) == 14
    assert [run.info.run_name for run in mains] == [f"run {run.data.params['x']}" for run in mains]


@contextmanager
def kedro_server(project: Project) -> Iterator[str]:
    """Serve the project with `kedro server start`; gives the address."""
    port = free_port()
    command = [sys.executable, "-m", "kedro", "server", "start", f"--port={port}"]
    env = {**os.environ, "COLUMNS": "200"}
    with running(command, project.path, env=env, end=signal.SIGTERM):
        yield f"http://127.0.0.1:{port}"


def post_run(address: str, **body: Any) -> dict[str, Any]:
    """Ask the server for a run and wait for its answer."""
    request = urllib.request.Request(
        f"{address}/run", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        content: dict[str, Any] = json.load(answer)
        return content


def test_forty_requests_to_a_kedro_server_are_forty_runs(serviced: Project, tmp_path: Path) -> None:
    with kedro_server(serviced) as address, ThreadPoolExecutor(THREADS) as pool:
        answers = list(
            pool.map(
                lambda x: post_run(address, pipeline_names=["work"], params={"x": x}), range(RUNS)
            )
        )

    assert [answer.get("error", answer["status"]) for answer in answers] == [
        {"type": "ValueError", "message": f"no penguins for {x}"} if fails(x) else "success"
        for x in range(RUNS)
    ]
    check_each_has_its_own(serviced, range(RUNS), tmp_path / "artifacts")
