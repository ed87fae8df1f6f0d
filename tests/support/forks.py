"""Run `python -m …` in a process forked from one that has imported MLflow, which takes seconds.

A fork is a process of its own, with its environment, folder, output, signals and exit status. What
it doesn't do as a new process are the first imports of libraries: a test that is about these starts
a new one.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

# What runs import; not each environment has all.
LIBRARIES = [
    "boto3",
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_worker",
    "git",
    "kedro.framework.cli",
    "kedro.framework.session",
    "kedro.runner",
    "kedro_datasets.json",
    "kedro_datasets.pandas",
    "kedro_datasets.text",
    "matplotlib.pyplot",
    "mlflow.models",
    "mlflow.pyfunc",
    "mlflow.sklearn",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.rest_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "pydantic",
    "rich.table",
    "skops.io",
    "sklearn.linear_model",
]
# A request with the environment of a process.
SIZE = 1 << 20


class Fork:
    """A running process, with what the tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, answers: socket.socket, stdout: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait, args=(answers,), daemon=True).start()

    def _wait(self, answers: socket.socket) -> None:
        with answers:
            self.returncode = int(answers.recv(SIZE))
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, None]:
        """Read what is left of the output, and wait for the end."""
        text = ""
        if self.stdout and not self.stdout.closed:
            with self.stdout:
                text = self.stdout.read()
        self.wait()
        return text, None


def start(
    module: str,
    words: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    new_session: bool = False,
) -> Fork:
    """Start `python -m module words`.

    Args:
        module: The module, or package, to run.
        words: Its arguments.
        folder: Where it works.
        env: Its environment.
        stdout: Descriptor of a file for what it writes; by default a pipe to `stdout` of the fork.
        stderr: Descriptor of a file for its errors; by default they go where the output goes.
        new_session: Whether it leads a session of its own, as a command in a terminal.
    """
    answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = (None, stdout) if stdout is not None else os.pipe()
    request = {
        "module": module,
        "words": words,
        "folder": str(folder),
        "env": dict(env),
        "new_session": new_session,
    }
    descriptors = [theirs.fileno(), write, write if stderr is None else stderr]
    socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
    theirs.close()
    if read is not None:
        os.close(write)
    pid = int(answers.recv(SIZE))
    file = None if read is None else io.TextIOWrapper(io.FileIO(read), encoding="utf-8")
    return Fork(pid, answers, file)


@cache
def _server() -> socket.socket:
    """Start the process to fork from; gives the socket for requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    @atexit.register
    def end() -> None:
        ours.close()
        process.kill()
        process.wait()

    return ours


def _serve(requests: socket.socket) -> str:
    """Fork for each request; returns in a fork, with the module to run there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, SIZE, 3)
        if not text:
            sys.exit()
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    process = os.fork()
    if process:
        answers = socket.socket(fileno=descriptors[0])
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        answers.send(str(process).encode())
        _, status = os.waitpid(process, 0)
        with suppress(OSError):  # nobody is left to hear it
            answers.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    request = json.loads(text)
    _become(request, descriptors)
    return str(request["module"])


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Make this process what a new one would be."""
    if request["new_session"]:
        os.setsid()
    _, stdout, stderr = descriptors
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in descriptors:
        os.close(descriptor)
    # As in a terminal, whoever runs the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [request["folder"], *filter(None, paths)]
    sys.argv[1:] = request["words"]


def main() -> None:
    """Import what a run needs, and run what is asked for."""
    del sys.path[0]  # this file's folder
    for name in LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    # Kedro reads its settings, and sets up logging, when it is imported.
    for name in list(sys.modules):
        if name.partition(".")[0] in ("kedro", "kedro_datasets"):
            del sys.modules[name]
    gc.freeze()  # what is never collected needs no copy in each fork
    module = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
