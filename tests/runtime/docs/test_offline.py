"""What `docs/offline.md` shows is run, and does what the text says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from mlflow import MlflowClient

from ...conftest import REPOSITORY
from ...support import forks
from ...support.projects import ONE_NODE, Project
from ...support.servers import free_port, mlflow_server

GUIDE = (REPOSITORY / "docs" / "offline.md").read_text("utf-8")
(CONFIGURATION,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
(COMMANDS,) = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
(SENTENCE,) = re.findall(r"^```text\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)

ADDRESS = "127.0.0.1:5000"


def test_the_sentence_of_the_guide_is_what_a_run_without_a_server_says(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    address = f"127.0.0.1:{free_port()}"
    server, _, _ = CONFIGURATION.partition("tracking:")
    project.mlflow_yml(server.replace(ADDRESS, address))

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert ended.stderr.endswith(SENTENCE.replace(ADDRESS, address))
    assert not (project.path / ".mlflow-offline").exists()


def test_the_commands_of_the_guide_replay_a_run(project: Project, tmp_path: Path) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    port = free_port()
    project.mlflow_yml(CONFIGURATION.replace("5000", str(port)))
    recorded = project.kedro("run")
    assert recorded.returncode == 0, recorded.stderr
    (file,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    client = MlflowClient(f"sqlite:///{file.as_posix()}")
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    path = forks.write_commands(tmp_path / "bin", "kedro")

    with mlflow_server(tmp_path, port=port):
        ended = subprocess.run(
            ["bash", "-euc", f'PATH="{path}"\n{COMMANDS}'],
            cwd=project.path,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "40"},  # ids stay whole in any terminal
        )
        client = MlflowClient(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name(project.package)
        assert experiment
        (replayed,) = client.search_runs([experiment.experiment_id])

    assert replayed.data.params == run.data.params
    assert replayed.data.tags["kedro_recorded_as"] == run.info.run_id
    assert replayed.info.start_time == run.info.start_time
    assert replayed.info.end_time == run.info.end_time
    assert ended.stdout.count(run.info.run_id) == 2
    assert ended.stdout.count(replayed.info.run_id) == 1
