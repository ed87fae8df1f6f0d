"""Databases that this process opens itself: their tables are made on first use.

MLflow and SQLAlchemy are imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from .. import _mlflow
from ..config.errors import ADDRESS, ConfigError, SettingError
from ..config.uris import is_database, sqlite_file, sqlite_uri
from .moving import follow
from .schema import Schema, check_schema, connect, schema_of

if TYPE_CHECKING:
    from sqlalchemy.pool import Pool

logger = logging.getLogger(__name__)

# Any number that other programs are unlikely to lock in the same database.
_MAKING_TABLES = 0x6D6C666C6F77


def prepare(uri: str, location: str | None, project_path: Path | None = None) -> None:
    """Make a database fit for runs: its tables, and where its files are; leave any other URI alone.

    Args:
        uri: Where runs are kept.
        location: Where the files go.
        project_path: The project's folder: a SQLite file in it is migrated from an older MLflow.

    Raises:
        SettingError: When a file can't be made, or the tables are another MLflow's.
        ConfigError: When MLflow can't open any database from where it is installed.
    """
    if not is_database(uri):
        return
    _check_place_of_mlflow()
    file = sqlite_file(uri)
    if file and not file.exists():
        _make_sqlite(uri, file, location)
        return
    schema = _read_or_make(uri, location)
    check_schema(uri, schema, project_path)
    if file and location:
        follow(uri, file, location)


def _check_place_of_mlflow() -> None:
    # MLflow 3.17 doesn't escape the path of its migrations for Alembic's configuration.
    spec = find_spec("mlflow")
    if spec and "%" in str(spec.origin):
        raise ConfigError(
            f"MLflow can't open a database from a folder with a per cent sign, {spec.origin}: move "
            "the environment, for uv by the variable UV_PROJECT_ENVIRONMENT."
        )


def _make_sqlite(uri: str, file: Path, location: str | None) -> None:
    """Create an embedded store, complete before another process can see it.

    MLflow makes one on first use too, but two processes that start at once would get in each
    other's way.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in _mlflow.engines():
        if engine.url.database == str(file):  # somebody has removed the store meanwhile
            engine.dispose()
    logger.info("Creating the embedded MLflow store %s", uri)
    draft = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
    except OSError as error:  # MLflow would try for two minutes
        what = f"{file} can't be made ({error.strerror}): make its folder writable, or name another"
        raise SettingError(ADDRESS, what) from error
    try:
        with _quiet("alembic"):
            # MLflow's experiment "Default" comes with it: its artifacts go where the others go.
            store = SqlAlchemyStore(sqlite_uri(draft), location)
        store.engine.dispose()
        try:
            # Unlike a renaming, a link never replaces the store that another process has made.
            os.link(draft, file)
        except FileExistsError:
            logger.info("Another process has made the store meanwhile")
        except OSError:  # a file system without links
            if not file.exists():
                draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _read_or_make(uri: str, location: str | None) -> Schema:
    """Read the version of a database's tables, and make them in one that is empty."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import text

    with connect(uri) as connection:
        schema = schema_of(connection, uri)
        if schema.version is None:
            logger.info("Making MLflow's tables in the database")
            if connection.dialect.name == "postgresql":
                # Held until this connection ends: another process waits, then finds the tables.
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MAKING_TABLES})
            with _quiet("alembic"):
                SqlAlchemyStore(uri, location or "mlartifacts")
        return schema


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide messages of a logger below a warning, such as a line for each of forty migrations."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        yield
    finally:
        noisy.setLevel(level)


@lru_cache
def part_when_forked() -> None:
    """Make a forked worker open connections of its own, instead of using its parent's.

    Two processes on one connection take each other's answers, or wait for ever.
    """
    inherited: list[Pool] = []  # for good: what is collected would be closed

    def part() -> None:
        for engine in _mlflow.engines():
            inherited.append(engine.pool)
            engine.dispose(close=False)

    if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
        os.register_at_fork(after_in_child=part)
