"""A server that is away: by default the run says so before it begins; offline it is sent later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support import everything
from ..support.faults import Fault, FaultyProxy, faulty_proxy
from ..support.projects import Project

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

    assert f"{uri} can't be reached (its name isn't known): start the server" in sentence


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
