"""Servers that tests start on loopback."""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any


def free_port() -> int:
    """Return a port that nobody listens on.

    It is below those that systems give to whoever asks for any: a server that takes half a minute
    to start would find one of these taken by somebody's connection.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


UVICORN = "Uvicorn running on"


@contextmanager
def running(
    command: Sequence[str],
    folder: Path,
    *,
    ready: str = UVICORN,
    env: Mapping[str, str] = os.environ,
    end: signal.Signals = signal.SIGKILL,
    **owner: Any,
) -> Iterator[list[str]]:
    """Run a command, from when it is ready to the end of the block; gives the lines it prints.

    Args:
        command: The program and its arguments.
        folder: Where it works.
        ready: What it prints when it is ready.
        env: Its environment.
        end: The signal that ends it, and what it has started: an orderly end may take ten seconds.
        owner: Whose process it is: `user`, `group` and `extra_groups` of `subprocess.Popen`.

    Raises:
        RuntimeError: It has ended before it was ready.
    """
    log: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**env, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **owner,
    )
    assert process.stdout
    try:
        for line in process.stdout:
            log.append(line)
            if ready in line:
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended:\n{''.join(log)}")
        # It may not wait for a reader of what it prints.
        threading.Thread(target=log.extend, args=(process.stdout,), daemon=True).start()
        yield log
    finally:
        _end(process, end)


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    os.killpg(process.pid, how)
    try:
        process.wait(60)
    finally:
        # What it has left behind ends too; mostly there is nothing.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


MLFLOW = (sys.executable, "-m", "mlflow")


@contextmanager
def mlflow_server(
    folder: Path,
    *options: str,
    store: str = "",
    artifacts: str = "",
    mlflow: Sequence[str] = MLFLOW,
    ready: str = UVICORN,
    env: Mapping[str, str] = MappingProxyType({}),
    port: int = 0,
) -> Iterator[int]:
    """Serve a store with proxied artifacts, by default a SQLite file and a folder; gives the port.

    Args:
        folder: Where the server works.
        options: Further options of `mlflow server`.
        store: URI of the runs.
        artifacts: URI of the artifacts.
        mlflow: Command of the MLflow that serves.
        ready: What it logs when it is ready.
        env: Environment variables for it.
        port: Where it listens; by default a free port.
    """
    port = port or free_port()
    command = [*mlflow, "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    store = store or f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
    artifacts = artifacts or (folder / "artifacts").as_uri()
    command += [f"--backend-store-uri={store}", f"--artifacts-destination={artifacts}", *options]
    # Jobs are half a dozen more processes.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **env}
    with running(command, folder, ready=ready, env=env):
        yield port


@dataclass(frozen=True)
class CountingProxy:
    """The address of a proxy, and what it was asked: `POST /api/2.0/mlflow/runs/create`, …"""

    uri: str
    requests: list[str]
    headers: list[dict[str, str]]


# Gives the status and the text of an answer, or None for a request that is passed on.
Refusal = Callable[[str, Mapping[str, str]], "tuple[int, str] | None"]


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP in a thread; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def counting_proxy(port: int, refuse: Refusal | None = None) -> Iterator[CountingProxy]:
    """Pass HTTP requests on to a port of this machine and keep what was asked.

    Those that `refuse` has an answer for, given path and headers, are answered here.
    """
    requests: list[str] = []
    headers: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def forward(self) -> None:
            requests.append(f"{self.command} {self.path.partition('?')[0]}")
            headers.append(dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if refused := refuse and refuse(self.path, dict(self.headers)):
                self.answer(refused[0], refused[1].encode())
                return
            behind = http.client.HTTPConnection("127.0.0.1", port)
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            self.answer(answer.status, answer.read(), answer.getheaders())
            behind.close()

        def answer(
            self, status: int, content: bytes, headers: Iterable[tuple[str, str]] = ()
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, *args: Any) -> None:
            """Stay quiet."""

    with _serving(Handler) as address:
        yield CountingProxy(address, requests, headers)


@contextmanager
def answering(
    status: int = 0, headers: Mapping[str, str] = MappingProxyType({}), body: str = ""
) -> Iterator[CountingProxy]:
    """Give one answer to all that is asked, as a proxy to `CONNECT` too.

    Without a status the connection is closed. The answer has no other headers than its length.
    """
    requests: list[str] = []
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(f"{self.command} {self.path.partition('?')[0]}")
            received.append(dict(self.headers))
            if status:
                self.send_response_only(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

        do_CONNECT = do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            """Stay quiet."""

    with _serving(Handler) as address:
        yield CountingProxy(address, requests, received)


@contextmanager
def trickling(answer: bytes, interval: float) -> Iterator[str]:
    """Give one answer to all that is asked, a byte in each so many seconds; gives the address."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # the client has had enough
                for byte in answer:
                    if ended.wait(interval):
                        return
                    self.wfile.write(bytes([byte]))

        def log_message(self, *args: Any) -> None:
            """Stay quiet."""

    with _serving(Handler) as address:
        try:
            yield address
        finally:
            ended.set()
