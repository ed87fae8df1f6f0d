"""What `docs/orchestrators.md` shows is run, and does what the text says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from mlflow.utils.databricks_utils import get_databricks_host_creds

from ...conftest import REPOSITORY
from ...support import forks
from ...support.projects import Project, needs_kedro
from ...support.servers import CountingProxy, counting_proxy, free_port

GUIDE = (REPOSITORY / "docs" / "orchestrators.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


(FUNCTIONS,) = blocks("python")
TASKS, DASK = blocks("console")
CONFIG, CREDENTIALS = blocks("yaml")

PIPELINE = """
import mlflow
from kedro.pipeline import Node, Pipeline

def split():
    return [1, 2, 3]

def train(penguins, depth):
    with mlflow.start_run(nested=True, run_name=f"depth {depth}"):
        mlflow.log_metric("score", len(penguins) / depth)
    mlflow.log_metric(f"score_{depth}", len(penguins) / depth)
    return len(penguins) / depth

def compare(shallow, deep):
    mlflow.log_metric("best", max(shallow, deep))

def create_pipeline():
    return Pipeline([
        Node(split, None, "penguins", name="split"),
        Node(train, ["penguins", "params:shallow"], "score_shallow", name="train_shallow"),
        Node(train, ["penguins", "params:deep"], "score_deep", name="train_deep"),
        Node(compare, ["score_shallow", "score_deep"], None, name="compare"),
    ])
"""
CATALOG = """
"{name}": {type: json.JSONDataset, filepath: "data/03_primary/{name}.json"}
"""
MODELS = ["train_shallow", "train_deep"]


def write(project: Project) -> None:
    project.pipeline(PIPELINE)
    project.parameters({"shallow": 1, "deep": 2})
    project.catalog(CATALOG)
    project.write("orchestrate.py", FUNCTIONS)


@pytest.fixture
def shared(new_project: Callable[..., Project], server: CountingProxy) -> Project:
    """A project whose tasks log to a server that the environment names."""
    project = new_project()
    write(project)
    project.tracking_uri = server.uri
    return project


def shell(project: Project, commands: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a shell in the project's folder, with this environment's commands."""
    path = forks.write_commands(project.path.with_name("bin"), "kedro")
    return subprocess.Popen(
        ["bash", "-euc", commands],
        cwd=project.path,
        env={**os.environ, "PATH": path, **env},
        start_new_session=True,
    )


def check(client: MlflowClient, experiment: str, name: str, status: str) -> None:
    """Check that all nodes have logged to one run, with its children."""
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (main.info.run_name, main.info.status) == (name, status)
    assert main.data.params == {"shallow": "1", "deep": "2"}
    assert main.data.metrics == {"score_1": 3, "score_2": 1.5, "best": 3}
    children = {run.info.run_name: run for run in runs if run is not main}
    assert children.keys() == {"depth 1", "depth 2"}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == main.info.run_id
        assert child.info.status == "FINISHED"


@pytest.mark.parametrize("failed", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_the_functions_of_the_guide_make_one_run_of_tasks_in_processes(
    shared: Project, failed: bool
) -> None:
    experiment = f"functions of {shared.package}"

    def start(call: str) -> forks.Fork:
        code = f"from orchestrate import *\nprint({call})"
        env = {**os.environ, "MLFLOW_TRACKING_URI": shared.tracking_uri}
        return forks.start("-c", [code], shared.path, env)

    def end(process: forks.Fork) -> str:
        output, _ = process.communicate()
        assert process.returncode == 0
        return output.splitlines()[-1]

    def nodes(*names: str) -> forks.Fork:
        return start(f"run_nodes({str(shared.path)!r}, {list(names)!r}, {run_id!r})")

    run_id = end(start(f"open_run({experiment!r}, 'nightly')"))
    end(nodes("split"))
    for task in [nodes(name) for name in MODELS]:
        end(task)
    end(nodes("compare"))
    end(start(f"end_run({run_id!r}, {failed})"))

    check(shared.client, experiment, "nightly", "FAILED" if failed else "FINISHED")


def test_the_commands_of_the_guide_make_one_run_of_tasks_at_once(shared: Project) -> None:
    experiment = f"commands of {shared.package}"
    commands = TASKS.replace("http://127.0.0.1:5000", shared.tracking_uri)

    assert shell(shared, commands.replace("'penguins'", f"'{experiment}'")).wait() == 0

    check(shared.client, experiment, "nightly", "FINISHED")


def test_a_task_without_its_data_fails_and_leaves_the_run_open(shared: Project) -> None:
    run = shared.client.create_run("0", run_name="nightly")

    ended = shared.kedro(
        "run",
        "--nodes=compare",
        MLFLOW_RUN_ID=run.info.run_id,
        MLFLOW_TRACKING_URI=shared.tracking_uri,
    )

    assert ended.returncode == 1
    found = shared.client.get_run(run.info.run_id)
    assert (found.info.status, found.data.metrics) == ("RUNNING", {})
    assert "score_shallow" in found.data.tags["kedro_error"]


@pytest.fixture
def nobody() -> Iterator[CountingProxy]:
    """A host that knows nothing of itself: the client of Databricks asks five minutes for it."""
    with counting_proxy(0, lambda *_: (404, "{}")) as proxy:
        yield proxy


def test_the_settings_of_the_guide_name_the_workspace_of_databricks(
    project: Project, nobody: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("conf/databricks/mlflow.yml", CONFIG)
    workspace = yaml.safe_load(CREDENTIALS)["databricks"]["DATABRICKS_HOST"]
    written = CREDENTIALS.replace(workspace, nobody.uri)
    project.write("conf/databricks/credentials.yml", written)
    given = yaml.safe_load(written)["databricks"]
    for name in given:
        monkeypatch.delenv(name, raising=False)
    bootstrap_project(project.path)

    with KedroSession.create(project.path, env="databricks") as session:
        context = session.load_context()  # type: ignore[attr-defined]
        config = context.mlflow
        variables = sys.modules[f"{project.package}.runtime.config.loading"].read_credentials(
            context
        )

    connection = config.server.connection
    assert (connection.tracking_uri, connection.registry_uri) == ("databricks", "databricks-uc")
    assert config.tracking.experiment.name == "/Shared/penguins"
    assert variables == given
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    host = get_databricks_host_creds("databricks")
    assert (host.host, host.token) == (given["DATABRICKS_HOST"], given["DATABRICKS_TOKEN"])


@needs_kedro("1.6")
def test_the_commands_of_the_guide_run_the_nodes_in_workers_of_dask(
    new_project: Callable[..., Project],
) -> None:
    project = new_project(scale_out="dask")
    write(project)
    commands = DASK.replace("8786", str(free_port())).replace("penguins.", f"{project.package}.")
    started = shell(project, commands, PYTHONPATH="src")

    try:
        assert started.wait() == 0
    finally:
        os.killpg(started.pid, signal.SIGTERM)

    check(project.client, project.package, "__default__", "FINISHED")
