"""A process that tests start is waited for, read from, and ended with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ...support.servers import running

# Says its own id and that of a process which it starts, and waits for a signal.
PARENT = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(os.getpid(), child.pid)
print("ready")
signal.pause()
"""


def state(pid: int) -> str:
    """Tell how a process is: the empty text when it has ended, `Z` when nobody has asked how."""
    listed = ["ps", "-o", "state=", "-p", str(pid)]
    return subprocess.run(listed, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_process_has_started_ends_with_it(tmp_path: Path, end: signal.Signals) -> None:
    with running([sys.executable, "-c", PARENT], tmp_path, ready="ready", end=end) as log:
        parent, child = map(int, log[0].split())
        assert state(parent)
        assert state(child)

    assert state(parent) == ""
    assert state(child) in ("", "Z")


def test_a_process_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="ended:\nno port is free\n"),
        running([sys.executable, "-c", "print('no port is free')"], tmp_path, ready="ready"),
    ):
        pass


def test_a_process_may_print_more_than_a_pipe_holds(tmp_path: Path) -> None:
    done = tmp_path / "done"
    os.mkfifo(done)
    code = "print('ready')\nfor _ in range(100_000): print('a line of the log')\n"
    code += f"open({str(done)!r}, 'w').write('done')"

    with running([sys.executable, "-c", code], tmp_path, ready="ready"):
        assert done.read_text() == "done"
