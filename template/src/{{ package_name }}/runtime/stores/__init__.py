"""Where runs are kept: the server, embedded stores, credentials, and what a store refuses.

`stores.project` is imported on first use: most commands of Kedro never read `mlflow.yml`, and don't
wait for pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import project as project


def __getattr__(name: str) -> Any:
    if name == "project":
        return import_module(f"{__name__}.project")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
