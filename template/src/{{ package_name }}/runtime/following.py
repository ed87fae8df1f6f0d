"""Send what a run records while it goes on, and the rest at its end."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from .offline import lose
from .recording import KedroRun, Recording, remove
from .sending import look_for, send
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
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(recording, run, stop), name="send-to-mlflow", daemon=True
    )
    _followers[run.folder] = _Follower(recording, run, opening, stop, thread)
    thread.start()


def _follow(recording: Recording, run: KedroRun, stop: threading.Event) -> None:
    pause = EVERY
    while not stop.wait(pause):
        if recording.away and not look_for(recording):
            pause = min(2 * pause, AT_MOST)
            continue
        try:
            send(recording, run)
            pause = EVERY
        except Exception as error:  # whatever it is must not end what is recorded
            logger.debug("Not sent", exc_info=True)
            lose(recording, error)


def settle(server: Server, run_id: str, opening: str) -> None:
    """Send the rest of a run that has ended; what can't be sent waits on the disk."""
    recording = server.recording
    run = recording.kedro_run_of(run_id) if recording else None
    follower = _followers.get(run.folder) if run else None
    if recording is None or run is None or follower is None or follower.opening != opening:
        return
    follower.stop.set()
    follower.thread.join()
    del _followers[run.folder]
    run.end()
    if not recording.away or look_for(recording):
        try:
            send(recording, run)
        except Exception as error:  # the run has ended well, whatever this is
            logger.debug("Not sent", exc_info=True)
            lose(recording, error)
        else:
            run.note_sent()
            if not any(notes.refused for notes in run.notes()):
                remove(recording, run)
            return
    logger.warning(
        "The run %s is recorded in %s and not sent (%s). `kedro mlflow sync` sends it.",
        run_id,
        recording.folder,
        recording.away.reason,
    )
