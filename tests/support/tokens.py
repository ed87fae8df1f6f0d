"""A server's gate that issues tokens which expire, and what takes them in a project."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .projects import Project
from .work import SECRET

# How many requests a token holds for: it expires many times in a run.
USES = 3

PROVIDER = """
import os
import threading
from urllib.request import urlopen

from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider


class FreshToken(RequestHeaderProvider):
    \"\"\"Take a token from where they are issued, and another one when it has been used up.\"\"\"

    def __init__(self, issuer, uses):
        self._issuer, self._uses = issuer, uses
        self._left, self._owner = 0, None
        self._lock = threading.Lock()

    def in_context(self):
        return True

    def request_headers(self):
        with self._lock:
            if self._left == 0 or self._owner != os.getpid():
                with urlopen(self._issuer) as answer:
                    self._token = answer.read().decode()
                self._left, self._owner = self._uses, os.getpid()
            self._left -= 1
            return {"Authorization": f"Bearer {self._token}"}
"""


def provide(project: Project, issuer: str, uses: int = USES) -> dict[str, Any]:
    """Have a project take a new token after that many requests; gives the key of `server`."""
    project.write(f"src/{project.package}/headers.py", PROVIDER)
    arguments = {"issuer": f"{issuer}/token", "uses": uses}
    provider = {"type": f"{project.package}.headers.FreshToken", "init_kwargs": arguments}
    return {"request_header_provider": provider}


@dataclass
class Gate:
    """Issues tokens, and lets a request pass whose token has not been used too often."""

    used: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def refuse(self, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        with self.lock:
            if path == "/token":
                token = f"{SECRET}-{len(self.used)}"
                self.used[token] = 0
                return 200, token
            if token not in self.used:
                return 401, "no token"
            self.used[token] += 1
            return (401, "the token has expired") if self.used[token] > USES else None
