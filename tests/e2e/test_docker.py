"""What the Dockerfile does, done without Docker: its files are copied and its commands run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from .conftest import Shell


def test_the_steps_of_the_dockerfile_give_a_project_that_runs_without_its_sources(
    clone: Path, tmp_path: Path, shell: Shell, pytestconfig: pytest.Config
) -> None:
    project, app = tmp_path / "my_project", tmp_path / "app"
    shell(f"uvx copier copy --defaults --data=docker=true {clone} {project}", tmp_path)
    dockerfile = (project / "Dockerfile").read_text()
    _, _, build, final = re.split(r"^FROM .*\n", dockerfile, flags=re.MULTILINE)
    assert "UV_COMPILE_BYTECODE=1 " in build
    if not pytestconfig.getoption("--all"):  # most of the time is that of the compiler
        build = build.replace("UV_COMPILE_BYTECODE=1 ", "")

    follow(build, project, app, shell)
    for left_behind in {path.name for path in app.iterdir()} - {".venv"}:
        remove(app / left_behind)
    copies = [line for line in final.splitlines() if line.startswith("COPY conf")]
    follow("\n".join(copies), project, app, shell)
    shutil.copytree(project / "data", app / "data")  # the volume
    (command,) = json.loads(final.partition("ENTRYPOINT")[2])
    store = f"sqlite:///{tmp_path.as_posix()}/runs.db"
    shell(f".venv/bin/{command}", app, MLFLOW_TRACKING_URI=store)

    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (experiment.name, run.info.status) == ("my_project", "FINISHED")
    assert run.data.metrics["accuracy"] > 0.9


def follow(stage: str, project: Path, app: Path, shell: Shell) -> None:
    """Copy and run what a stage of a Dockerfile says, in a folder instead of /app."""
    app.mkdir(exist_ok=True)
    env: dict[str, str] = {}
    for line in stage.splitlines():
        instruction, _, words = line.partition(" ")
        if instruction == "ENV":
            env |= dict(word.split("=", 1) for word in words.split())
        elif instruction == "RUN":
            shell(re.sub(r"--mount=\S+ ", "", words), app, **env)
        elif instruction == "COPY" and not words.startswith("--from"):
            *sources, target = words.split()
            for source in (path for pattern in sources for path in project.glob(pattern)):
                if source.is_dir():
                    shutil.copytree(source, app / target)
                else:
                    shutil.copy(source, app / target)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
