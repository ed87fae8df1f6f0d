"""The extras are hooks beside `MlflowHook`, in any order; what no hook heeds is refused."""

from __future__ import annotations

import itertools
import re

import click
import pytest
from mlflow import MlflowClient

from ...support.commands import Command, mlflow_command
from ...support.projects import ONE_NODE, Project
from ...support.servers import free_port

__all__ = ["mlflow_command"]

HOOKS = ("MlflowHook", "OfflineHook", "ServingHook")

PIPELINE = """
from kedro.pipeline import Node, Pipeline
from PACKAGE.runtime import pipeline_ml_factory

def fit(size):
    return size

def predict(model, rows):
    return [model * row for row in rows]

def create_pipeline():
    return pipeline_ml_factory(
        Pipeline([Node(fit, "params:size", "model")]),
        Pipeline([Node(predict, ["model", "rows"], "predictions")]),
        "rows",
        log_model_kwargs={"signature": None, "pip_requirements": []},
    )
"""

OFFLINE = """
server: {{mlflow_tracking_uri: "http://127.0.0.1:{port}"}}
tracking: {{on_unreachable: offline}}
"""


def register(project: Project, *hooks: str) -> None:
    """Write the hooks into settings.py."""
    settings = project.path / "src" / project.package / "settings.py"
    calls = "".join(f"{hook}(), " for hook in hooks)
    text = re.sub(r"^HOOKS = .*$", f"HOOKS = ({calls})", settings.read_text("utf-8"), flags=re.M)
    settings.write_text(text, "utf-8")


def on_disk(project: Project) -> Project:
    """Return the project with its store on disk as its store."""
    (file,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    return Project(project.path, project.package, f"sqlite:///{file.as_posix()}")


@pytest.mark.parametrize("order", list(itertools.permutations(HOOKS)), ids=", ".join)
def test_in_any_order_a_run_is_kept_on_disk_with_its_model_and_replayed_when_it_has_ended(
    project: Project, order: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    register(project, *order)
    project.pipeline(PIPELINE)
    project.parameters({"size": 2})
    project.catalog("model: {type: json.JSONDataset, filepath: data/06_models/model.json}")
    project.mlflow_yml(OFFLINE.format(port=free_port()))

    project.run()

    run = on_disk(project).only_run()
    assert run.info.status == "FINISHED"
    models = MlflowClient(on_disk(project).tracking_uri).search_logged_models(
        [run.info.experiment_id]
    )
    assert [(model.name, model.source_run_id) for model in models] == [("model", run.info.run_id)]
    told = " ".join("".join(capsys.readouterr()).split())
    ended, replayed = (
        told.index(f"MLflow run '{run.info.run_name}' FINISHED"),
        told.index("and not on the server"),
    )
    assert ended < replayed


@pytest.mark.parametrize("order", [HOOKS, HOOKS[::-1]], ids=", ".join)
def test_what_can_not_become_a_model_leaves_no_run(
    project: Project, order: tuple[str, ...]
) -> None:
    register(project, *order)
    project.pipeline(PIPELINE)
    project.parameters({"size": 2})
    project.catalog("")  # the model would be in memory only

    with pytest.raises(Exception, match="'model', which is only in memory"):
        project.run()

    assert project.all_runs() == []


def test_offline_without_its_hook_is_refused_before_the_run(project: Project) -> None:
    register(project, "MlflowHook")
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.mlflow_yml("tracking: {on_unreachable: offline}")

    with pytest.raises(click.ClickException) as refused:
        project.run()

    assert str(refused.value) == (
        "conf/local/mlflow.yml:1: tracking.on_unreachable: offline needs the hook of an extra: add "
        "OfflineHook() to HOOKS in settings.py"
    )
    assert project.all_runs() == []


def test_a_pipeline_with_a_model_is_refused_before_the_run_where_no_hook_would_log_it(
    project: Project,
) -> None:
    register(project, "MlflowHook", "OfflineHook")
    project.pipeline(PIPELINE)
    project.parameters({"size": 2})
    project.catalog("model: {type: json.JSONDataset, filepath: data/06_models/model.json}")

    with pytest.raises(click.ClickException) as refused:
        project.run()

    assert str(refused.value) == (
        "settings.py: HOOKS: expected ServingHook() beside MlflowHook(), because this pipeline is "
        "a PipelineML, got MlflowHook, OfflineHook"
    )
    assert project.all_runs() == []


def test_modelify_needs_the_server_where_runs_are_kept_on_disk(
    project: Project, mlflow_command: Command
) -> None:
    project.pipeline(PIPELINE)
    project.parameters({"size": 2})
    project.catalog("model: {type: json.JSONDataset, filepath: data/06_models/model.json}")
    project.write("data/06_models/model.json", "2")
    port = free_port()
    project.mlflow_yml(OFFLINE.format(port=port).strip())

    ended = mlflow_command(project, "modelify", "--pipeline=__default__", "--input-name=rows")

    assert ended.status == 1
    assert ended.err == (
        "Error: conf/local/mlflow.yml:1: server.mlflow_tracking_uri: "
        f"http://127.0.0.1:{port} can't be reached (connection refused): start the server, or "
        "correct the address (http or https, host, port)\n"
    )
    assert not (project.path / ".mlflow-offline").exists()


def test_a_store_that_is_named_when_the_run_is_open_already_is_refused(project: Project) -> None:
    project.write(
        f"src/{project.package}/late.py",
        """
        from kedro.framework.hooks import hook_impl
        from .runtime.binding import context_of_run, keep_run_in

        class Late:
            @hook_impl
            def before_pipeline_run(self, catalog):
                config = context_of_run().mlflow
                keep_run_in(catalog, config.server.connection, config.tracking.experiment)
        """,
    )
    settings = project.path / "src" / project.package / "settings.py"
    text = "from .late import Late\n" + settings.read_text("utf-8")
    settings.write_text(re.sub(r"HOOKS = .*", "HOOKS = (MlflowHook(), Late())", text), "utf-8")
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})

    with pytest.raises(RuntimeError, match="wrapper=True, tryfirst=True"):
        project.run()

    assert project.only_run().info.status == "FAILED"
