"""The server that keeps the runs: its client, the first request to it, the experiment.

MLflow is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime  # from Python 3.11 on the built-in one
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from .. import state
from ..config.errors import ADDRESS, SettingError
from ..config.uris import is_database, is_databricks, is_http, shown_uri
from . import credentials
from .embedded import part_when_forked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from mlflow.store.entities import PagedList
    from requests import Response

    from ..config.keys import ExperimentOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The first request to a server is answered, to the last byte, within so many seconds, or the server
# is away: MLflow by itself tries eight times, which takes four minutes.
FIRST_ANSWER_TIMEOUT = 9
CONNECT_TIMEOUT = 3  # for each address of its name


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
        """Return the server that `mlflow.…` in this process is pointed at."""
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
        # Two threads that do this at once must not take each other's URI for the user's.
        with state.current().lock:
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


@lru_cache
def _client(tracking_uri: str, registry_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    if is_database(tracking_uri) or is_database(registry_uri):
        part_when_forked()
    return MlflowClient(tracking_uri, registry_uri)


def ask_first(uri: str, path: str, **params: str) -> Any:
    """Return what a server says to the first request to it, as `first_answer` makes it.

    Raises:
        MlflowException: When there is no answer, or not the one that is asked for.
    """
    endpoint = f"/api/2.0/mlflow/{path}"
    return checked(first_answer(uri, endpoint, FIRST_ANSWER_TIMEOUT, **params), endpoint).json()


def first_answer(uri: str, endpoint: str, seconds: float, **params: str) -> Response:
    """Return the answer to a request that is sent once, if all of it comes within so many seconds.

    Where the user has set `MLFLOW_HTTP_REQUEST_MAX_RETRIES` or `MLFLOW_HTTP_REQUEST_TIMEOUT`, these
    hold instead.

    Raises:
        MlflowException: When there is no answer in time.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request
    from requests.exceptions import ReadTimeout

    ask: Callable[..., Response] = partial(
        http_request,
        get_default_host_creds(uri),
        endpoint,
        "GET",
        params=params,
        raise_on_status=False,
    )
    chosen = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    if any(credentials.original(name) is not None for name in chosen):
        return ask()
    ask = partial(ask, max_retries=0, timeout=(CONNECT_TIMEOUT, seconds))
    answer: Future[Response] = Future()
    context = copy_context()  # has MLflow's workspace

    def wait() -> None:
        try:
            answer.set_result(context.run(ask))
        except BaseException as error:  # is raised in the thread that waits for the answer
            answer.set_exception(error)

    # A time-out is one for each read: that of a server which sends a byte now and then never ends.
    Thread(target=wait, daemon=True).start()
    try:
        return answer.result(seconds)
    except NotInTime:
        too_late = ReadTimeout(f"no whole answer within {seconds} seconds")
        raise MlflowException(str(too_late)) from too_late


def checked(answer: Response, endpoint: str) -> Response:
    """Return a server's answer, if it isn't an error.

    Raises:
        MlflowException: When it is, or is from where only a GET is redirected to; its cause has the
            status, also of another server's answer.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.rest_utils import verify_rest_response
    from requests.exceptions import HTTPError

    try:
        if any(redirect.status_code in (301, 302, 303) for redirect in answer.history):
            raise MlflowException("redirected, and what a request writes would be lost on the way")
        verify_rest_response(answer, endpoint)
    except MlflowException as error:
        raise error from HTTPError(response=answer)
    return answer


def find_run(server: Server, run_id: str) -> Run:
    """Return a run, with the first request to a server.

    Raises:
        MlflowException: When there is no such run, or no answer.
    """
    if is_http(server.tracking_uri):
        ask_first(server.tracking_uri, "runs/get", run_id=run_id)
    return server.client.get_run(run_id)


def _find_experiment(server: Server, name: str) -> Experiment | None:
    """Return an experiment, with the first request to a server; None when there is none."""
    from mlflow.entities import Experiment
    from mlflow.exceptions import MlflowException

    if not is_http(server.tracking_uri):
        return server.client.get_experiment_by_name(name)
    try:
        answer = ask_first(server.tracking_uri, "experiments/get-by-name", experiment_name=name)
        entry = answer["experiment"]
        location, stage = entry.get("artifact_location"), entry.get("lifecycle_stage", "active")
        return Experiment(entry["experiment_id"], name, location, stage)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    except KeyError as error:
        what = "answered, but not as an MLflow server does: correct the address"
        raise SettingError(ADDRESS, f"{shown_uri(server.tracking_uri)} {what}") from error


def experiment_name(server: Server, options: ExperimentOptions) -> str:
    """Return the name of the experiment that runs belong to.

    Raises:
        SettingError: When it can't be one on Databricks, whose experiments have paths for names.
    """
    name, uri = options.name or "Default", server.replayed_to or server.tracking_uri
    if is_databricks(uri) and not name.startswith("/"):
        what = (
            f"expected a path in the workspace, such as '/Shared/{name}' or '/Users/<you>/{name}'"
        )
        raise SettingError(("tracking", "experiment", "name"), f"{what}, got {name!r}")
    return name


def experiment_id(server: Server, options: ExperimentOptions) -> str:
    """Return the id of the experiment that runs belong to; make or restore it when need be.

    Raises:
        SettingError: When it is deleted and `restore_if_deleted` is false, or can't have its name.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name(server, options)
    experiment = _find_experiment(server, name)
    if experiment is None:
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
            experiment = server.client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        if not options.restore_if_deleted:
            what = f"the experiment {name!r} is deleted; expected true, or another name, got False"
            raise SettingError(("tracking", "experiment", "restore_if_deleted"), what)
        server.client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def lack_of_models(server: Server) -> SettingError | None:
    """Return the error for a server that is older than the models of this MLflow, if it is.

    Makes one request, for pipelines that log models: else they would fail when all has run.
    """
    from mlflow.exceptions import MlflowException

    uri = server.tracking_uri
    if not is_http(uri):
        return None
    try:
        answer = first_answer(uri, "/version", 5)
    except MlflowException as error:
        logger.info("The server doesn't tell its version: %s", error)
        return None
    old_version = re.fullmatch(r"[012]\.\d+\.\S+", answer.text.strip())
    if answer.status_code != 200 or old_version is None:
        return None
    return SettingError(
        ADDRESS,
        f"{shown_uri(uri)} is an MLflow server of version {old_version[0]}, which can't keep "
        f"models of MLflow {version('mlflow')}: update it to 3.0 or newer, or take the models out "
        "of the pipeline",
    )


def all_results(search: Callable[..., PagedList[T]], *args: Any, **kwargs: Any) -> Iterator[T]:
    """Return all that a search of MLflow's client finds, page after page."""
    token = None
    while True:
        page = search(*args, page_token=token, **kwargs)
        yield from page
        token = page.token
        if not token:
            return
