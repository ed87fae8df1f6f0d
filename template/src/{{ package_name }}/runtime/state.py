"""The state that this process keeps of its runs, in one object with one lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    from .config.hiding import Secrets
    from .tracking.ending import Started
    from .tracking.outbox import Outbox

# A run's id, and which Kedro run logs to it.
RunKey = tuple[str, str]


@dataclass
class ProcessState:
    """The state that a process keeps of the runs in progress in it."""

    lock: RLock = field(default_factory=RLock)
    started: dict[RunKey, Started] = field(default_factory=dict)
    outboxes: dict[RunKey, Outbox] = field(default_factory=dict)
    # The environment variables of each run, and what each was before the first run.
    exported: dict[str, Mapping[str, str | None]] = field(default_factory=dict)
    before_export: dict[str, str | None] = field(default_factory=dict)
    # Each provider that MLflow asks, under its class and all that it was made with.
    header_providers: dict[tuple[str, str], RequestHeaderProvider] = field(default_factory=dict)
    # The flavors that MLflow logs by itself, each with its options.
    autologging: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    has_autologging_threads: bool = False
    signal_handlers: dict[int, Callable[[int, FrameType | None], None]] = field(
        default_factory=dict
    )
    # What is hidden in this process's output: the secrets of its last runs.
    secrets: list[Secrets] = field(default_factory=list)
    is_watching_exit: bool = False
    is_clearing_active_runs: bool = False
    is_following_parent: bool = False
    is_flushing_traces_before_exit: bool = False
    # The last trace that was sent, or is of the process that this one was forked from.
    last_trace: str | None = None

    def of_forked(self) -> ProcessState:
        """Return the state of a forked worker: an empty one, because the runs are its parent's.

        The providers are registered in its copy of MLflow too, and must not be registered twice.
        """
        return ProcessState(header_providers=self.header_providers, secrets=self.secrets)


_state = ProcessState()


def current() -> ProcessState:
    """Return the state of this process."""
    return _state


def _renew() -> None:
    global _state
    _state = _state.of_forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
    os.register_at_fork(after_in_child=_renew)
