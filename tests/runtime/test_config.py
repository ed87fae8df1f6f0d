"""`mlflow.yml` is read, completed and checked."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from runtime.config import ConfigError, anchor_uri, parse
from runtime.resolvers import random_name

from .conftest import Project
from .test_runs import ONE_NODE


@pytest.mark.parametrize(
    ("uri", "anchored"),
    [
        ("sqlite:///mlflow.db", "sqlite:////my/project/mlflow.db"),
        ("sqlite:///db/runs.db?timeout=9", "sqlite:////my/project/db/runs.db?timeout=9"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:////my/project/mlflow.db"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
        ("sqlite:///C:/abs/mlflow.db", "sqlite:///C:/abs/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("mlruns", "file:///my/project/mlruns"),
        ("/abs/mlruns", "file:///abs/mlruns"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://ada@host/runs", "postgresql://ada@host/runs"),
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("databricks", "databricks"),
        ("databricks-uc", "databricks-uc"),
    ],
)
def test_relative_uris_start_at_the_project(uri: str, anchored: str) -> None:
    assert anchor_uri(uri, Path("/my/project")) == anchored


def test_every_mistake_is_told_with_key_and_value() -> None:
    with pytest.raises(ConfigError) as told:
        parse({"tracking": {"run": {"nmae": "x"}, "experiment": {"restore_if_deleted": "maybe"}}})

    first, second = sorted(told.value.message.splitlines())
    assert first.startswith("mlflow.yml: tracking.experiment.restore_if_deleted: ")
    assert first.endswith("got 'maybe'")
    assert second == "mlflow.yml: tracking.run.nmae: unknown key"


def test_a_mistake_ends_kedro_run_without_a_traceback_and_without_a_run(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.mlflow_yml("tracking: {nmae: x}")

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert "mlflow.yml: tracking.nmae: unknown key" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert project.all_runs() == []


def test_without_mlflow_yml_a_run_is_tracked(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    for file in project.path.glob("conf/*/mlflow.yml"):
        file.unlink()

    project.run()

    run = project.only_run()
    assert project.client.get_experiment(run.info.experiment_id).name == project.package


def test_the_environment_variable_names_the_server_when_mlflow_yml_does_not(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    elsewhere = f"sqlite:///{PurePosixPath(tmp_path)}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)

    project.run()

    assert project.all_runs() == []
    project.tracking_uri = elsewhere
    experiment = project.client.get_experiment(project.only_run().info.experiment_id)
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_an_environment_changes_single_keys(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": {"y": 1}})
    project.mlflow_yml("tracking: {params: {dict_params: {flatten: true}}}", env="local")
    project.pipeline(ONE_NODE.replace("2 * x", "1"))

    project.run()
    project.run(env="prod")

    prod, local = project.all_runs()
    if "prod" not in project.client.get_experiment(prod.info.experiment_id).name:
        prod, local = local, prod
    assert project.client.get_experiment(prod.info.experiment_id).name.endswith("-prod")
    assert prod.data.params == {"x": "{'y': 1}"}
    assert local.data.params == {"x.y": "1"}


def test_a_run_is_named_by_a_runtime_parameter_or_at_random(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.mlflow_yml("tracking: {run: {name: '${runtime_params:run_name, ${km.random_name:}}'}}")

    project.run(params={"run_name": "mine"})
    project.run()

    drawn, given = (run.info.run_name for run in project.all_runs())
    assert given == "mine"
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", drawn)


def test_random_names_differ() -> None:
    assert len({random_name() for _ in range(50)}) > 40


def test_a_deleted_experiment_is_restored(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    experiment = project.client.create_experiment(project.package)
    project.client.delete_experiment(experiment)

    project.run()

    assert project.only_run().info.experiment_id == experiment


def test_a_run_is_continued_by_its_id_and_ended(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    earlier = project.client.create_run(project.client.create_experiment(project.package))
    project.client.set_terminated(earlier.info.run_id, "FAILED")
    project.mlflow_yml(f"tracking: {{run: {{id: {earlier.info.run_id}}}}}")

    project.run()

    run = project.only_run()
    assert (run.info.run_id, run.info.status) == (earlier.info.run_id, "FINISHED")
    assert run.data.params == {"x": "1"}


def test_secrets_stay_out_of_parameters_tags_and_the_command(project: Project) -> None:
    project.pipeline(ONE_NODE.replace("params:x", "params:api").replace("2 * x", "1"))
    project.parameters({"api": {"token": "t0p-secret", "url": "http://example.org"}})

    project.run(params={"api": {"token": "t0p-secret-2"}})

    run = project.only_run()
    assert "***" in run.data.params["api"]
    assert "t0p-secret" not in str(run.to_dictionary())
