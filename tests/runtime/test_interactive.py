"""In a notebook and from a script: `context.mlflow`, and MLflow's own functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from ..support import forks
from ..support.projects import ONE_NODE, Project, has
from ..support.servers import CountingProxy


def ipython(project: Project, code: str, *, anew: bool = False) -> str:
    """Run code in `kedro ipython`; in a new process, where nothing is imported yet, if wanted."""
    words = ["--ext=kedro.ipython", "--colors=NoColor", "-c", code]
    env = {**os.environ, "IPYTHONDIR": str(project.path / "ipython"), "COLUMNS": "200"}
    process = (
        subprocess.Popen(
            [sys.executable, "-m", "IPython", *words],
            cwd=project.path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if anew
        else forks.start("IPython", words, project.path, env)
    )
    shown, _ = process.communicate()
    assert process.returncode == 0, shown
    assert not re.search(r"^\w*Error\b", shown, re.MULTILINE), shown
    return shown


def test_mlflow_in_a_notebook_reads_the_projects_store(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.run()

    output = ipython(
        project,
        """
import sys
assert "mlflow" not in sys.modules
print("name:", context.mlflow.tracking.experiment.name)
import mlflow
(found,) = mlflow.search_runs(output_format="list")
print("found:", found.info.run_id)
session.run()
print("runs:", len(mlflow.search_runs()))
""",
        anew=True,
    )

    assert f"name: {project.package}" in output
    assert f"found: {project.all_runs()[-1].info.run_id}" in output
    assert "runs: 2" in output


INTERRUPTED_ONCE = """
import mlflow
from kedro.pipeline import Node, Pipeline

def work(x):
    mlflow.start_run(nested=True, run_name="inner")
    if x == 1:
        raise KeyboardInterrupt
    return x

def create_pipeline():
    return Pipeline([Node(work, "params:x", "y")])
"""


def test_datasets_in_a_notebook_know_their_names(project: Project) -> None:
    project.catalog(
        """
        accuracy: {type: PACKAGE.runtime.MlflowMetricDataset}
        scores: {type: PACKAGE.runtime.MlflowMetricsDataset}
        """
    )

    ipython(
        project,
        """
import mlflow
with mlflow.start_run():
    catalog.save("accuracy", 0.5)
    catalog.save("scores", {"f1": 0.25})
    assert catalog.load("accuracy") == 0.5
""",
    )

    run = project.only_run()
    assert run.data.metrics == {"accuracy": 0.5, "scores.f1": 0.25}
    assert run.info.status == "FINISHED"


def test_an_interrupted_cell_ends_its_run_at_once_and_leaves_nothing_to_the_next(
    project: Project,
) -> None:
    project.pipeline(INTERRUPTED_ONCE)
    project.parameters({"x": 1})

    output = ipython(
        project,
        """
import mlflow
shell = get_ipython()
shell.run_cell("session.run()")
print("statuses:", [run.info.status for run in mlflow.search_runs(output_format="list")])
assert mlflow.active_run() is None
shell.run_line_magic("reload_kedro", "--params=x=2")
shell.run_cell("session.run()")
""",
    )

    assert "statuses: ['KILLED', 'KILLED']" in output
    newest = {run.info.run_name: run for run in reversed(project.all_runs())}["__default__"]
    assert newest.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in newest.data.tags


def test_a_script_that_survives_an_interruption_ends_the_run_with_its_next_one(
    project: Project,
) -> None:
    project.pipeline(INTERRUPTED_ONCE)
    project.parameters({"x": 1})

    with pytest.raises(KeyboardInterrupt):
        project.run()
    project.run(params={"x": 2})

    runs = [run for run in project.all_runs() if run.info.run_name == "__default__"]
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED"]
    assert runs[1].data.tags["kedro_error"].startswith("interrupted")
    assert not [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert mlflow.active_run() is None


def test_a_notebook_makes_no_request_until_mlflow_is_used(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.client.create_experiment(project.package)
    server.requests.clear()

    # The variable marks the process as one of a server, which refuses some places of artifacts.
    free = "import os; assert '_MLFLOW_SERVER_ARTIFACT_ROOT' not in os.environ"
    ipython(project, f"context.mlflow.server.client; {free}")
    assert server.requests == []
    ipython(project, "import mlflow; mlflow.search_runs()")
    assert server.requests


@pytest.mark.skipif(not has("mlflow", "3.10"), reason="MLflow puts them where it is used")
def test_mlflow_used_before_the_first_run_keeps_its_files_in_the_project(
    new_project: Callable[..., Project],
) -> None:
    project = new_project()
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    ipython(project, "import mlflow; assert len(mlflow.search_runs()) == 0")

    project.run()
    for experiment in project.client.search_experiments():
        assert experiment.artifact_location.startswith((project.path / "mlartifacts").as_uri())


def test_a_second_project_in_a_notebook_has_its_own_store(
    new_project: Callable[..., Project],
) -> None:
    first, second = new_project(), new_project()

    output = ipython(
        first,
        f"""
import mlflow
context.mlflow.setup(context)
print("first:", mlflow.get_tracking_uri())
get_ipython().run_line_magic("reload_kedro", {str(second.path)!r})
print("second:", mlflow.get_tracking_uri(), context.mlflow.server.mlflow_tracking_uri)
assert len(mlflow.search_runs()) == 0
""",
    )

    assert f"first: {first.tracking_uri}" in output
    assert f"second: {second.tracking_uri} {second.tracking_uri}" in output


def test_setup_points_mlflow_at_the_project(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_SECRET", raising=False)
    project.write("conf/local/credentials.yml", "mine: {A_SECRET: t0p}")
    project.mlflow_yml("server: {credentials: mine}")
    bootstrap_project(project.path)

    with KedroSession.create(project_path=project.path) as session:
        context = session.load_context()  # type: ignore[attr-defined]
        config = context.mlflow
        config.setup(context)

    try:
        assert mlflow.get_tracking_uri() == project.tracking_uri
        assert os.environ["A_SECRET"] == "t0p"
        with mlflow.start_run():
            mlflow.log_metric("m", 1)
        (run,) = project.all_runs()
        assert run.info.experiment_id == config.tracking.experiment.entity.experiment_id
        assert config.tracking.experiment.entity.name == project.package
        assert config.server.client.get_run(run.info.run_id).data.metrics == {"m": 1}
    finally:
        os.environ.pop("A_SECRET", None)


def test_the_configuration_is_a_value(project: Project) -> None:
    bootstrap_project(project.path)
    loaded = []
    for _ in range(2):
        with KedroSession.create(project_path=project.path) as session:
            loaded.append(session.load_context().mlflow)  # type: ignore[attr-defined]

    config, again = loaded
    assert config == again
    twin = type(config).model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump())))
    assert twin.model_dump() == config.model_dump()
    with pytest.raises(ValueError, match="frozen"):
        config.tracking.run.name = "changed"
    assert Path(config.tracking.experiment.create_experiment_kwargs.artifact_location).name
