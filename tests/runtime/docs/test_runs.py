"""What `docs/runs.md` shows is run, and does what the text says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ...conftest import REPOSITORY
from ...support import forks
from ...support.projects import Project

GUIDE = (REPOSITORY / "docs" / "runs.md").read_text("utf-8")
NODE, AROUND, MEASURE, KEEP_APART = re.findall(
    r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE
)
(COMMANDS,) = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)

PIPELINE = f"""
from kedro.pipeline import Node, Pipeline
{NODE}

def split():
    return [1, 2, 3]

def create_pipeline():
    return Pipeline([
        Node(split, None, "penguins", name="split"),
        Node(train, ["penguins", "params:depths"], "deepest", name="train"),
    ])
"""


def write(project: Project) -> None:
    project.pipeline(PIPELINE)
    project.parameters({"depths": [1, 3]})
    project.catalog("penguins: {type: json.JSONDataset, filepath: data/03_primary/penguins.json}")


def check(project: Project, name: str | None, status: str) -> None:
    """Check that both nodes have logged to one run, with its children."""
    runs = project.all_runs()
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert main.info.status == status
    assert name in (main.info.run_name, None)
    assert (main.data.params, main.data.metrics) == ({"depths": "[1, 3]"}, {"tried": 2})
    children = {run.info.run_name: run for run in runs if run is not main}
    assert children.keys() == {"depth 1", "depth 3"}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == main.info.run_id
        assert child.info.status == "FINISHED"


def test_the_node_of_the_guide_logs_to_the_run_and_to_children(project: Project) -> None:
    write(project)

    project.run()

    check(project, "__default__", "FINISHED")


def test_the_script_of_the_guide_makes_one_run(project: Project) -> None:
    write(project)
    script = f"import mlflow\nmlflow.set_tracking_uri({project.tracking_uri!r})\n{AROUND}"

    ended = forks.run("-c", [script], project.path, os.environ)

    assert ended.returncode == 0, ended.stderr
    check(project, "nightly", "FINISHED")


def test_the_commands_of_the_guide_make_one_run(project: Project, tmp_path: Path) -> None:
    write(project)
    path = forks.write_commands(tmp_path / "bin", "kedro")

    subprocess.run(["bash", "-euc", f'PATH="{path}"\n{COMMANDS}'], cwd=project.path, check=True)

    check(project, None, "RUNNING")


def test_the_hooks_of_the_guide_reach_the_run_and_have_it_in_another_store(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project)
    for name, code in (("measure", MEASURE), ("keep_apart", KEEP_APART)):
        project.write(f"src/{project.package}/{name}.py", code)
    settings = project.path / "src" / project.package / "settings.py"
    hooks = "from .keep_apart import KeepApart\nfrom .measure import Measure\n\n"
    hooks += "HOOKS = (Measure(), MlflowHook(), KeepApart())\n"
    settings.write_text(re.sub(r"HOOKS = .*\n", hooks, settings.read_text("utf-8")), "utf-8")

    project.run()

    assert project.all_runs() == []
    project.tracking_uri = f"sqlite:///{project.path.as_posix()}/apart.db"
    check(project, "__default__", "FINISHED")
    (run,) = [r for r in project.all_runs() if "mlflow.parentRunId" not in r.data.tags]
    assert run.data.tags["measured"] == "yes"
    assert f"The run has ended: {run.info.run_id}" in capsys.readouterr().out
