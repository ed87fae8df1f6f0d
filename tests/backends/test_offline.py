"""Runs with `tracking.on_unreachable: offline`: on disk first, then on the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from ..support import everything
from ..support.everything import Recorded
from ..support.faults import Fault, FaultyProxy, faulty_proxy
from ..support.projects import ONE_NODE, Project
from ..support.stores import content, differences
from .test_kills import TELLING
from .test_replay import left_on_disk

NewProject = Callable[..., Project]


@pytest.fixture
def proxy(port: int) -> Iterator[FaultyProxy]:
    """The way to the server, on which nothing goes wrong yet."""
    with faulty_proxy(port) as proxy:
        yield proxy


@pytest.fixture
def offline(new_project: NewProject, proxy: FaultyProxy) -> Project:
    """A project with one node, whose server may go away."""
    project = new_project()
    project.tracking_uri = proxy.uri
    everything.reach(project, proxy.uri)
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.catalog("")
    return project


def on_server(project: Project, port: int) -> list[dict[str, object]]:
    """Read the runs of a project's experiment."""
    runs: list[dict[str, object]] = everything.on_server(port, project, project.tracking_uri)[
        "runs"
    ]
    return runs


@pytest.mark.parametrize(
    ("runner", "start_method"),
    [
        ("SequentialRunner", "fork"),
        ("ParallelRunner", "fork"),
        pytest.param("ThreadRunner", "fork", marks=pytest.mark.thorough),
        pytest.param("ParallelRunner", "spawn", marks=pytest.mark.thorough),
        pytest.param("ParallelRunner", "forkserver", marks=pytest.mark.thorough),
    ],
)
def test_a_run_is_on_the_server_as_a_whole_when_it_has_ended(
    recorded: Recorded,
    proxy: FaultyProxy,
    port: int,
    new_project: NewProject,
    runner: str,
    start_method: str,
) -> None:
    project = everything.fill(new_project(), proxy.uri)

    ended = project.kedro("run", f"--runner={runner}", KEDRO_MP_CONTEXT=start_method)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    direct = f"http://127.0.0.1:{port}"
    names = {
        **everything.stand_ins(project, proxy.uri),
        f"kedro run --runner={runner}": "kedro run",
        runner: "SequentialRunner",
    }
    found = content(MlflowClient(direct, direct), project.package, names=names)
    assert differences(found, recorded.content) == []
    assert left_on_disk(project) == []


def test_the_server_is_asked_for_nothing_before_the_run_has_ended(
    offline: Project, proxy: FaultyProxy
) -> None:
    offline.pipeline(
        f"""
        from urllib.request import urlopen
        from kedro.pipeline import Node, Pipeline

        def ask():
            return urlopen("{proxy.uri}/health").read().decode()

        def create_pipeline():
            return Pipeline([Node(ask, None, "answer")])
        """
    )

    offline.run()

    assert proxy.requests[0] == "GET /health"
    assert proxy.requests[-1] == "POST /api/2.0/mlflow/runs/update"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("refuse"), "connection refused"),
        (Fault("hang"), "no answer"),
        (Fault("503"), "503"),
        (Fault("401"), "401"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_run_whose_server_is_away_ends_well_and_says_where_it_is(
    offline: Project, port: int, proxy: FaultyProxy, fault: Fault, reason: str
) -> None:
    proxy.plan(fault)

    ended = offline.kedro("run")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    (warning,) = re.findall(r"^WARNING .*sync.*", ended.stderr, re.MULTILINE)
    assert "kedro mlflow sync" in warning
    assert reason in warning
    assert len(proxy.requests) <= 1  # nobody waits for MLflow's eight tries
    assert "kedro mlflow ui --offline" in ended.stderr
    proxy.heal()
    assert on_server(offline, port) == []
    everything.sync(offline)
    (found,) = on_server(offline, port)
    assert (found["status"], found["params"]) == ("FINISHED", {"x": "1"})


def test_the_next_run_replays_what_an_earlier_one_has_left(
    offline: Project, port: int, proxy: FaultyProxy
) -> None:
    proxy.plan(Fault("refuse"))
    offline.run()
    proxy.heal()

    offline.run()

    assert [run["status"] for run in on_server(offline, port)] == ["FINISHED", "FINISHED"]
    assert left_on_disk(offline) == []


def test_a_failed_run_is_replayed_with_what_went_wrong(offline: Project, port: int) -> None:
    offline.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def fail(x):
            raise ValueError("no penguins")

        def create_pipeline():
            return Pipeline([Node(fail, "params:x", "y", name="fail")])
        """
    )

    with pytest.raises(ValueError, match="no penguins"):
        offline.run()

    (run,) = on_server(offline, port)
    assert run["status"] == "FAILED"
    assert run["tags"]["kedro_failed_node"] == "fail"  # type: ignore[index]
    assert "no penguins" in run["artifacts"]["traceback.txt"]  # type: ignore[index]


def test_runs_at_once_are_all_replayed_into_one_experiment(
    offline: Project, port: int, proxy: FaultyProxy
) -> None:
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: offline.kedro("run"), range(3)))

    assert [run.returncode for run in ended] == [0, 0, 0], "\n".join(run.stderr for run in ended)
    runs = on_server(offline, port)
    assert [(run["status"], run["params"]) for run in runs] == [("FINISHED", {"x": "1"})] * 3
    assert left_on_disk(offline) == []


@pytest.mark.parametrize("by", ["MLFLOW_RUN_ID", "tracking.run.id"])
def test_a_run_of_the_server_is_not_continued_offline(
    offline: Project, port: int, proxy: FaultyProxy, by: str
) -> None:
    client = MlflowClient(f"http://127.0.0.1:{port}")
    run_id = client.create_run(client.create_experiment(offline.package)).info.run_id
    env = {"MLFLOW_RUN_ID": run_id} if by == "MLFLOW_RUN_ID" else {}
    if not env:
        file = offline.path / "conf" / "local" / "mlflow.yml"
        file.write_text(f"{file.read_text()}  run: {{id: {run_id}}}\n")

    ended = offline.kedro("run", **env)

    assert ended.returncode == 1
    assert "Running node" not in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    (sentence,) = (line for line in ended.stderr.splitlines() if line.startswith("Error: "))
    assert by in sentence
    assert "offline a run of the server can't be continued" in sentence
    assert run_id in sentence


def test_a_model_of_a_run_with_many_parameters_is_replayed(offline: Project, port: int) -> None:
    offline.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def fit(x):
            from sklearn.linear_model import LinearRegression

            return LinearRegression().fit([[0], [1]], [1, 3])

        def create_pipeline():
            return Pipeline([Node(fit, "params:x", "line")])
        """
    )
    offline.parameters({"x": {f"p{index}": index for index in range(250)}})
    offline.catalog(everything.CATALOG.replace("champion", "'250'"))
    file = offline.path / "conf" / "local" / "mlflow.yml"
    file.write_text(f"{file.read_text()}  params: {{dict_params: {{flatten: true}}}}\n")

    offline.run()

    found = everything.on_server(port, offline, offline.tracking_uri)
    assert len(found["runs"][0]["params"]) == 250
    assert found["models"][0]["params"] == found["runs"][0]["params"]
    assert found["models"][0]["status"] == "READY"


TRACED = """
import mlflow
from kedro.pipeline import Node, Pipeline

@mlflow.trace
def double(x):
    return 2 * x

def work(x):
    return [double(index) for index in range(7)]

def create_pipeline():
    return Pipeline([Node(work, "params:x", "doubled")])
"""


def test_traces_are_replayed_and_hold_up_no_process(
    offline: Project, port: int, proxy: FaultyProxy
) -> None:
    offline.pipeline(TRACED)
    proxy.plan(Fault("refuse"))
    # MLflow's own patience: a process that waited for its traces would take minutes to end.
    ended = offline.kedro("run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    proxy.heal()

    everything.sync(offline)

    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name(offline.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    traces = client.search_traces(locations=[experiment.experiment_id])
    assert sorted(trace.data.spans[0].inputs["x"] for trace in traces) == list(range(7))
    assert sorted(trace.data.spans[0].outputs for trace in traces) == list(range(0, 14, 2))
    assert {trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces} == {run.info.run_id}
    assert {trace.data.spans[0].name for trace in traces} == {"double"}
    assert left_on_disk(offline) == []


LOADING = """
import threading

import mlflow
from kedro.pipeline import Node, Pipeline

def use(line):
    mlflow.log_metric("predicted", float(line.predict([[2]])[0]))
    return [0.5]

def create_pipeline():
    return Pipeline([Node(use, name, f"history_{number}", name=f"use_{number}")
                     for number, name in enumerate(["registered", "by_uri", "by_run"])])
"""

READS = """
registered:
  type: PACKAGE.runtime.MlflowModelRegistryDataset
  model_name: MODEL
  alias: champion
  flavor: mlflow.sklearn
by_uri:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  load_args: {model_uri: "models:/MODEL@champion"}
by_run:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {name: line}
  load_args: {run_id: RUN}
"history_{number}": {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
"""


@pytest.fixture
def reading(offline: Project, port: int, new_project: NewProject) -> Project:
    """A project whose nodes take a model that another one has registered on the server."""
    direct = f"http://127.0.0.1:{port}"
    training = everything.fill(new_project(), direct, on_unreachable=None)
    training.run()
    client = MlflowClient(direct)
    run_id = client.get_model_version(training.package, "1").run_id
    offline.pipeline(LOADING)
    offline.catalog(READS.replace("MODEL", training.package).replace("RUN", str(run_id)))
    return offline


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner"])
def test_datasets_read_from_the_server_while_the_run_is_on_disk(
    reading: Project, port: int, runner: str
) -> None:
    ended = reading.kedro("run", f"--runner={runner}")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    (run,) = on_server(reading, port)
    predicted = [point[2] for point in run["metrics"]["predicted"]]  # type: ignore[index]
    assert predicted == pytest.approx([5.0] * 3)
    assert {"history_0", "history_1", "history_2"} <= run["metrics"].keys()  # type: ignore[attr-defined]


def test_a_node_that_needs_the_server_names_it_when_it_is_away(
    reading: Project, port: int, proxy: FaultyProxy
) -> None:
    proxy.plan(Fault("refuse"))

    ended = reading.kedro("run")

    assert ended.returncode == 1
    shown = " ".join((ended.stdout + ended.stderr).split())
    assert f"the MLflow server {proxy.uri} is away (connection refused)" in shown
    proxy.heal()
    everything.sync(reading)
    (run,) = on_server(reading, port)
    assert run["status"] == "FAILED"


def test_ctrl_c_while_a_server_hangs_leaves_no_traceback_and_no_open_run(
    offline: Project, port: int, proxy: FaultyProxy
) -> None:
    proxy.plan(Fault("hang"))

    with everything.process(offline, "run") as run:
        assert proxy.wait_until_struck_or_ended(run)
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate()

    assert "Traceback" not in said
    (run_id,) = everything.on_disk(offline)
    (file,) = offline.path.glob(".mlflow-offline/*/mlflow.db")
    assert MlflowClient(f"sqlite:///{file}").get_run(run_id).info.status == "FINISHED"
    proxy.heal()
    everything.sync(offline)
    assert [run["status"] for run in on_server(offline, port)] == ["FINISHED"]


def test_what_a_killed_run_has_logged_is_replayed(new_project: NewProject, port: int) -> None:
    project = everything.fill(new_project(), f"http://127.0.0.1:{port}")
    project.pipeline(TELLING)
    project.catalog(everything.CATALOG)
    os.mkfifo(project.path / "waiting")

    with everything.process(project, "run", WAIT_AFTER="9") as run:
        with (project.path / "waiting").open():  # opened once the pipeline waits
            run.kill()
        run.wait()
    shutil.copy(project.path / "told", project.path / "told_before")
    everything.sync(project)

    found = on_server(project, port)
    (killed,) = [run for run in found if run["name"] == "__default__"]
    assert killed["status"] == "KILLED"
