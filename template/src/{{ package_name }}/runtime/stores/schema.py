"""The version of a database's tables, and what is done where it isn't that of this MLflow.

MLflow and SQLAlchemy are imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.errors import ADDRESS, SettingError
from ..config.uris import shown_uri, sqlite_file

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

logger = logging.getLogger(__name__)

# How many seconds a database has to answer, as the argument of its driver. A SQLite file that is
# locked is waited for as long as MLflow does.
_TIMEOUTS = {
    "postgresql": {"connect_timeout": 9},
    "mysql": {"connect_timeout": 9},
    "sqlite": {"timeout": 20},
}

# How long a process waits for another one that migrates the same database, in seconds.
LOCK_TIMEOUT = 120.0


@dataclass(frozen=True)
class Schema:
    """The version of a database's tables: of its own, None without any, and of this MLflow.

    `advice` says what to do where they differ; `is_older` whether MLflow can migrate the tables.
    """

    version: str | None
    wanted: str
    advice: str = ""
    is_older: bool = False

    @property
    def fits(self) -> bool:
        """Check whether this MLflow can use the tables, or make them."""
        return self.version in (None, self.wanted)


def read_schema(uri: str) -> Schema:
    """Read the version of a database's tables.

    MLflow's own stores create or change tables as soon as they are opened, which this doesn't.
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        return Schema(None, "")
    with connect(uri) as connection:
        return schema_of(connection, uri)


def connect(uri: str) -> Connection:
    """Connect to a database once.

    MLflow would try ten times, for nearly two minutes, where the password is refused.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    kind = uri.split(":", 1)[0].split("+", 1)[0]
    is_chosen = kind == "postgresql" and "PGCONNECT_TIMEOUT" in os.environ
    arguments = {} if is_chosen else _TIMEOUTS.get(kind, {})
    return create_engine(uri, poolclass=NullPool, connect_args=arguments).connect()


def schema_of(connection: Connection, uri: str) -> Schema:
    """Read the version of the tables of a database that is connected to."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    migrations = ScriptDirectory(str(Path(str(db_migrations.__file__)).parent))
    found, wanted = (
        MigrationContext.configure(connection).get_current_revision(),
        str(migrations.get_current_head()),
    )
    if found in (None, wanted):
        return Schema(found, wanted)
    where = f"the tables of {shown_uri(uri)} are those of"
    if found in {script.revision for script in migrations.walk_revisions()}:
        advice = (
            f"{where} an older MLflow than {version('mlflow')}: back the database up, then run "
            f"`mlflow db upgrade {shown_uri(uri)}`"
        )
        return Schema(found, wanted, advice, is_older=True)
    advice = f"{where} a newer MLflow than {version('mlflow')}: update mlflow in this project"
    return Schema(found, wanted, advice)


def can_migrate(uri: str, schema: Schema, project_path: Path | None) -> bool:
    """Check whether tables may be migrated unasked: an older MLflow's, in a file of the project."""
    file = sqlite_file(uri)
    if file is None or project_path is None:
        return False
    return schema.is_older and file.resolve().is_relative_to(project_path.resolve())


def check_schema(uri: str, schema: Schema, project_path: Path | None) -> None:
    """Migrate the tables of a project's own SQLite file, after a copy of it was made beside it.

    Args:
        uri: The database.
        schema: What was read of it.
        project_path: The project's folder; a database outside of it is left as it is.

    Raises:
        SettingError: When the tables are not those of this MLflow, and stay so.
    """
    if schema.fits:
        return
    file = sqlite_file(uri)
    if file is None or not can_migrate(uri, schema, project_path):
        raise SettingError(ADDRESS, schema.advice)
    copy = file.with_name(f"{file.name}.before-{schema.wanted}")
    with _lock(file):
        if read_schema(uri).fits:  # another process has done it
            return
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            copy.replace(file)
            errors = re.findall(r"^\S*(?:Error|Exception):? .*$", ended.stderr, re.MULTILINE)
            raise SettingError(
                ADDRESS,
                f"{file}: its tables can't be brought to MLflow {version('mlflow')} "
                f"({errors[-1] if errors else f'status {ended.returncode}'}): it is as it was; "
                "name another database",
            )
    logger.warning(
        "The tables of %s were brought to MLflow %s; as it was before it is in %s",
        file,
        version("mlflow"),
        copy.name,
    )


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Keep other processes from migrating a file: SQLite's lock on one beside it, which stays."""
    path = file.with_name(f"{file.name}.lock")
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield
