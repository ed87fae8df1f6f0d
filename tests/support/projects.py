"""A generated project to fill and run, and pipelines for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from mlflow.entities import Run
from packaging.version import Version

from . import forks

# The package in a project that is generated once for each set of answers, to copy.
PATTERN = "pattern_of_a_package"


ONE_NODE = """
from kedro.pipeline import Node, Pipeline

def double(x):
    return 2 * x

def create_pipeline():
    return Pipeline([Node(double, "params:x", "y", name="double")])
"""


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

    def start(self, *words: str, new_session: bool = False, **env: str) -> forks.Fork:
        """Start `kedro …` in a process of its own, which writes all it writes to `stdout`."""
        words = tuple(for_kedro(word) for word in words)
        return forks.start("kedro", words, self.path, os.environ | env, new_session=new_session)

    def kedro(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `kedro …` in a process of its own."""
        words = tuple(for_kedro(word) for word in words)
        return forks.run("kedro", words, self.path, {**os.environ, "COLUMNS": "200", **env})

    def kedro_anew(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `kedro …` in a new process: in one that hasn't imported anything before."""
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
