"""Whole projects, as their users make and use them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime import _mlflow

from ..conftest import REPOSITORY
from ..support.servers import running

Shell = Callable[..., str]


def git(folder: Path, *words: str) -> str:
    """Run git in a folder, as somebody whose name doesn't matter."""
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_all(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={message}")


def console_commands(markdown: str) -> list[str]:
    """List the commands in the `console` blocks of a text."""
    blocks = re.findall(r"^```console\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def environment() -> dict[str, str]:
    """The environment of a user, who is in no virtual environment."""
    out = {"VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONPATH", "NOX_CURRENT_SESSION"}
    return {
        **{name: value for name, value in os.environ.items() if name not in out},
        "COLUMNS": "200",
        # As uv does, pip leaves it to Python to compile what is imported: false is "don't" here.
        "PIP_NO_COMPILE": "false",
    }


@contextmanager
def served(command: str, project: Path, port: int) -> Iterator[str]:
    """Run `mlflow models serve … 5001` on another port; gives the address."""
    words = command.replace("5001", str(port)).split()
    with running(words, project, env=environment(), end=signal.SIGINT):  # Ctrl-C
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the bytecode of what tests install: to compile MLflow takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, the same for all tests: only there their bytecode fits."""
    folder = tmp_path_factory.getbasetemp() / "home"
    shutil.rmtree(folder, ignore_errors=True)
    for engine in _mlflow.engines():  # of stores that an earlier test had there
        engine.dispose()
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def shell() -> Shell:
    """Run a command as a user types it; fails with all output when the status isn't as expected."""

    def run(command: str, folder: Path, *, status: int = 0, **env: str) -> str:
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    return run


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this repository as it is now, tagged v0.1.0."""
    folder = tmp_path / "km-template"
    listed = git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit_all(folder, "First version")
    git(folder, "tag", "v0.1.0")
    return folder
