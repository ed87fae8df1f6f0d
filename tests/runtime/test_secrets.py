"""No secret leaves the process: not to the store, not as an artifact, not to the terminal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from kedro.framework.startup import bootstrap_project

from ..support.projects import Project, needs_kedro

# By where they are planted; none may be in the store or on the terminal.
PLANTED = {
    "credentials": "by-cred%ntials/0x",
    "con": "by-con#1x",
    "line": "by-line-2x-MIIE",
    "typed": "by-typed-'3x'",
    "nested": "by-nested-4x",
    "runtime": "by-runtime-5x",
    "number": 90210123,
    "uri": "by/uri-6x",
}

NODE = """
import json
import logging
from urllib.parse import quote_plus

from kedro.pipeline import Node, Pipeline
from pydantic import BaseModel

logger = logging.getLogger(__name__)

class Login(BaseModel):
    password: str
    number_token: int

class Api(BaseModel):
    password: str
    login: Login

PLANTED = VALUES

def training(api: Api, depth):
    text = " ".join(str(value) for value in PLANTED.values())
    logger.warning("with %s and %s", text, [api, *PLANTED.values()])
    logger.error("with %s %s", json.dumps(PLANTED), quote_plus(text))
    try:
        raise KeyError(text)
    except KeyError:
        logger.exception("with %r", text)
    WHAT
    return 1

def create_pipeline():
    return Pipeline([Node(training, ["params:api", "params:depth"], "y", name="training")])
"""

ENDINGS = {
    "FINISHED": "pass",
    "FAILED": "raise ValueError(f'no way in with {text} of {api!r}')",
    "KILLED": 'open(FIFO, "w").close(); import threading; threading.Event().wait()',
}


def plant(project: Project, what: str) -> Path:
    """Write a project that uses its secrets, and ends as `what` says; gives a named pipe."""
    fifo = project.path / "waiting"
    os.mkfifo(fifo)
    code = NODE.replace("VALUES", repr(PLANTED)).replace("WHAT", what)
    project.pipeline(code.replace("FIFO", repr(str(fifo))), name="training")
    api = {
        "password": PLANTED["typed"],
        "login": {"password": PLANTED["nested"], "number_token": PLANTED["number"]},
    }
    project.parameters({"api": api, "depth": 3})
    credentials = {
        "user": "training",
        "password": PLANTED["credentials"],
        "con": f"postgresql://ada:{PLANTED['con']}@db/penguins",
        "pem": f"-----BEGIN-----\n{PLANTED['line']}\n-----END-----\n",
        "other_password": "training",
        "connect_timeout": 1000,
    }
    project.write("conf/local/credentials.yml", json.dumps({"db": credentials}))
    registry = f"postgresql://ada:{PLANTED['uri']}@localhost/registry"
    flatten = {"params": {"dict_params": {"flatten": True}}}
    project.mlflow_yml(
        json.dumps({"server": {"mlflow_registry_uri": registry}, "tracking": flatten})
    )
    return fifo


def leaks(project: Project, output: str) -> list[tuple[str, str]]:
    """Give where secrets stand: in files that a run has written, and in its output."""
    given = [project.path / "conf", project.path / "src"]
    texts = {"output": output.encode()} | {
        str(file.relative_to(project.path)): file.read_bytes()
        for file in project.path.rglob("*")
        if file.is_file() and not any(file.is_relative_to(folder) for folder in given)
    }
    forms: set[Any] = set()
    for value in map(str, PLANTED.values()):
        forms |= {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote_plus(value)}
    return [
        (place, form) for place, text in texts.items() for form in forms if form.encode() in text
    ]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner", "ParallelRunner"])
def test_no_secret_is_in_the_store_the_artifacts_the_logs_and_the_terminal(
    project: Project, runner: str, ending: str
) -> None:
    fifo = plant(project, ENDINGS[ending])
    words = ("run", f"--runner={runner}", f"--params=api_token={PLANTED['runtime']}")
    process = project.start(*words, new_session=True, COLUMNS="1000")
    if ending == "KILLED":
        with fifo.open():  # opened once the node waits
            process.send_signal(signal.SIGTERM)
    output = "".join(text or "" for text in process.communicate())

    run = project.only_run()
    assert run.info.status == ending, output
    assert "with *** ***" in output
    assert leaks(project, output) == []
    assert run.data.params["depth"] == "3"
    assert run.data.params["api.password"] == "***"
    assert run.data.tags.get("kedro_failed_node") == ("training" if ending == "FAILED" else None)
    if ending == "FAILED":
        assert run.data.tags["kedro_error"].startswith("ValueError: no way in with *** ***")


@needs_kedro("1.3")
def test_typed_parameters_are_stored_entry_by_entry_without_their_secrets(
    project: Project,
) -> None:
    plant(project, "assert isinstance(api, Api)")
    project.run()

    assert project.only_run().data.params == {
        "api.password": "***",
        "api.login.password": "***",
        "api.login.number_token": "***",
        "depth": "3",
    }


def test_words_of_the_project_stay_although_credentials_have_them(project: Project) -> None:
    plant(project, "pass")

    ended = project.kedro("run", "--pipelines=training", "--params=depth=1000", COLUMNS="1000")

    assert ended.returncode == 0, ended.stderr
    run = project.only_run()
    assert run.info.run_name == "training"
    assert run.data.params["depth"] == "1000"
    assert run.data.tags["kedro_command"] == ("kedro run --pipelines=training --params=depth=1000")
    assert "'training'" in ended.stderr


def test_what_is_wrong_with_credentials_and_headers_is_told_without_them(project: Project) -> None:
    plant(project, "pass")
    project.mlflow_yml("server: {credentials: {MLFLOW_TRACKING_TOKEN: t0p-secret-9}}")

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert "server.credentials: expected a text, got '***'" in ended.stderr
    assert "t0p-secret-9" not in ended.stderr

    project.write(
        f"src/{project.package}/headers.py",
        """
        from mlflow.tracking.request_header.abstract_request_header_provider import (
            RequestHeaderProvider,
        )

        class Broken(RequestHeaderProvider):
            def __init__(self, token, key):
                raise ValueError(f"refused: {token} {key}")
        """,
    )
    arguments = {"token": "t0p-secret-8", "key": PLANTED["credentials"]}
    provider = {"type": f"{project.package}.headers.Broken", "init_kwargs": arguments}
    project.mlflow_yml(json.dumps({"server": {"request_header_provider": provider}}))

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert "can't be used: refused: *** ***" in ended.stderr
    assert leaks(project, ended.stderr) == []


INTERRUPTED = """
from kedro.pipeline import Node, Pipeline

def work():
    raise KeyboardInterrupt

def create_pipeline():
    return Pipeline([Node(work, None, "y")])
"""


def test_a_token_leaves_the_environment_with_an_interrupted_pipeline(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the user")
    project.write("conf/local/credentials.yml", "mlflow: {MLFLOW_TRACKING_TOKEN: t0p-secret-9}")
    project.mlflow_yml("server: {credentials: mlflow}")
    project.pipeline(INTERRUPTED)
    bootstrap_project(project.path)
    before = dict(os.environ)

    with pytest.raises(KeyboardInterrupt):
        project.run()

    assert os.environ == before
