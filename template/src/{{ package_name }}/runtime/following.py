"""Send what a run records while it goes on, and the rest at its end."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .offline import lose
from .recording import KedroRun, Recording, remove
from .sending import look_for, send, send_locked
from .server import Server

logger = logging.getLogger(__name__)

# What is recorded is sent after so many seconds; while the server is away the pauses get longer.
EVERY = 2.0
AT_MOST = 60.0


@dataclass(frozen=True)
class _Follower:
    """A thread that sends what a Kedro run records while it goes on."""

    recording: Recording
    run: KedroRun
    opening: str
    stop: threading.Event
    thread: threading.Thread


_followers: dict[Path, _Follower] = {}


def follow(server: Server, run_id: str, opening: str) -> None:
    """Send what a run records while it goes on, where it is recorded."""
    recording = server.recording
    run = recording.kedro_run_of(run_id) if recording else None
    if recording is None or run is None or run.folder in _followers:
        return
    _let_fork()
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(recording, run, stop), name="send-to-mlflow", daemon=True
    )
    _followers[run.folder] = _Follower(recording, run, opening, stop, thread)
    thread.start()


def _follow(recording: Recording, run: KedroRun, stop: threading.Event) -> None:
    pause = EVERY
    while not stop.wait(pause):
        with _sending:
            if recording.away and not look_for(recording, once=True):
                pause = min(2 * pause, AT_MOST)
                continue
            try:
                send(recording, run, _sending.pause)
                pause = EVERY
            except Exception as error:  # whatever it is must not end what is recorded
                logger.debug("Not sent", exc_info=True)
                lose(recording, error)


def settle(opening: str) -> None:
    """Send the rest of the runs that a Kedro run has followed; what can't be sent waits."""
    for follower in [found for found in _followers.values() if found.opening == opening]:
        follower.stop.set()
        follower.thread.join()
        del _followers[follower.run.folder]
        _settle(follower.recording, follower.run)


def _settle(recording: Recording, run: KedroRun) -> None:
    is_there = not recording.away or look_for(recording, once=True)
    with _sending, run.lock():
        is_last = run.leave()
        if is_there:
            try:
                send_locked(recording, run, _sending.pause, is_last=is_last)
            except Exception as error:  # the run has ended well, whatever this is
                logger.debug("Not sent", exc_info=True)
                lose(recording, error)
            else:
                if is_last:
                    _close(recording, run)
                return
    logger.warning(
        "The run %s is recorded in %s and not sent: %s. `kedro mlflow sync` sends it.",
        run.notes()[0].run_id,
        recording.folder,
        recording.away.reason,
    )


def _close(recording: Recording, run: KedroRun) -> None:
    """Remove from the disk what the server has; what it has refused is kept."""
    run.note_sent()
    if not any(notes.refused for notes in run.notes()):
        remove(recording, run)


class _Sending:
    """Is held while threads send, so that no process is forked meanwhile.

    A lock that one of them holds at that moment would stay held in the new process for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._senders: set[int] = set()
        self._forks = 0

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._forks)
            self._senders.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._senders.discard(threading.get_ident())
            self._changed.notify_all()

    def pause(self) -> None:
        """Let others fork; to be called between two requests."""
        if self._forks:
            self.__exit__()
            self.__enter__()

    def before_fork(self) -> None:
        """Wait until nothing is being sent."""
        self._changed.acquire()
        self._forks += 1
        self._changed.wait_for(lambda: self._senders <= {threading.get_ident()})

    def after_fork(self) -> None:
        """Go on."""
        self._forks -= 1
        self._changed.notify_all()
        self._changed.release()


_sending = _Sending()


@lru_cache
def _let_fork() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
        os.register_at_fork(
            before=_sending.before_fork,
            after_in_parent=_sending.after_fork,
            after_in_child=_renew,
        )


def _renew() -> None:
    """Begin anew in a forked process: the threads are not there."""
    _sending.__init__()  # type: ignore[misc]
    _followers.clear()
