"""Run `python -m …` or `-c …` in a process forked from one that has imported MLflow.

The import takes seconds. A fork is a process of its own, with its environment, folder, output,
signals and exit status. What it doesn't do as a new process are the first imports of libraries: a
test that is about these starts a new one.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# What runs import, but for Kedro: it reads settings, and sets up logging, when it is imported.
# Not each environment has all.
LIBRARIES = [
    "attr",
    "boto3",
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_worker",
    "dynaconf",
    "fsspec.implementations.local",
    "git",
    "matplotlib.pyplot",
    "mlflow.models",
    "mlflow.pyfunc",
    "mlflow.sklearn",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.rest_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "more_itertools",
    "omegaconf",
    "pandas",
    "pydantic",
    "rich.logging",
    "rich.table",
    "sklearn.linear_model",
    "skops.io",
]
# The longest message: a request with the environment of a process.
SIZE = 1 << 20


class Fork:
    """A running process, with what the tests use of `subprocess.Popen`."""

    def __init__(self, server: socket.socket, stdout: int | None) -> None:
        self.pid = int(server.recv(SIZE))
        self.stdout = None if stdout is None else io.TextIOWrapper(io.FileIO(stdout))
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait, args=(server,), daemon=True).start()

    def _wait(self, server: socket.socket) -> None:
        with server:
            self.returncode = int(server.recv(SIZE))
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
        module: The module, or package, to run; `-c` for the code that is the first argument.
        words: Its arguments.
        folder: Where it works.
        env: Its environment.
        stdout: Descriptor of a file for what it writes; by default a pipe to `stdout` of the fork.
        stderr: Descriptor of a file for its errors; by default they go where the output goes.
        new_session: Whether it leads a session of its own, as a command in a terminal.
    """
    return _ask(_server(), module, words, folder, env, stdout, stderr, new_session)


def run(
    module: str, words: Sequence[str], folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module words` to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(module, words, folder, env, stdout=out.fileno(), stderr=err.fileno())
        try:
            status = process.wait(300)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([module, *words], status, out.read(), err.read())


def write_commands(folder: Path, *modules: str) -> str:
    """Write commands into a new folder that run modules in forks; gives a PATH with them."""
    folder.mkdir()
    for module in modules:
        file = folder / module
        words = f"{sys.executable} -IS {__file__} ask {_server()} {module}"
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def _ask(
    server: str,
    module: str,
    words: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    stdout: int | None = None,
    stderr: int | None = None,
    new_session: bool = False,
) -> Fork:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(server)
    read, write = (None, stdout) if stdout is not None else os.pipe()
    request = {
        "module": module,
        "words": words,
        "folder": str(folder),
        "env": dict(env),
        "new_session": new_session,
    }
    descriptors = [write, write if stderr is None else stderr]
    socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
    if read is not None:
        os.close(write)
    return Fork(connection, read)


@cache
def _server() -> str:
    """Start the process to fork from; gives the address of its socket."""
    folder = tempfile.TemporaryDirectory(prefix="forks")
    address = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(16)
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.PIPE,  # the server ends when nobody has the other end
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )

    @atexit.register
    def end() -> None:
        process.kill()
        process.communicate()
        folder.cleanup()

    return address


def _serve(listener: socket.socket) -> str:
    """Fork for each request; returns in a fork, with the module to run there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    text, (stdout, stderr), _, _ = socket.recv_fds(connection, SIZE, 2)
    process = os.fork()
    if process:
        os.close(stdout)
        os.close(stderr)
        connection.send(str(process).encode())
        _, status = os.waitpid(process, 0)
        with suppress(OSError):  # who has asked is gone
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    with open(os.devnull) as nothing:  # noqa: PTH123
        for file, number in ((nothing.fileno(), 0), (stdout, 1), (stderr, 2)):
            os.dup2(file, number)
    os.close(stdout)
    os.close(stderr)
    request = json.loads(text)
    _become(request)
    return str(request["module"])


def _become(request: dict[str, Any]) -> None:
    """Make this process what a new one would be."""
    if request["new_session"]:
        os.setsid()
    # As in a terminal, whoever runs the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    if "PYTHONWARNINGS" in os.environ:
        warnings.simplefilter(os.environ["PYTHONWARNINGS"])  # type: ignore[arg-type]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [request["folder"], *filter(None, paths)]
    sys.argv[1:] = request["words"]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        del sys.path[0]  # this file's folder
        for name in LIBRARIES:
            with suppress(ImportError):
                import_module(name)
        # Whoever asks `inspect` for the module of a frame, as Dynaconf and pydantic do, has it note
        # the files of all modules first.
        inspect.getmodule(inspect.currentframe())
        gc.freeze()  # what is never collected needs no copy in each fork
        name = _serve(socket.socket(fileno=int(sys.argv[2])))
        if name == "-c":
            sys.argv[:2], code = ["-c"], sys.argv[1]
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        _, _, address, name, *arguments = sys.argv
        fork = _ask(address, name, arguments, Path.cwd(), os.environ, 1, 2)
        status = fork.wait()
        sys.exit(status if status >= 0 else 128 - status)
