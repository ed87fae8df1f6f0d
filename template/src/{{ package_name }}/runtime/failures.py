"""What goes wrong between a run and where it is kept, each told in one sentence.

The clients of servers, databases and storages raise errors of many kinds, which are read here and
nowhere else. What isn't known here stays as it was raised.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from socket import gaierror
from typing import TYPE_CHECKING, Any, NamedTuple

from kedro.io import DatasetError

from .contact import NoAnswerError, causes_of
from .loading import ConfigError, is_database, shown_uri, uri_of_environment
from .server import SettingError

if TYPE_CHECKING:
    from .server import Server

logger = logging.getLogger(__name__)

ADDRESS = ("server", "mlflow_tracking_uri")
CREDENTIALS = ("server", "credentials")
PROVIDER = ("server", "request_header_provider")

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN = "MLFLOW_TRACKING_TOKEN"
CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"

# Where credentials are: mlflow.yml names an entry of credentials.yml.
ENTRY = "the entry of credentials.yml that server.credentials names"


class ArtifactError(ConfigError):
    """Artifacts can't be stored: one sentence, for `kedro` to print instead of a traceback."""


# How each such sentence begins.
_NOT_STORED = "Artifacts can't be stored in"


def told(error: BaseException) -> ArtifactError | None:
    """Give the sentence that an error of Kedro is about, if there is one."""
    if found := _first(_causes(error), ArtifactError):
        return ArtifactError(found.message)
    # Kedro puts the dataset's name before it; on its way from a worker it has lost its cause.
    found = isinstance(error, DatasetError) and re.search(f"{_NOT_STORED}.*", str(error), re.DOTALL)
    return ArtifactError(found[0]) if found else None


class _Storage(NamedTuple):
    """What a kind of storage needs: a package to install, and environment variables."""

    package: str
    variables: str


_S3 = _Storage("boto3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL")
_AZURE = _Storage("azure-storage-blob", "AZURE_STORAGE_CONNECTION_STRING")
_STORAGES = {
    "s3": _S3,
    "gs": _Storage("google-cloud-storage", "GOOGLE_APPLICATION_CREDENTIALS"),
    "wasb": _AZURE,
    "wasbs": _AZURE,
    "abfss": _Storage("azure-storage-file-datalake", "AZURE_STORAGE_CONNECTION_STRING"),
}

# The packages whose errors a storage raises.
_STORAGE_CLIENTS = {"boto3", "botocore", "google", "azure"}

# The package to install for a module that a database's URI asks for.
_DRIVERS = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
}


@contextmanager
def told_of_server(server: Server, variables: Mapping[str, str]) -> Iterator[None]:
    """Turn what a server or database refuses into the setting to change.

    Args:
        server: Where the run was to be opened.
        variables: The environment variables that `server.credentials` names.

    Raises:
        SettingError: For what is known; another error stays as it is.
    """
    try:
        yield
    except (ConfigError, SettingError):
        raise
    except Exception as error:  # each kind of store has errors of its own
        where = shown_uri(server.tracking_uri)
        if uri_of_environment() == server.tracking_uri:
            where = f"{where} (of MLFLOW_TRACKING_URI)"
        if is_database(server.tracking_uri):
            told = _of_database(error, where)
        else:
            told = _of_server(error, where, variables)
        if told is None:
            raise
        raise told from error


@contextmanager
def told_of_artifacts(place: str, server: Server) -> Iterator[None]:
    """Turn what the storage of a run's artifacts refuses into one sentence.

    Args:
        place: URI of the run's artifacts.
        server: Where the run is.

    Raises:
        ArtifactError: For what is known; another error stays as it is.
    """
    try:
        yield
    except Exception as error:  # each kind of storage has errors of its own
        told = of_artifacts(error, place, server)
        if told is None:
            raise
        raise ArtifactError(told) from error


# What a server answers when it won't ever take a request: to ask it again later doesn't help.
_REFUSALS = {
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


def is_refusal(error: BaseException) -> bool:
    """Tell whether MLflow has read a request and won't do it, rather than being away."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or _status(error):
        return False
    return error.error_code in _REFUSALS


def reason_of(error: BaseException) -> str:
    """Say in a few words why a server or a storage can't be used."""
    from requests.exceptions import HTTPError, RequestException, RetryError, Timeout

    causes = _causes(error)
    if asked := _first(causes, NoAnswerError):
        return f"{reason_of(asked.__cause__)}; {asked}" if asked.__cause__ else str(asked)
    if _first(causes, ConnectionRefusedError):
        return "connection refused"
    if _first(causes, gaierror):
        return "its name isn't known"
    if problem := _first(causes, ssl.SSLError):
        return f"no connection over TLS: {_in_short(str(problem))}"
    if _first(causes, Timeout, TimeoutError):
        return "no answer in time"
    if retried := _first(causes, RetryError):
        found = re.search(r"too many (\d+) error responses", str(retried))
        return f"it answered {found[1]}" if found else _in_short(str(retried))
    answered = _first(causes, HTTPError)
    if answered and answered.response is not None:
        return f"it answered {answered.response.status_code}"
    message = getattr(error, "message", None) or str(error)
    if found := re.search(r"failed with error code (\d{3})", message):
        return f"it answered {found[1]}"
    if _first(causes, RequestException):
        return "the connection was closed"
    return _in_short(shown_uri(message))


def _causes(error: BaseException) -> list[BaseException]:
    return list(causes_of(error))


def _first(causes: list[BaseException], *kinds: type[BaseException]) -> Any:
    return next((cause for cause in causes if isinstance(cause, kinds)), None)


def _of_server(error: Exception, where: str, variables: Mapping[str, str]) -> SettingError | None:
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    causes = _causes(error)
    if told := _of_encryption(causes, where, variables):
        return told
    asked = _first(causes, NoAnswerError)
    tried = f" ({asked.asked})" if asked else ""
    if asked and asked.status:
        what = f"answered {asked.status}: see the server's log, or try again later{tried}"
        return SettingError(ADDRESS, f"{where} {what}")
    if _first(causes, RequestException):
        return SettingError(ADDRESS, f"{_of_connection(causes, where)}{tried}")
    answer = _first(causes, MlflowException)
    if answer is None:
        return None
    status = _status(answer)
    if status in (401, 403):
        return _of_login(status, answer, where, variables)
    if status == 404:
        return SettingError(
            ADDRESS,
            f"{where} answered 404 (not found): expected the address of an MLflow server of "
            f"version 3 or newer, with the path that it is served under, if any",
        )
    if "not in a valid JSON format" in answer.message:
        what = "answered with a page and not as an MLflow server does: correct the address"
        return SettingError(ADDRESS, f"{where} {what}")
    if status or answer.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
        what = f"{_in_short(answer.message)} (see the server's log)"
        return SettingError(ADDRESS, f"{where} answered: {what}")
    return None


def _of_connection(causes: list[BaseException], where: str) -> str:
    """Say why there was no answer, or only one that is worth no second try."""
    from requests.exceptions import RetryError, Timeout

    if _first(causes, ConnectionRefusedError):
        return (
            f"nothing listens at {where} (connection refused): start the server, or correct the "
            "address"
        )
    if _first(causes, gaierror):
        return f"the host of {where} isn't known: correct the address"
    if _first(causes, Timeout, TimeoutError):
        return (
            f"{where} gave no answer in time: correct the address, see whether a firewall is in "
            "between, or raise MLFLOW_HTTP_REQUEST_TIMEOUT"
        )
    if retried := _first(causes, RetryError):
        found = re.search(r"too many (\d+) error responses", str(retried))
        return f"{where} answered {found[1] if found else retried}: see the server's log"
    return (
        f"{where} closed the connection without an answer: correct the address (that of a server "
        "over TLS begins with https://)"
    )


def _of_encryption(
    causes: list[BaseException], where: str, variables: Mapping[str, str]
) -> SettingError | None:
    if any("CA certificate bundle" in str(cause) for cause in causes):
        what = f"there is no file where {CERTIFICATE} says: name the file of the server's CA, in "
        return SettingError(CREDENTIALS, f"{what}{ENTRY}")
    problem = _first(causes, ssl.SSLError)
    if problem is None:
        return None
    if isinstance(problem, ssl.SSLCertVerificationError):
        why = problem.verify_message
        what = f"the certificate of {where} isn't trusted ({why}): "
        if _given(CERTIFICATE, variables):
            what += f"name the file of the CA that has signed it in {CERTIFICATE}, in {ENTRY}"
        else:
            what += f"add {CERTIFICATE} with the file of the CA that has signed it to {ENTRY}"
        return SettingError(CREDENTIALS, what)
    if problem.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        what = f"{where} doesn't speak TLS: expected an address with http://"
        return SettingError(ADDRESS, what)
    if "X509" in str(problem) or "PEM" in str(problem):
        what = f"the file that {CERTIFICATE} names has no certificates (PEM): correct it in {ENTRY}"
        return SettingError(CREDENTIALS, what)
    return SettingError(ADDRESS, f"{where} can't be reached over TLS: {_in_short(str(problem))}")


def _of_login(status: int, answer: Any, where: str, variables: Mapping[str, str]) -> SettingError:
    from .credentials import registered_header_providers

    if "Invalid Host header" in answer.message:
        what = "refuses this name of it: add the name to the server's --allowed-hosts"
        return SettingError(ADDRESS, f"{where} {what}")
    meaning = "not authenticated" if status == 401 else "not allowed"
    asked = f"{where} answered {status} ({meaning})"
    user, password, token = (_given(name, variables) for name in (USER, PASSWORD, TOKEN))
    if user and password:
        return SettingError(
            CREDENTIALS, f"{asked} to {USER} and {PASSWORD}: correct them in {ENTRY}"
        )
    if user or password:
        missing = PASSWORD if user else USER
        return SettingError(CREDENTIALS, f"{asked}, and {missing} is missing: add it to {ENTRY}")
    if token:
        return SettingError(CREDENTIALS, f"{asked} to {TOKEN}: correct it in {ENTRY}")
    if providers := registered_header_providers():
        what = f"{asked} to the headers of {' and '.join(providers)}: see that they have a token "
        return SettingError(PROVIDER, f"{what}that holds")
    what = f"{asked}, and no user or token was sent: add {USER} and {PASSWORD}, or {TOKEN}, to an "
    return SettingError(
        CREDENTIALS, f"{what}entry of credentials.yml, and name the entry in server.credentials"
    )


def _of_database(error: Exception, where: str) -> SettingError | None:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import ArgumentError, DBAPIError

    causes = _causes(error)
    if missing := _first(causes, ModuleNotFoundError):
        package = _DRIVERS.get(missing.name, missing.name)
        what = f"{where} needs a package that isn't installed: uv add '{package}'"
        return SettingError(ADDRESS, what)
    if wrong := _first(causes, ArgumentError):
        return SettingError(ADDRESS, f"{where} can't be read: {_in_short(str(wrong))}")
    if refused := _first(causes, DBAPIError):
        # The last line says why; before it stands the address, which is told already.
        lines = [line.strip() for line in str(refused.orig).splitlines() if line.strip()]
        fatal = [line for line in lines if "FATAL:" in line] or lines or [str(refused.orig)]
        said = _in_short(re.sub(r"^.*\bfailed: ", "", fatal[0]))
        if re.search(r"password|authentication|role .* does not exist|pg_hba", said):
            what = f"correct the user in the address, and PGPASSWORD in {ENTRY}"
            return SettingError(CREDENTIALS, f"{where} refuses the login ({said}): {what}")
        if re.search(r"database .* does not exist", said):
            what = "create the database, or correct its name in the address"
            return SettingError(ADDRESS, f"{where} isn't there ({said}): {what}")
        what = "start the database, or correct the address"
        if where.startswith("sqlite"):
            what = "see to the file and its folder, or name another"
        return SettingError(ADDRESS, f"{where} can't be used ({said}): {what}")
    if answer := _first(causes, MlflowException):
        return SettingError(ADDRESS, f"{where}: {_in_short(answer.message)}")
    return None


def of_artifacts(error: BaseException, place: str, server: Server) -> str | None:
    """Say why artifacts can't be stored and what to change; None for an error of another kind."""
    causes = _causes(error)
    scheme = place.partition(":")[0]
    if scheme == "mlflow-artifacts":
        return _of_proxy(causes, place, shown_uri(server.tracking_uri))
    storage = _STORAGES.get(scheme)
    if storage is None:
        return None
    where = f"{_NOT_STORED} {place}"
    if missing := _first(causes, ModuleNotFoundError):
        if missing.name and missing.name.partition(".")[0] in _STORAGE_CLIENTS:
            return f"{where}: a package isn't installed: uv add {storage.package}"
        return None
    ours = [c for c in causes if type(c).__module__.partition(".")[0] in _STORAGE_CLIENTS]
    if not ours:
        return None
    innermost = ours[-1]
    said = _code(innermost) or _in_short(str(innermost))
    if re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", said):
        bucket = re.sub(r"^\w+://", "", place).partition("/")[0]
        return (
            f"{where}: there is no bucket {bucket!r} ({said}). Create it or correct "
            f"MLFLOW_S3_ENDPOINT_URL in {ENTRY}; an experiment keeps its place, so for another "
            "bucket name a new one in tracking.experiment, with its "
            "create_experiment_kwargs.artifact_location."
        )
    return f"{where}: {said}. Correct {storage.variables} in {ENTRY}."


def _of_proxy(causes: list[BaseException], place: str, server: str) -> str | None:
    """Say why a server that stores artifacts itself couldn't."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import HTTPError, RetryError

    failed = _first(causes, HTTPError, RetryError)
    if failed is None:
        answer = _first(causes, MlflowException)
        if answer is None or "/mlflow-artifacts/" not in answer.message:
            return None
        failed = answer
    response = getattr(failed, "response", None)
    found = re.search(r"too many (\d+) error|^(\d+) ", str(failed))
    status = response.status_code if response is not None else found and (found[1] or found[2])
    where = f"{_NOT_STORED} {place} of {server}"
    did = f"answered {status}" if status else "closed the connection"
    if str(status) in ("401", "403"):
        return f"{where}: the server answered {status}. See to the permissions, and to {ENTRY}."
    return (
        f"{where}: the server {did}. Its log says why: see to its "
        "--artifacts-destination, and to the bucket and the keys that the server has for it."
    )


def lack_of_models(server: Server) -> SettingError | None:
    """Say that a server is older than the models of this MLflow, which it can't log then.

    One request, for pipelines that log models: else they would fail when all has run.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if not server.tracking_uri.startswith(("http://", "https://")):
        return None
    try:
        answer = http_request(
            get_default_host_creds(server.tracking_uri), "/version", "GET", max_retries=0, timeout=5
        )
    except MlflowException as error:
        logger.info("The server doesn't tell its version: %s", error)
        return None
    found = re.fullmatch(r"([012])\.\d+\.\S+", answer.text.strip())
    if answer.status_code != 200 or found is None:
        return None
    return SettingError(
        ADDRESS,
        f"{shown_uri(server.tracking_uri)} is an MLflow server of version {found[0]}, which can't "
        f"keep models of MLflow {version('mlflow')}: update it to 3.0 or newer, or take the models "
        "out of the pipeline",
    )


def _status(answer: Any) -> int:
    """Tell the status of an answer that wasn't one of MLflow's; 0 when it was."""
    found = re.search(r"failed with error code (\d{3})", answer.message)
    if found:
        return int(found[1])
    codes = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}
    return codes.get(answer.error_code, 0)


def _code(error: Any) -> str:
    """Give what S3 calls an error, such as `NoSuchBucket`; nothing for other storages."""
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) else ""


def _given(name: str, variables: Mapping[str, str]) -> bool:
    return bool(variables.get(name) or os.environ.get(name))


def _in_short(text: str) -> str:
    """Give the first line of a text, without what follows 200 characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= 200 else f"{line[:199]}…"


def is_away(error: BaseException) -> bool:
    """Check whether an error means that a server can't be reached now."""
    from requests import exceptions
    from sqlalchemy.exc import InterfaceError, OperationalError

    causes = _causes(error)
    kinds = (exceptions.ConnectionError, exceptions.Timeout, OperationalError, InterfaceError)
    if _first(causes, NoAnswerError, *kinds, ConnectionError, TimeoutError):
        return True
    found = re.search(r"error code (\d{3})", str(error))
    return bool(found and (int(found[1]) == 401 or int(found[1]) >= 500)) or bool(
        (e := _first(causes, exceptions.HTTPError)) is not None
        and e.response is not None
        and (e.response.status_code == 401 or e.response.status_code >= 500)
    )
