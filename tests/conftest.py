"""What all tests share: the template as a plain folder, and projects made from it.

With `--all` what takes long is tested too.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import copier
import pytest

REPOSITORY = Path(__file__).parents[1]

# Nothing may be sent anywhere, and nothing of the machine may decide how a test ends.
os.environ.update(DO_NOT_TRACK="1", MLFLOW_DISABLE_TELEMETRY="true")
for name in list(os.environ):
    if name.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN", "MLFLOW_EXPERIMENT", "KEDRO_")):
        del os.environ[name]

# Dynaconf, which reads the settings of Kedro, asks for the files of all frames. Without context
# they are the same, and not every line of the stack is looked for in thousands of modules.
inspect.stack = partial(inspect.stack, context=0)  # type: ignore[assignment]

Generate = Callable[..., Path]

EXTRAS = ("offline", "serving", "console")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="test also what takes long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: takes long, and runs with --all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        left = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template without its git history, which Copier then needs not clone."""
    return copy_template(tmp_path_factory.mktemp("copied") / "template")


def copy_template(folder: Path) -> Path:
    """Copy what Copier reads into a new folder."""
    folder.mkdir()
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
        if "extras" in answers:
            answers["extras"] = list(answers["extras"])  # type: ignore[call-overload]
        copier.run_copy(str(template), folder, data=answers, defaults=True, quiet=True)
        return folder

    return generate
