"""Look at the store of a project without creating or changing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..binding import secrets_of
from ..config.errors import ADDRESS, SettingError
from ..config.loading import mistake
from ..config.uris import is_database, shown_uri, sqlite_file
from ..stores.errors import translate_server_errors

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext

    from ..stores.project import MlflowConfig

# For commands that only look: MLflow by itself asks a server that is away for four minutes.
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "4",
    "AWS_MAX_ATTEMPTS": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Schema:
    """The version of a database's tables: of its own, None without any, and of this MLflow.

    `advice` says what to do where they differ.
    """

    version: str | None
    wanted: str
    advice: str


def read_schema(uri: str) -> Schema:
    """Read the version of a database's tables.

    MLflow's own stores create or change tables as soon as they are opened, which this doesn't.
    """
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    migrations = ScriptDirectory(str(Path(str(db_migrations.__file__)).parent))
    file, version = sqlite_file(uri), None
    if file is None or file.exists():
        with create_engine(uri, poolclass=NullPool).connect() as connection:
            version = MigrationContext.configure(connection).get_current_revision()
    where = f"the tables of {shown_uri(uri)} are those of"
    if version in {script.revision for script in migrations.walk_revisions()}:
        advice = (
            f"{where} an older MLflow: back the database up, then run "
            f"`mlflow db upgrade {shown_uri(uri)}`"
        )
    else:
        advice = f"{where} a newer MLflow: update mlflow in this project"
    return Schema(version, str(migrations.get_current_head()), advice)


def exists(uri: str) -> bool:
    """Check whether there is a store with tables, or a server to ask.

    Raises:
        SettingError: When the tables are not those of the MLflow that is installed.
    """
    if uri.startswith("file:"):
        return local_path(uri).is_dir()
    if not is_database(uri):
        return True
    schema = read_schema(uri)
    if schema.version not in (None, schema.wanted):
        raise SettingError(ADDRESS, schema.advice)
    return schema.version is not None


def local_path(uri: str) -> Path:
    """Return the path of a `file:` URI."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(local_file_uri_to_path(uri))


@contextmanager
def with_explained_errors(context: KedroContext, variables: Mapping[str, str]) -> Iterator[None]:
    """Raise what a server refuses in a `with` block as the sentence that a run would end with.

    Args:
        context: The project's.
        variables: The environment variables that `server.credentials` names.

    Raises:
        ConfigError: For what the configuration or the server shows to be wrong.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    try:
        with translate_server_errors(config.server.connection, variables):
            yield
    except SettingError as error:
        raise mistake(context, error.key, secrets_of(context).hide_in(str(error))) from error
