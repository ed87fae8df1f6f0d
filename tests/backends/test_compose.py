"""The services of a project's compose.yml, with its settings, as plain processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import psycopg2
import pytest
import yaml

from ..support.postgres import Postgres
from ..support.projects import Project
from ..support.s3 import S3
from ..support.servers import free_port, running
from ..support.work import check, fill

WORDS = {
    "POSTGRES_PASSWORD": "a-password-of-ones-own",
    "S3_ACCESS_KEY": "mlflow",
    "S3_SECRET_KEY": "another-one",
}


def filled(text: str, values: dict[str, str]) -> str:
    """Put values in for the `${…}` of a compose file, and hosts for the services' names."""
    for name, value in values.items():
        text = text.replace(f"${{{name}:?copy .env.example to .env}}", value)
    return text


@contextmanager
def served(service: dict[str, Any], folder: Path, hosts: dict[str, str]) -> Iterator[str]:
    """Run the service `mlflow` of the file until the block ends; gives its address."""
    port = free_port()
    words = " ".join(service["command"][1:]).replace("--port=5050", f"--port={port}")
    variables = {name: filled(str(value), WORDS) for name, value in service["environment"].items()}
    for name, host in hosts.items():
        words = words.replace(name, host)
        variables = {key: value.replace(name, host) for key, value in variables.items()}
    command = [sys.executable, "-m", "mlflow", *words.split(), "--workers=1"]
    env = {**os.environ, **variables, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, folder, env=env):
        yield f"http://127.0.0.1:{port}"


def make_user(postgres: Postgres, name: str, password: str) -> None:
    """Do what the image of PostgreSQL does with POSTGRES_USER and POSTGRES_PASSWORD."""
    with (
        closing(psycopg2.connect(postgres.uri("postgres"))) as connection,
        connection.cursor() as cursor,
    ):
        connection.autocommit = True
        cursor.execute(f'CREATE USER "{name}" PASSWORD %s', (password,))
        cursor.execute(f'CREATE DATABASE "{name}" OWNER "{name}"')


@pytest.fixture
def dockered(new_project: Callable[..., Project]) -> Project:
    project = new_project(docker=True)
    fill(project)
    return project


def test_a_run_with_the_environment_for_docker_is_kept_by_the_services_of_compose_yml(
    dockered: Project, postgres: Postgres, s3: S3, tmp_path: Path
) -> None:
    compose = yaml.safe_load((dockered.path / "compose.yml").read_text())
    services = compose["services"]
    made = services["postgres"]["environment"]
    make_user(postgres, made["POSTGRES_USER"], filled(made["POSTGRES_PASSWORD"], WORDS))
    bucket = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=services["mlflow"]["environment"]["AWS_DEFAULT_REGION"],
        aws_access_key_id=WORDS["S3_ACCESS_KEY"],
        aws_secret_access_key=WORDS["S3_SECRET_KEY"],
    )
    (volume,) = services["s3"]["volumes"]
    name = volume.rpartition("/")[2]
    bucket.create_bucket(Bucket=name)
    hosts = {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "@postgres/": f"@127.0.0.1:{postgres.port}/",
        "http://s3:7070": s3.endpoint,
    }

    with served(services["mlflow"], tmp_path, hosts) as address:
        config = dockered.path / "conf/docker/mlflow.yml"
        assert "http://127.0.0.1:${oc.env:MLFLOW_PORT, 5050}" in config.read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_PORT", address.rpartition(":")[2])
            dockered.run(env="docker")

        dockered.tracking_uri = address
        run = check(dockered, tmp_path)

    keys = [found["Key"] for found in bucket.list_objects_v2(Bucket=name)["Contents"]]
    assert any(key.endswith(f"{run.info.run_id}/artifacts/report.txt") for key in keys)
    assert not set(WORDS.values()) & set(postgres.texts(made["POSTGRES_USER"]).split())
