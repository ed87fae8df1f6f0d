"""What stands between a run and its server is named, and what may pass is told from what won't."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

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
from ...support.servers import answering, free_port

# A host that only a proxy could know.
HOST = "mlflow.penguins.invalid"

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
