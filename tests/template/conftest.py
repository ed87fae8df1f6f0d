"""What the tests of the template share: git as on a fresh machine, and a folder as one value."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Kedro brings the second where Python hasn't the first.
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@pytest.fixture(scope="package", autouse=True)
def plain_git() -> Iterator[None]:
    """Keep the user's git settings, and those of a hook that runs the tests, away from git."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("GIT_"):
                patch.delenv(name)
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        for role in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{role}_NAME", "Somebody")
            patch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
        yield


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it says."""
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, encoding="utf-8"
    ).stdout


def files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder: {path: content}."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts(folder: Path) -> dict[str, str]:
    """Read every file below a folder as text: {path: text}."""
    return {name: content.decode("utf-8") for name, content in files(folder).items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    table: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    return table


def changed_by_hooks(folder: Path) -> list[str]:
    """Name the files that the shipped pre-commit hooks for whitespace would change."""
    return [
        name
        for name, text in texts(folder).items()
        if not name.startswith("data/")
        if any(line != line.rstrip(" \t\r") for line in text.split("\n"))
        or (text and (not text.endswith("\n") or text.endswith("\n\n")))
    ]


def ruff(folder: Path, *arguments: str) -> str:
    """Run ruff with the folder's own configuration; the empty text when it finds nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet", "."],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
    )
    return done.stdout + done.stderr


def complaints(folder: Path, tool: str, *arguments: str) -> str:
    """Run a linter that came with the tests' packages; the empty text when it finds nothing."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / tool), *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
    )
    return done.stdout + done.stderr if done.returncode else ""
