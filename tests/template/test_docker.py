"""The image holds the project and no secrets; the services are pinned, healthy and private."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.utils.build import exclude_paths

from ..conftest import Generate
from .conftest import complaints

PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[a-z]+)*")


@pytest.fixture(scope="module")
def project(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docker") / "penguin-study"
    return generate(folder, docker=True, licence="MIT")


@pytest.fixture(scope="module")
def services(project: Path) -> dict[str, dict[str, Any]]:
    compose = yaml.safe_load((project / "compose.yml").read_text("utf-8"))
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def instructions(project: Path) -> list[str]:
    lines = (project / "Dockerfile").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_linter_has_nothing_to_say_of_the_dockerfile(project: Path) -> None:
    assert complaints(project, "hadolint", "--no-color", "Dockerfile") == ""


def test_the_linter_of_the_dockerfile_does_find_mistakes(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\n")

    assert "DL3007" in complaints(tmp_path, "hadolint", "--no-color", "Dockerfile")


def test_the_image_is_made_from_pinned_images(instructions: list[str]) -> None:
    images = [line.split()[1] for line in instructions if line.startswith("FROM")]

    assert len(images) == 3
    assert [image for image in images if not PINNED.fullmatch(image)] == []


def test_the_project_runs_as_a_user_without_rights(instructions: list[str]) -> None:
    last = max(i for i, line in enumerate(instructions) if line.startswith("FROM"))

    assert "USER 1000" in instructions[last:]
    # Nothing is owned by that user but its home.
    assert not [line for line in instructions if "chown" in line or "chmod" in line]


def test_a_change_of_the_code_leaves_the_layer_with_the_dependencies(
    instructions: list[str],
) -> None:
    dependencies = next(i for i, line in enumerate(instructions) if "--no-install-project" in line)

    before = [line.split()[1:-1] for line in instructions[:dependencies] if line.startswith("COPY")]
    assert before == [["--from=uv", "/uv"], ["pyproject.toml", "uv.lock*"]]


def test_the_image_is_built_from_the_package_index_that_an_argument_names(
    project: Path, instructions: list[str], services: dict[str, dict[str, Any]]
) -> None:
    first_install = next(i for i, line in enumerate(instructions) if "uv sync" in line)

    assert "ARG UV_DEFAULT_INDEX" in instructions[:first_install]
    assert services["project"]["build"]["args"] == ["UV_DEFAULT_INDEX"]
    assert "# UV_DEFAULT_INDEX=" in (project / ".env.example").read_text("utf-8")


def test_the_project_starts_by_its_own_command(project: Path, instructions: list[str]) -> None:
    assert instructions[-1] == 'ENTRYPOINT ["penguin-study"]'
    assert 'penguin-study = "penguin_study.__main__:main"' in (
        project / "pyproject.toml"
    ).read_text("utf-8")


def test_neither_secrets_nor_data_go_to_the_image(generate: Generate, tmp_path: Path) -> None:
    project = generate(tmp_path / "penguin-study", docker=True, licence="MIT", example=False)
    secret = """
    .env .git/config .venv/bin/python mlflow.db mlartifacts/1/model.pkl data/01_raw/people.csv
    conf/base/credentials.yml conf/local/mlflow.yml conf/prod/aws_credentials.yml
    notebooks/first.ipynb src/penguin_study/__pycache__/settings.cpython-313.pyc
    """.split()
    for name in [*secret, "uv.lock"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("written")

    # What the Docker client would send to the builder.
    patterns = (project / ".dockerignore").read_text("utf-8").splitlines()
    sent = exclude_paths(str(project), [line for line in patterns if not line.startswith("#")])

    files = {name for name in sent if (project / name).is_file()}
    # The Docker client needs these two itself.
    files -= {"Dockerfile", ".dockerignore"}
    sources = set(project.joinpath("src").rglob("*.py"))
    sources |= {path for path in project.joinpath("src").rglob("runtime/*") if path.is_file()}
    assert {name for name in files if name.startswith("src/")} == {
        path.relative_to(project).as_posix() for path in sources
    }
    assert {name for name in files if not name.startswith("src/")} == {
        "LICENSE",
        "README.md",
        "conf/README.md",
        "conf/base/catalog.yml",
        "conf/base/mlflow.yml",
        "conf/base/parameters.yml",
        "conf/docker/mlflow.yml",
        "conf/local/.gitkeep",
        "conf/logging.yml",
        "conf/prod/mlflow.yml",
        "pyproject.toml",
        "uv.lock",
    }


def test_compose_yml_is_valid(project: Path) -> None:
    schema = "vendor.compose-spec"

    assert complaints(project, "check-jsonschema", "--builtin-schema", schema, "compose.yml") == ""


def test_the_schema_of_compose_yml_does_find_mistakes(project: Path, tmp_path: Path) -> None:
    text = (project / "compose.yml").read_text("utf-8")
    (tmp_path / "compose.yml").write_text(text.replace("healthcheck:", "health:"), "utf-8")

    found = complaints(
        tmp_path, "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yml"
    )

    assert "'health' was unexpected" in found


def test_the_services_are_mlflow_postgresql_an_s3_store_and_the_project(
    services: dict[str, dict[str, Any]],
) -> None:
    assert list(services) == ["mlflow", "postgres", "s3", "project"]


def test_every_image_is_pinned(services: dict[str, dict[str, Any]]) -> None:
    images = [service["image"] for service in services.values() if "image" in service]

    assert len(images) == 3
    assert [image for image in images if not PINNED.fullmatch(image)] == []


def test_a_service_starts_when_those_it_needs_are_healthy(
    services: dict[str, dict[str, Any]],
) -> None:
    needed = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }

    assert needed == {
        "mlflow": {"postgres": "service_healthy", "s3": "service_healthy"},
        "postgres": {},
        "s3": {},
        "project": {"mlflow": "service_healthy"},
    }
    assert {name for name, service in services.items() if "healthcheck" in service} == {
        "mlflow",
        "postgres",
        "s3",
    }


def test_the_database_has_a_connection_for_each_thread_of_the_server(
    services: dict[str, dict[str, Any]],
) -> None:
    server, database = services["mlflow"], services["postgres"]
    (workers,) = (word for word in server["command"] if word.startswith("--workers="))
    (allowed,) = (word for word in database["command"] if word.startswith("max_connections="))

    pool = server["environment"]["MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"]

    # A worker has 40 threads, and a pool for runs and another one for registered models.
    assert pool == 40
    asked = int(workers.partition("=")[2]) * 2 * pool
    # PostgreSQL keeps three for administrators.
    assert asked <= int(allowed.partition("=")[2]) - 3


def test_only_this_machine_reaches_the_server_and_nobody_what_is_behind_it(
    services: dict[str, dict[str, Any]],
) -> None:
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert ports == {"mlflow": ["127.0.0.1:${MLFLOW_PORT:-5050}:5050"]}


def test_what_the_services_keep_is_in_volumes(project: Path) -> None:
    compose = yaml.safe_load((project / "compose.yml").read_text("utf-8"))

    kept = {
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }

    assert kept == compose["volumes"].keys() == {"postgres", "s3"}


def test_every_password_comes_from_a_file_that_is_not_committed(project: Path) -> None:
    text = (project / "compose.yml").read_text("utf-8")
    example = (project / ".env.example").read_text("utf-8")
    offered = dict(re.findall(r"^(\w+)=(.*)$", example, flags=re.MULTILINE))

    demanded = set(re.findall(r"\$\{(\w+):\?copy \.env\.example to \.env\}", text))

    assert demanded == offered.keys() == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert all(offered.values())
    # Whatever looks like a secret is one of these.
    for name, value in re.findall(r"^ +(\w*(?:PASSWORD|KEY|SECRET)\w*): (.*)$", text, re.MULTILINE):
        assert value.startswith("${"), name


def test_the_commands_in_compose_yml_are_those_of_the_readme(project: Path) -> None:
    head = (project / "compose.yml").read_text("utf-8").partition("services:")[0]
    readme = (project / "README.md").read_text("utf-8")

    commands = re.findall(r"^#   (.*?)  ", head, flags=re.MULTILINE)

    assert len(commands) == 5
    assert [command for command in commands if command not in readme] == []
