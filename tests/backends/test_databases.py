"""Runs are kept in a database that the project opens itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..runtime.conftest import Project
from .conftest import RUNNERS
from .postgres import PASSWORD, Postgres
from .work import check


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
    project.mlflow_yml(
        f"server: {{mlflow_tracking_uri: '{project.tracking_uri}', credentials: db}}"
    )
    project.write("conf/local/credentials.yml", f"db: {{PGPASSWORD: {PASSWORD}}}")

    project.run(runner=runner())

    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    check(project, tmp_path)
    assert PASSWORD not in postgres.texts(project.package)
