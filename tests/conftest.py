"""What all tests share: the template as a plain folder, and projects made from it.

With `--all` what takes long is tested too.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import tempfile
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
inspect.stack = partial(inspect.stack, context=0)

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
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a test run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "of all workers"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless this worker or another has made it; gives the folder."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = Path(tempfile.mkdtemp(dir=folder.parent)) / folder.name
            make(new)
            new.rename(folder)
    return folder


@pytest.fixture(scope="session")
def template(of_all_workers: Path) -> Path:
    """The template without its git history, which Copier then needs not clone."""
    return once(of_all_workers / "template", copy_template)


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
def generate(template: Path, of_all_workers: Path) -> Generate:
    """Generate a project into a folder, with the answers given as keywords.

    What was generated before, with the same answers and the same name of the folder, is copied.
    """

    def generate(folder: Path, **answers: object) -> Path:
        if "extras" in answers:
            answers["extras"] = list(answers["extras"])  # type: ignore[call-overload]

        def render(place: Path) -> None:
            copier.run_copy(str(template), place, data=answers, defaults=True, quiet=True)

        if folder.exists():
            render(folder)
        else:
            wanted = hashlib.sha256(repr((folder.name, sorted(answers.items()))).encode())
            same = of_all_workers / wanted.hexdigest()
            once(same, lambda place: render(place / folder.name))
            shutil.copytree(same / folder.name, folder)
        return folder

    return generate
