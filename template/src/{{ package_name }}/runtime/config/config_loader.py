"""Kedro's configuration loader, for runs that share a process."""

from __future__ import annotations

import warnings
from threading import RLock
from typing import Any

from kedro.config import OmegaConfigLoader

from .. import _kedro

_lock = RLock()


class ConfigLoader(OmegaConfigLoader):
    """Load configuration one loader at a time. For `CONFIG_LOADER_CLASS` in settings.py.

    OmegaConf has one set of resolvers in a process, and each loader puts its own there: in a
    service, where runs overlap, `${runtime_params:…}` would give the parameters of another run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _lock:
            _ignore_deprecation_in_kedro()
            super().__init__(*args, **kwargs)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Load what the files of a kind of configuration say, with this loader's resolvers."""
        with _lock:
            _ignore_deprecation_in_kedro()
            _kedro.use_globals_of(self)  # Kedro registers that of runtime_params itself
            return super().__getitem__(key)


def _ignore_deprecation_in_kedro() -> None:
    """Don't warn that Kedro 1.7 registers resolvers with what OmegaConf 2.4 deprecates.

    For good and each time: pytest takes filters back after each test, and `catch_warnings` would
    do so with those of other threads.
    """
    warnings.filterwarnings(
        "ignore", r"register_new_resolver\(\)", module=r"kedro\.config\.omegaconf_config"
    )
