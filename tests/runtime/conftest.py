"""Real Kedro projects on disk, with real MLflow stores."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import fluent
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

from runtime._mlflow import replace_folder
from runtime.config.uris import sqlite_uri

from ..conftest import EXTRAS, once
from ..support.projects import PATTERN, Project, copy_of, has, let_pipelines_overlap
from ..support.s3 import S3, s3_server
from ..support.servers import CountingProxy, counting_proxy, mlflow_server

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder where what MLflow puts into the working directory does no harm."""
    folder = tmp_path / "working directory"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(scope="session")
def empty_store(of_all_workers: Path) -> Path:
    """A SQLite store with its tables, to copy: making one takes seconds."""
    folder = of_all_workers / "store"

    def make(new: Path) -> None:
        new.mkdir()
        file = new / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{file.as_posix()}", (folder / "mlartifacts").as_uri())

    return once(folder, make) / "mlflow.db"


@pytest.fixture(scope="session")
def pattern(
    generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Generate a project with all extras once for each set of answers: it takes a second."""

    @lru_cache
    def make(**answers: object) -> Path:
        answers = {"extras": EXTRAS, **answers}
        return generate(
            tmp_path_factory.mktemp("pattern") / PATTERN, package_name=PATTERN, **answers
        )

    return make


@pytest.fixture
def new_project(
    tmp_path: Path, pattern: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Project]]:
    """Make projects with all extras and no store yet; leaves no trace of them in this process."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    autologging = deepcopy(AUTOLOGGING_INTEGRATIONS)
    packages = []

    def make(**answers: object) -> Project:
        package = f"project_{os.getpid()}_{next(_numbers)}"
        packages.append(package)
        copy_of(pattern(**{"example": False, **answers}), tmp_path / package, package)
        if not has("kedro", "1.5"):
            let_pipelines_overlap(tmp_path / package, package)
        if not answers.get("example"):
            shutil.rmtree(tmp_path / package / "src" / package / "pipelines" / "first")
        return Project(tmp_path / package, package)

    yield make
    for module in list(sys.modules):
        if module.partition(".")[0] in packages:
            del sys.modules[module]
    mlflow.autolog(disable=True)
    # Else it keeps away from what a test has switched on or off by itself.
    imported = AUTOLOGGING_INTEGRATIONS.keys() - autologging.keys()
    AUTOLOGGING_INTEGRATIONS.update(autologging | {name: {} for name in imported})
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # mlflow.set_experiment leaves it there
    os.environ.pop("MLFLOW_REGISTRY_URI", None)  # and mlflow.set_registry_uri this one
    fluent._active_run_stack.set([])
    fluent._active_experiment_id = None
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture
def project(new_project: Callable[..., Project], empty_store: Path) -> Project:
    """A project without pipelines, with an empty store."""
    project = new_project()
    put_store(empty_store, project)
    return project


def put_store(empty_store: Path, project: Project) -> None:
    """Give a project an empty store, as if it was made there."""
    file = project.path / "mlflow.db"
    shutil.copy(empty_store, file)
    replace_folder(sqlite_uri(file), empty_store.parent.as_uri(), project.path.as_uri())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingProxy]:
    """An MLflow server behind a proxy that counts requests."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as port, counting_proxy(port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server: one, since all of a process would serve the same buckets."""
    with s3_server() as server:
        yield server


_started: list[list[str]] = []


@pytest.fixture
def started() -> list[list[str]]:
    """The commands that this process starts, but for git's, while a test runs."""
    if not _hooked:
        sys.addaudithook(_note_command)  # which can't be taken back
        _hooked.append(True)
    _started.clear()
    return _started


_hooked: list[bool] = []


def _note_command(event: str, values: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and Path(os.fsdecode(values[0])).name != "git":
        _started.append([str(word) for word in values[1]])
