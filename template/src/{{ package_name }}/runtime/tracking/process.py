"""Signals and processes, for runs that end in another way than by Kedro's hooks.

Kedro calls hooks at a pipeline's end and for an `Exception` in it, but not at SIGTERM or
`kill -9`. Nothing here knows MLflow.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from types import FrameType

from .. import state

logger = logging.getLogger(__name__)

# Signals whose default is to end the process at once, and that can be handled.
_DEADLY = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

# Two readings of one process's start differ by less than this, in seconds; a process that got
# the same id later differs by more.
_SAME_START = 2.0


@dataclass(frozen=True)
class Process:
    """A process, and what distinguishes it from another that gets its id later.

    `start_time` is in seconds since 1970, None where the system doesn't tell, and changes when the
    clock is set; `start_ticks`, the system's boot and the ticks from it to the start, doesn't, but
    only Linux tells it. `namespace` distinguishes containers with the same host name.
    """

    host: str
    pid: int
    start_time: float | None
    namespace: str = ""
    start_ticks: str = ""

    def tags(self) -> dict[str, str]:
        """Return the tags that identify the process."""
        tags = {"host": self.host, "pid": str(self.pid)}
        if self.start_time is not None:
            start = datetime.fromtimestamp(self.start_time, timezone.utc)
            tags["process_start"] = start.isoformat(timespec="milliseconds")
        if self.start_ticks:
            tags["process_start_ticks"] = self.start_ticks
        return tags

    def is_gone(self) -> bool:
        """Check whether the process has ended, as far as this process can know."""
        here = this_process()
        if (self.host, self.namespace) != (here.host, here.namespace) or self.start_time is None:
            return False
        if self.start_ticks and here.start_ticks:
            return _start_ticks(self.pid) != self.start_ticks
        start_time = _start_time(self.pid)
        return start_time is None or abs(start_time - self.start_time) > _SAME_START


def this_process() -> Process:
    """Return the process that this code runs in."""
    return _describe(os.getpid())


@lru_cache
def _describe(pid: int) -> Process:
    namespace = Path("/proc/self/ns/pid")
    return Process(
        socket.gethostname(),
        pid,
        _start_time(pid),
        str(namespace.readlink()) if namespace.is_symlink() else "",
        _start_ticks(pid),
    )


def _start_time(pid: int) -> float | None:
    """Return when a process started, in seconds since 1970; None when it has ended."""
    if sys.platform == "linux":
        started = _start_time_on_linux(pid)
    elif sys.platform == "win32":
        started = None
    else:
        start = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        started = time.mktime(time.strptime(start)) if start else None
    return started


def _start_ticks(pid: int) -> str:
    """Return the boot of the system, and the ticks from it to the start of a process.

    Empty where the process has ended, and elsewhere than on Linux.
    """
    boot_id, ticks = Path("/proc/sys/kernel/random/boot_id"), _ticks_since_boot(pid)
    return f"{boot_id.read_text().strip()}:{ticks}" if ticks and boot_id.exists() else ""


def _start_time_on_linux(pid: int) -> float | None:
    assert sys.platform == "linux"  # for type checkers: elsewhere Python lacks what this needs
    ticks = _ticks_since_boot(pid)
    if ticks is None:
        return None
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _ticks_since_boot(pid: int) -> int | None:
    """Return when a process started, in the ticks of Linux; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): the name, in brackets, may hold anything; the state is the field after it.
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":  # it has ended and its parent has not asked yet
        return None
    return int(fields[19])


@dataclass(frozen=True)
class Marker:
    """A run that is in progress, in a file that outlives its process."""

    run_id: str
    server: str
    process: Process


def mark(folder: Path, run_id: str, server: str) -> None:
    """Write the marker of a run that is in progress in this process, where it can be written."""
    marker = Marker(run_id, server, this_process())
    try:
        folder.mkdir(exist_ok=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        (folder / f"{run_id}.json").write_text(json.dumps(asdict(marker)), encoding="utf-8")
    except OSError as error:
        logger.info("Without a marker, a run that is killed stays RUNNING: %s", error)


def unmark(folder: Path, run_id: str) -> None:
    """Remove the marker of a run."""
    try:
        (folder / f"{run_id}.json").unlink(missing_ok=True)
    except OSError as error:
        logger.info("The marker of the run %s can't be removed: %s", run_id, error)


def orphans(folder: Path, server: str) -> Iterator[Marker]:
    """Return the runs on a server whose process is gone."""
    for file in sorted(folder.glob("*.json")):
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
            marker = Marker(entry["run_id"], entry["server"], Process(**entry["process"]))
        except FileNotFoundError:
            continue  # its process has just ended it
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.info("%s can't be read: %s", file, error)
            continue
        if marker.server == server and marker.process.is_gone():
            yield marker


def watch_signals(end_runs: Callable[[str], None]) -> None:
    """Call `end_runs(reason)` before a signal ends this process.

    Only signals that nobody else handles are taken, and only from the main thread, as Python
    demands. The process ends with the signal's own status, its children before it.
    """
    handlers = state.current().signal_handlers
    if handlers or threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal is not waited for
        if os.getpid() != owner:  # a forked worker: the run is not its own to end
            os.kill(os.getpid(), number)
        # In a thread: whatever lock the interrupted code holds, it can go on and release it.
        threading.Thread(target=end_all, args=(number,), name="end-by-signal").start()

    def end_all(number: int) -> None:
        try:
            end_runs(signal.Signals(number).name)
        finally:
            for child in multiprocessing.active_children():
                child.terminate()
            os.kill(os.getpid(), number)

    for number in _DEADLY:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
            handlers[number] = end


def forget_signals() -> None:
    """Restore the signal handlers that `watch_signals` has replaced."""
    if threading.current_thread() is threading.main_thread():
        handlers = state.current().signal_handlers
        while handlers:
            number, handler = handlers.popitem()
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)


def managers() -> list[int]:
    """Return the process ids of the managers that Kedro's ParallelRunner has started here."""
    children = multiprocessing.active_children()
    return [p.pid for p in children if p.pid and p.name.startswith("ParallelRunnerManager")]


def is_child_of(pid: int) -> bool:
    """Check whether this is a worker process that the process with this id has started."""
    parent = multiprocessing.parent_process()
    return parent is not None and parent.pid == pid


def follow_parent(pid: int, managers: Sequence[int]) -> None:
    """End this worker process as soon as its parent is gone, and the parent's managers with it.

    Python's process pools go on waiting for a parent that was killed outright.
    """
    parent = multiprocessing.parent_process()
    held = state.current()
    if parent is None or parent.pid != pid or held.is_following_parent:
        return
    held.is_following_parent = True

    def follow() -> None:
        parent.join()
        for manager in managers:
            with suppress(ProcessLookupError):  # another worker was first
                os.kill(manager, signal.SIGTERM)
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
