"""What `kedro mlflow doctor` finds on real databases, servers and storages, broken one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from mlflow import MlflowClient

from ..runtime.conftest import put_store
from ..runtime.extras.console.test_doctor import EMBEDDED, SERVED, only
from ..support.postgres import PASSWORD as PG_PASSWORD
from ..support.postgres import USER as PG_USER
from ..support.postgres import Postgres
from ..support.projects import Project
from ..support.s3 import S3
from ..support.servers import free_port, mlflow_server
from ..support.storages import ENDPOINT, KEY, KEY_SECRET, Locked, variables
from ..support.work import CA, ENTRY, PASSWORD, USER, WITNESS
from .conftest import SECRET, Reach, Served
from .test_databases import set_up
from .test_storages import Store, contents, storing

__all__ = ["storing"]


def examined(project: Project, **env: str) -> tuple[dict[str, bool | None], str, str]:
    """Give what each check has found, the one advice if any, and all that was written."""
    ended = project.kedro("mlflow", "doctor", "--json", **env)
    findings: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    oks = {finding["check"]: finding["ok"] for finding in findings}
    assert ended.returncode == (1 if False in oks.values() else 0), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    (advice,) = [f["advice"] for f in findings if f["advice"]] or [""]
    return oks, advice, ended.stdout + ended.stderr


def test_nothing_is_wrong_with_a_postgresql_and_only_a_deleted_run_stays_in_it(
    project: Project, postgres: Postgres
) -> None:
    uri = postgres.create(project.package)
    set_up(project, uri, PGPASSWORD=PG_PASSWORD)
    project.pipeline(WITNESS)
    project.catalog("")

    empty, _, _ = examined(project)
    assert postgres.texts(project.package) == ""
    listed = project.kedro("mlflow", "runs")
    assert postgres.texts(project.package) == ""
    assert project.kedro("run").returncode == 0
    before = postgres.texts(project.package).splitlines()
    found, _, shown = examined(project)
    added = set(postgres.texts(project.package).splitlines()) - {*before}

    assert "No run yet: the first one makes postgresql+psycopg2://***@" in listed.stdout
    unmade = dict.fromkeys(list(EMBEDDED)[3:-1], None)
    assert empty == {**EMBEDDED, **unmade}
    assert found == {**EMBEDDED, "place of files": None}
    (deleted,) = [row for row in added if row.startswith("runs:")]
    assert "'deleted'" in deleted
    assert {row.partition(":")[0] for row in added} == {"runs", "tags"}
    assert PG_PASSWORD not in shown


def test_a_postgresql_that_refuses_the_password_is_told(
    project: Project, postgres: Postgres
) -> None:
    uri = postgres.uri("postgres", PG_USER, "postgresql+psycopg2")
    set_up(project, uri, PGPASSWORD="forgotten")

    found, advice, _ = examined(project)

    assert found == only("server", EMBEDDED)
    assert "refuses the login (FATAL:  password authentication failed" in advice


def test_a_postgresql_that_is_away_is_told(project: Project) -> None:
    set_up(project, f"postgresql+psycopg2://ada:{SECRET}@127.0.0.1:{free_port()}/runs")

    found, advice, shown = examined(project)

    assert found == only("server", EMBEDDED)
    assert "see to the database, or correct the address" in advice
    assert SECRET not in shown


LOGIN = {USER: "admin", PASSWORD: SECRET}


def test_nothing_is_wrong_with_a_server_that_is_given_its_password(
    on: Reach, guarded: Served
) -> None:
    found, _, shown = examined(on(guarded.uri, **LOGIN))

    assert found == SERVED
    assert SECRET not in shown


@pytest.mark.parametrize("credentials", [{**LOGIN, PASSWORD: "forgotten"}, {}])
def test_a_password_that_the_server_refuses_is_told(
    on: Reach, guarded: Served, credentials: dict[str, str]
) -> None:
    found, advice, _ = examined(on(guarded.uri, **credentials))

    assert found == only("server", SERVED)
    assert f"server.credentials: {guarded.uri} answered 401 (not authenticated)" in advice


def test_a_user_who_may_only_read_is_told(
    on: Reach, guarded: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = {USER: "reader", PASSWORD: "may-only-read-1"}
    project = on(guarded.uri, **reader)
    api = f"{guarded.uri}/api/2.0/mlflow/users/create"
    answer = requests.post(
        api,
        json={"username": reader[USER], "password": reader[PASSWORD]},
        auth=("admin", SECRET),
        timeout=60,
    )
    assert answer.ok, answer.text
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    MlflowClient(guarded.uri).create_experiment(project.package)  # others may read it by default

    found, advice, _ = examined(project)

    assert found == only("writing runs", SERVED)
    assert f"{guarded.uri} answered 403 (not allowed) to {USER} and {PASSWORD}" in advice


def test_a_certificate_that_is_not_trusted_is_told(
    on: Reach, encrypted: Served, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))

    right, _, _ = examined(on(encrypted.uri, **{CA: str(encrypted.ca)}))
    wrong, advice, _ = examined(on(encrypted.uri, **{CA: str(tmp_path / "other.pem")}))

    assert right == SERVED
    assert wrong == only("server", SERVED)
    assert f"the certificate of {encrypted.uri} isn't trusted" in advice


def test_nothing_stays_in_a_bucket(storing: Store, s3: S3) -> None:
    project = storing(f"s3://{s3.bucket}/examined", variables(s3))

    assert project.kedro("run").returncode == 0
    before = contents(s3)
    found, _, _ = examined(project)

    assert found == EMBEDDED
    assert contents(s3) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({KEY: "AKIAFORGOTTEN0000000"}, "InvalidAccessKeyId"),
        ({KEY_SECRET: "forgotten"}, "SignatureDoesNotMatch"),
        ({ENDPOINT: "http://127.0.0.1:9"}, "Could not connect to the endpoint URL.*"),
    ],
    ids=["another key", "wrong secret", "away"],
)
def test_a_storage_that_does_not_open_is_told(
    storing: Store, locked: Locked, empty_store: Path, wrong: dict[str, str], said: str
) -> None:
    project = storing("s3://locked/runs", {**locked.opening, **wrong})
    put_store(empty_store, project)

    found, advice, _ = examined(project, AWS_SHARED_CREDENTIALS_FILE="none", AWS_CONFIG_FILE="none")

    assert found == only("artifacts", EMBEDDED)
    assert re.search(
        rf"^Artifacts can't be stored in s3://locked/runs/\S+: .*{said}.* See to the bucket, and "
        f"to {KEY}, .* in {ENTRY}. An experiment keeps its place: .*$",
        advice,
    )
    assert project.all_runs() == []


def test_a_server_whose_bucket_is_missing_is_told(on: Reach, s3: S3, tmp_path: Path) -> None:
    with mlflow_server(tmp_path, artifacts="s3://absent/runs", env=variables(s3)) as port:
        uri = f"http://127.0.0.1:{port}"
        found, advice, _ = examined(on(uri))

    assert found == only("artifacts", SERVED)
    assert f" of {uri}: the server " in advice
