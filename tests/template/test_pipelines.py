"""Kedro's commands for pipelines do with those of the example what they do with any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..conftest import Generate
from ..support import forks


@pytest.mark.parametrize(
    "pipeline",
    [
        "training",
        pytest.param("data_processing", marks=pytest.mark.thorough),
        pytest.param("inference", marks=pytest.mark.thorough),
    ],
)
def test_a_pipeline_of_the_example_is_deleted_with_its_tests(
    generate: Generate, tmp_path: Path, pipeline: str
) -> None:
    project = generate(tmp_path / "penguins")

    run(project, "kedro", "pipeline", "delete", "--yes", pipeline)

    left = [path for path in project.rglob("*") if pipeline in path.relative_to(project).parts]
    assert left == []
    assert "error" not in run(project, "pytest", "--collect-only", "--quiet")


def run(project: Path, module: str, *words: str) -> str:
    """Run a module in a project with the packages of the tests; gives what it prints."""
    done = forks.run(module, words, project, {**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
