"""Errors of servers, databases and storages, each as one sentence.

Their clients raise errors of many kinds, which are read here and nowhere else. What isn't in the
table stays as it was raised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from socket import gaierror
from ssl import SSLCertVerificationError, SSLEOFError, SSLError, SSLZeroReturnError
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from kedro.io import DatasetError

from ..config.errors import ADDRESS, ConfigError, SettingError
from ..config.uris import (
    is_database,
    is_databricks,
    is_http,
    shown_uri,
    uri_of_environment,
    without_login,
)
from .credentials import header_provider_names

if TYPE_CHECKING:
    from .server import Server

CREDENTIALS = ("server", "credentials")
PROVIDER = ("server", "request_header_provider")

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN, CERTIFICATE = "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_SERVER_CERT_PATH"

HOST, HOST_TOKEN = "DATABRICKS_HOST", "DATABRICKS_TOKEN"

# Where credentials are, and how they get there: mlflow.yml names an entry of credentials.yml.
ENTRY = "the entry of credentials.yml that server.credentials names"
TO_ENTRY = "to an entry of credentials.yml, and name the entry in server.credentials"

# Recurring parts of sentences.
ANSWERED = "{where} answered {status} ({meaning})"
NO_ANSWER = "no answer in time"
UNREACHED = (
    "{where} can't be reached ({reason}): start the server, or correct the address (http or "
    "https, host, port)"
)

# The package to install for a module that a database's URI asks for, where their names differ.
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}

# The package to install for each kind of storage, and the variables that open it.
_STORAGES = {
    "s3": ("boto3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL"),
    "gs": ("google-cloud-storage", "GOOGLE_APPLICATION_CREDENTIALS"),
    "wasb": ("azure-storage-blob", "AZURE_STORAGE_CONNECTION_STRING"),
    "wasbs": ("azure-storage-blob", "AZURE_STORAGE_CONNECTION_STRING"),
    "abfss": ("azure-storage-file-datalake", "AZURE_STORAGE_CONNECTION_STRING"),
}

# The packages whose errors are about a storage, and all whose errors are about what they asked.
_STORAGE_CLIENTS = {"boto3", "botocore", "google", "azure"}
_CLIENTS = {"mlflow", "requests", "urllib3", "sqlalchemy", *_STORAGE_CLIENTS}

# Where MLflow and requests write a status into a message.
_STATUS = re.compile(r"(?:too many|failed with error code|Tunnel connection failed:) (\d{3})\b")


class _Failure:
    """The facts of an error, for the predicates and the sentences of the table."""

    def __init__(self, error: BaseException, uri: str, variables: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException, RestException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        causes = causes_of(error)
        self.where = _place(uri)
        self.text = "\n".join(map(str, causes))
        # Databricks' client adds the settings that it has.
        self.message = _message_of(causes).partition(" Config: ")[0].rstrip(".")
        self.reason = reason_of(error)
        self.certificate_error = _first(causes, SSLCertVerificationError)
        self.is_of_database = _first(causes, SQLAlchemyError, MlflowException)
        # An answer, and the code in it when it is MLflow's own.
        self.status = _status(causes)
        self.meaning = "not authenticated" if self.status == 401 else "not allowed"
        self.is_login = self.status in (401, 403)
        self.is_unanswered = not self.status and _first(causes, RequestException)
        answer = _first(causes, RestException)
        self.code = answer.json.get("error_code", "") if answer else ""
        given = {**os.environ, **variables}
        self.sent = " and ".join(n for n in (USER, PASSWORD, TOKEN) if given.get(n))
        self.missing = " and ".join(n for n in (HOST, HOST_TOKEN) if not given.get(n))
        self.profile = uri.partition("://")[2] or given.get("DATABRICKS_CONFIG_PROFILE")
        self.redirect, self.is_moved = _redirect(causes)
        self.providers = " and ".join(header_provider_names())
        missing = _first(causes, ModuleNotFoundError)
        self.package = _DRIVERS.get(missing.name, missing.name) if missing else ""

    def matches(self, pattern: str) -> object:
        return re.search(pattern, self.text)


def _place(uri: str) -> str:
    """Return a URI as sentences name it: with its variable, and the proxy on the way to it."""
    from requests.utils import get_environ_proxies, select_proxy

    shown = shown_uri(uri)  # without a password, which may have what an address may not
    from_environment = " (of MLFLOW_TRACKING_URI)" if uri == uri_of_environment() else ""
    proxy = select_proxy(shown, get_environ_proxies(shown)) if is_http(uri) else None
    through = f" (through the proxy {shown_uri(proxy)}, but for hosts in NO_PROXY)" if proxy else ""
    return f"{shown}{from_environment}{through}"


def _redirect(causes: Sequence[BaseException]) -> tuple[str, bool]:
    """Return the address that a server redirects to, and whether it is that of a server.

    The address has no login and no query, and is empty where the server doesn't redirect.
    """
    from requests.exceptions import HTTPError

    response = getattr(_first(causes, HTTPError), "response", None)
    if response is None or not (response.history or response.is_redirect):
        return "", False
    first = (response.history or [response])[0]
    asked, target = urlsplit(first.url), urlsplit(response.url)
    if not response.history:
        target = urlsplit(urljoin(first.url, response.headers["Location"]))
    is_moved = target.path.endswith(asked.path)
    address = f"{target.scheme}://{target.netloc}{target.path}"
    return without_login(address.removesuffix(asked.path) if is_moved else address), is_moved


class _Row(NamedTuple):
    """A kind of failure, the key of mlflow.yml that it is about, and its sentence.

    A `{name}` in the sentence is an attribute of `_Failure`.
    """

    applies: Callable[[_Failure], object]
    key: tuple[str, ...]
    sentence: str


_REFUSED_LOGIN = "password authentication|no password|pg_hba|role .* does not exist|Access denied"

# Of the rows for a server, and of those for a database, the first one that applies counts.
# fmt: off
_SERVER = (
    _Row(lambda f: f.is_moved, ADDRESS, "{where} redirects to {redirect}: write that address"),
    _Row(lambda f: f.redirect, ADDRESS,
         "{where} redirects to {redirect}, where no MLflow server is: correct the address; a page "
         f"to log in at lets a program in with {TOKEN} in {ENTRY}, or with headers of "
         "server.request_header_provider"),
    _Row(lambda f: f.certificate_error, CREDENTIALS,
         "the certificate of {where} isn't trusted ({message}): name the file of the CA that has "
         f"signed it in {CERTIFICATE}, in {ENTRY}"),
    _Row(lambda f: f.matches(r"CA certificate bundle|\[X509|PEM lib"), CREDENTIALS,
         f"the file that {CERTIFICATE} names is not there or has no certificates (PEM): correct "
         f"it in {ENTRY}"),
    _Row(lambda f: f.is_unanswered and f.reason == NO_ANSWER, ADDRESS,
         f"{UNREACHED}, or raise MLFLOW_HTTP_REQUEST_TIMEOUT"),
    _Row(lambda f: f.is_unanswered, ADDRESS, UNREACHED),
    _Row(lambda f: f.status == 403 and f.matches("Invalid Host header"), ADDRESS,
         "{where} refuses this name of it: add the name to the server's --allowed-hosts"),
    _Row(lambda f: f.is_login and f.sent, CREDENTIALS,
         f"{ANSWERED} to {{sent}}: correct it in {ENTRY}; a server takes {USER} and {PASSWORD}, or "
         f"{TOKEN}"),
    _Row(lambda f: f.is_login and f.providers, PROVIDER,
         f"{ANSWERED} to the headers of {{providers}}: see that they have a token that holds"),
    _Row(lambda f: f.is_login, CREDENTIALS,
         f"{ANSWERED}, and no user or token was sent: add {USER} and {PASSWORD}, or {TOKEN}, "
         f"{TO_ENTRY}"),
    # Of MLflow's own answers only those that say that the server can't.
    _Row(lambda f: f.code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"), ADDRESS,
         "{where} answered: {message} (see the server's log)"),
    _Row(lambda f: f.matches("not in a valid JSON format") or (f.status == 404 and not f.code),
         ADDRESS,
         "{where} doesn't answer as an MLflow server of version 3 or newer: correct the address, "
         "with the path that it is served under, if any"),
    _Row(lambda f: f.status and not f.code, ADDRESS,
         "{where} answered {status}: see the server's log"),
)

_NO_LOGIN = "Reading Databricks credential configuration|cannot configure default credentials"

_DATABRICKS = (
    _Row(lambda f: f.matches(_NO_LOGIN) and f.profile, ADDRESS,
         "there is no login for {where}: the profile {profile!r} of ~/.databrickscfg isn't there, "
         "or has no host and token. Add it by `databricks auth login --profile {profile}`, or name "
         "another"),
    _Row(lambda f: f.matches(_NO_LOGIN) and f.missing, CREDENTIALS,
         f"there is no login for {{where}}: add {{missing}} {TO_ENTRY}; or log in by `databricks "
         "auth login`"),
    _Row(lambda f: f.matches("hostname and credentials configured by"), ADDRESS,
         "there is no login for {where}: outside of the workspace no secrets of it can be read, "
         "and in it they may not be there. Write databricks://<profile>, or databricks"),
    _Row(lambda f: f.matches("no netloc in URI"), ADDRESS,
         "expected databricks or databricks://<profile>, got {where}"),
    _Row(lambda f: f.is_login, CREDENTIALS,
         f"{ANSWERED}: {{message}}. Correct {HOST} and {HOST_TOKEN}, in {ENTRY} or in the profile "
         "of ~/.databrickscfg, or have the right granted"),
    *_SERVER,
)

_DATABASE = (
    _Row(lambda f: f.package, ADDRESS,
         "{where} needs a package that isn't installed: uv add '{package}'"),
    _Row(lambda f: f.is_of_database and f.matches(_REFUSED_LOGIN), CREDENTIALS,
         "{where} refuses the login ({message}): correct the user in the address, and PGPASSWORD "
         f"in {ENTRY}"),
    _Row(lambda f: f.is_of_database and f.matches("database is locked"), ADDRESS,
         "{where} is locked: another program is writing to it, wait for its end"),
    _Row(lambda f: f.is_of_database, ADDRESS,
         "{where} can't be used ({message}): see to the database, or correct the address"),
)
# fmt: on


@contextmanager
def translate_server_errors(server: Server, variables: Mapping[str, str]) -> Iterator[None]:
    """Turn what a server or database refuses into the setting to change.

    Args:
        server: Where the run was to be opened.
        variables: The environment variables that `server.credentials` names.

    Raises:
        SettingError: For what is in the table; another error stays as it is.
    """
    try:
        yield
    except (ConfigError, SettingError):
        raise
    except Exception as error:  # each kind of store has errors of its own
        failure = _Failure(error, server.tracking_uri, variables)
        for row in _rows_of(server.tracking_uri):
            if row.applies(failure):
                raise SettingError(row.key, row.sentence.format_map(vars(failure))) from error
        raise


def _rows_of(uri: str) -> Sequence[_Row]:
    if is_database(uri):
        return _DATABASE
    return _DATABRICKS if is_databricks(uri) else _SERVER


class ArtifactError(ConfigError):
    """Artifacts can't be stored: one sentence, for `kedro` to print instead of a traceback."""


# How each such sentence begins.
_NOT_STORED = "Artifacts can't be stored in"


@contextmanager
def translate_artifact_errors(place: str, server: Server) -> Iterator[None]:
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
        if sentence := artifact_sentence(error, place, server):
            raise ArtifactError(sentence) from error
        raise


def artifact_sentence(error: BaseException, place: str, server: Server) -> str | None:
    """Return why artifacts can't be stored; None where the error isn't about that."""
    from requests.exceptions import HTTPError, RetryError

    causes, scheme = causes_of(error), urlsplit(place).scheme
    if scheme == "mlflow-artifacts":  # the server stores them
        if not (_first(causes, HTTPError, RetryError) or "/mlflow-artifacts/" in str(causes)):
            return None
        status = _status(causes)
        did = f"answered {status}" if status else "closed the connection"
        return (
            f"{_NOT_STORED} {place} of {shown_uri(server.tracking_uri)}: the server {did}. Its log "
            "says why: see to its --artifacts-destination, and to the bucket and the keys that it "
            "has."
        )
    package, variables = _STORAGES.get(scheme, ("", ""))
    missing = _first(causes, ModuleNotFoundError)
    if package and missing and str(missing.name).partition(".")[0] in _STORAGE_CLIENTS:
        return f"{_NOT_STORED} {place}: a package isn't installed: uv add {package}"
    if package and _storage_error(causes):
        return (
            f"{_NOT_STORED} {place}: {_message_of(causes).rstrip('.')}. See to the bucket, and to "
            f"{variables} in {ENTRY}. An experiment keeps its place: for another bucket name a new "
            "one in tracking.experiment."
        )
    return None


def artifact_error_in(error: BaseException) -> ArtifactError | None:
    """Return the sentence on artifacts that an error of Kedro is about, if there is one."""
    if cause := _first(causes_of(error), ArtifactError):
        return ArtifactError(cause.message)
    # Kedro puts the dataset's name before it; on its way from a worker it has lost its cause.
    if isinstance(error, DatasetError):
        sentence = re.search(f"{_NOT_STORED}.*", str(error), re.DOTALL)
        return ArtifactError(sentence[0]) if sentence else None
    return None


def is_away(error: BaseException) -> bool:
    """Check whether an error means that a server, database or storage can't be reached for now.

    That is a connection error, a time-out, an answer of 500 or more, or a login that has expired
    (401); neither another refusal nor an error of the code that asks.
    """
    from requests import exceptions
    from sqlalchemy.exc import InterfaceError, OperationalError

    away = (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)
    tls = _first(causes_of(error), SSLError)
    if tls and not isinstance(tls, (SSLEOFError, SSLZeroReturnError)):
        return False
    for cause in causes_of(error):
        if status := _status([cause]):
            return status == 401 or status >= 500
        if isinstance(cause, (OperationalError, InterfaceError)):
            # Without a statement there was no connection yet.
            return cause.connection_invalidated or cause.statement is None
        if isinstance(cause, (*away, ConnectionError, TimeoutError, gaierror)):
            return True
        if not (_is_of(cause, _CLIENTS) or isinstance(cause, (ConfigError, SettingError))):
            return False
    return False


def reason_of(error: BaseException) -> str:
    """Return in a few words why a server or a storage can't be used."""
    from mlflow.exceptions import RestException
    from requests.exceptions import ChunkedEncodingError, Timeout
    from requests.exceptions import ConnectionError as NoConnection

    causes = causes_of(error)
    status, message = _status(causes), _message_of(causes)
    if redirect := _redirect(causes)[0]:
        return f"it redirects to {redirect}"
    if status and not _first(causes, RestException):
        return f"it answered {status}"
    reasons: dict[type[BaseException], str] = {
        RestException: message,
        ConnectionRefusedError: "connection refused",
        gaierror: "its name isn't known",
        SSLError: f"no connection over TLS: {message}",
        TimeoutError: NO_ANSWER,
        Timeout: NO_ANSWER,
        NoConnection: "the connection was closed",
        ChunkedEncodingError: "the connection was closed",
    }
    return next((text for kind, text in reasons.items() if _first(causes, kind)), message)


def causes_of(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the outermost first."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _first(causes: Sequence[BaseException], *kinds: type[BaseException]) -> Any:
    return next((cause for cause in causes if isinstance(cause, kinds)), None)


def _is_of(error: BaseException, packages: set[str]) -> bool:
    return type(error).__module__.partition(".")[0] in packages


def _storage_error(causes: Sequence[BaseException]) -> BaseException | None:
    """Return the innermost error that the client of a storage has raised."""
    return next((c for c in reversed(causes) if _is_of(c, _STORAGE_CLIENTS)), None)


def _status(causes: Sequence[BaseException]) -> int:
    """Return the status of the answer that an error is about; 0 without one."""
    from mlflow.exceptions import MlflowException, RestException
    from requests import RequestException, Response

    for cause in causes:
        response = getattr(cause, "response", None)
        if isinstance(response, Response):
            return int(response.status_code)
        if isinstance(response, dict):  # of S3
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if isinstance(cause, RestException) and "error_code" in cause.json:
            return int(cause.get_http_status_code())
        if isinstance(cause, (MlflowException, RequestException)) and (
            status := _STATUS.search(str(cause))
        ):
            return int(status[1])
    return 0


def _message_of(causes: Sequence[BaseException]) -> str:
    """Return the message of the server, database or storage itself, in short."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import ArgumentError, DBAPIError

    if refusal := _first(causes, DBAPIError):
        # The line with the reason; before it stands the address, which the sentence has already.
        lines = [line.strip() for line in str(refusal.orig).splitlines() if line.strip()]
        fatal = [line for line in lines if "FATAL:" in line] or lines or [str(refusal.orig)]
        return _in_short(re.sub(r"^.*\bfailed: ", "", fatal[0]))
    if certificate_error := _first(causes, SSLCertVerificationError):
        return str(certificate_error.verify_message)
    if client := _storage_error(causes):
        return _in_short(str(client))
    kinds = (SSLError, ArgumentError, MlflowException, BaseException)
    cause = next(cause for kind in kinds if (cause := _first(causes, kind)))
    return _in_short(shown_uri(getattr(cause, "message", None) or str(cause)))


def _in_short(text: str) -> str:
    """Return the first line of a text, without what follows 200 characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= 200 else f"{line[:199]}…"
