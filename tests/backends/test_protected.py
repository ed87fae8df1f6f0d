"""Runs are kept by an MLflow server with passwords, or over TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from ..support.work import CA, ENTRY, PASSWORD, TOKEN, USER, check, refused
from .conftest import RUNNERS, SECRET, Reach, Served


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_value_is_on_the_server_that_asks_for_a_password(
    on: Reach, guarded: Served, runner: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": SECRET}
    project = on(guarded.uri, **login)

    project.run(runner=runner())

    for name, value in login.items():
        monkeypatch.setenv(name, value)
    check(project, tmp_path)
    assert not guarded.has(SECRET)


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_value_is_on_the_server_whose_certificate_a_private_ca_has_signed(
    on: Reach, encrypted: Served, runner: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = on(encrypted.uri, MLFLOW_TRACKING_SERVER_CERT_PATH=str(encrypted.ca))

    project.run(runner=runner())

    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(encrypted.ca))
    check(project, tmp_path)


BOTH = f"correct it in {ENTRY}; a server takes {USER} and {PASSWORD}, or {TOKEN}"


@pytest.mark.parametrize(
    ("credentials", "sentence"),
    [
        (
            {USER: "admin", PASSWORD: "forgotten"},
            f"answered 401 (not authenticated) to {USER} and {PASSWORD}: {BOTH}",
        ),
        (
            {USER: "admin"},
            f"answered 401 (not authenticated) to {USER}: {BOTH}",
        ),
        (
            {},
            (
                f"answered 401 (not authenticated), and no user or token was sent: add {USER} and "
                f"{PASSWORD}, or {TOKEN}, to an entry of credentials.yml, and name the entry in "
                "server.credentials"
            ),
        ),
    ],
    ids=["wrong password", "missing password", "nothing"],
)
def test_a_login_that_fails_is_told(
    on: Reach, guarded: Served, credentials: dict[str, str], sentence: str
) -> None:
    told = refused(on(guarded.uri, **credentials))

    place = "conf/local/mlflow.yml:3" if credentials else "conf/base/mlflow.yml:10"
    assert told == f"{place}: server.credentials: {guarded.uri} {sentence}"


@pytest.mark.parametrize("given", ["nothing", "another CA"])
def test_a_certificate_that_is_not_trusted_is_told(
    on: Reach, encrypted: Served, given: str, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    credentials = {CA: str(tmp_path / "other.pem")} if given == "another CA" else {}
    told = refused(on(encrypted.uri, **credentials))

    place = "conf/local/mlflow.yml:3" if credentials else "conf/base/mlflow.yml:10"
    assert told == (
        f"{place}: server.credentials: the certificate of {encrypted.uri} isn't trusted (unable to "
        "get local issuer certificate): name the file of the CA that has signed it in "
        f"{CA}, in {ENTRY}"
    )


@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_file_that_has_no_certificate_is_told(
    on: Reach, encrypted: Served, content: str | None, tmp_path: Path
) -> None:
    if content:
        (tmp_path / "ca.pem").write_text(content)
    told = refused(on(encrypted.uri, **{CA: str(tmp_path / "ca.pem")}))

    assert told == (
        f"conf/local/mlflow.yml:3: server.credentials: the file that {CA} names is not there or "
        f"has no certificates (PEM): correct it in {ENTRY}"
    )
