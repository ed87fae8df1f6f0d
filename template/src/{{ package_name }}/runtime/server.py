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
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from . import _mlflow, credentials
from .loading import ANNOUNCED, is_database, is_http, shown_uri, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from requests import Response
    from sqlalchemy.pool import Pool

    from .config import ExperimentOptions

logger = logging.getLogger(__name__)

# What a server is asked first is answered within so many seconds, or it is away: by itself MLflow
# asks eight times, which takes four minutes.
PATIENCE = 9
CONNECTING = 3  # to each address of its name


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


# The key of mlflow.yml that says where runs are.
ADDRESS = ("server", "mlflow_tracking_uri")


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
    for engine in _mlflow.engines():
        if engine.url.database == str(file):  # somebody has removed the store meanwhile
            engine.dispose()
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

    # One that doesn't answer is given up as soon as a server is.
    patience = {"connect_timeout": PATIENCE} if _KNOWS_PATIENCE.match(uri) else {}
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


def ask_first(uri: str, path: str, **params: str) -> Any:
    """Return what a server answers to the first question, which is asked once and not for long.

    Where the user has set `MLFLOW_HTTP_REQUEST_MAX_RETRIES` or `MLFLOW_HTTP_REQUEST_TIMEOUT` these
    say how often, and for how long.

    Raises:
        MlflowException: When there is no answer, or not the one that is asked for.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    endpoint = f"/api/2.0/mlflow/{path}"
    chosen = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    is_chosen = any(credentials.original(name) is not None for name in chosen)
    once = {} if is_chosen else {"max_retries": 0, "timeout": (CONNECTING, PATIENCE)}
    answer = http_request(
        get_default_host_creds(uri), endpoint, "GET", params=params, raise_on_status=False, **once
    )
    return checked(answer, endpoint).json()


def checked(answer: Response, endpoint: str) -> Response:
    """Return an answer that is a good one.

    Raises:
        MlflowException: For any other; its cause has the headers, which say who has answered.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.rest_utils import verify_rest_response
    from requests.exceptions import HTTPError

    try:
        verify_rest_response(answer, endpoint)
    except MlflowException as error:
        raise error from HTTPError(response=answer)
    return answer


def find_run(server: Server, run_id: str) -> Run:
    """Return a run, as the first that a server is asked for.

    Raises:
        MlflowException: When there is no such run, or no answer.
    """
    if is_http(server.tracking_uri):
        ask_first(server.tracking_uri, "runs/get", run_id=run_id)
    return server.client.get_run(run_id)


def _find_experiment(server: Server, name: str) -> Experiment | None:
    """Return an experiment, as the first that a server is asked for; None when there is none."""
    from mlflow.entities import Experiment
    from mlflow.exceptions import MlflowException

    if not is_http(server.tracking_uri):
        return server.client.get_experiment_by_name(name)
    try:
        answer = ask_first(server.tracking_uri, "experiments/get-by-name", experiment_name=name)
        found = answer["experiment"]
        place, stage = found.get("artifact_location"), found.get("lifecycle_stage", "active")
        return Experiment(found["experiment_id"], name, place, stage)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    except KeyError as error:
        what = "answered, but not as an MLflow server does: correct the address"
        raise SettingError(ADDRESS, f"{shown_uri(server.tracking_uri)} {what}") from error


def experiment_id(server: Server, options: ExperimentOptions) -> str:
    """Find the experiment that runs belong to; make or restore it when need be.

    Raises:
        SettingError: When it is deleted and `restore_if_deleted` is false.
    """
    from mlflow.exceptions import MlflowException

    name = options.name or "Default"
    found = _find_experiment(server, name)
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


def lack_of_models(server: Server) -> SettingError | None:
    """Return what to tell of a server that is older than the models of this MLflow.

    One request, for pipelines that log models: else they would fail when all has run.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    uri = server.tracking_uri
    if not is_http(uri):
        return None
    try:
        answer = http_request(
            get_default_host_creds(uri), "/version", "GET", max_retries=0, timeout=5
        )
    except MlflowException as error:
        logger.info("The server doesn't tell its version: %s", error)
        return None
    found = re.fullmatch(r"([012])\.\d+\.\S+", answer.text.strip())
    if answer.status_code != 200 or found is None:
        return None
    return SettingError(
        ADDRESS,
        f"{shown_uri(uri)} is an MLflow server of version {found[0]}, which can't keep models of "
        f"MLflow {version('mlflow')}: update it to 3.0 or newer, or take the models out of the "
        "pipeline",
    )
