"""Runs are kept in a database that the project opens itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from ..support.postgres import PASSWORD, USER, Postgres
from ..support.projects import Project
from ..support.servers import free_port
from ..support.work import ENTRY, WITNESS, check, refused
from .conftest import RUNNERS


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_value_is_in_the_sqlite_file(project: Project, runner: type, tmp_path: Path) -> None:
    project.run(runner=runner())

    check(project, tmp_path)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_every_value_is_in_postgresql_and_the_password_is_not(
    project: Project,
    postgres: Postgres,
    driver: str,
    runner: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project.tracking_uri = postgres.create(project.package, driver)
    set_up(project, project.tracking_uri, PGPASSWORD=PASSWORD)

    project.run(runner=runner())

    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    check(project, tmp_path)
    assert PASSWORD not in postgres.texts(project.package)


@pytest.mark.parametrize("runner", RUNNERS[1:])
def test_what_is_recorded_before_the_database_is_there_is_in_it_after_sync(
    project: Project,
    postgres: Postgres,
    runner: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = postgres.uri(project.package, USER, "postgresql+psycopg2")
    set_up(project, uri, PGPASSWORD=PASSWORD)
    file = project.path / "conf/local/mlflow.yml"
    file.write_text(f"{file.read_text()}tracking: {{on_unreachable: offline}}\n")
    project.run(runner=runner())
    assert "will be retried" not in caplog.text  # as MLflow does, for nearly two minutes

    project.tracking_uri = postgres.create(project.package)
    ended = project.kedro("mlflow", "sync")

    assert ended.returncode == 0, ended.stderr
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    check(project, tmp_path)
    assert PASSWORD not in postgres.texts(project.package)
    left = [path for path in (project.path / ".mlflow-offline").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {".gitignore", "mlflow.db", "replay.lock"}


def set_up(project: Project, uri: str, **credentials: str) -> None:
    """Have runs kept in a database."""
    project.mlflow_yml(f"server:\n  mlflow_tracking_uri: '{uri}'\n  credentials: db\n")
    project.write("conf/local/credentials.yml", yaml.safe_dump({"db": credentials}))


ADDRESS = "conf/local/mlflow.yml:2: server.mlflow_tracking_uri"
CREDENTIALS = "conf/local/mlflow.yml:3: server.credentials"


@pytest.mark.parametrize(
    ("credentials", "said"),
    [
        ({"PGPASSWORD": "forgotten"}, f'FATAL:  password authentication failed for user "{USER}"'),
        ({}, "fe_sendauth: no password supplied"),
    ],
    ids=["wrong", "missing"],
)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_password_that_postgresql_refuses_is_told(
    project: Project, postgres: Postgres, credentials: dict[str, str], said: str, driver: str
) -> None:
    uri = postgres.uri("postgres", USER, f"postgresql+{driver}")
    set_up(project, uri, **credentials)

    shown = uri.replace(USER, "***")
    assert refused(project) == (
        f"{CREDENTIALS}: {shown} refuses the login ({said}): correct the user in the address, and "
        f"PGPASSWORD in {ENTRY}"
    )


def test_what_is_wrong_with_a_postgresql_is_told_without_its_password(
    project: Project, postgres: Postgres
) -> None:
    absent = postgres.uri("absent", scheme="postgresql+psycopg2")
    away = f"postgresql+psycopg2://{USER}:{PASSWORD}@127.0.0.1:{free_port()}/postgres"
    undriven = "postgresql+pg8000://db.invalid/postgres"
    sentences = {
        absent: '{} can\'t be used (FATAL:  database "absent" does not exist): see to the '
        "database, or correct the address",
        away: "{} can't be used (Connection refused): see to the database, or correct the address",
        undriven: "{} needs a package that isn't installed: uv add 'pg8000'",
    }
    for uri, sentence in sentences.items():
        set_up(project, uri)

        shown = uri.replace(f"{USER}:{PASSWORD}", "***")
        assert refused(project) == f"{ADDRESS}: {sentence.format(shown)}"


def test_what_is_wrong_with_a_sqlite_file_is_told(project: Project) -> None:
    (project.path / "text.db").write_text("no database " * 100)
    uri = f"sqlite:///{project.path.as_posix()}/text.db"
    set_up(project, uri)

    what = "can't be used (file is not a database): see to the database, or correct the address"
    assert refused(project) == f"{ADDRESS}: {uri} {what}"


def test_runs_that_start_at_once_on_an_empty_postgresql_are_all_kept(
    project: Project, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.tracking_uri = postgres.create(project.package)
    set_up(project, project.tracking_uri, PGPASSWORD=PASSWORD)
    project.pipeline(WITNESS)
    project.catalog("")

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: project.kedro("run"), range(3)))

    assert [run.returncode for run in ended] == [0, 0, 0], "\n".join(run.stderr for run in ended)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert [run.info.status for run in project.all_runs()] == ["FINISHED"] * 3
