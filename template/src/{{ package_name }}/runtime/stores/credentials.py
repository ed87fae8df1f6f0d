"""How requests prove who sends them: environment variables, and headers from a provider."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kedro.utils import load_obj

from .. import _mlflow, state

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    from ..config.keys import RequestHeaderProviderOptions


def export(key: str, variables: Mapping[str, str | None]) -> None:
    """Set environment variables for a run, or whatever else has this key; None takes one away.

    Runs in one process may overlap, and the last one to end puts everything back.
    """
    held = state.current()
    with held.lock:
        held.exported[key] = variables
        for name, value in variables.items():
            held.before_export.setdefault(name, os.environ.get(name))
            _set(name, value)


def exported(key: str) -> dict[str, str | None]:
    """Return what a run has exported, for its workers."""
    return dict(state.current().exported.get(key, {}))


def take_back(key: str) -> None:
    """Restore the variables of a run, unless another run still needs them."""
    held = state.current()
    with held.lock:
        for name in held.exported.pop(key, {}):
            of_others = [other[name] for other in held.exported.values() if name in other]
            _set(name, of_others[-1] if of_others else held.before_export.pop(name))


@contextmanager
def exporting(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for a `with` block."""
    key = uuid4().hex
    export(key, variables)
    try:
        yield
    finally:
        take_back(key)


def original(name: str) -> str | None:
    """Return what an environment variable is without what runs have exported."""
    held = state.current()
    with held.lock:
        return held.before_export.get(name, os.environ.get(name))


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def header_provider_names() -> list[str]:
    """Return the classes that MLflow asks for headers in this process, for the projects in it."""
    return [kind for kind, _ in state.current().header_providers]


def register_header_provider(
    options: RequestHeaderProviderOptions, context: KedroContext | None
) -> RequestHeaderProvider | None:
    """Register the header provider of `mlflow.yml` with MLflow, once in a process.

    Returns:
        The provider, or None where `mlflow.yml` names none.

    Raises:
        TypeError: When the class is not a `RequestHeaderProvider` of MLflow.
        Exception: What the import or the making of the class raises.
    """
    if options.type is None:
        return None
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    held, key = state.current(), (options.type, options.model_dump_json())
    with held.lock:
        if key not in held.header_providers:
            kind = load_obj(options.type)
            if not (isinstance(kind, type) and issubclass(kind, RequestHeaderProvider)):
                raise TypeError(
                    f"{options.type} is not a subclass of MLflow's RequestHeaderProvider"
                )
            arguments: dict[str, Any] = {"kedro_context": context} if options.pass_context else {}
            provider = held.header_providers[key] = kind(**{**options.init_kwargs, **arguments})
            _mlflow.register_header_provider(provider)
    return held.header_providers[key]
