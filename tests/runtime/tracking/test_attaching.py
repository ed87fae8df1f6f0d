"""A run that somebody else opened is logged to and left as its owner wants it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import mlflow
import pytest
from mlflow.entities import Run

from ...support.projects import Project
from ...support.servers import CountingProxy

CHAIN = """
import mlflow
from kedro.pipeline import Node, Pipeline

def work(number):
    mlflow.log_metric(f"fluent_{number}", number)
    with mlflow.start_run(nested=True, run_name=f"child_{number}"):
        mlflow.log_metric("inner", number)
    return float(number)

def fail():
    raise ValueError("no penguins")

def create_pipeline():
    nodes = [Node(work, f"params:n{i}", f"m{i}", name=f"n{i}") for i in range(4)]
    return Pipeline([*nodes, Node(fail, None, "never", name="failing", tags="bad")])
"""
CATALOG = """
"m{number}": {type: PACKAGE.runtime.MlflowMetricDataset}
"""
OWNERS_TAGS = {
    "mlflow.source.name": "dags/training.py",
    "mlflow.user": "airflow",
    "env": "the owner's",
    "host": "scheduler",
}


@pytest.fixture
def tasks(project: Project) -> Project:
    """A project whose nodes an orchestrator runs one by one."""
    project.pipeline(CHAIN)
    project.catalog(CATALOG)
    project.parameters({f"n{i}": i for i in range(4)})
    return project


def owned_run(project: Project) -> Run:
    """The run that an owner has opened, not in the experiment of mlflow.yml."""
    experiment = project.client.create_experiment("the owner's")
    return project.client.create_run(experiment, run_name="theirs", tags=OWNERS_TAGS)


def check_owned(project: Project, run_id: str, *numbers: int) -> None:
    """Check that tasks have logged to the run, and that it is otherwise as it was."""
    run = project.client.get_run(run_id)
    assert (run.info.status, run.info.end_time, run.info.run_name) == ("RUNNING", None, "theirs")
    assert OWNERS_TAGS.items() <= run.data.tags.items()
    assert run.data.params == {f"n{i}": str(i) for i in numbers}
    assert run.data.metrics == {k: i for i in numbers for k in (f"m{i}", f"fluent_{i}")}
    others = [other for other in project.all_runs() if other.info.run_id != run_id]
    assert sorted(child.info.run_name for child in others) == [f"child_{i}" for i in numbers]
    for child in others:
        assert child.data.tags["mlflow.parentRunId"] == run_id
        assert child.info.experiment_id == run.info.experiment_id
        assert child.info.status == "FINISHED"


def test_an_open_run_is_attached_to_and_left_open(tasks: Project) -> None:
    run_id = owned_run(tasks).info.run_id
    mlflow.set_tracking_uri(tasks.tracking_uri)

    with mlflow.start_run(run_id) as mine:
        tasks.run(node_names=["n0", "n1"])
        assert mlflow.active_run() is mine
        tasks.run(node_names=["n2"])
        assert mlflow.active_run() is mine
        check_owned(tasks, run_id, 0, 1, 2)

    assert tasks.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner", "ParallelRunner"])
def test_the_run_that_the_environment_names_is_attached_to_and_left_open(
    tasks: Project, runner: str
) -> None:
    run_id = owned_run(tasks).info.run_id

    ended = tasks.kedro("run", "--nodes=n0,n1", f"--runner={runner}", MLFLOW_RUN_ID=run_id)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_owned(tasks, run_id, 0, 1)


def test_every_kedro_run_of_a_process_attaches_to_the_run_of_the_environment(
    tasks: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = owned_run(tasks).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)

    tasks.run(node_names=["n0"])
    tasks.run(node_names=["n1"])

    check_owned(tasks, run_id, 0, 1)
    assert os.environ["MLFLOW_RUN_ID"] == run_id


def test_tasks_at_the_same_time_share_one_run(tasks: Project) -> None:
    run_id = owned_run(tasks).info.run_id
    started = [tasks.start("run", f"--nodes=n{i}", MLFLOW_RUN_ID=run_id) for i in range(4)]
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, output

    check_owned(tasks, run_id, 0, 1, 2, 3)


def test_a_failing_task_says_why_and_leaves_the_end_to_the_owner(tasks: Project) -> None:
    run_id = owned_run(tasks).info.run_id

    assert tasks.kedro("run", "--nodes=failing", MLFLOW_RUN_ID=run_id).returncode == 1

    check_owned(tasks, run_id)
    tags = tasks.client.get_run(run_id).data.tags
    assert (tags["kedro_failed_node"], tags["kedro_error"]) == (
        "failing",
        "ValueError: no penguins",
    )


def test_the_server_of_the_environment_goes_before_that_of_mlflow_yml(
    tasks: Project, server: CountingProxy
) -> None:
    tasks.mlflow_yml(f"server: {{mlflow_tracking_uri: {tasks.tracking_uri}}}")
    local, tasks.tracking_uri = tasks.tracking_uri, server.uri
    run = tasks.client.create_run("0", run_name="on the owner's server")

    ended = tasks.kedro(
        "run", "--nodes=n1", MLFLOW_RUN_ID=run.info.run_id, MLFLOW_TRACKING_URI=server.uri
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = tasks.client.get_run(run.info.run_id)
    assert found.data.metrics == {"m1": 1.0, "fluent_1": 1.0}
    assert found.data.params == {"n1": "1"}
    tasks.tracking_uri = local
    assert tasks.all_runs() == []


@pytest.mark.parametrize("given", ["no-such-run", "0123456789abcdef0123456789abcdef", "deleted"])
def test_a_run_that_is_not_there_is_told_in_one_sentence(tasks: Project, given: str) -> None:
    if given == "deleted":
        given = owned_run(tasks).info.run_id
        tasks.client.delete_run(given)

    ended = tasks.kedro("run", "--nodes=n0", MLFLOW_RUN_ID=given)

    assert ended.returncode == 1
    assert f"MLFLOW_RUN_ID: expected the id of a run on {tasks.tracking_uri}" in ended.stderr
    assert repr(given) in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert tasks.all_runs() == []


def test_other_values_of_the_parameters_are_told_before_a_node_runs(tasks: Project) -> None:
    run_id = owned_run(tasks).info.run_id
    tasks.client.log_param(run_id, "n0", "7")
    mlflow.set_tracking_uri(tasks.tracking_uri)

    with (
        mlflow.start_run(run_id),
        pytest.raises(click.ClickException, match=r"has other parameters: .*'n0'.*'7'"),
    ):
        tasks.run(node_names=["n0"])

    assert tasks.client.get_run(run_id).data.metrics == {}
    assert mlflow.active_run() is None


def test_a_kedro_run_within_a_node_is_a_child_of_its_run(
    new_project: Callable[..., Project], tasks: Project
) -> None:
    tasks.pipeline(
        f"""
        from kedro.framework.session import KedroSession
        from kedro.pipeline import Node, Pipeline

        def outer():
            with KedroSession.create(project_path={str(tasks.path)!r}) as session:
                session.run(pipeline_names=["work"], node_names=["n3"])
            return "done"

        def create_pipeline():
            return Pipeline([Node(outer, None, "done", name="outer")])
        """,
        name="around",
    )

    tasks.run(pipeline_names=["around"])

    runs = {run.info.run_name: run for run in tasks.all_runs()}
    assert runs.keys() == {"around", "work", "child_3"}
    parent = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parent == {
        "around": None,
        "work": runs["around"].info.run_id,
        "child_3": runs["work"].info.run_id,
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["work"].data.metrics == {"m3": 3, "fluent_3": 3}
    assert mlflow.active_run() is None


EARLY = """
import mlflow
from kedro.framework.hooks import hook_impl

class Early:
    @hook_impl
    def after_context_created(self, context):
        mlflow.set_tag("team", "penguins")

    @hook_impl
    def after_catalog_created(self, catalog):
        mlflow.log_param("entries", len(list(catalog)))
"""


@pytest.fixture
def early(tasks: Project) -> Project:
    """A project with a hook that logs before the run is open."""
    tasks.write(f"src/{tasks.package}/early.py", EARLY)
    settings = tasks.path / "src" / tasks.package / "settings.py"
    text = f"\nfrom {tasks.package}.early import Early\nHOOKS = (*HOOKS, Early())\n"
    settings.write_text(settings.read_text("utf-8") + text, "utf-8")
    return tasks


def check_early(run: Run, *numbers: int) -> None:
    """Check that the run has what the hook and the nodes have logged."""
    assert run.info.status == "FINISHED"
    assert run.data.tags["team"] == "penguins"
    assert "entries" in run.data.params
    assert {f"m{n}" for n in numbers} <= run.data.metrics.keys()
    assert mlflow.active_run() is None


def test_what_a_hook_logs_before_the_run_lands_in_it(early: Project) -> None:
    early.run(pipeline_names=["work"], node_names=["n0"])
    early.run(pipeline_names=["work"], node_names=["n1"])

    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"} & os.environ.keys()
    second, first = (run for run in early.all_runs() if "mlflow.parentRunId" not in run.data.tags)
    check_early(first, 0)
    check_early(second, 1)
    for run in (first, second):
        assert run.info.run_name == "work"
        assert run.data.tags["mlflow.source.name"] == early.package
        assert early.client.get_experiment(run.info.experiment_id).name == early.package
        assert run.info.artifact_uri.startswith((early.path / "mlartifacts").as_uri())


def test_what_a_hook_logs_before_the_run_lands_in_the_run_that_is_continued(early: Project) -> None:
    run_id = owned_run(early).info.run_id
    early.mlflow_yml(f"tracking: {{run: {{id: {run_id}}}}}")

    early.run(pipeline_names=["work"], node_names=["n0"])

    run = early.client.get_run(run_id)
    check_early(run, 0)
    assert run.info.run_name == "theirs"


def test_what_a_hook_logs_before_an_attached_run_lands_in_it(early: Project) -> None:
    mlflow.set_tracking_uri(early.tracking_uri)
    with mlflow.start_run(run_name="theirs") as theirs:
        early.run(pipeline_names=["work"], node_names=["n0"])
        active = mlflow.active_run()
        assert active
        assert active.info.run_id == theirs.info.run_id

    run = early.client.get_run(theirs.info.run_id)
    check_early(run, 0)
    assert run.info.run_name == "theirs"


def test_what_a_hook_logs_before_the_run_lands_in_it_from_the_command_line(early: Project) -> None:
    ended = early.kedro("run", "--pipelines=work", "--nodes=n0")

    assert ended.returncode == 0, ended.stderr
    run = next(run for run in early.all_runs() if "mlflow.parentRunId" not in run.data.tags)
    check_early(run, 0)
    assert early.client.get_experiment(run.info.experiment_id).name == early.package


def test_the_users_server_holds_after_a_hook_has_logged_early(
    early: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path.as_posix()}/theirs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    early.run(pipeline_names=["work"], node_names=["n0"])

    assert os.environ["MLFLOW_TRACKING_URI"] == uri
    assert early.all_runs() == []
    early.tracking_uri = uri
    check_early(next(r for r in early.all_runs() if "mlflow.parentRunId" not in r.data.tags), 0)


def test_variables_of_mlflow_that_are_empty_count_as_unset(
    early: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")

    early.run(pipeline_names=["work"], node_names=["n0"])

    run = next(run for run in early.all_runs() if "mlflow.parentRunId" not in run.data.tags)
    check_early(run, 0)
    assert early.client.get_experiment(run.info.experiment_id).name == early.package
    assert os.environ["MLFLOW_RUN_ID"] == ""
