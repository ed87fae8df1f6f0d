"""Kedro's commands for pipelines do with those of the example what they do with any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import Generate


@pytest.mark.parametrize("pipeline", ["data_processing", "inference", "training"])
def test_a_pipeline_of_the_example_is_deleted_with_its_tests(
    generate: Generate, tmp_path: Path, pipeline: str
) -> None:
    project = generate(tmp_path / "penguins")

    run(project, "kedro", "pipeline", "delete", "--yes", pipeline)

    left = [path for path in project.rglob("*") if pipeline in path.relative_to(project).parts]
    assert left == []
    assert "error" not in run(project, "pytest", "--collect-only", "--quiet")


def run(project: Path, *command: str) -> str:
    """Run a module in a project with the packages of the tests; gives what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
