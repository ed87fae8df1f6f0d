"""Where runs are kept: the server, an embedded store made on first use, the experiment.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from uuid import uuid4

from . import _mlflow, credentials
from .loading import ANNOUNCED, is_database, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from sqlalchemy.pool import Pool

    from .config import ExperimentOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """Where runs (`tracking_uri`) and registered models (`registry_uri`) are kept.

    `replayed_to` is the server that runs of a store on disk are replayed to.
    """

    tracking_uri: str
    registry_uri: str
    replayed_to: str = ""

    @classmethod
    def in_use(cls) -> Server:
        """Give the server that `mlflow.…` in this process is pointed at."""
        import mlflow

        return cls(mlflow.get_tracking_uri(), mlflow.get_registry_uri())

    @property
    def client(self) -> MlflowClient:
        """The MLflow client for this server."""
        return _client(self.tracking_uri, self.registry_uri)

    @property
    def client_of_start(self) -> MlflowClient:
        """The client for what is asked first, which doesn't wait long for a server that is away."""
        from .contact import URI_SCHEME, is_patient, register

        if is_patient(self.tracking_uri):
            return self.client
        register()
        return _client(f"{URI_SCHEME}:{self.tracking_uri}", self.registry_uri)

    def use(self) -> None:
        """Point `mlflow.…` in this process at this server, without a request.

        The environment stays as it is: another project in this process must not take this
        project's server for one that the user has chosen.
        """
        import mlflow

        names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        with _using:
            before = {name: os.environ.get(name) for name in names}
            if mlflow.get_tracking_uri() != self.tracking_uri:
                mlflow.set_tracking_uri(self.tracking_uri)
            if mlflow.get_registry_uri() != self.registry_uri:
                mlflow.set_registry_uri(self.registry_uri)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


# Two threads that use a server at once must not take each other's URI for the user's.
_using = threading.Lock()


@lru_cache
def _client(tracking_uri: str, registry_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    if is_database(tracking_uri) or is_database(registry_uri):
        part_when_forked()
    return MlflowClient(tracking_uri, registry_uri)


@lru_cache
def part_when_forked() -> None:
    """Let a forked worker open connections of its own, instead of talking on its parent's.

    Two processes on one connection take each other's answers, or wait for ever.
    """
    inherited: list[Pool] = []  # for good: what is collected would be closed

    def part() -> None:
        for engine in _mlflow.engines():
            inherited.append(engine.pool)
            engine.dispose(close=False)

    if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
        os.register_at_fork(after_in_child=part)


class SettingError(Exception):
    """A setting that the server shows to be wrong: the key in `mlflow.yml`, and what is right."""

    def __init__(self, key: tuple[str, ...], what: str) -> None:
        super().__init__(what)
        self.key = key


def set_up(server: Server, options: ExperimentOptions, variables: Mapping[str, str]) -> None:
    """Point `mlflow.…` in this process at the project's server and experiment, for good.

    The experiment is made, or restored, when there is none.
    """
    import mlflow

    credentials.export("set_up", variables)
    server.use()
    mlflow.set_experiment(experiment_id=experiment_of(server, options).experiment_id)


def experiment_of(server: Server, options: ExperimentOptions) -> Experiment:
    """Give the experiment that runs belong to; make or restore it when need be."""
    open_server(server, options)
    return server.client.get_experiment(experiment_id(server, options))


def announce(server: Server, options: ExperimentOptions) -> None:
    """Let MLflow find the project's server and experiment when somebody uses it.

    For notebooks. Environment variables do this without importing MLflow and without a request.
    """
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow refuses an id and a name that differ
    os.environ.update(
        MLFLOW_TRACKING_URI=server.tracking_uri,
        MLFLOW_REGISTRY_URI=server.registry_uri,
        MLFLOW_EXPERIMENT_NAME=options.name or "",
        **{ANNOUNCED: server.tracking_uri},
    )
    _mlflow.export_artifact_root(options.create_experiment_kwargs.artifact_location)
    if "mlflow" in sys.modules:
        _mlflow.set_active_experiment(None)  # that of another project
        server.use()


def open_server(server: Server, experiment: ExperimentOptions) -> None:
    """See to it that runs can be opened: an embedded store is made when there is none."""
    prepare(server.tracking_uri, experiment.create_experiment_kwargs.artifact_location)


def prepare(uri: str, location: str | None) -> None:
    """Make an embedded store that doesn't exist yet, whole before anybody can see it.

    MLflow makes one on first use too, but where two processes start at once each meets the
    other's half-made tables.

    Args:
        uri: Where runs are kept.
        location: Where the files go.
    """
    file = sqlite_file(uri)
    if file is None and is_database(uri):
        _prepare_database(uri, location)
    if file is None or file.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logger.info("Creating the embedded MLflow store %s", uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        with _quiet("alembic"):
            # MLflow's experiment "Default" comes with it: its artifacts go where the others go.
            store = SqlAlchemyStore(f"sqlite:///{draft.as_posix()}", location)
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


def _prepare_database(uri: str, location: str | None) -> None:
    """Knock at a database, and make the tables in one that is empty.

    MLflow knocks ten times, for more than a minute, at one that refuses the password.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.pool import NullPool

    from .contact import PATIENCE

    # One that doesn't answer is given up as soon as a server is.
    patience = {"connect_timeout": round(PATIENCE)} if _KNOWS_PATIENCE.match(uri) else {}
    engine = create_engine(uri, poolclass=NullPool, connect_args=patience)
    with engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            return
        logger.info("Making MLflow's tables in the database")
        if connection.dialect.name == "postgresql":
            # Held until this connection ends: another process waits, and then finds the tables.
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MAKING_TABLES})
        with _quiet("alembic"):
            SqlAlchemyStore(uri, location or "mlartifacts")


# Databases whose drivers take this argument.
_KNOWS_PATIENCE = re.compile("postgresql|mysql")

# Any number that other programs are unlikely to lock in the same database.
_MAKING_TABLES = 0x6D6C666C6F77


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide what a logger tells below a warning, such as a line for each of forty migrations."""
    noisy = logging.getLogger(name)
    before = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        yield
    finally:
        noisy.setLevel(before)


def experiment_id(server: Server, options: ExperimentOptions) -> str:
    """Find the experiment that runs belong to; make or restore it when need be.

    Raises:
        SettingError: When it is deleted and `restore_if_deleted` is false.
    """
    from mlflow.exceptions import MlflowException

    name = options.name or "Default"
    found: Experiment | None = server.client_of_start.get_experiment_by_name(name)
    if found is None:
        try:
            return server.client.create_experiment(
                name,
                artifact_location=options.create_experiment_kwargs.artifact_location,
                tags=options.create_experiment_kwargs.tags,
            )
        except MlflowException as error:
            # Another process has made it since.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = server.client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        if not options.restore_if_deleted:
            what = f"the experiment {name!r} is deleted; expected true, or another name, got False"
            raise SettingError(("tracking", "experiment", "restore_if_deleted"), what)
        server.client.restore_experiment(found.experiment_id)
    return found.experiment_id
