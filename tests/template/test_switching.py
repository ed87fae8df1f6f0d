"""A choice is switched later: `copier update --vcs-ref :current: --data …`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import files, git

GITHUB = {".github/dependabot.yml", ".github/workflows/ci.yml"}
DOCKER = {".dockerignore", ".env.example", "Dockerfile", "compose.yml", "conf/docker/mlflow.yml"}
TESTS = {"conf/test/mlflow.yml"}


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a git repository with one version; projects remember where it is."""
    folder = tmp_path_factory.mktemp("switching") / "km-template"
    shutil.copytree(template, folder)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=First version")
    git(folder, "tag", "v0.1.0")
    return folder


def copier(folder: Path, *arguments: str) -> None:
    """Run Copier as a user types it, who takes the default where no answer is given."""
    subprocess.run(
        [sys.executable, "-m", "copier", *arguments, "--defaults", "--quiet"],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def generate(repository: Path, folder: Path, *answers: str) -> Path:
    data = [f"--data={answer}" for answer in answers]
    copier(folder.parent, "copy", str(repository), folder.name, *data)
    return folder


@pytest.fixture
def project(committed: Path, tmp_path: Path) -> Path:
    """A project with neither Docker nor CI, and with edits of its owner."""
    return Path(shutil.copytree(committed, tmp_path / "penguins"))


@pytest.fixture(scope="module")
def committed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = generate(repository, tmp_path_factory.mktemp("committed") / "penguins")
    git(folder, "init", "--quiet")
    with (folder / "conf/base/mlflow.yml").open("r+", encoding="utf-8") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace("flatten: false", "flatten: true "))
    (folder / "README.md").write_text("My own words.\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=Mine")
    return folder


def switch(project: Path, *answers: str) -> None:
    data = [f"--data={answer}" for answer in answers]
    copier(project, "update", "--vcs-ref=:current:", *data)
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--allow-empty", f"--message=Switch {answers}")


def content(project: Path) -> dict[str, bytes]:
    found = files(project)
    return {name: text for name, text in found.items() if not name.startswith(".git/")}


def with_edits(project: Path) -> dict[str, bytes]:
    """What a newly generated project would be with the owner's edits."""
    found = content(project)
    config = found["conf/base/mlflow.yml"]
    found["conf/base/mlflow.yml"] = config.replace(b"flatten: false", b"flatten: true ")
    found["README.md"] = b"My own words.\n"
    return found


@pytest.mark.parametrize(
    ("answers", "added"),
    [
        pytest.param(("docker=true",), DOCKER, marks=pytest.mark.thorough),
        pytest.param(("ci=github",), GITHUB, marks=pytest.mark.thorough),
        (("ci=gitlab",), {".gitlab-ci.yml"}),
        (("docker=true", "ci=github"), {*DOCKER, *GITHUB}),
        (("artifact_store=s3", "artifact_location=s3://runs/penguins"), TESTS),
        (("tracking_backend=server", "tracking_uri=https://mlflow.example.org"), TESTS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_choice_that_is_switched_on_later_gives_what_it_gives_at_once(
    repository: Path, project: Path, tmp_path: Path, answers: tuple[str, ...], added: set[str]
) -> None:
    before = content(project)
    (tmp_path / "new").mkdir()
    new = with_edits(generate(repository, tmp_path / "new" / "penguins", *answers))

    switch(project, *answers)

    assert content(project) == new
    assert new.keys() - before.keys() == added


def test_a_choice_that_is_switched_off_again_leaves_the_project_as_it_was(project: Path) -> None:
    before = content(project)

    switch(project, "docker=true", "ci=github")
    switch(project, "docker=false", "ci=none")

    assert content(project) == before
    assert not (project / ".github").exists()
    assert not (project / "conf/docker").exists()


def test_one_ci_takes_the_place_of_the_other(project: Path) -> None:
    switch(project, "ci=github")

    switch(project, "ci=gitlab")

    assert not (project / ".github").exists()
    assert (project / ".gitlab-ci.yml").exists()


def test_another_store_takes_the_place_of_the_first(project: Path) -> None:
    switch(project, "artifact_store=s3", "artifact_location=s3://runs/penguins")

    switch(project, "artifact_store=gcs", "artifact_location=gs://runs/penguins")

    config = yaml.safe_load((project / "conf/base/mlflow.yml").read_text("utf-8"))
    experiment = config["tracking"]["experiment"]
    assert experiment["create_experiment_kwargs"]["artifact_location"] == "gs://runs/penguins"
    pyproject = (project / "pyproject.toml").read_text("utf-8")
    assert "google-cloud-storage" in pyproject
    assert "boto3" not in pyproject


def test_a_file_that_the_owner_has_deleted_stays_deleted(project: Path) -> None:
    switch(project, "docker=true")
    (project / "compose.yml").unlink()
    git(project, "commit", "--quiet", "--all", "--message=No services")

    switch(project, "ci=github")

    assert not (project / "compose.yml").exists()
    assert (project / "Dockerfile").exists()
