"""What stands between a run and its server is named, and what may pass is told from what won't."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine, text

from runtime.config.errors import SettingError
from runtime.config.keys import ExperimentOptions
from runtime.stores.errors import is_away, reason_of, translate_server_errors
from runtime.stores.server import Server, ask_first, experiment_id, find_run

from ...support.s3 import S3
from ...support.servers import answering, free_port, trickling

# A host that only a proxy could know.
HOST = "mlflow.penguins.invalid"

EXPERIMENT = '{"experiment": {"experiment_id": "7"}}'

NO_LOGIN = (
    "answered 403 (not allowed), and no user or token was sent: add MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to an entry of credentials.yml, and name "
    "the entry in server.credentials"
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def told(uri: str) -> tuple[str, str]:
    """Ask a server for an experiment; gives the key and the sentence of what is wrong."""
    server = Server(uri, uri)
    with pytest.raises(SettingError) as raised, translate_server_errors(server, {}):
        experiment_id(server, ExperimentOptions(name="penguins"))
    return ".".join(raised.value.key), str(raised.value)


CLOSED = "can't be reached (the connection was closed): "
START = "start the server, or correct the address (http or https, host, port)"


@pytest.mark.parametrize(
    ("scheme", "status", "sentence"),
    [
        ("http", 403, NO_LOGIN),
        ("http", 407, "answered 407: see the server's log"),
        ("http", 0, CLOSED + START),
        ("https", 403, NO_LOGIN),
        ("https", 502, "answered 502: see the server's log"),
        ("https", 0, CLOSED + START),
    ],
)
def test_a_proxy_on_the_way_is_named(
    scheme: str, status: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{scheme}://{HOST}"
    with answering(status) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.uri.replace("//", "//ada:secret@"))
        _, found = told(uri)

    (request,) = proxy.requests
    assert request.split()[0] == ("CONNECT" if scheme == "https" else "GET")
    through = f"through the proxy {proxy.uri.replace('//', '//***@')}, but for hosts in NO_PROXY"
    assert found == f"{uri} ({through}) {sentence}"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("all_proxy", address)

    key, found = told(f"{scheme}://{HOST}")

    assert key == "server.mlflow_tracking_uri"
    assert found == (
        f"{scheme}://{HOST} (through the proxy {address}, but for hosts in NO_PROXY) can't be "
        f"reached (connection refused): {START}"
    )


def test_a_host_of_no_proxy_is_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", HOST)

    _, found = told(f"http://{HOST}")

    assert found == f"http://{HOST} can't be reached (its name isn't known): {START}"


def test_a_json_that_is_none_of_mlflows_is_told_by_its_status() -> None:
    with answering(404, body='{"detail": "Not Found"}') as server:
        _, found = told(server.uri)

    assert found.startswith(f"{server.uri} doesn't answer as an MLflow server of version 3")


def test_an_answer_without_an_experiment_is_none_of_an_mlflow_server() -> None:
    with answering(200, body="{}") as server:
        key, found = told(server.uri)

    assert key == "server.mlflow_tracking_uri"
    what = "answered, but not as an MLflow server does: correct the address"
    assert found == f"{server.uri} {what}"


@pytest.mark.parametrize(("retries", "requests"), [(None, 1), ("0", 1), ("1", 2)])
@pytest.mark.parametrize("ask", ["experiment", "run"])
def test_the_first_question_is_asked_once_unless_the_user_says_how_often(
    ask: str, retries: str | None, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if retries:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    options = ExperimentOptions(name="penguins")
    questions: dict[str, Callable[[Server], object]] = {
        "experiment": lambda server: experiment_id(server, options),
        "run": lambda server: find_run(server, "0" * 32),
    }
    with answering(503) as proxy, pytest.raises(MlflowException):
        questions[ask](Server(proxy.uri, proxy.uri))

    assert len(proxy.requests) == requests


@pytest.mark.parametrize(("timeout", "limit"), [(None, 10.0), ("1", 4.0)])
def test_a_server_that_hangs_is_given_up_within_ten_seconds_or_as_the_user_says(
    timeout: str | None, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if timeout:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        _, found = told(f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert time.monotonic() - begun < limit
    assert "(no answer in time)" in found


@pytest.mark.parametrize("interval", [0.1, 0.01])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up_as_one_that_hangs(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.stores.server.FIRST_ANSWER_TIMEOUT", 1)
    # After a second the slower one is still in the head, the other one in the body.
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
    with trickling(answer, interval) as uri:
        begun = time.monotonic()
        key, found = told(uri)

    assert time.monotonic() - begun < 4
    assert key == "server.mlflow_tracking_uri"
    assert "can't be reached (no answer in time)" in found


def test_a_slow_answer_that_comes_in_time_is_taken() -> None:
    with trickling(f"HTTP/1.1 200 OK\r\n\r\n{EXPERIMENT}".encode(), 0.01) as uri:
        assert experiment_id(Server(uri, uri), ExperimentOptions(name="penguins")) == "7"


GET_EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name"


@pytest.mark.parametrize("status", [301, 302, 303])
@pytest.mark.parametrize("followed", ["true", "false"])
def test_a_server_that_redirects_what_is_written_is_told_with_the_address(
    status: int, followed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_HTTP_REDIRECTS", followed)
    with answering(200, body=EXPERIMENT) as behind:
        there = behind.uri.replace("//", "//ada:t0p-secret@") + "/mlflow"
        location = f"{there}{GET_EXPERIMENT}?token=t0p-secret"
        with answering(status, {"Location": location}) as server:
            key, found = told(server.uri)

    assert key == "server.mlflow_tracking_uri"
    assert found == f"{server.uri} redirects to {behind.uri}/mlflow: write that address"


@pytest.mark.parametrize("status", [307, 308])
def test_a_server_that_redirects_all_requests_as_they_are_is_followed(status: int) -> None:
    with answering(200, body=EXPERIMENT) as behind:
        location = {"Location": f"{behind.uri}{GET_EXPERIMENT}"}
        with answering(status, location) as server:
            found = experiment_id(Server(server.uri, server.uri), ExperimentOptions(name="p"))

    assert found == "7"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_page_for_a_login_is_told_with_its_address(status: int) -> None:
    with answering(200, body="<html>Log in</html>") as page:
        location = {"Location": f"{page.uri}/login?next=mlflow&code=t0p-secret"}
        with answering(status, location) as server:
            key, found = told(server.uri)

    assert key == "server.mlflow_tracking_uri"
    assert found == (
        f"{server.uri} redirects to {page.uri}/login, where no MLflow server is: correct the "
        "address; a page to log in at lets a program in with MLFLOW_TRACKING_TOKEN in the entry "
        "of credentials.yml that server.credentials names, or with headers of "
        "server.request_header_provider"
    )


@pytest.fixture
def no_databricks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that knows no workspace; gives the file with profiles that it may have."""
    for name in os.environ:
        if name.startswith("DATABRICKS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
    return tmp_path / "databrickscfg"


@pytest.mark.usefixtures("no_databricks")
@pytest.mark.parametrize(
    "server",
    [
        Server("databricks", "databricks-uc"),
        Server("databricks://work", "databricks-uc://work"),
        Server("sqlite:///disk.db", "sqlite:///disk.db", replayed_to="databricks"),
    ],
    ids=lambda server: server.replayed_to or server.tracking_uri,
)
def test_an_experiment_on_databricks_has_a_path_for_a_name(server: Server) -> None:
    with pytest.raises(SettingError) as raised:
        experiment_id(server, ExperimentOptions(name="penguins"))

    assert raised.value.key == ("tracking", "experiment", "name")
    assert str(raised.value) == (
        "expected a path in the workspace, such as '/Shared/penguins' or '/Users/<you>/penguins', "
        "got 'penguins'"
    )


def told_by_databricks(uri: str = "databricks") -> tuple[str, str]:
    server = Server(uri, "databricks-uc")
    with pytest.raises(SettingError) as raised, translate_server_errors(server, {}):
        experiment_id(server, ExperimentOptions(name="/Shared/penguins"))
    return ".".join(raised.value.key), str(raised.value)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "DATABRICKS_HOST and DATABRICKS_TOKEN"),
        ({"DATABRICKS_TOKEN": "dapi0"}, "DATABRICKS_HOST"),
        ({"DATABRICKS_HOST": "NOBODY"}, "DATABRICKS_TOKEN"),
    ],
)
@pytest.mark.usefixtures("no_databricks")
def test_without_credentials_for_databricks_the_missing_variables_are_named(
    given: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host that says at once that it knows nothing: the client asks others for minutes.
    with answering(404, body="{}") as nobody:
        for name, value in given.items():
            monkeypatch.setenv(name, value.replace("NOBODY", nobody.uri))
        key, found = told_by_databricks()

    assert key == "server.credentials"
    assert found == (
        f"there is no login for databricks: add {missing} to an entry of credentials.yml, and name "
        "the entry in server.credentials; or log in by `databricks auth login`"
    )


@pytest.mark.parametrize("by", ["address", "variable"])
def test_a_profile_for_databricks_that_is_not_there_is_named(
    by: str, no_databricks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_databricks.write_text("[other]\nhost = http://127.0.0.1:1\ntoken = dapi0\n")
    if by == "variable":
        monkeypatch.setenv("DATABRICKS_CONFIG_PROFILE", "work")
    uri = "databricks://work" if by == "address" else "databricks"

    key, found = told_by_databricks(uri)

    assert key == "server.mlflow_tracking_uri"
    assert found == (
        f"there is no login for {uri}: the profile 'work' of ~/.databrickscfg isn't there, or has "
        "no host and token. Add it by `databricks auth login --profile work`, or name another"
    )


@pytest.mark.usefixtures("no_databricks")
def test_an_address_of_databricks_that_names_nothing_is_told() -> None:
    _, malformed = told_by_databricks("databricks:/work")
    _, secrets = told_by_databricks("databricks://scope:prefix")

    assert malformed == "expected databricks or databricks://<profile>, got databricks:/work"
    assert secrets.startswith("there is no login for databricks://scope:prefix: outside of the")


@pytest.mark.usefixtures("no_databricks")
def test_a_login_that_databricks_refuses_is_told_with_its_own_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."}
    with answering(403, body=json.dumps(refusal)) as workspace:
        monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
        monkeypatch.setenv("DATABRICKS_TOKEN", "dapi0")
        key, found = told_by_databricks()

    assert key == "server.credentials"
    assert found == (
        "databricks answered 403 (not allowed): PERMISSION_DENIED: Invalid access token. Correct "
        "DATABRICKS_HOST and DATABRICKS_TOKEN, in the entry of credentials.yml that "
        "server.credentials names or in the profile of ~/.databrickscfg, or have the right granted"
    )


# Each raises an error of what it is named for.
def closed_port() -> None:
    ask_first(f"http://127.0.0.1:{free_port()}", "experiments/search")


def unknown_host() -> None:
    ask_first(f"http://{HOST}", "experiments/search")


def no_proxy_there() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        ask_first(f"http://{HOST}", "experiments/search")


def closed_connection() -> None:
    with answering() as server:
        ask_first(server.uri, "experiments/search")


def time_out() -> None:
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as silent:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        ask_first(f"http://127.0.0.1:{silent.getsockname()[1]}", "experiments/search")


def no_tls() -> None:
    with answering(200) as server:
        ask_first(server.uri.replace("http:", "https:"), "experiments/search")


def no_address() -> None:
    ask_first("http://:5000", "experiments/search")


def answer(status: int, code: str = "") -> Callable[[], None]:
    """Make a client ask, which is answered by a status, and a code when it is MLflow's own."""
    body = json.dumps({"error_code": code, "message": "no penguins"}) if code else "<html>"

    def ask() -> None:
        with pytest.MonkeyPatch.context() as patch, answering(status, body=body) as server:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            MlflowClient(server.uri).get_run("0" * 32)

    ask.__name__ = f"{status} {code}"
    return ask


def mistake_in_code() -> None:
    try:
        closed_port()
    except MlflowException:
        len(None)  # type: ignore[arg-type]


def mistake_of_the_client() -> None:
    MlflowClient("http://127.0.0.1:1").log_metric("0" * 32, "loss", "much")  # type: ignore[arg-type]


def database_without_connection() -> None:
    create_engine("sqlite:////no/such/folder/mlflow.db").connect()


def database_without_table() -> None:
    with create_engine("sqlite://").connect() as connection:
        connection.execute(text("SELECT * FROM penguins"))


def translated() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with translate_server_errors(Server(uri, uri), {}):
        ask_first(uri, "experiments/search")


@pytest.mark.parametrize(
    ("fail", "away", "reason"),
    [
        (closed_port, True, "connection refused"),
        (unknown_host, True, "its name isn't known"),
        (no_proxy_there, True, "connection refused"),
        (closed_connection, True, "the connection was closed"),
        (time_out, True, "no answer in time"),
        (translated, True, "connection refused"),
        (answer(500), True, "it answered 500"),
        (answer(500, "INTERNAL_ERROR"), True, "it answered 500"),
        (answer(503), True, "it answered 503"),
        (answer(401), True, "it answered 401"),
        (answer(401, "UNAUTHENTICATED"), True, "UNAUTHENTICATED: no penguins"),
        (answer(403), False, "it answered 403"),
        (answer(404), False, "it answered 404"),
        (answer(404, "RESOURCE_DOES_NOT_EXIST"), False, "RESOURCE_DOES_NOT_EXIST: no penguins"),
        (answer(400, "INVALID_PARAMETER_VALUE"), False, "INVALID_PARAMETER_VALUE: no penguins"),
        (no_tls, False, r"no connection over TLS: .*WRONG_VERSION_NUMBER.*"),
        (no_address, False, "Invalid url: http://:5000/.*"),
        (mistake_in_code, False, None),
        (mistake_of_the_client, False, None),
        (database_without_connection, True, "unable to open database file"),
        (database_without_table, False, "no such table: penguins"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_may_pass_is_told_from_what_will_not(
    fail: Callable[[], None], away: bool, reason: str | None
) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        fail()

    assert is_away(raised.value) is away
    if reason:
        assert re.fullmatch(reason, reason_of(raised.value)), reason_of(raised.value)


def test_a_storage_that_is_away_is_told_from_one_that_refuses(s3: S3) -> None:
    def upload(endpoint: str, bucket: str) -> Exception:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        with pytest.raises(Exception) as raised:  # noqa: PT011
            client.put_object(Bucket=bucket, Key="note.txt", Body=b"a note")
        return raised.value

    assert is_away(upload(f"http://127.0.0.1:{free_port()}", s3.bucket))
    assert not is_away(upload(s3.endpoint, "absent"))
