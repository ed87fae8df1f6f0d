"""Run `kedro mlflow …` in the test's own process, which saves the seconds of a new one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
from kedro.framework.startup import bootstrap_project

from .projects import Project


@dataclass(frozen=True)
class Ended:
    """How a command has ended, and what it has written."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The one sentence that the command has ended with."""
        assert (self.status, self.out) == (1, ""), self
        (sentence,) = (line for line in self.err.splitlines() if line.startswith("Error: "))
        return sentence.removeprefix("Error: ")


Command = Callable[..., Ended]


@pytest.fixture
def mlflow_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `kedro mlflow …` on a project, as wide as `columns`."""

    def run(project: Project, *words: str, columns: int = 200) -> Ended:
        monkeypatch.setenv("COLUMNS", str(columns))
        metadata = bootstrap_project(project.path)
        commands = import_module(f"{project.package}.cli").cli
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main(["mlflow", *words], obj=metadata)
        sys.stdout.flush()
        written = capsys.readouterr()
        return Ended(int(ended.value.code or 0), written.out, written.err)

    return run
