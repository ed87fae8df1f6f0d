"""What `docs/offline.md` shows is run, and does what the text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from ..conftest import REPOSITORY
from .conftest import Project
from .servers import free_port, mlflow_server
from .test_runs import ONE_NODE

GUIDE = (REPOSITORY / "docs" / "offline.md").read_text("utf-8")
(CONFIGURATION,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
(COMMANDS,) = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
SENTENCE, UI = re.findall(r"^```text\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)

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


def test_the_commands_of_the_guide_send_a_recorded_run(project: Project, tmp_path: Path) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    address = f"127.0.0.1:{free_port()}"
    project.mlflow_yml(CONFIGURATION.replace(ADDRESS, address))
    recorded = project.kedro("run")
    assert recorded.returncode == 0, recorded.stderr
    folder = re.search(r"sqlite:///(\S+)/mlflow.db", UI)
    assert folder
    place = project.path / folder[1].replace("5000", address.partition(":")[2])
    (run,) = MlflowClient(f"sqlite:///{place}/mlflow.db").search_runs(
        [MlflowClient(f"sqlite:///{place}/mlflow.db").search_experiments()[0].experiment_id]
    )
    here = Path(sys.executable).parent

    with mlflow_server(tmp_path) as port:
        project.mlflow_yml(CONFIGURATION.replace("5000", str(port)))
        place.rename(place.with_name(f"http-127.0.0.1-{port}"))  # its address is another now
        ended = subprocess.run(
            ["bash", "-euc", f'PATH="{here}:$PATH"\n{COMMANDS}'],
            cwd=project.path,
            check=True,
            capture_output=True,
            text=True,
        )
        client = MlflowClient(f"http://127.0.0.1:{port}")
        (sent,) = client.search_runs([client.search_experiments()[0].experiment_id])

    assert sent.data.params == run.data.params
    assert sent.info.start_time == run.info.start_time
    assert sent.info.end_time == run.info.end_time
    uri = f"http://127.0.0.1:{port}"
    assert re.findall("^(?:Sent|Nothing|Removed).*$", ended.stdout, re.MULTILINE) == [
        f"Sent to {uri}: 1 run.",
        f"Nothing waits for {uri}.",
        "Removed from the disk: 1 run.",
    ]
