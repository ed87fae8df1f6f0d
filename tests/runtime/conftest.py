"""Real Kedro projects on disk, with real MLflow stores."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import fluent
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from packaging.version import Version

from .s3 import S3, s3_server
from .servers import CountingProxy, counting_proxy, mlflow_server

_numbers = itertools.count()


def has(package: str, oldest: str) -> bool:
    """Tell whether a package is of a version or a later one."""
    return Version(version(package)) >= Version(oldest)


def needs_kedro(oldest: str) -> pytest.MarkDecorator:
    """Skip a test with a Kedro that hasn't yet what it is about."""
    return pytest.mark.skipif(not has("kedro", oldest), reason=f"Kedro {oldest} brought it")


def for_kedro(text: str) -> str:
    """Write a command, or code that runs one pipeline, as Kedro before 1.2 takes it."""
    if has("kedro", "1.2"):
        return text
    text = re.sub(r'pipeline_names=\["(\w+)"\]', r'pipeline_name="\1"', text)
    return text.replace("--pipelines=", "--pipeline=")


@dataclass
class Project:
    """A generated project without the example, to fill and run."""

    path: Path
    package: str
    tracking_uri: str = ""

    def __post_init__(self) -> None:
        self.tracking_uri = self.tracking_uri or f"sqlite:///{self.path.as_posix()}/mlflow.db"

    def write(self, file: str, text: str) -> None:
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = for_kedro(textwrap.dedent(text).replace("PACKAGE", self.package))
        path.write_text(text, encoding="utf-8")

    def pipeline(self, code: str, name: str = "work") -> None:
        """Write a pipeline: a module with its nodes and `create_pipeline`."""
        self.write(f"src/{self.package}/pipelines/{name}/__init__.py", code)

    def catalog(self, text: str) -> None:
        self.write("conf/base/catalog.yml", text)

    def parameters(self, values: dict[str, Any]) -> None:
        self.write("conf/base/parameters.yml", yaml.safe_dump(values))

    def mlflow_yml(self, text: str, env: str = "local") -> None:
        self.write(f"conf/{env}/mlflow.yml", text)

    def run(
        self, *, env: str | None = None, params: dict[str, Any] | None = None, **how: Any
    ) -> Any:
        """Run in this process, as `kedro run` does."""
        bootstrap_project(self.path)
        with KedroSession.create(project_path=self.path, env=env, runtime_params=params) as session:
            if not has("kedro", "1.2"):
                (how["pipeline_name"],) = how.pop("pipeline_names", [None])
            return session.run(**how)

    def kedro(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `kedro …` in a process of its own."""
        words = tuple(for_kedro(word) for word in words)
        return subprocess.run(
            [sys.executable, "-m", "kedro", *words],
            cwd=self.path,
            env={**os.environ, "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri)

    def all_runs(self) -> list[Run]:
        """Every run of every experiment, the newest first."""
        client = self.client
        experiments = [e.experiment_id for e in client.search_experiments()]
        return list(client.search_runs(experiments))

    def only_run(self) -> Run:
        """The one run that there has to be."""
        (run,) = self.all_runs()
        return run


def let_pipelines_overlap(project: Path, package: str) -> None:
    """Allow the same nodes in two pipelines: before Kedro 1.5 a run of one adds all of them up."""
    registry = project / "src" / package / "pipeline_registry.py"
    made = re.compile(r"^    (pipelines\[\"__default__\"\] = .*)$", re.MULTILINE)
    guarded = r"    with suppress(Exception):\n        \1"
    text = "from contextlib import suppress\n" + made.sub(guarded, registry.read_text())
    registry.write_text(text)


def heed_signals() -> None:
    """Let signals do in a process what they do in a terminal, whoever runs the tests."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder where what MLflow puts into the working directory does no harm."""
    folder = tmp_path / "working directory"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables, to copy: making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    SqlAlchemyStore(f"sqlite:///{folder.as_posix()}/mlflow.db", (folder / "mlartifacts").as_uri())
    return folder / "mlflow.db"


# The package in a project that is generated once for each set of answers, to copy.
PATTERN = "pattern_of_a_package"


@pytest.fixture(scope="session")
def pattern(
    generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Generate a project once for each set of answers: that takes most of a second."""

    @lru_cache
    def make(**answers: object) -> Path:
        return generate(
            tmp_path_factory.mktemp("pattern") / PATTERN, package_name=PATTERN, **answers
        )

    return make


def copy_of(pattern: Path, path: Path, package: str) -> None:
    """Copy a project, with another name for its package."""
    names = [(PATTERN, package), (PATTERN.replace("_", "-"), package.replace("_", "-"))]
    for source in pattern.rglob("*"):
        if source.is_file():
            target = path / source.relative_to(pattern).as_posix().replace(PATTERN, package)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            for old, new in names:
                content = content.replace(old.encode(), new.encode())
            target.write_bytes(content)


@pytest.fixture
def new_project(
    tmp_path: Path, pattern: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Project]]:
    """Make projects whose store doesn't exist yet; leaves no trace of them in this process."""
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
    shutil.copy(empty_store, project.path)
    return project


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
