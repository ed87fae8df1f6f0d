"""CI runs the linters, the tests and a tracked run, and its files are sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ..conftest import REPOSITORY, Generate
from .conftest import complaints

GITHUB = ".github/workflows/ci.yml"
DEPENDABOT = ".github/dependabot.yml"
GITLAB = ".gitlab-ci.yml"

# What a developer runs too.
COMMANDS = [
    "uv run pre-commit run --all-files",
    "uv run mypy",
    "uv run pytest",
    "uv run kedro run",
]


@pytest.fixture(scope="module")
def github(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("ci") / "github", ci="github", example=False)


@pytest.fixture(scope="module")
def gitlab(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("ci") / "gitlab", ci="gitlab", example=False)


def commands_of_github(project: Path) -> list[str]:
    workflow = yaml.safe_load((project / GITHUB).read_text("utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


def commands_of_gitlab(project: Path) -> list[str]:
    pipeline = yaml.safe_load((project / GITLAB).read_text("utf-8"))
    jobs = [job for job in pipeline.values() if "script" in job]
    before: list[str] = pipeline["default"]["before_script"]
    return [command for job in jobs for command in before + job["script"]]


def test_github_runs_the_linters_the_tests_and_a_tracked_run(github: Path) -> None:
    commands = commands_of_github(github)

    assert [command for command in commands if command != "pip install uv"] == COMMANDS


def test_github_checks_pushes_to_the_default_branch_whatever_it_is_called(github: Path) -> None:
    workflow = yaml.safe_load((github / GITHUB).read_text("utf-8"))
    events = workflow[True]  # `on` is true in YAML 1.1

    assert events["push"] is None
    assert {job["if"] for job in workflow["jobs"].values()} == {
        "github.event_name != 'push' || github.ref_name == github.event.repository.default_branch"
    }


def test_gitlab_runs_the_linters_the_tests_and_a_tracked_run(gitlab: Path) -> None:
    commands = commands_of_gitlab(gitlab)

    assert [command for command in commands if command != "pip install uv"] == COMMANDS


@pytest.fixture(params=["of a project", "of this repository"])
def on_github(request: pytest.FixtureRequest, github: Path) -> Path:
    return REPOSITORY if "repository" in request.param else github


def test_the_files_for_github_are_valid(on_github: Path) -> None:
    for kind, file in (("github-workflows", GITHUB), ("dependabot", DEPENDABOT)):
        schema = f"vendor.{kind}"

        assert complaints(on_github, "check-jsonschema", "--builtin-schema", schema, file) == ""


def test_the_pipeline_of_gitlab_is_valid(gitlab: Path) -> None:
    assert (
        complaints(gitlab, "check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", GITLAB) == ""
    )


def test_the_files_for_github_have_no_weakness_that_zizmor_knows(on_github: Path) -> None:
    files = [GITHUB, DEPENDABOT]

    assert complaints(on_github, "zizmor", "--offline", "--persona=pedantic", *files) == ""


def test_zizmor_does_find_weaknesses(github: Path, tmp_path: Path) -> None:
    text = (github / GITHUB).read_text("utf-8")
    (tmp_path / GITHUB).parent.mkdir(parents=True)
    (tmp_path / GITHUB).write_text(text.replace("persist-credentials: false", "clean: true"))

    assert "artipacked" in complaints(tmp_path, "zizmor", "--offline", GITHUB)


@pytest.mark.parametrize("answer", [{"tracking_backend": "server"}, {"artifact_store": "s3"}])
def test_ci_needs_no_server(generate: Generate, tmp_path: Path, answer: dict[str, str]) -> None:
    on_github = generate(tmp_path / "github", ci="github", **answer)
    on_gitlab = generate(tmp_path / "gitlab", ci="gitlab", **answer)

    assert commands_of_github(on_github)[-1] == "uv run kedro run --env=test"
    assert commands_of_gitlab(on_gitlab)[-1] == "uv run kedro run --env=test"
    assert (on_github / "conf/test/mlflow.yml").exists()


def test_the_schemas_do_find_mistakes(github: Path, gitlab: Path, tmp_path: Path) -> None:
    broken = {
        "vendor.github-workflows": (github / GITHUB).read_text("utf-8").replace("runs-on", "runs"),
        "vendor.gitlab-ci": (gitlab / GITLAB).read_text("utf-8").replace("script:", "scripts:"),
    }
    for schema, text in broken.items():
        (tmp_path / "broken.yml").write_text(text)

        assert "Schema validation errors" in complaints(
            tmp_path, "check-jsonschema", "--builtin-schema", schema, "broken.yml"
        )
