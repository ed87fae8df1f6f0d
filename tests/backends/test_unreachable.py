"""A server that is away: by default the run says so before it begins; offline it is sent later."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ..runtime.conftest import Project
from ..runtime.test_runs import ONE_NODE
from . import everything
from .everything import Undisturbed
from .faults import Fault, FaultyProxy, faulty_proxy, writes
from .stores import content, differences, every

# At which request the server is lost.
FROM_THE_START, IN_MID_RUN = 0, 12

NewProject = Callable[..., Project]

WITNESS = """
from pathlib import Path

from kedro.pipeline import Node, Pipeline

def see():
    Path("ran").touch()
    return "seen"

def create_pipeline():
    return Pipeline([Node(see, None, "seen")])
"""

# Kedro has not caught up with a renamed function of OmegaConf.
QUIET = {"PYTHONWARNINGS": "ignore"}

# Waits, when the server is away, until it is told that it is back.
WAITING = """
import mlflow
from kedro.pipeline import Node, Pipeline

def measure():
    mlflow.log_metric("early", 1)
    open("away", "w").close()
    open("back").close()
    mlflow.log_metric("late", 2)
    return "measured"

def create_pipeline():
    return Pipeline([Node(measure, None, "measured")])
"""


# A file that MLflow puts beside a model that it loads from a folder.
MADE_BY_LOADING = "registered_model_meta"


@pytest.fixture
def proxy(port: int) -> Iterator[FaultyProxy]:
    """The way to the server, on which nothing goes wrong yet."""
    with faulty_proxy(port) as proxy:
        yield proxy


def files(project: Project) -> set[Path]:
    """List what is in a project's folder, but for bytecode."""
    return {path for path in project.path.rglob("*") if "__pycache__" not in path.parts}


def refused(project: Project, **env: str) -> str:
    """Run a pipeline whose server is away; gives the one sentence that says so."""
    project.pipeline(WITNESS)
    before = files(project)

    ended = project.kedro("run", **QUIET, **env)

    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1, shown
    assert "Traceback" not in shown
    assert "WARNING" not in shown
    assert files(project) == before, shown  # neither has a node run, nor is anything left
    (sentence,) = (line for line in shown.splitlines() if line.startswith("Error: "))
    return sentence


@pytest.mark.parametrize(
    ("fault", "what", "advice"),
    [
        (Fault("refuse"), "connection refused", "start the server, or correct the address"),
        (Fault("hang"), "no answer", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
        (Fault("503"), "503", "see the server's log"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_run_whose_server_is_away_says_so_before_it_begins(
    proxy: FaultyProxy, new_project: NewProject, fault: Fault, what: str, advice: str
) -> None:
    project = everything.fill(new_project(), proxy.uri, on_unreachable=None)
    proxy.plan(fault)

    sentence = refused(project)

    assert proxy.uri in sentence
    assert what in sentence
    assert advice in sentence
    # MLflow by itself tries eight times, with two minutes for each.
    assert len(proxy.requests) <= 1
    assert set(proxy.requests) <= {"GET /api/2.0/mlflow/experiments/get-by-name"}


def test_a_run_whose_server_has_no_such_name_says_so_before_it_begins(
    new_project: NewProject,
) -> None:
    uri = "http://mlflow.penguins.invalid:5000"

    sentence = refused(everything.fill(new_project(), uri, on_unreachable=None))

    assert f"the host of {uri} isn't known: correct the address" in sentence


@pytest.mark.parametrize(
    ("fault", "retries", "requests"),
    [
        (Fault("503"), 0, 1),
        (Fault("503"), 2, 3),
        (Fault("reset"), 1, 2),
        (Fault("hang"), 0, 1),
        (Fault("hang"), 2, 3),
    ],
    ids=str,
)
def test_mlflows_own_settings_say_how_often_and_how_long_a_server_is_asked(
    proxy: FaultyProxy, new_project: NewProject, fault: Fault, retries: int, requests: int
) -> None:
    project = everything.fill(new_project(), proxy.uri, on_unreachable="fail")
    project.pipeline(WITNESS)
    proxy.plan(fault)
    given = {**everything.IMPATIENT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}

    ended = project.kedro("run", **given)

    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert not (project.path / "ran").exists()
    assert len(proxy.requests) == requests


def warnings(output: str) -> list[str]:
    """Give each warning in what `kedro run` shows, as one line."""
    found: list[str] = []
    for line in output.splitlines():
        if re.match(r"(\[.*\])?\s+(INFO|WARNING|ERROR) ", line):
            found.append(line)
        elif found:
            found[-1] += " " + line.strip()
    return [" ".join(entry.split()) for entry in found if " WARNING " in entry[:40]]


def on_disk(project: Project) -> tuple[MlflowClient, str]:
    """Give a client of the store that runs are recorded in, and where its files are."""
    (file,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    return MlflowClient(f"sqlite:///{file.as_posix()}"), (file.parent / "artifacts").as_uri()


def read_disk(project: Project, proxy: FaultyProxy) -> dict[str, Any]:
    client, folder = on_disk(project)
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    place = {f"{folder}/{experiment.experiment_id}/": "<place>/"}
    names = {**everything.stand_ins(project, proxy.uri), **place}
    return content(client, project.package, names=names)


def times(client: MlflowClient, project: Project) -> dict[str, tuple[int, int]]:
    """Tell when each run began and ended."""
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    return {
        run.info.run_name: (run.info.start_time, run.info.end_time)
        for run in every(client.search_runs, [experiment.experiment_id])
    }


def test_a_run_without_a_server_is_recorded_on_disk_and_sent_by_sync(
    proxy: FaultyProxy, port: int, new_project: NewProject, undisturbed: Undisturbed
) -> None:
    project = everything.fill(new_project(), proxy.uri)
    proxy.plan(Fault("refuse"))

    ended = project.kedro("run", **QUIET)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    shown = warnings(ended.stdout)
    assert len(shown) == 2, shown
    first, last = shown
    for warning in (first, last):
        assert "kedro mlflow sync" in warning
        assert "connection refused" in warning
    assert ended.stdout.index("WARNING") < ended.stdout.index("Running node")
    disk = read_disk(project, proxy)
    assert differences(disk["runs"], undisturbed.content["runs"]) == []
    (model,), (expected,) = disk["models"], undisturbed.content["models"]
    model["artifacts"].pop(MADE_BY_LOADING)
    assert differences({**model, "tags": {}}, {**expected, "tags": {}}) == []
    ((registered,), (version,)) = disk["registered"], disk["registered"][0]["versions"]
    assert registered["aliases"] == {"champion": version["version"]}

    proxy.heal()
    waiting = project.kedro("mlflow", "sync", "--dry-run")
    assert waiting.returncode == 0, waiting.stdout + waiting.stderr
    assert "__default__" in waiting.stdout
    assert [request for request in proxy.requests if writes(request)] == []

    ended = project.kedro("mlflow", "sync")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = everything.on_server(port, project, proxy)
    assert differences(found, undisturbed.content) == []
    client, _ = on_disk(project)
    assert times(project.client, project) == times(client, project)

    sent = len(proxy.requests)
    again = everything.sync(project)
    assert "nothing" in again.lower()
    assert [request for request in proxy.requests[sent:] if writes(request)] == []
    assert everything.on_server(port, project, proxy) == found


def test_what_was_sent_is_on_disk_until_it_is_pruned(
    proxy: FaultyProxy, port: int, new_project: NewProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in everything.IMPATIENT.items():
        monkeypatch.setenv(name, value)
    project = everything.fill(new_project(), proxy.uri)
    proxy.plan(Fault("refuse"))
    project.run()
    proxy.heal()
    everything.sync(project)
    sent = everything.on_server(port, project, proxy)
    assert read_disk(project, proxy)["runs"] == sent["runs"]

    proxy.plan(Fault("refuse"))
    project.run()
    everything.sync(project, "--prune", status=1)
    assert len(read_disk(project, proxy)["runs"]) >= len(sent["runs"])  # what waits is there

    proxy.heal()
    everything.sync(project, "--prune")
    _, folder = on_disk(project)
    assert read_disk(project, proxy)["runs"] == []
    assert [
        path for path in Path(folder.removeprefix("file://")).rglob("*") if path.is_file()
    ] == []
    both = everything.on_server(port, project, proxy)["runs"]
    assert sorted(run["name"] for run in both) == sorted(2 * [run["name"] for run in sent["runs"]])
    assert "nothing" in everything.sync(project, "--prune").lower()


@pytest.mark.parametrize(
    ("runner", "start_method", "at"),
    [
        ("ThreadRunner", "fork", FROM_THE_START),
        ("ParallelRunner", "spawn", IN_MID_RUN),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                ("ThreadRunner", "fork", IN_MID_RUN),
                ("ParallelRunner", "fork", FROM_THE_START),
                ("ParallelRunner", "fork", IN_MID_RUN),
                ("ParallelRunner", "spawn", FROM_THE_START),
            ]
        ),
    ],
)
def test_a_run_without_a_server_is_whole_after_sync_whatever_the_runner(
    proxy: FaultyProxy,
    port: int,
    new_project: NewProject,
    undisturbed: Undisturbed,
    runner: str,
    start_method: str,
    at: int,
) -> None:
    project = everything.fill(new_project(), proxy.uri)
    proxy.plan(Fault("refuse", at=at))

    ended = project.kedro(
        "run", f"--runner={runner}", KEDRO_MP_CONTEXT=start_method, **everything.IMPATIENT
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    proxy.heal()
    everything.sync(project)
    uri = f"http://127.0.0.1:{port}"
    client = MlflowClient(uri, uri)
    names = {
        **everything.stand_ins(project, proxy.uri),
        f"kedro run --runner={runner}": "kedro run",
        runner: "SequentialRunner",
    }
    found = content(client, project.package, names=names)
    assert differences(found, undisturbed.content) == []


def test_a_token_that_expires_in_mid_run_stops_nothing(
    proxy: FaultyProxy, port: int, new_project: NewProject, undisturbed: Undisturbed
) -> None:
    project = everything.fill(new_project(), proxy.uri)
    proxy.plan(Fault("401", at=15))

    ended = project.kedro("run", **QUIET, **everything.IMPATIENT)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "401" in warnings(ended.stdout)[0]
    assert "kedro mlflow sync" in warnings(ended.stdout)[-1]
    proxy.heal()
    everything.sync(project)
    found = everything.on_server(port, project, proxy)
    assert differences(found, undisturbed.content) == []


def test_a_server_that_comes_back_in_mid_run_gets_all_of_it_without_sync(
    proxy: FaultyProxy, port: int, new_project: NewProject
) -> None:
    project = everything.fill(new_project(), proxy.uri)
    project.pipeline(WAITING)
    for name in ("away", "back"):
        os.mkfifo(project.path / name)
    proxy.plan(Fault("refuse"))

    with everything.process(project, "run", **everything.IMPATIENT) as run:
        with (project.path / "away").open():
            proxy.heal()
        with (project.path / "back").open("w"):
            output, _ = run.communicate()

    assert run.returncode == 0, output
    (found,) = everything.on_server(port, project, proxy)["runs"]
    assert found["status"] == "FINISHED"
    assert {key: point[0][2] for key, point in found["metrics"].items()} == {"early": 1, "late": 2}
    requests = len(proxy.requests)
    assert "nothing" in everything.sync(project).lower()
    assert [request for request in proxy.requests[requests:] if writes(request)] == []


def test_a_sync_without_a_server_says_so_and_keeps_all(
    proxy: FaultyProxy,
    port: int,
    new_project: NewProject,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in everything.IMPATIENT.items():
        monkeypatch.setenv(name, value)
    project = everything.fill(new_project(), proxy.uri)
    proxy.plan(Fault("refuse"))
    project.run()

    ended = project.kedro("mlflow", "sync")

    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1, shown
    assert "Traceback" not in shown
    assert proxy.uri in shown
    proxy.heal()
    everything.sync(project)
    found = everything.on_server(port, project, proxy)
    assert differences(found, undisturbed.content) == []


def test_runs_that_begin_at_once_without_a_server_are_all_recorded_in_one_experiment(
    proxy: FaultyProxy, port: int, new_project: NewProject
) -> None:
    project = everything.fill(new_project(), proxy.uri)
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.catalog("")
    proxy.plan(Fault("refuse"))

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: project.kedro("run"), range(3)))

    assert [run.returncode for run in ended] == [0, 0, 0], "\n".join(run.stderr for run in ended)
    proxy.heal()
    everything.sync(project)
    runs = everything.on_server(port, project, proxy)["runs"]
    assert [(run["status"], run["params"]) for run in runs] == [("FINISHED", {"x": "1"})] * 3
