"""Look at the store of a project without creating it."""

from __future__ import annotations

from ..config.uris import is_database, local_path
from ..stores.schema import read_schema

# For commands that only look: MLflow by itself asks a server that is away for four minutes.
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "4",
    "AWS_MAX_ATTEMPTS": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def exists(uri: str) -> bool:
    """Check whether there is a store with tables, or a server to ask."""
    if uri.startswith("file:"):
        return local_path(uri).is_dir()
    return not is_database(uri) or read_schema(uri).version is not None
