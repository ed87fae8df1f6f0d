"""Artifacts are kept in an object storage, by the run itself or by the MLflow server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
import yaml

from ..support.projects import Project
from ..support.s3 import S3
from ..support.servers import free_port, mlflow_server
from ..support.storages import ENDPOINT, KEY, KEY_SECRET, Locked, variables
from ..support.work import ENTRY, WITNESS, check, fill
from .conftest import RUNNERS, SECRET, Served

Store = Callable[..., Project]


@pytest.fixture
def storing(new_project: Callable[..., Project]) -> Store:
    """Make a project whose artifacts go to a place, with variables in its credentials."""

    def storing(place: str, credentials: dict[str, str], uri: str = "") -> Project:
        project = new_project()
        project.tracking_uri = uri or project.tracking_uri
        experiment = {"create_experiment_kwargs": {"artifact_location": place}} if place else {}
        server = {"mlflow_tracking_uri": uri or None, "credentials": "storage"}
        options = {"server": server, "tracking": {"experiment": experiment}}
        project.mlflow_yml(yaml.safe_dump(options, sort_keys=False))
        project.write("conf/local/credentials.yml", yaml.safe_dump({"storage": credentials}))
        fill(project)
        return project

    return storing


def contents(s3: S3) -> dict[str, bytes]:
    """Read all that is in the bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=s3.bucket)["Contents"]]
    return {key: client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_artifact_is_in_the_bucket_that_the_run_writes_to(
    storing: Store, s3: S3, runner: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = storing(f"s3://{s3.bucket}/{runner.__name__}", variables(s3))

    project.run(runner=runner())

    for name, value in variables(s3).items():
        monkeypatch.setenv(name, value)
    run = check(project, tmp_path)
    stored = contents(s3)
    assert f"{runner.__name__}/{run.info.run_id}/artifacts/report.txt" in stored
    assert all(SECRET.encode() not in content for content in stored.values())
    assert SECRET.encode() not in (project.path / "mlflow.db").read_bytes()


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_artifact_is_in_the_bucket_that_the_server_writes_to(
    storing: Store, proxying: Served, s3: S3, runner: type, tmp_path: Path
) -> None:
    project = storing("", {}, proxying.uri)

    project.run(runner=runner())

    run = check(project, tmp_path)
    assert any(
        key.startswith("proxied/") and key.endswith(f"{run.info.run_id}/artifacts/report.txt")
        for key in contents(s3)
    )
    assert not proxying.has(SECRET)


def failed(project: Project, *options: str, **env: str) -> str:
    """Run a pipeline whose artifact can't be stored: one sentence, there and in the run."""
    project.pipeline(WITNESS)
    env = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "AWS_MAX_ATTEMPTS": "1", **env}
    ended = project.kedro("run", *options, **env)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1, shown
    assert "Traceback" not in shown, shown
    (sentence,) = (line for line in shown.splitlines() if line.startswith("Error: "))
    sentence = sentence.removeprefix("Error: ")
    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = project.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags.get("kedro_error") == f"ArtifactError: {sentence}", shown
    return sentence


@pytest.mark.parametrize("options", [[], ["--runner=ParallelRunner"]], ids=["one", "parallel"])
def test_a_bucket_that_is_missing_is_told(storing: Store, s3: S3, options: list[str]) -> None:
    project = storing("s3://absent/runs", variables(s3))

    sentence = failed(project, *options)

    assert sentence.startswith("Artifacts can't be stored in s3://absent/runs/")
    assert "(NoSuchBucket)" in sentence
    assert sentence.endswith(
        f"See to the bucket, and to {KEY}, {KEY_SECRET} and {ENDPOINT} in {ENTRY}. An experiment "
        "keeps its place: for another bucket name a new one in tracking.experiment."
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({KEY: "AKIAFORGOTTEN0000000"}, "InvalidAccessKeyId"),
        ({KEY_SECRET: "forgotten"}, "SignatureDoesNotMatch"),
        ({KEY: "", KEY_SECRET: ""}, "Unable to locate credentials"),
    ],
    ids=["another key", "wrong secret", "nothing"],
)
def test_a_key_that_is_wrong_is_told(
    storing: Store, locked: Locked, wrong: dict[str, str], said: str
) -> None:
    given = {**locked.opening, **wrong}
    project = storing("s3://locked/runs", {name: value for name, value in given.items() if value})

    sentence = failed(project, AWS_SHARED_CREDENTIALS_FILE="none", AWS_CONFIG_FILE="none")

    assert sentence.startswith("Artifacts can't be stored in s3://locked/runs/")
    assert said in sentence
    assert f"See to the bucket, and to {KEY}, {KEY_SECRET} and {ENDPOINT} in {ENTRY}" in sentence


def test_the_right_key_opens_the_storage_that_checks_keys(storing: Store, locked: Locked) -> None:
    project = storing("s3://locked/runs", locked.opening)

    # In a process of its own: S3's client keeps the first keys that it finds.
    ended = project.kedro("run")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert project.only_run().info.status == "FINISHED"


def test_an_endpoint_where_nothing_is_is_told(storing: Store, s3: S3) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    project = storing(f"s3://{s3.bucket}/runs", {**variables(s3), ENDPOINT: endpoint})

    assert "Could not connect to the endpoint URL" in failed(project)


def test_a_bucket_that_the_server_misses_is_told(storing: Store, s3: S3, tmp_path: Path) -> None:
    with mlflow_server(tmp_path, artifacts="s3://absent/runs", env=variables(s3)) as port:
        uri = f"http://127.0.0.1:{port}"
        project = storing("", {}, uri)

        # The server closes the connection after its answer, and what follows needs a second try.
        sentence = failed(project, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")

    assert sentence.startswith("Artifacts can't be stored in mlflow-artifacts:/")
    # It doesn't always wait for the file's end before it answers.
    did = "(answered 500|closed the connection)"
    what = "Its log says why: see to its --artifacts-destination, and to the bucket and the keys "
    assert re.search(f" of {uri}: the server {did}. {what}that it has.$", sentence)


def test_the_package_that_a_storage_needs_is_told(storing: Store) -> None:
    # The packages of the other storages are installed for their own tests.
    place, package = (
        "abfss://files@account.dfs.core.windows.net/runs",
        "azure-storage-file-datalake",
    )

    sentence = failed(storing(place, {}))

    assert sentence.endswith(f"/artifacts: a package isn't installed: uv add {package}")
