"""URIs of stores: what kind each is, anchored to the project, and shown without a password."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote, unquote_plus, urlsplit
from urllib.request import url2pathname

from .. import state

# Names the tracking URI that the environment has from a project, not from its user.
ANNOUNCED = "KEDRO_MLFLOW_ANNOUNCED_URI"

# A password may have a slash and an `@`; what follows a host's port may too.
_LOGIN = re.compile(r"""//([^\s/:@"']*:(?!\d{1,5}[/?#])[^\s"']*|[^\s/?#]*)@""")
_PASSWORD = re.compile(
    r"""((?:^|[?&;\s])(?:odbc_connect|[\w.-]*(?:password|passwd|pwd|token|secret|api_?key|"""
    r"""access_?key|sig|signature))=)(\{[^}]*\}|[^&;\s"']+)""",
    re.IGNORECASE,
)

_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:)[^?]+)")


def uri_of_environment() -> str | None:
    """Return the tracking URI that the user's environment names, not one that was announced."""
    # Before this project has announced its own, it may have been another's in this process.
    for variables in (os.environ, state.current().before_export):
        uri = variables.get("MLFLOW_TRACKING_URI")
        if uri != variables.get(ANNOUNCED):
            return uri
    return None


def anchor_uri(uri: str, project_path: PurePath) -> str:
    """Return a URI with a relative path, or `sqlite:///` path, from the project's folder.

    Other URIs, and the words `databricks` and `databricks-uc`, stay as they are.
    """
    if sqlite := _SQLITE_FILE.match(uri):
        path = sqlite["path"]
        if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
            return uri
        return sqlite_uri(project_path / path, sqlite["scheme"]) + uri[sqlite.end() :]
    if uri.startswith("databricks") or re.match(r"[\w+.-]{2,}:", uri):
        return uri
    return (project_path / uri).as_uri()


def shown_uri(text: str) -> str:
    """Return a URI, or a text with URIs, without the users and passwords in them."""
    return _LOGIN.sub("//***@", _PASSWORD.sub(r"\1***", text))


def passwords_in(text: str) -> Iterator[str]:
    """Return the passwords in the URIs and connection strings of a text, as written and decoded."""
    for login in _LOGIN.findall(text):
        yield from {login.partition(":")[2], unquote(login.partition(":")[2])}
    for _, value in _PASSWORD.findall(text):
        yield from {value.strip("{}"), unquote_plus(value).strip("{}")}
        if "=" in (inner := unquote_plus(value)):  # of odbc_connect
            yield from passwords_in(inner)


def without_login(uri: str) -> str:
    """Return an address without a user and password in it, for a browser."""
    return shown_uri(uri).replace("//***@", "//")


def is_http(uri: str) -> bool:
    """Check whether a tracking URI names a server that is reached by HTTP."""
    return uri.startswith(("http://", "https://"))


def is_databricks(uri: str) -> bool:
    """Check whether a tracking URI names a workspace of Databricks."""
    return uri.split(":", 1)[0] == "databricks"


def is_database(uri: str) -> bool:
    """Check whether a tracking URI names a database, which clients of the store open directly."""
    return uri.split(":", 1)[0].split("+", 1)[0] in {"sqlite", "postgresql", "mysql", "mssql"}


def sqlite_uri(file: PurePath, scheme: str = "sqlite:///") -> str:
    """Return the URI of a SQLite file, with what has a meaning in URIs quoted in its path.

    SQLAlchemy reads quoted paths from 2.1 on; before that nothing can stand for a question mark.
    MLflow takes them as they are for the folder to make, but with a driver it makes none.
    """
    path = file.as_posix()
    if not re.search("[%?#]", path) or not _sqlalchemy_unquotes():
        return f"{scheme}{path}"
    quoted = path.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return f"{'sqlite+pysqlite:///' if scheme == 'sqlite:///' else scheme}{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a `sqlite:///` URI; None for any other URI."""
    sqlite = _SQLITE_FILE.match(uri)
    if sqlite is None:
        return None
    return Path(unquote(sqlite["path"]) if _sqlalchemy_unquotes() else sqlite["path"])


def _sqlalchemy_unquotes() -> bool:
    return tuple(int(part) for part in version("sqlalchemy").split(".")[:2]) >= (2, 1)


def local_path(uri: str) -> Path:
    """Return the path of a `file:` URI."""
    return Path(url2pathname(urlsplit(uri).path))


def artifact_folder(tracking_uri: str) -> str | None:
    """Return where artifacts go by default: beside a SQLite file; None where a server decides.

    For a database MLflow's own default is a folder of the working directory.
    """
    if not is_database(tracking_uri):
        return None
    file = sqlite_file(tracking_uri)
    return file.with_name("mlartifacts").as_uri() if file else "mlartifacts"


def has_store(uri: str, plugins: str) -> bool:
    """Check whether MLflow, or one of a group of its plugins, has a store for a URI."""
    scheme = uri.split(":", 1)[0]
    known = {"http", "https", "file", "databricks"}
    if plugins == "mlflow.model_registry_store":
        known |= {"databricks-uc", "uc"}
    return scheme in known or is_database(uri) or scheme in entry_points(group=plugins).names


def takes_file_store() -> bool:
    """Check whether MLflow opens a folder as a store: from 3.13 on only where that is allowed."""
    installed = tuple(int(part) for part in version("mlflow").split(".")[:2])
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    return installed < (3, 13) or allowed
