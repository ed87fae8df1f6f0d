"""Servers that tests start on loopback."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """Serve a SQLite store with proxied artifacts; gives the port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--backend-store-uri=sqlite:///{(folder / 'mlflow.db').as_posix()}"]
    command += [f"--artifacts-destination={(folder / 'artifacts').as_uri()}", "--workers=1"]
    log: list[str] = []
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # half a dozen more processes
        },
        start_new_session=True,
    )
    assert server.stdout
    try:
        for line in server.stdout:
            log.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            raise RuntimeError("mlflow server ended:\n" + "".join(log))
        # Nobody may wait for a reader of the log.
        threading.Thread(target=log.extend, args=(server.stdout,), daemon=True).start()
        yield port
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@dataclass(frozen=True)
class CountingProxy:
    """The address of a proxy, and what it was asked: `POST /api/2.0/mlflow/runs/create`, …"""

    uri: str
    requests: list[str]
    headers: list[dict[str, str]]


@contextmanager
def counting_proxy(port: int) -> Iterator[CountingProxy]:
    """Pass HTTP requests on to a port of this machine and keep what was asked."""
    requests: list[str] = []
    headers: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            requests.append(f"{self.command} {self.path.partition('?')[0]}")
            headers.append(dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            behind = http.client.HTTPConnection("127.0.0.1", port)
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            behind.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, *args: Any) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield CountingProxy(f"http://127.0.0.1:{server.server_address[1]}", requests, headers)
    finally:
        server.shutdown()
        server.server_close()
