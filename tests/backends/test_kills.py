"""Whenever a run is killed: nothing that was logged is lost, and nothing is there twice.

Some moments are tried, chosen by a seed; with --all all of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from ..support import everything
from ..support.faults import Fault, FaultyProxy, faulty_proxy
from ..support.projects import Project

NewProject = Callable[..., Project]

# Logs something, and says so in a file when that is done. After the one of the number WAIT_AFTER
# it tells through a named pipe that it waits, and does so for ever.
TELLING = """
import os
import threading

import mlflow
import pandas as pd
from kedro.pipeline import Node, Pipeline

NOON = 1_700_000_000_000
told = 0


def tell(*facts):
    global told
    with open("told", "a") as file:
        file.write("".join(f"{fact}\\n" for fact in facts))
    told += 1
    if str(told) == os.environ.get("WAIT_AFTER"):
        open("waiting", "w").close()
        threading.Event().wait()


def measure(depth):
    tell("__default__ has depth=3", "__default__ has runner=SequentialRunner")
    mlflow.set_tag("species", "gentoo")
    tell("__default__ has species=gentoo")
    mlflow.log_param("colour", "blue")
    tell("__default__ has colour=blue")
    for step in range(3):
        mlflow.log_metric("loss", step / 4, step=step, timestamp=NOON + step)
        tell(f"__default__ measured loss {step} {NOON + step} {step / 4}")
    mlflow.log_text("from the node", "notes/by_node.txt")
    tell("__default__ holds notes/by_node.txt")
    points = [{"step": i, "value": i / 4, "timestamp": NOON} for i in range(2)]
    return points, pd.DataFrame({"bill": [1.5, 2.5]})


def tune(points, report):
    tell(
        f"__default__ measured history 0 {NOON} 0.0",
        f"__default__ measured history 1 {NOON} 0.25",
        "__default__ holds report.csv",
    )
    for depth in (1, 2):
        with mlflow.start_run(nested=True, run_name=f"depth {depth}"):
            tell(f"depth {depth} is a child of __default__")
            mlflow.log_metric("score", depth / 8, step=depth, timestamp=NOON)
            mlflow.set_tag("kind", "trial")
            tell(f"depth {depth} measured score {depth} {NOON} {depth / 8}",
                 f"depth {depth} has kind=trial")
            with mlflow.start_run(nested=True, run_name=f"fold of {depth}"):
                mlflow.log_text("a fold", "fold.txt")
                tell(f"fold of {depth} is a child of depth {depth}",
                     f"fold of {depth} holds fold.txt")
    return depth


def fit(tuned):
    from sklearn.linear_model import LinearRegression

    tell()
    return LinearRegression().fit([[0], [1]], [1, 3])


def use(line):
    tell("a model line of __default__", "a version 1 with the alias champion")
    mlflow.log_metric("slope", 2, step=0, timestamp=NOON)
    tell(f"__default__ measured slope 0 {NOON} 2.0")


def create_pipeline():
    return Pipeline([
        Node(measure, "params:depth", ["history", "report"]),
        Node(tune, ["history", "report"], "tuned"),
        Node(fit, "tuned", "line"),
        Node(use, "line", None),
    ])
"""
TELLS = 17  # how often it tells something
LAST = "__default__ measured slope 0 1700000000000 2.0"

# At least so many requests does the replay of it make.
REQUESTS = 30


def telling(project: Project, uri: str) -> Project:
    """Give a project the pipeline that tells what it has logged."""
    everything.fill(project, uri)
    project.pipeline(TELLING)
    project.catalog(everything.CATALOG.replace("  artifact_path: reports\n", ""))
    os.mkfifo(project.path / "waiting")
    return project


def facts(store: dict[str, Any]) -> list[str]:
    """Write what is in a store in the words of the pipeline."""
    found = []
    for run in store["runs"]:
        name, tags = run["name"], dict(run["tags"])
        if parent := tags.pop("mlflow.parentRunId", None):
            found.append(f"{name} is a child of {parent.removeprefix('<run ').rstrip('>')}")
        else:
            found.append(f"a run {name}")
        found += [f"{name} has {k}={v}" for k, v in [*run["params"].items(), *tags.items()]]
        found += [f"{name} holds {file}" for file in run["artifacts"]]
        for key, points in run["metrics"].items():
            found += [f"{name} measured {key} {' '.join(map(str, point))}" for point in points]
    for model in store["models"]:
        if model["status"] == "READY":
            found.append(f"a model {model['name']} of {model['run'][5:-1]}")
    for registered in store["registered"]:
        aliases = {number: alias for alias, number in registered["aliases"].items()}
        for version in registered["versions"]:
            number = version["version"]
            found.append(f"a version {number} with the alias {aliases.get(number)}")
    return found


def told(project: Project) -> list[str]:
    """Read what the pipeline has told."""
    file = project.path / "told"
    return file.read_text().splitlines() if file.exists() else []


def check_killed(project: Project, port: int, proxy: FaultyProxy, whole: list[str]) -> None:
    """Check that the server has what a killed run has told of, and nothing that it never did."""
    store = everything.on_server(port, project, proxy.uri)
    found = facts(store)
    statuses = {run["name"]: run["status"] for run in store["runs"]}

    assert sorted(set(found)) == sorted(found), "something is there twice"
    assert set(told(project)) - set(found) == set(), "something is lost"
    half = [fact for fact in found if " has kedro_error=" in fact]
    half.append("a version 1 with the alias None")  # killed before it got one
    assert set(found) - {*whole, *half} == set(), "something was never logged"
    assert set(statuses.values()) <= {"KILLED", "FINISHED"}
    if "__default__" in statuses and LAST not in told(project):
        assert statuses["__default__"] == "KILLED"


_whole: dict[int, list[str]] = {}


@pytest.fixture
def whole(port: int, new_project: NewProject) -> list[str]:
    """All that is there after a run that nobody kills."""
    if port not in _whole:
        with faulty_proxy(port) as proxy:
            project = telling(new_project(), proxy.uri)
            ended = project.kedro("run")
            assert ended.returncode == 0, ended.stdout + ended.stderr
            store = everything.on_server(port, project, proxy.uri)
        _whole[port] = facts(store)
        assert told(project)[-1] == LAST
        assert set(told(project)) <= set(_whole[port])
        assert len(proxy.requests) >= REQUESTS
    return _whole[port]


def moments(kind: str, count: int, sample: int) -> list[Any]:
    """Choose some moments out of so many, always the same; all are tried with --all."""
    chosen = random.Random(kind).sample(range(count), sample)
    return [
        pytest.param(moment, marks=() if moment in chosen else pytest.mark.thorough)
        for moment in range(count)
    ]


@pytest.mark.parametrize("number", moments("told", TELLS, 1))
def test_what_a_killed_run_has_logged_is_there_after_sync(
    port: int, new_project: NewProject, whole: list[str], number: int
) -> None:
    with faulty_proxy(port) as proxy:
        project = telling(new_project(), proxy.uri)
        with everything.process(project, "run", WAIT_AFTER=str(number + 1)) as run:
            with (project.path / "waiting").open():  # opened once the pipeline waits
                everything.sync(project)  # leaves alone what is in progress
                run.kill()
            run.wait()
        everything.sync(project)

        check_killed(project, port, proxy, whole)


@pytest.mark.parametrize("processed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("index", moments("requests", REQUESTS, 1))
def test_a_run_that_is_killed_while_it_is_replayed_is_on_the_server_after_sync(
    port: int, new_project: NewProject, whole: list[str], index: int, processed: bool
) -> None:
    with faulty_proxy(port, Fault("hang", at=index, processed=processed)) as proxy:
        project = telling(new_project(), proxy.uri)
        with everything.process(project, "run") as run:
            assert proxy.wait_until_struck_or_ended(run), run.stdout and run.stdout.read()
            run.kill()
            run.wait()
        proxy.heal()
        everything.sync(project)

        check_killed(project, port, proxy, whole)


def test_the_next_run_replays_one_that_was_killed(
    port: int, new_project: NewProject, whole: list[str]
) -> None:
    with faulty_proxy(port) as proxy:
        project = telling(new_project(), proxy.uri)
        with everything.process(project, "run", WAIT_AFTER="9") as run:
            with (project.path / "waiting").open():
                run.kill()
            run.wait()
        project.mlflow_yml(
            (project.path / "conf/local/mlflow.yml").read_text() + "  run: {name: the next}\n"
        )
        before = told(project)

        ended = project.kedro("run")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = everything.on_server(port, project, proxy.uri)
    (killed,) = [run for run in found["runs"] if run["name"] == "__default__"]
    assert killed["status"] == "KILLED"
    assert set(before) <= set(facts(found))
