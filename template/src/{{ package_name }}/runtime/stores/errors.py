"""Errors of servers, databases and storages: one table with a sentence for each.

The clients of servers, databases and storages raise errors of many kinds, which are read here and
nowhere else. What isn't in the table stays as it was raised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from socket import gaierror
from ssl import SSLCertVerificationError, SSLEOFError, SSLError, SSLZeroReturnError
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from kedro.io import DatasetError

from ..config.errors import ADDRESS, ConfigError, SettingError
from ..config.uris import is_database, is_http, shown_uri, uri_of_environment
from .credentials import header_provider_names

if TYPE_CHECKING:
    from .server import Server

CREDENTIALS = ("server", "credentials")
PROVIDER = ("server", "request_header_provider")
LOCATION = ("tracking", "experiment", "create_experiment_kwargs", "artifact_location")

# What a row is about: an MLflow server, a database that is opened directly, artifacts that the
# server stores, and a storage of artifacts that is written to directly.
SERVER, DATABASE, SERVED, STORAGE = "server", "database", "served artifacts", "storage"

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN, CERTIFICATE = "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_SERVER_CERT_PATH"

# Where credentials are: mlflow.yml names an entry of credentials.yml.
ENTRY = "the entry of credentials.yml that server.credentials names"

# Recurring parts of sentences.
ANSWERED = "{where} answered {status} ({meaning})"
UNTRUSTED = "the certificate of {where} isn't trusted ({message}): "
AROUND = "add {host} to NO_PROXY to go without it"
UNCONNECTED = f"{{proxy}} gives no connection to {{where}} ({{reason}}): {AROUND}, or correct it"
ITS_LOG = (
    "Its log says why: see to its --artifacts-destination, and to the bucket and the keys that the "
    "server has for it."
)


class _Row(NamedTuple):
    """A kind of failure, the key of mlflow.yml that it is about, and its sentence.

    A `{name}` in the sentence is an attribute of `_Failure`.
    """

    store: str
    applies: Callable[[_Failure], object]
    key: tuple[str, ...]
    sentence: str


@lru_cache
def _table() -> Sequence[_Row]:
    """Return all rows; the first one that applies to a failure counts."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import InvalidURL, ProxyError, Timeout
    from sqlalchemy.exc import ArgumentError

    # fmt: off
    return (
        # Something else answers than the server, or lets no request through to it.
        _Row(SERVER, lambda f: f.headers.get("Server", "").startswith("AirTunes"), ADDRESS,
             "AirPlay Receiver of macOS answers at {where} ({status}): have MLflow listen at "
             "another port, or switch AirPlay Receiver off in the System Settings"),
        _Row(SERVER, lambda f: f.status == 407, ADDRESS,
             "{proxy} asks for a login (407): write it into {variable} as in "
             f"http://user:password@host:port, or {AROUND}"),
        _Row(SERVER, _by(ProxyError), ADDRESS, UNCONNECTED),
        _Row(SERVER, lambda f: f.variable and f.is_of_proxy, ADDRESS,
             f"{{proxy}} answered {{status}} in the place of {{where}}: {AROUND}, or have it let "
             "the requests through"),
        _Row(SERVER, lambda f: f.status == 403 and f.is_of_proxy, ADDRESS,
             "a proxy in between answered 403 in the place of {where}: have it let the requests to "
             "{host} through"),
        # TLS.
        _Row(SERVER, lambda f: "CA certificate bundle" in f.text, CREDENTIALS,
             f"there is no file where {CERTIFICATE} says: name the file of the server's CA, in "
             f"{ENTRY}"),
        _Row(SERVER, lambda f: f.certificate_error and f.is_given(CERTIFICATE), CREDENTIALS,
             f"{UNTRUSTED}name the file of the CA that has signed it in {CERTIFICATE}, in {ENTRY}"),
        _Row(SERVER, lambda f: f.certificate_error, CREDENTIALS,
             f"{UNTRUSTED}add {CERTIFICATE} with the file of the CA that has signed it to {ENTRY}"),
        _Row(SERVER, lambda f: f.tls_error and f.tls_error.reason in _NO_TLS, ADDRESS,
             "{where} doesn't speak TLS: expected an address with http://"),
        _Row(SERVER, lambda f: f.tls_error and f.matches("X509|PEM"), CREDENTIALS,
             f"the file that {CERTIFICATE} names has no certificates (PEM): correct it in {ENTRY}"),
        _Row(SERVER, lambda f: f.tls_error, ADDRESS,
             "{where} can't be reached over TLS: {message}"),
        # No answer.
        _Row(SERVER, lambda f: f.variable and f.is_unanswered, ADDRESS, UNCONNECTED),
        _Row(SERVER, _by(ConnectionRefusedError), ADDRESS,
             "nothing listens at {where} (connection refused): start the server, or correct the "
             "address"),
        _Row(SERVER, _by(gaierror), ADDRESS,
             "the host of {where} isn't known: correct the address"),
        _Row(SERVER, _by(Timeout, TimeoutError), ADDRESS,
             "{where} gave no answer in time: correct the address, see whether a firewall is in "
             "between, or raise MLFLOW_HTTP_REQUEST_TIMEOUT"),
        _Row(SERVER, _by(InvalidURL), ADDRESS, "{where} is no address of a server: correct it"),
        _Row(SERVER, lambda f: f.is_unanswered, ADDRESS,
             "{where} closed the connection without an answer: correct the address (that of a "
             "server over TLS begins with https://)"),
        # A login.
        _Row(SERVER, lambda f: f.status == 403 and "Invalid Host header" in f.text, ADDRESS,
             "{where} refuses this name of it: add the name to the server's --allowed-hosts"),
        _Row(SERVER, lambda f: f.is_login and f.is_given(USER, PASSWORD), CREDENTIALS,
             f"{ANSWERED} to {USER} and {PASSWORD}: correct them in {ENTRY}"),
        _Row(SERVER, lambda f: f.is_login and f.is_given(USER), CREDENTIALS,
             f"{ANSWERED}, and {PASSWORD} is missing: add it to {ENTRY}"),
        _Row(SERVER, lambda f: f.is_login and f.is_given(PASSWORD), CREDENTIALS,
             f"{ANSWERED}, and {USER} is missing: add it to {ENTRY}"),
        _Row(SERVER, lambda f: f.is_login and f.is_given(TOKEN), CREDENTIALS,
             f"{ANSWERED} to {TOKEN}: correct it in {ENTRY}"),
        _Row(SERVER, lambda f: f.is_login and f.providers, PROVIDER,
             f"{ANSWERED} to the headers of {{providers}}: see that they have a token that holds"),
        _Row(SERVER, lambda f: f.is_login, CREDENTIALS,
             f"{ANSWERED}, and no user or token was sent: add {USER} and {PASSWORD}, or {TOKEN}, "
             "to an entry of credentials.yml, and name the entry in server.credentials"),
        # Any other answer; of MLflow's own only those that say that the server can't.
        _Row(SERVER, lambda f: f.code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"), ADDRESS,
             "{where} answered: {message} (see the server's log)"),
        _Row(SERVER, lambda f: f.status == 404 and not f.code, ADDRESS,
             f"{ANSWERED}: expected the address of an MLflow server of version 3 or newer, with "
             "the path that it is served under, if any"),
        _Row(SERVER, lambda f: "not in a valid JSON format" in f.text, ADDRESS,
             "{where} answered with a page and not as an MLflow server does: correct the address"),
        _Row(SERVER, lambda f: f.status and not f.code, ADDRESS,
             "{where} answered {status}: see the server's log"),

        _Row(DATABASE, _by(ModuleNotFoundError), ADDRESS,
             "{where} needs a package that isn't installed: uv add '{package}'"),
        _Row(DATABASE, _by(ArgumentError), ADDRESS, "{where} can't be read: {message}"),
        # Only its text tells why there is no connection.
        _Row(DATABASE, lambda f: f.database_error and f.matches(_REFUSED_LOGIN), CREDENTIALS,
             "{where} refuses the login ({message}): correct the user in the address, and "
             f"PGPASSWORD in {ENTRY}"),
        _Row(DATABASE, lambda f: f.database_error and f.matches(_NO_DATABASE), ADDRESS,
             "{where} isn't there ({message}): create the database, or correct its name in the "
             "address"),
        _Row(DATABASE, lambda f: f.database_error and f.where.startswith("sqlite"), ADDRESS,
             "{where} can't be used ({message}): see to the file and its folder, or name another"),
        _Row(DATABASE, lambda f: f.database_error, ADDRESS,
             "{where} can't be used ({message}): start the database, or correct the address"),
        _Row(DATABASE, _by(MlflowException), ADDRESS, "{where}: {message}"),

        _Row(SERVED, lambda f: f.is_of_artifacts and f.is_login, CREDENTIALS,
             f"the server answered {{status}}. See to the permissions, and to {ENTRY}."),
        _Row(SERVED, lambda f: f.is_of_artifacts and f.status, LOCATION,
             f"the server answered {{status}}. {ITS_LOG}"),
        _Row(SERVED, lambda f: f.is_of_artifacts, LOCATION,
             f"the server closed the connection. {ITS_LOG}"),

        _Row(STORAGE, lambda f: f.lacks_client, LOCATION,
             "a package isn't installed: uv add {storage[0]}"),
        _Row(STORAGE, lambda f: f.storage_error and f.matches(_NO_BUCKET), LOCATION,
             "there is no bucket {bucket!r} ({message}). Create it or correct "
             f"MLFLOW_S3_ENDPOINT_URL in {ENTRY}; an experiment keeps its place, so for another "
             "bucket name a new one in tracking.experiment, with its "
             "create_experiment_kwargs.artifact_location."),
        _Row(STORAGE, lambda f: f.storage_error, CREDENTIALS,
             f"{{message}}. Correct {{storage[1]}} in {ENTRY}."),
    )
    # fmt: on


# What only a text tells.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
_REFUSED_LOGIN = r"password|authentication|role .* does not exist|pg_hba"
_NO_DATABASE = r"database .* does not exist"
_NO_BUCKET = r"NoSuchBucket|ContainerNotFound|bucket does not exist"
_STATUS = re.compile(r"(?:too many|failed with error code|Tunnel connection failed:) (\d{3})\b")

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

# The package to install for a module that a database's URI asks for, where their names differ.
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}

# How a proxy marks answers, and the names in `Server` that it keeps when it passes on MLflow's.
_PROXY_HEADERS = {"Via", "Proxy-Agent", "Proxy-Authenticate", "Proxy-Connection", "Proxy-Status"}
_MLFLOW_SERVERS = ("uvicorn", "gunicorn", "waitress", "Werkzeug")


def _by(*kinds: type[BaseException]) -> Callable[[_Failure], object]:
    return lambda failure: failure.first(*kinds)


class _Failure:
    """The facts of an error, for the predicates and the sentences of the table."""

    def __init__(
        self, store: str, error: BaseException, uri: str, where: str, given: Mapping[str, str]
    ) -> None:
        from mlflow.exceptions import RestException
        from requests.exceptions import HTTPError, RequestException, RetryError
        from sqlalchemy.exc import DBAPIError

        self.store, self.where, self._causes, self._given = store, where, causes_of(error), given
        self.text = "\n".join(map(str, self._causes))
        self.message, self.reason = _message_of(self._causes), reason_of(error)
        self.tls_error = self.first(SSLError)
        self.certificate_error = self.first(SSLCertVerificationError)
        self.database_error = self.first(DBAPIError)
        # An answer, its headers, and the code in it when it is MLflow's own.
        self.status = _status(self._causes)
        self.meaning = {401: "not authenticated", 404: "not found"}.get(self.status, "not allowed")
        self.is_login = self.status in (401, 403)
        self.is_unanswered = not self.status and self.first(RequestException) is not None
        self.is_of_artifacts = (
            self.first(HTTPError, RetryError) or "/mlflow-artifacts/" in self.text
        )
        answer, answered = self.first(RestException), self.first(HTTPError)
        self.code = answer.json.get("error_code", "") if answer else ""
        has_headers = answered is not None and answered.response is not None
        self.headers = answered.response.headers if has_headers else {}
        self.providers = " and ".join(header_provider_names())
        parts = urlsplit(shown_uri(uri))  # a password may have what an address may not
        self.host, self.bucket = parts.hostname, parts.netloc
        self.variable, address = _proxy(uri)
        self.proxy = f"the proxy {address} (of {self.variable})" if address else "a proxy"
        # Packages that aren't installed, and errors of those that are.
        missing = self.first(ModuleNotFoundError)
        self.module = str(missing.name) if missing else ""
        self.package = _DRIVERS.get(self.module, self.module)
        self.lacks_client = self.module.partition(".")[0] in _STORAGE_CLIENTS
        self.storage_error = _storage_error(self._causes)
        self.storage = _STORAGES.get(parts.scheme)

    def first(self, *kinds: type[BaseException]) -> Any:
        return _first(self._causes, *kinds)

    def matches(self, pattern: str) -> object:
        return re.search(pattern, self.message)

    def is_given(self, *names: str) -> bool:
        return all(self._given.get(name) or os.environ.get(name) for name in names)

    @property
    def is_of_proxy(self) -> bool:
        """Check whether a proxy has answered by itself, instead of passing on MLflow's answer."""
        if self.status not in (403, 502, 503, 504) or self.code or not self.headers:
            return False
        is_between = self.variable or any(name in self.headers for name in _PROXY_HEADERS)
        is_of_mlflow = self.headers.get("Server", "").startswith(_MLFLOW_SERVERS)
        return "X-Squid-Error" in self.headers or bool(is_between and not is_of_mlflow)

    def explain(self) -> SettingError | None:
        """Return the key and the sentence of the first row that applies."""
        for row in _table():
            if row.store == self.store and row.applies(self):
                return SettingError(row.key, row.sentence.format_map(vars(self)))
        return None


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
        uri, where = server.tracking_uri, shown_uri(server.tracking_uri)
        if uri_of_environment() == uri:
            where = f"{where} (of MLFLOW_TRACKING_URI)"
        store = DATABASE if is_database(uri) else SERVER
        if explained := _Failure(store, error, uri, where, variables).explain():
            raise explained from error
        raise


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
        ArtifactError: For what is in the table; another error stays as it is.
    """
    try:
        yield
    except Exception as error:  # each kind of storage has errors of its own
        if sentence := artifact_sentence(error, place, server):
            raise ArtifactError(sentence) from error
        raise


def artifact_sentence(error: BaseException, place: str, server: Server) -> str | None:
    """Return why artifacts can't be stored; None for what isn't in the table."""
    store, where = STORAGE, place
    if place.startswith("mlflow-artifacts:"):
        store, where = SERVED, f"{place} of {shown_uri(server.tracking_uri)}"
    elif place.partition(":")[0] not in _STORAGES:
        return None
    explained = _Failure(store, error, place, where, {}).explain()
    return f"{_NOT_STORED} {where}: {explained}" if explained else None


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
    if status and not _first(causes, RestException):
        return f"it answered {status}"
    reasons: dict[type[BaseException], str] = {
        RestException: message,
        ConnectionRefusedError: "connection refused",
        gaierror: "its name isn't known",
        SSLError: f"no connection over TLS: {message}",
        TimeoutError: "no answer in time",
        Timeout: "no answer in time",
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
        response = getattr(client, "response", None)
        if isinstance(response, dict) and "Code" in response.get("Error", {}):
            return str(response["Error"]["Code"])  # of S3, such as NoSuchBucket
        return _in_short(str(client))
    kinds = (SSLError, ArgumentError, MlflowException, BaseException)
    cause = next(cause for kind in kinds if (cause := _first(causes, kind)))
    return _in_short(shown_uri(getattr(cause, "message", None) or str(cause)))


def _in_short(text: str) -> str:
    """Return the first line of a text, without what follows 200 characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= 200 else f"{line[:199]}…"


def _proxy(uri: str) -> tuple[str, str]:
    """Return the variable that names the proxy for an address, and the proxy's own address."""
    from requests.utils import get_environ_proxies, select_proxy

    uri = shown_uri(uri)
    address = select_proxy(uri, get_environ_proxies(uri)) if is_http(uri) else None
    if not address:
        return "", ""
    names = [f"{scheme}_proxy" for scheme in (uri.partition(":")[0], "all")]
    spelled = [name for lower in names for name in (lower, lower.upper())]
    variable = next((name for name in spelled if os.environ.get(name)), "the system's settings")
    return variable, shown_uri(address)
