"""`kedro mlflow doctor`: each thing that a run needs, broken one at a time."""

from __future__ import annotations

import importlib
import json
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import ViewType

from runtime.tracking.ending import MARKERS
from runtime.tracking.process import this_process

from ....support.commands import Command, Ended, mlflow_command
from ....support.projects import ONE_NODE, Project
from ....support.servers import CountingProxy, Refusal, counting_proxy, free_port, mlflow_server
from ...tracking.test_endings import IN_A_NODE, main_and_child, running, wait_for_all
from .test_runs import everything

__all__ = ["mlflow_command"]

CHECKS = [
    "configuration",
    "credentials",
    "server",
    "version",
    "clock",
    "database schema",
    "place of files",
    "experiment",
    "writing runs",
    "artifacts",
    "open runs",
    "offline runs",
]
GOOD = dict.fromkeys(CHECKS, True)
EMBEDDED = {**GOOD, "version": None, "clock": None}
SERVED = {**GOOD, "database schema": None, "place of files": None}

# What can't be looked at when something before it is wrong.
AFTER = {
    "configuration": CHECKS[1:-1],
    "credentials": CHECKS[2:-1],
    "server": CHECKS[3:-1],
    "database schema": CHECKS[6:-1],
    "place of files": CHECKS[7:-1],
    "experiment": CHECKS[8:-1],
    "writing runs": ["artifacts"],
    "artifacts": [],
    "version": [],
    "clock": [],
    "open runs": [],
    "offline runs": [],
}


def only(wrong: str, otherwise: dict[str, bool | None]) -> dict[str, bool | None]:
    """Give the findings where one thing is wrong."""
    return {**otherwise, wrong: False, **dict.fromkeys(AFTER[wrong], None)}


def oks(ended: Ended) -> dict[str, bool | None]:
    """Give what each check has found, as the JSON says; the exit status has to fit."""
    findings = ended.json
    assert all(set(finding) == {"check", "ok", "found", "advice"} for finding in findings)
    found = {finding["check"]: finding["ok"] for finding in findings}
    assert list(found) == CHECKS
    assert ended.status == (1 if False in found.values() else 0)
    for finding in findings:
        assert bool(finding["advice"]) == (finding["ok"] is False), finding
    return found


def finding(ended: Ended, check: str) -> dict[str, Any]:
    (found,) = (f for f in ended.json if f["check"] == check)
    return dict(found)


def advice(ended: Ended) -> str:
    """Give the one advice that there is."""
    (told,) = (f["advice"] for f in ended.json if f["advice"])
    return str(told)


def test_where_nothing_is_wrong_a_doctor_says_so_and_leaves_a_deleted_run(
    project: Project, mlflow_command: Command
) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.run()
    before = {path for path in project.path.rglob("*") if "__pycache__" not in path.parts}
    run = project.only_run()

    table = mlflow_command(project, "doctor")
    written = mlflow_command(project, "doctor", "--json")

    assert table.status == 0, table.out
    marks = {line[3:20].strip(): line[0] for line in table.lines if line[0] != " "}
    assert marks == {name: "✓" if ok else "-" for name, ok in EMBEDDED.items()}
    assert oks(written) == EMBEDDED
    assert {path for path in project.path.rglob("*") if "__pycache__" not in path.parts} == before
    deleted = project.client.search_runs([run.info.experiment_id], "", ViewType.DELETED_ONLY)
    assert [made.info.run_name for made in deleted] == ["kedro mlflow doctor"] * 2
    assert project.only_run().info.run_id == run.info.run_id


def test_a_store_that_is_not_there_yet_is_right_and_is_not_made(
    new_project: Callable[..., Project], mlflow_command: Command, tmp_path: Path
) -> None:
    project = new_project()
    before = everything(tmp_path)

    ended = mlflow_command(project, "doctor", "--json")

    later = dict.fromkeys(CHECKS[3:-1], None)
    assert oks(ended) == {**GOOD, **later}
    shown = finding(ended, "server")["found"]
    assert shown == f"{project.tracking_uri} isn't there yet: the first run makes it"
    assert everything(tmp_path) == before


def test_a_store_that_cannot_be_made_is_told(
    new_project: Callable[..., Project], mlflow_command: Command
) -> None:
    project = new_project()
    (project.path / "taken").touch()
    project.mlflow_yml("server: {mlflow_tracking_uri: 'sqlite:///taken/mlflow.db'}")

    ended = mlflow_command(project, "doctor", "--json")

    assert oks(ended) == only("server", EMBEDDED)
    assert advice(ended) == (
        f"make the folder {project.path}/taken writable for this user, or name another in "
        "server.mlflow_tracking_uri"
    )


def test_a_mistake_in_the_configuration_is_told(project: Project, mlflow_command: Command) -> None:
    project.mlflow_yml("ui:\n  prot: 1\n")

    ended = mlflow_command(project, "doctor", "--json")
    table = mlflow_command(project, "doctor")

    assert oks(ended) == only("configuration", EMBEDDED)
    sentence = "conf/local/mlflow.yml:2: ui.prot: unknown key, did you mean 'port'?"
    assert advice(ended) == sentence
    assert table.status == 1
    assert table.lines[0].split()[:2] == ["✗", "configuration"]
    assert table.lines[1].strip() == sentence


def test_credentials_that_are_missing_are_told(project: Project, mlflow_command: Command) -> None:
    project.mlflow_yml("server:\n  credentials: team\n")

    ended = mlflow_command(project, "doctor", "--json")

    assert oks(ended) == only("credentials", EMBEDDED)
    assert advice(ended) == (
        "conf/local/mlflow.yml:2: server.credentials: credentials.yml has no entry 'team'; its "
        "entries: none"
    )


PROVIDER = """
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

class Broken(RequestHeaderProvider):
    def in_context(self):
        return True

    def request_headers(self):
        raise RuntimeError("no token for t0ps3cr3t")
"""


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Absent", "type '{0}.headers.Absent' can't be used: "),
        ("Broken", "type '{0}.headers.Broken' gives no headers: RuntimeError: no token for ***"),
    ],
)
def test_a_header_provider_that_does_not_work_is_told(
    project: Project,
    mlflow_command: Command,
    name: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = importlib.import_module("mlflow.tracking.request_header.registry")
    known = registry._request_header_provider_registry
    monkeypatch.setattr(known, "_registry", known._registry[:])
    project.write(f"src/{project.package}/headers.py", PROVIDER)
    project.write("conf/local/credentials.yml", "team: {SECRET: t0ps3cr3t}")
    provider = f"{{type: {project.package}.headers.{name}}}"
    project.mlflow_yml(f"server:\n  credentials: team\n  request_header_provider: {provider}\n")

    ended = mlflow_command(project, "doctor", "--json")

    assert oks(ended) == only("credentials", EMBEDDED)
    place = "conf/local/mlflow.yml:3: server.request_header_provider: "
    assert advice(ended).startswith(place + what.format(project.package))


@pytest.mark.parametrize(
    ("revision", "what"),
    [
        (
            "bda7b8c39065",
            "the next run migrates them, or `kedro mlflow doctor --fix`",
        ),
        (
            "0123456789ab",
            "those of a newer MLflow than {version}: update mlflow in this project",
        ),
    ],
    ids=["older", "newer"],
)
def test_tables_of_another_mlflow_are_told_and_left_as_they_are(
    project: Project, mlflow_command: Command, revision: str, what: str
) -> None:
    with sqlite3.connect(project.path / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = ?", [revision])
    before = everything(project.path)

    ended = mlflow_command(project, "doctor", "--json")

    assert oks(ended) == only("database schema", EMBEDDED)
    uri = project.tracking_uri
    assert advice(ended).endswith(what.format(uri=uri, version=version("mlflow")))
    assert everything(project.path) == before


def test_an_experiment_that_is_missing_is_made_as_the_first_run_would(
    project: Project, mlflow_command: Command
) -> None:
    assert oks(mlflow_command(project, "doctor", "--json")) == EMBEDDED

    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    assert experiment.artifact_location == (project.path / "mlartifacts").as_uri()
    assert project.all_runs() == []


def test_an_experiment_that_is_deleted_is_not_restored(
    project: Project, mlflow_command: Command
) -> None:
    client = project.client
    experiment = client.create_experiment(project.package)
    client.delete_experiment(experiment)

    restored = mlflow_command(project, "doctor", "--json")
    project.mlflow_yml("tracking: {experiment: {restore_if_deleted: false}}")
    kept = mlflow_command(project, "doctor", "--json")

    assert oks(restored) == {**EMBEDDED, "writing runs": None, "artifacts": None}
    assert oks(kept) == only("experiment", EMBEDDED)
    assert advice(kept) == (
        "conf/local/mlflow.yml:1: tracking.experiment.restore_if_deleted: the experiment "
        f"{project.package!r} is deleted; expected true, or another name, got False"
    )
    assert client.get_experiment(experiment).lifecycle_stage == "deleted"


def test_artifacts_that_cannot_be_written_are_told(
    project: Project, mlflow_command: Command
) -> None:
    (project.path / "taken").touch()
    where = "create_experiment_kwargs: {artifact_location: taken/artifacts}"
    project.mlflow_yml(f"tracking: {{experiment: {{{where}}}}}")

    ended = mlflow_command(project, "doctor", "--json")

    assert oks(ended) == only("artifacts", EMBEDDED)
    place = f"{(project.path / 'taken' / 'artifacts').as_uri()}/"
    assert advice(ended).startswith(f"Artifacts can't be stored in {place}")
    assert "See to the folder, or name another place" in advice(ended)
    assert project.all_runs() == []


@pytest.fixture
def served(project: Project, server: CountingProxy) -> Project:
    """A project whose runs are on the server."""
    return on(project, server.uri)


def on(project: Project, uri: str) -> Project:
    project.tracking_uri = uri
    project.mlflow_yml(f"server:\n  mlflow_tracking_uri: {uri}\n")
    return project


def test_a_server_where_nothing_is_wrong_keeps_a_deleted_run_that_says_whose_it_is(
    served: Project, server: CountingProxy, mlflow_command: Command
) -> None:
    server.requests.clear()

    ended = mlflow_command(served, "doctor", "--json")

    assert oks(ended) == SERVED
    assert len(server.requests) <= 20, server.requests
    assert "View run" not in ended.err
    found = finding(ended, "server")["found"]
    assert re.fullmatch(rf"{server.uri} answered in \d+ ms", found)
    assert re.fullmatch(r"\d+ s apart", finding(ended, "clock")["found"])
    client = served.client
    experiment = client.get_experiment_by_name(served.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert (run.info.lifecycle_stage, run.info.status) == ("deleted", "FINISHED")
    assert run.info.run_name == "kedro mlflow doctor"
    assert "kedro_mlflow_doctor" in run.data.tags
    assert client.list_artifacts(run.info.run_id) == []


def test_a_server_where_nothing_listens_is_told(project: Project, mlflow_command: Command) -> None:
    uri = f"http://127.0.0.1:{free_port()}"

    ended = mlflow_command(on(project, uri), "doctor", "--json")

    assert oks(ended) == only("server", SERVED)
    assert advice(ended) == (
        f"conf/local/mlflow.yml:2: server.mlflow_tracking_uri: {uri} can't be reached "
        "(connection refused): start the server, or correct the address (http or https, host, port)"
    )


@contextmanager
def silent_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """Take connections and never answer; gives the address, and the connections that were made."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            with suppress(OSError):  # when it has been closed
                while True:
                    taken.append(listening.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in taken:
                connection.close()


def test_a_server_that_never_answers_is_asked_once_and_for_seconds(
    project: Project, mlflow_command: Command
) -> None:
    with silent_server() as (uri, taken):
        ended = mlflow_command(on(project, uri), "doctor", "--json")

        assert len(taken) == 1
    assert oks(ended) == only("server", SERVED)
    assert f"{uri} can't be reached (no answer in time)" in advice(ended)


def test_a_server_is_given_the_time_and_the_tries_that_the_user_has_set(
    project: Project, mlflow_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    with silent_server() as (uri, taken):
        ended = mlflow_command(on(project, uri), "doctor", "--json")

        assert len(taken) == 3
    assert oks(ended) == only("server", SERVED)


@contextmanager
def answering(server: CountingProxy, refuse: Refusal) -> Iterator[str]:
    """Give the address of a server that answers some requests in its own way."""
    port = int(server.uri.rpartition(":")[2])
    with counting_proxy(port, refuse) as proxy:
        yield proxy.uri


def says(path: str, status: int, text: str) -> Refusal:
    return lambda asked, _: (status, text) if asked.partition("?")[0].endswith(path) else None


@pytest.mark.parametrize(
    ("path", "status", "text", "expected", "told"),
    [
        (
            "/version",
            200,
            "2.22.1",
            only("version", SERVED),
            "update the server to MLflow 3.0 or newer",
        ),
        (
            "/version",
            200,
            "9.1.0",
            only("version", SERVED),
            "update mlflow in this project to 9.0 or newer",
        ),
        ("/version", 404, "not found", {**SERVED, "version": None}, None),
        ("/version", 200, "<html>", {**SERVED, "version": None}, None),
        ("/version", 500, "oh", only("server", SERVED), "{} answered 500: see the server's log"),
        (
            "/experiments/get-by-name",
            200,
            "<html>",
            only("experiment", SERVED),
            "{} doesn't answer as an MLflow server of version 3 or newer: correct the address",
        ),
        (
            "/runs/create",
            403,
            "only for the team",
            only("writing runs", SERVED),
            "{} answered 403 (not allowed), and no user or token was sent",
        ),
        (
            "/doctor.txt",
            507,
            "disk full",
            only("artifacts", SERVED),
            " of {}: the server answered 507. Its log says why",
        ),
        (
            "/runs/delete",
            403,
            "not you",
            {**SERVED, "writing runs": False},
            "(kedro mlflow doctor) by hand: MlflowException: ",
        ),
    ],
)
def test_what_a_server_answers_wrongly_is_told(
    served: Project,
    server: CountingProxy,
    mlflow_command: Command,
    path: str,
    status: int,
    text: str,
    expected: dict[str, bool | None],
    told: str | None,
) -> None:
    with answering(server, says(path, status, text)) as uri:
        ended = mlflow_command(on(served, uri), "doctor", "--json")

    assert oks(ended) == expected
    if told:
        assert told.format(uri) in advice(ended)


def test_a_store_of_artifacts_that_deletes_nothing_will_do(
    served: Project, server: CountingProxy, mlflow_command: Command
) -> None:
    def refuse(_path: str, _headers: Any) -> tuple[int, str] | None:
        return (403, "no") if proxy.requests[-1].startswith("DELETE ") else None

    with counting_proxy(int(server.uri.rpartition(":")[2]), refuse) as proxy:
        ended = mlflow_command(on(served, proxy.uri), "doctor", "--json")

    assert oks(ended) == SERVED
    found = finding(ended, "artifacts")["found"]
    assert re.match(
        r"written and read; doctor.txt stays in mlflow-artifacts:\S+, which can't", found
    )


AHEAD = """
import time

real = time.time
time.time = lambda: real() + 3630
"""


def test_a_clock_that_is_an_hour_ahead_is_told(
    project: Project, mlflow_command: Command, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    (tmp_path / "server").mkdir()

    with mlflow_server(tmp_path / "server", env={"PYTHONPATH": str(tmp_path)}) as port:
        ended = mlflow_command(on(project, f"http://127.0.0.1:{port}"), "doctor", "--json")

    assert oks(ended) == only("clock", SERVED)
    assert advice(ended).startswith("the server's clock is 1 h 00 min ahead of this machine's: ")


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "not noted"])
def test_runs_that_dead_processes_have_left_open_are_told_and_ended_when_asked_to(
    project: Project, mlflow_command: Command, noted: bool
) -> None:
    with running(project, IN_A_NODE) as process:
        alive = mlflow_command(project, "doctor", "--fix", "--json")
        process.kill()
        process.wait(60)
        wait_for_all(process.pid)
    markers = project.path / MARKERS
    if not noted:
        for marker in markers.glob("*.json"):
            marker.unlink()
    killed, child = main_and_child(project)
    assert child

    told = mlflow_command(project, "doctor", "--json")
    statuses = {run.info.status for run in project.all_runs()}
    fixed = mlflow_command(project, "doctor", "--fix", "--json")
    again = mlflow_command(project, "doctor", "--json")

    assert oks(alive) == oks(fixed) == oks(again) == EMBEDDED
    assert oks(told) == only("open runs", EMBEDDED)
    assert advice(told) == "`kedro mlflow doctor --fix` ends them as KILLED"
    run_id = killed.info.run_id
    assert finding(told, "open runs")["found"] == f"1 run of processes that are gone: {run_id}"
    assert statuses == {"RUNNING"}
    assert (
        finding(fixed, "open runs")["found"] == f"ended 1 run of processes that are gone: {run_id}"
    )
    assert {run.info.status for run in project.all_runs()} == {"KILLED"}
    reason = project.client.get_run(run_id).data.tags["kedro_error"]
    assert reason.startswith(f"the process {process.pid} on ")
    assert list(markers.glob("*.json")) == []


def test_only_runs_whose_process_is_surely_gone_are_taken_for_left_open(
    project: Project, mlflow_command: Command
) -> None:
    here = this_process()
    assert here.start_time
    gone = replace(here, start_time=here.start_time - 60, start_ticks="")
    path = {"project_path": str(project.path)}
    elsewhere = replace(gone, namespace="pid:[1]")  # another container with this host's name
    tags = {
        "gone": {**gone.tags(), **path},
        "alive": {**here.tags(), **path},
        "the clock was set": {**here.tags(), "process_start": gone.tags()["process_start"], **path},
        "another host": {**gone.tags(), **path, "host": "elsewhere"},
        "another project": {**gone.tags(), "project_path": "/elsewhere"},
        "another container": {**elsewhere.tags(), **path},
        "unknown start": {**path, "host": here.host, "pid": "1"},
        "no number": {**gone.tags(), **path, "pid": "one"},
    }
    client = project.client
    experiment = client.create_experiment(project.package)
    ids = {
        name: client.create_run(experiment, run_name=name, tags=of_run).info.run_id
        for name, of_run in tags.items()
    }
    noted = ids["another container"]
    marker = {
        "run_id": noted,
        "server": project.tracking_uri,
        "process": asdict(elsewhere),
    }
    project.write(f"{MARKERS}/{noted}.json", json.dumps(marker))
    # A note of a run that somebody has deleted for good.
    absent = {**marker, "run_id": "0" * 32, "process": asdict(gone)}
    project.write(f"{MARKERS}/{'0' * 32}.json", json.dumps(absent))

    ended = mlflow_command(project, "doctor", "--fix", "--json")

    assert oks(ended) == EMBEDDED
    assert {run.info.run_name: run.info.status for run in project.all_runs()} == {
        **dict.fromkeys(ids, "RUNNING"),
        "gone": "KILLED",
    }


def test_runs_that_wait_to_be_replayed_are_told(project: Project, mlflow_command: Command) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    away = f"http://127.0.0.1:{free_port()}"
    offline = {"server": {"mlflow_tracking_uri": away}, "tracking": {"on_unreachable": "offline"}}
    project.mlflow_yml(yaml.safe_dump(offline), env="prod")
    project.run(env="prod")
    (store,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    client = MlflowClient(f"sqlite:///{store.as_posix()}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)

    ended = mlflow_command(project, "doctor", "--json", "--env=prod")

    assert oks(ended)["offline runs"] is False
    told = finding(ended, "offline runs")
    assert told["advice"] == "`kedro mlflow sync --env=prod` replays them"
    assert told["found"] == f"1 run on disk in this project: {run.info.run_id}"


def test_no_secret_is_written(project: Project, mlflow_command: Command) -> None:
    uri = f"http://ada:t0ps3cr3t@127.0.0.1:{free_port()}"
    project.write("conf/local/credentials.yml", "team: {MLFLOW_TRACKING_TOKEN: an0thers3cr3t}")
    server = {"mlflow_tracking_uri": uri, "credentials": "team"}
    project.mlflow_yml(yaml.safe_dump({"server": server}))

    for options in ([], ["--json"]):
        ended = mlflow_command(project, "doctor", *options)

        assert ended.status == 1
        shown = ended.out + ended.err
        assert "MLFLOW_TRACKING_TOKEN" in shown
        assert "***@127.0.0.1" in shown
        assert not re.search("t0ps3cr3t|an0thers3cr3t", shown)


def test_a_doctor_writes_nothing_but_json_to_stdout(project: Project) -> None:
    ended = project.kedro("mlflow", "doctor", "--json")

    assert ended.returncode == 0, ended.stderr
    *_kedros_own, line = ended.stdout.splitlines()
    assert [found["check"] for found in json.loads(line)] == CHECKS
