"""What all tests share: the template as a plain folder, and projects made from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import copier
import pytest

REPOSITORY = Path(__file__).parents[1]

# Nothing may be sent anywhere, and nothing of the machine may decide how a test ends.
os.environ.update(DO_NOT_TRACK="1", MLFLOW_DISABLE_TELEMETRY="true")
for name in list(os.environ):
    if name.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN", "MLFLOW_EXPERIMENT", "KEDRO_")):
        del os.environ[name]

Generate = Callable[..., Path]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template without its git history, which Copier then needs not clone."""
    folder = tmp_path_factory.mktemp("template")
    for name in ("copier.yml", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("includes", "template"):
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def generate(template: Path) -> Generate:
    """Generate a project into a folder, with the answers given as keywords."""

    def generate(folder: Path, **answers: object) -> Path:
        copier.run_copy(str(template), folder, data=answers, defaults=True, quiet=True)
        return folder

    return generate
