"""How requests prove who sends them: environment variables, and headers from a provider."""

from __future__ import annotations

import os
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from . import _mlflow

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    from .config import RequestHeaderProviderOptions

# What each variable was before the first run that exports it, and what each running run wants.
# Runs in one process may overlap, and the last one to end puts everything back.
_before: dict[str, str | None] = {}
_wanted: dict[str, Mapping[str, str | None]] = {}
_lock = Lock()


def export(run_id: str, variables: Mapping[str, str | None]) -> None:
    """Set environment variables for a run; None takes one away."""
    with _lock:
        _wanted[run_id] = variables
        for name, value in variables.items():
            _before.setdefault(name, os.environ.get(name))
            _set(name, value)


def exported(run_id: str) -> dict[str, str | None]:
    """Give what a run has exported, for its workers."""
    with _lock:
        return dict(_wanted.get(run_id, {}))


def take_back(run_id: str) -> None:
    """Put back what the variables of a run were, unless another run still wants them."""
    with _lock:
        for name in _wanted.pop(run_id, {}):
            still = [variables[name] for variables in _wanted.values() if name in variables]
            _set(name, still[-1] if still else _before.pop(name))


def original(name: str) -> str | None:
    """Tell what an environment variable is without what runs have exported."""
    with _lock:
        return _before.get(name, os.environ.get(name))


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# Each provider that is registered, under its class and all that it was made with.
_registered: dict[tuple[str, str], RequestHeaderProvider] = {}


def registered_header_providers() -> list[str]:
    """Name the classes that MLflow asks for headers in this process, for the projects in it."""
    return [kind for kind, _ in _registered]


def register_header_provider(
    options: RequestHeaderProviderOptions, context: KedroContext | None
) -> RequestHeaderProvider | None:
    """Let MLflow ask the provider of `mlflow.yml` for headers, registered once in a process.

    Returns:
        The provider, or None where `mlflow.yml` names none.

    Raises:
        TypeError: When the class is not a `RequestHeaderProvider` of MLflow.
        Exception: What the import or the making of the class raises.
    """
    if options.type is None:
        return None
    known = (options.type, options.model_dump_json())
    if known in _registered:
        return _registered[known]
    from kedro.utils import load_obj
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    provider = load_obj(options.type)
    if not (isinstance(provider, type) and issubclass(provider, RequestHeaderProvider)):
        raise TypeError(f"{options.type} is not a subclass of MLflow's RequestHeaderProvider")
    arguments: dict[str, Any] = dict(options.init_kwargs)
    if options.pass_context:
        arguments["kedro_context"] = context
    _registered[known] = provider(**arguments)
    _mlflow.register_header_provider(_registered[known])
    return _registered[known]
