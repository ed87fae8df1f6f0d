"""Runs are kept by an MLflow server that asks for nothing, or for tokens that expire."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import mlflow
import pytest
import yaml
from kedro.runner import ParallelRunner, SequentialRunner

from ..support.projects import Project
from ..support.servers import counting_proxy, free_port, mlflow_server
from ..support.tokens import USES, provide
from ..support.work import CATALOG, ENTRY, PASSWORD, TOKEN, USER, WITNESS, check, refused
from .conftest import RUNNERS, SECRET, Gated, Reach, Served


@pytest.mark.parametrize("runner", [SequentialRunner, ParallelRunner])
def test_every_value_is_on_the_server(
    on: Reach, plain: Served, runner: type, tmp_path: Path
) -> None:
    project = on(plain.uri)

    project.run(runner=runner())

    run = check(project, tmp_path)
    assert (run.info.artifact_uri or "").startswith("mlflow-artifacts:/")


def use_tokens(project: Project, gated: Gated, uses: int) -> None:
    """Have a project take its tokens from the gate, and take each for that many requests."""
    server = {"mlflow_tracking_uri": gated.proxy.uri, **provide(project, gated.proxy.uri, uses)}
    project.mlflow_yml(yaml.safe_dump({"server": server}, sort_keys=False))


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_value_is_on_the_server_whose_tokens_expire_in_the_run(
    on: Reach, gated: Gated, runner: type, tmp_path: Path
) -> None:
    project = on(gated.proxy.uri)
    use_tokens(project, gated, USES)

    project.run(runner=runner())

    assert len(gated.gate.used) > 3
    assert max(gated.gate.used.values()) <= USES
    project.tracking_uri = gated.server.uri
    check(project, tmp_path)
    assert not gated.server.has(SECRET)


def test_what_a_user_may_not_do_is_told(on: Reach, plain: Served) -> None:
    with counting_proxy(plain.port, lambda *_: (403, "Permission denied")) as proxy:
        told = refused(on(proxy.uri, **{USER: "ada", PASSWORD: SECRET}))

    what = f"answered 403 (not allowed) to {USER} and {PASSWORD}: correct it in {ENTRY}; "
    what += f"a server takes {USER} and {PASSWORD}, or {TOKEN}"
    assert told == f"conf/local/mlflow.yml:3: server.credentials: {proxy.uri} {what}"


def test_a_token_that_is_not_taken_is_told(on: Reach, gated: Gated) -> None:
    told = refused(on(gated.proxy.uri, **{TOKEN: SECRET}))

    what = f"answered 401 (not authenticated) to {TOKEN}: correct it in {ENTRY}; "
    what += f"a server takes {USER} and {PASSWORD}, or {TOKEN}"
    assert told == f"conf/local/mlflow.yml:3: server.credentials: {gated.proxy.uri} {what}"


def test_headers_whose_token_has_expired_are_told(on: Reach, gated: Gated) -> None:
    project = on(gated.proxy.uri)
    use_tokens(project, gated, uses=100)
    # It expires before the last of the parameters are logged.
    project.parameters({f"p{i}": i for i in range(500)})
    project.mlflow_yml("tracking: {params: {dict_params: {flatten: true}}}", env="base")

    told = refused(
        project, WITNESS.replace("see()", "see(parameters)").replace("None", "'parameters'")
    )

    what = "answered 401 (not authenticated) to the headers of "
    what += f"{project.package}.headers.FreshToken: see that they have a token that holds"
    place = "conf/local/mlflow.yml:3: server.request_header_provider"
    assert told == f"{place}: {gated.proxy.uri} {what}"


Answer = tuple[int, str]

NOT_MLFLOW = (
    "doesn't answer as an MLflow server of version 3 or newer: correct the address, with the path "
    "that it is served under, if any"
)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            (404, "<html>Not Found</html>"),
            NOT_MLFLOW,
        ),
        (
            (200, "<html>Welcome, please log in</html>"),
            NOT_MLFLOW,
        ),
        ((503, "later"), "answered 503: see the server's log"),
        ((500, "oh"), "answered 500: see the server's log"),
        (
            (403, "Invalid Host header - possible DNS rebinding attack detected"),
            "refuses this name of it: add the name to the server's --allowed-hosts",
        ),
    ],
)
def test_an_answer_that_is_none_of_an_mlflow_server_is_told(
    on: Reach, plain: Served, answer: Answer, sentence: str
) -> None:
    with counting_proxy(plain.port, lambda *_: answer) as proxy:
        told = refused(on(proxy.uri))

    assert told == f"conf/local/mlflow.yml:2: server.mlflow_tracking_uri: {proxy.uri} {sentence}"


def test_an_address_where_no_server_is_is_told_without_the_password_in_it(
    on: Reach, plain: Served, encrypted: Served
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = {
            f"http://ada:{SECRET}@127.0.0.1:{free_port()}": "connection refused",
            "http://mlflow.invalid": "its name isn't known",
            encrypted.uri.replace("https", "http"): "the connection was closed",
            plain.uri.replace("http", "https"): "no connection over TLS: .*",
            f"http://127.0.0.1:{silent.getsockname()[1]}": "no answer in time",
        }
        for address, reason in addresses.items():
            told = refused(on(address), MLFLOW_HTTP_REQUEST_TIMEOUT="1")

            shown = address.replace(f"ada:{SECRET}", "***")
            assert re.fullmatch(
                rf"conf/local/mlflow.yml:2: server.mlflow_tracking_uri: {re.escape(shown)} "
                rf"can't be reached \({reason}\): start the server, or correct the address .*",
                told,
            )


def test_an_address_of_the_environment_is_named_as_such(
    new_project: Callable[..., Project],
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    told = refused(new_project(), MLFLOW_TRACKING_URI=uri)

    assert f"{uri} (of MLFLOW_TRACKING_URI) can't be reached (connection refused)" in told


OLD = "2.22.4"

# What has come since it was made, and it can't use.
AGE = ["--with=setuptools<81", "--with=sqlalchemy<2.1"]

# What the node returns is a model.
MODEL = CATALOG.replace("report:", "text:").replace("line:", "report:")


def test_a_server_that_is_too_old_for_models_is_told_before_they_are_made(
    on: Reach, plain: Served
) -> None:
    def answer(path: str, headers: Mapping[str, str]) -> Answer | None:
        return (200, OLD) if path == "/version" else None

    with counting_proxy(plain.port, answer) as proxy:
        project = on(proxy.uri)
        project.catalog(MODEL)

        told = refused(project)

    what = f"is an MLflow server of version {OLD}, which can't keep models of MLflow "
    what += f"{mlflow.__version__}: update it to 3.0 or newer, or take the models out of the "
    what += "pipeline"
    assert told == f"conf/local/mlflow.yml:2: server.mlflow_tracking_uri: {proxy.uri} {what}"


@pytest.mark.thorough
def test_an_mlflow_server_of_version_2_keeps_runs_and_is_told_to_be_too_old_for_models(
    on: Reach, tmp_path: Path
) -> None:
    old = ["uv", "tool", "run", f"--from=mlflow=={OLD}", *AGE, "mlflow"]
    with mlflow_server(tmp_path, mlflow=old, ready="Listening at") as port:
        project = on(f"http://127.0.0.1:{port}")
        project.catalog(MODEL)
        told = refused(project)
        assert f"is an MLflow server of version {OLD}" in told

        project.catalog(CATALOG.partition("line:")[0])
        project.pipeline(WITNESS)
        project.run()

        (failed, finished) = sorted(project.all_runs(), key=lambda run: run.info.start_time)
        assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
        assert told in failed.data.tags["kedro_error"]
        (file,) = project.client.list_artifacts(finished.info.run_id)
        assert file.path == "report.txt"
