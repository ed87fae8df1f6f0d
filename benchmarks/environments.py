"""Two virtual environments that differ in kedro-mlflow alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .cases import Variant

PEER = "kedro-mlflow"
PEER_VERSION = "2.0.3"


def make_environments(folder: Path) -> dict[Variant, Path]:
    """Make or update the environments; gives the folder of each variant's.

    kedro-mlflow has one of its own, because as a plugin of Kedro it would slow every command of
    an environment that it is merely installed in. Every other package is the same in both, and
    kedro-telemetry is left out of both, as it is in generated projects.
    """
    wanted = [f"{package}=={version(package)}" for package in ("kedro", "mlflow")]
    wanted += ["kedro-datasets", f"{PEER}=={PEER_VERSION}"]
    compiled = _uv("pip", "compile", "-", "--no-emit-package=kedro-telemetry", stdin=wanted)
    pinned = compiled.splitlines()
    without_peer = [line for line in pinned if not line.startswith(f"{PEER}==")]
    plain = _environment(folder / f"plain-{platform.python_version()}", without_peer)
    peer = _environment(folder / f"peer-{platform.python_version()}", pinned)
    return {"plain": plain, "peer": peer, "ours": plain}


def process_variables() -> dict[str, str]:
    """Give the environment variables of what is timed: nothing of the caller's may count."""
    # Kedro and MLflow start several times slower where bytecode isn't kept.
    ours = ("KEDRO_", "MLFLOW_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _environment(folder: Path, pinned: list[str]) -> Path:
    _uv("venv", "--allow-existing", str(folder))
    _uv("pip", "sync", "-", python=folder, stdin=pinned)
    return folder


def _uv(*words: str, python: str | Path = sys.executable, stdin: list[str] | None = None) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "uv", *words, f"--python={python}", "--quiet"],
        input="\n".join(stdin or []),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ended.stdout
