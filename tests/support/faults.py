"""A proxy that breaks the connection to an MLflow server, at a request that a test chooses."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, NamedTuple

from .forks import Fork
from .servers import free_port

Kind = Literal["refuse", "reset", "hang", "500", "503", "401", "slow", "full"]


def _error(message: str) -> str:
    return json.dumps({"error_code": "INTERNAL_ERROR", "message": message})


# What an MLflow server says, or what stands before it.
ANSWERS: dict[str, tuple[int, str]] = {
    "500": (500, _error("out of penguins")),
    "503": (503, "<html><body><h1>503 Service Unavailable</h1></body></html>"),
    "401": (401, "You are not authenticated: the token has expired."),
    "full": (500, _error("(sqlite3.OperationalError) database or disk is full")),
}

# How late a slow server answers, in seconds: any client waits longer.
DELAY = 0.2


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and with which requests.

    Args:
        kind: `refuse` closes the port; `reset` breaks the connection off (RST); `hang` never
            answers; a number is answered with that status; `slow` answers late, but in time;
            `full` is a server whose disk is full: it reads, and answers 500 to what writes.
        at: The first request that suffers, counted from 0 over all that the proxy has seen. The
            port is closed before it could come: while the one before is answered.
        times: How many requests suffer; None for all until `heal()`. Nobody can count who knocks
            at a closed port, so that one is closed until `heal()`.
        processed: The server does what it is asked to, and then the answer is lost. Without it a
            request doesn't reach the server, but for half of the body of one that is reset.
        torn: The connection is reset in the middle of the answer, and not before it.
        only: What the path of a request has that suffers; `at` counts such requests only.
    """

    kind: Kind
    at: int = 0
    times: int | None = None
    processed: bool = False
    torn: bool = False
    only: str = ""

    def __post_init__(self) -> None:
        if self.kind == "refuse" and (self.times or self.processed or self.only):
            raise ValueError("A closed port can't count who knocks, nor choose, nor pass on.")
        if self.torn and not (self.kind == "reset" and self.processed):
            raise ValueError("There is only an answer to tear when the request was processed.")

    def __str__(self) -> str:
        how = " within the answer" if self.torn else " after all is done" * self.processed
        of = f" of {self.only}" if self.only else ""
        return f"{self.kind}{how} from {self.at}{of} {f'{self.times}x' if self.times else 'on'}"

    def hits(self, request: str, before: list[str]) -> bool:
        """Tell whether a request suffers that comes after others."""
        if self.only not in request:
            return False
        index = sum(self.only in earlier for earlier in before)
        if self.kind == "full" and not writes(request):
            return False
        return self.at <= index and (self.times is None or index < self.at + self.times)


def writes(request: str) -> bool:
    """Tell whether a request, such as `POST /api/2.0/mlflow/runs/create`, changes the store."""
    method, _, path = request.partition(" ")
    return method != "GET" and not path.endswith("/search")


class FaultyProxy:
    """The address of a proxy in front of a port, what it was asked, and what goes wrong there.

    Requests are kept as `POST /api/2.0/mlflow/runs/create`. `struck` is set once a request has
    met the fault, or the port is closed.
    """

    def __init__(self, port: int) -> None:
        self.behind = port
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.struck = threading.Event()
        self._fault: Fault | None = None
        self._lock = threading.RLock()
        self._open = threading.Event()
        self._stopped = False
        self._connections: set[socket.socket] = set()
        self._idle: set[socket.socket] = set()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(128)
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def plan(self, fault: Fault) -> None:
        """Let something go wrong, at once or with a request that is still to come."""
        with self._lock:
            self._fault = fault
            self.struck.clear()
            self._close_when_due()

    def heal(self) -> None:
        """Let nothing go wrong from now on; what hangs stays without an answer."""
        with self._lock:
            self._fault = None
            if not self._open.is_set():
                self._listener.listen(128)
                self._open.set()

    def wait_until_struck_or_ended(self, process: Fork) -> bool:
        """Wait until the fault strikes or a process ends; tells whether the process goes on."""

        def wait() -> None:
            process.wait()
            self.struck.set()

        threading.Thread(target=wait, daemon=True).start()
        assert self.struck.wait(120)
        return process.poll() is None

    def _close_when_due(self) -> None:
        """Close the port when the next request is one that must not come."""
        fault = self._fault
        if fault is None or fault.kind != "refuse" or len(self.requests) < fault.at:
            return
        self.struck.set()
        if self._open.is_set():
            self._open.clear()
            # Closes the port, but leaves it to this socket: nobody else can take it meanwhile.
            self._listener.shutdown(socket.SHUT_RDWR)
        for connection in self._idle:
            _shut(connection)

    def begin(
        self, connection: socket.socket, request: str, headers: dict[str, str]
    ) -> Fault | None:
        """Count a request; gives the fault that it suffers from."""
        with self._lock:
            self._idle.discard(connection)
            fault = self._fault
            suffers = fault is not None and fault.hits(request, self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self._close_when_due()
            return fault if suffers else None

    def end(self, connection: socket.socket) -> bool:
        """Note that a request is answered; tells whether the connection may be used again."""
        with self._lock:
            if self._open.is_set():
                self._idle.add(connection)
            return self._open.is_set()

    def stop(self) -> None:
        """Close the port and all connections."""
        with self._lock:
            self._stopped = True
            if self._open.is_set():
                self._listener.shutdown(socket.SHUT_RDWR)
            self._open.set()
            for connection in self._connections:
                _shut(connection)
            self._listener.close()

    def _accept(self) -> None:
        while not self._stopped:
            self._open.wait()
            try:
                connection, address = self._listener.accept()
            except OSError:  # the port was closed
                continue
            with self._lock:
                self._connections.add(connection)
                self._idle.add(connection)
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            with suppress(ConnectionError):  # the client is gone, or was cut off
                _Handler(connection, address, self)  # type: ignore[arg-type]
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._idle.discard(connection)
                connection.close()


@contextmanager
def faulty_proxy(port: int, fault: Fault | None = None) -> Iterator[FaultyProxy]:
    """Pass HTTP requests on to a port of this machine, but for those that meet the fault."""
    proxy = FaultyProxy(port)
    try:
        if fault:
            proxy.plan(fault)
        yield proxy
    finally:
        proxy.stop()


class _Answer(NamedTuple):
    status: int
    content: bytes
    headers: Iterable[tuple[str, str]]


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with as many requests as it likes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: FaultyProxy  # type: ignore[assignment]

    def handle_request(self) -> None:
        proxy = self.server
        request = f"{self.command} {self.path.partition('?')[0]}"
        body = self._body()
        fault = proxy.begin(self.connection, request, dict(self.headers))
        if fault is None:
            self._reply(self._pass_on(body))
        else:
            self._fail(fault, body)
        if not proxy.end(self.connection):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

    def _fail(self, fault: Fault, body: bytes) -> None:
        answer = self._pass_on(body) if fault.processed else None
        # A test may act now: what the server was to do is done.
        self.server.struck.set()
        if fault.kind == "slow":
            threading.Event().wait(DELAY)
            self._reply(self._pass_on(body))
        elif fault.kind in ANSWERS:
            status, text = ANSWERS[fault.kind]
            self._reply(_Answer(status, text.encode(), [("Content-Type", "text/plain")]))
        elif fault.kind == "hang":
            self.connection.recv(1)  # ends when the client has had enough
            self.close_connection = True
        else:
            if body and fault.kind == "reset" and not fault.processed:
                self._pass_half_on(body)
            if answer and fault.torn:
                self._reply(answer, len(answer.content) // 2)
            _reset_at_close(self.connection)
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":  # as that of an empty file
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _head(self, body: bytes) -> http.client.HTTPConnection:
        """Send all but the body to the server."""
        server = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in _of_the_message(self.headers.items()):
            server.putheader(name, value)
        server.putheader("Content-Length", str(len(body)))
        server.endheaders()
        return server

    def _pass_on(self, body: bytes) -> _Answer:
        server = self._head(body)
        server.send(body)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        return _Answer(answer.status, content, answer.getheaders())

    def _pass_half_on(self, body: bytes) -> None:
        server = self._head(body)
        server.send(body[: len(body) // 2])
        _reset_at_close(server.sock)
        server.close()

    def _reply(self, answer: _Answer, length: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in _of_the_message(answer.headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content[:length])

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""


def _of_the_message(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Leave out the headers that are about the connection."""
    of_the_connection = ("transfer-encoding", "content-length", "connection")
    return ((name, value) for name, value in headers if name.lower() not in of_the_connection)


def _reset_at_close(connection: socket.socket) -> None:
    """Have a connection end with RST, as that of a machine that has crashed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed by the other side
        connection.shutdown(socket.SHUT_RDWR)
