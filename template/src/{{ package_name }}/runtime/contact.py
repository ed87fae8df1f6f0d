"""The first contact with a server: one that is away is given up within ten seconds.

MLflow's own tries, of which there are eight with pauses in between, go on for four minutes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

# A server that is there may be busy for so long, in seconds.
PATIENCE = 9.0

# So long it may take to get a connection.
CONNECTING = 3.0

# Between two tries, in seconds.
PAUSES = (0.5, 1.0, 2.0)

# How often MLflow asks a server again, and how often while runs are recorded: what can't be sent is
# sent again later anyway, and nobody is to wait for minutes. Written like this it is none that a
# user has set.
TRIES, FEW = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "00"

# Begins the URI of a store that asks in this way.
URI_SCHEME = "brisk"


class NoAnswerError(Exception):
    """No answer came that helps, however often and long the server was asked; says how often.

    `status` is that of the last answer, 0 where there was none.
    """

    def __init__(self, asked: str, status: int) -> None:
        super().__init__(asked, status)
        self.asked = asked
        self.status = status

    def __str__(self) -> str:
        return f"it answered {self.status}; {self.asked}" if self.status else self.asked


def is_patient(uri: str) -> bool:
    """Tell whether MLflow's own tries are to be used: what the user has set for them counts."""
    tries = os.environ.get(TRIES)
    of_user = tries not in (None, FEW) or "MLFLOW_HTTP_REQUEST_TIMEOUT" in os.environ
    return of_user or not is_http(uri)


def is_http(uri: str) -> bool:
    """Tell whether a server is reached by HTTP."""
    return uri.startswith(("http://", "https://"))


def ask(
    credentials: Any,
    endpoint: str,
    method: str = "GET",
    body: dict[str, Any] | None = None,
    pauses: Sequence[float] = PAUSES,
) -> Any:
    """Ask a server something, and once more when no answer comes; gives the answer.

    Args:
        credentials: MLflow's `MlflowHostCreds`, which has the address.
        endpoint: What is asked for: `/api/2.0/mlflow/…`.
        method: `GET` or `POST`.
        body: What is asked, as JSON.
        pauses: Between one try and the next, in seconds.

    Raises:
        NoAnswerError: When none came for ten seconds, or only such as 503; its cause is the last
            error.
    """
    from mlflow.utils.rest_utils import http_request

    start = time.monotonic()
    tries = 0
    while True:
        tries += 1
        left = PATIENCE - (time.monotonic() - start)
        answer, problem = None, None
        try:
            answer = http_request(
                credentials,
                endpoint,
                method,
                max_retries=0,
                timeout=(min(CONNECTING, left), left),
                raise_on_status=False,
                **{"params" if method == "GET" else "json": body},
            )
        except Exception as error:  # MLflow raises errors of its own for some
            if not _may_pass(error):
                raise
            problem = error
        if answer is not None and answer.status_code < 500:
            return answer
        gone = time.monotonic() - start
        is_over = tries > len(pauses) or PATIENCE - gone < 2 * pauses[tries - 1]
        # What is created may be there though no answer came: nothing is created twice.
        if is_over or (method != "GET" and not _is_refused(problem)):
            times = "once" if tries == 1 else f"{tries} times"
            status = 0 if answer is None else answer.status_code
            raise NoAnswerError(f"asked {times} in {gone:.0f} s", status) from problem
        time.sleep(pauses[tries - 1])  # time for a server that is being started again


def _may_pass(error: Exception) -> bool:
    """Tell whether the next try may have an answer: not when TLS is wrong."""
    from requests import exceptions

    causes = list(causes_of(error))
    if any(isinstance(cause, exceptions.SSLError) for cause in causes):
        return False
    kinds = (exceptions.ConnectionError, exceptions.Timeout)
    return any(isinstance(cause, kinds) for cause in causes)


def _is_refused(error: Exception | None) -> bool:
    """Tell whether a request never came to the server."""
    return any(isinstance(cause, ConnectionRefusedError) for cause in causes_of(error))


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and what led to it, the outermost first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


@lru_cache
def register() -> None:
    """Let MLflow find the store that asks in this way."""
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    _tracking_store_registry.register(
        URI_SCHEME, lambda store_uri, **_: brisk_store(store_uri.removeprefix(f"{URI_SCHEME}:"))
    )


@lru_cache
def brisk_store(uri: str, pauses: Sequence[float] = PAUSES) -> Any:
    """Make a store of runs on a server that asks in this way."""
    from mlflow.store.tracking.rest_store import RestStore

    return _brisk(RestStore, uri, pauses)


@lru_cache
def brisk_registry(uri: str) -> Any:
    """Make a store of registered models on a server that asks in this way."""
    from mlflow.store.model_registry.rest_store import RestStore

    return _brisk(RestStore, uri, PAUSES)


def _brisk(kind: Any, uri: str, pauses: Sequence[float]) -> Any:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.proto_json_utils import parse_dict
    from mlflow.utils.rest_utils import verify_rest_response

    methods = getattr(kind, "_METHOD_TO_INFO", None)

    class BriskStore(kind):  # type: ignore[misc]
        def _call_endpoint(self, api: Any, json_body: str | None = None, *_: Any, **__: Any) -> Any:
            endpoint, method = methods[api] if methods else self._get_endpoint_from_method(api)
            body = json.loads(json_body) if json_body else None
            answer = verify_rest_response(
                ask(self.get_host_creds(), endpoint, method, body, pauses), endpoint
            )
            found = api.Response()
            parse_dict(answer.json(), found)
            return found

    return BriskStore(partial(get_default_host_creds, uri))
