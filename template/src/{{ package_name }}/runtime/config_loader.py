"""Kedro's configuration loader, for runs that share a process."""

from __future__ import annotations

from threading import RLock
from typing import Any

from kedro.config import OmegaConfigLoader

from . import _kedro

_lock = RLock()


class ConfigLoader(OmegaConfigLoader):
    """Load configuration one loader at a time. For `CONFIG_LOADER_CLASS` in settings.py.

    OmegaConf has one set of resolvers in a process, and each loader puts its own there: in a
    service, where runs overlap, `${runtime_params:…}` would give the parameters of another run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _lock:
            super().__init__(*args, **kwargs)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Load what the files of a kind of configuration say, with this loader's resolvers."""
        with _lock:
            _kedro.use_globals_of(self)  # Kedro registers that of runtime_params itself
            return super().__getitem__(key)
