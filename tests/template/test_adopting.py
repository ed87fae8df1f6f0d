"""`--data adopt=true` brings the runtime to a Kedro project, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from ..conftest import EXTRAS, Generate
from .conftest import files

COMES = {
    ".copier-answers.yml",
    "conf/base/mlflow.yml",
    "src/flights/cli.py",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A Kedro project in a folder that isn't called like its package."""
    folder = tmp_path / "My work"
    for name in (
        "README.md",
        "pyproject.toml",
        "conf/base/catalog.yml",
        "src/flights/__init__.py",
        "src/flights/settings.py",
        "src/flights/pipeline_registry.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# my {name}\n")
    return folder


def added(project: Path, before: dict[str, bytes]) -> set[str]:
    """List what is new but for the runtime; nothing may have changed."""
    now = files(project)
    assert {name: now[name] for name in before} == before
    return {name for name in now.keys() - before.keys() if "/runtime/" not in name}


def test_the_runtime_comes_into_the_package_that_is_there_and_changes_nothing(
    generate: Generate, project: Path, template: Path
) -> None:
    before = files(project)

    generate(project, adopt=True)

    assert added(project, before) == COMES
    ours = files(template / "template/src/{{ package_name }}/runtime")
    assert files(project / "src/flights/runtime") == {
        name: text for name, text in ours.items() if name.split("/")[0] not in EXTRAS
    }


def test_an_adopting_project_gets_the_extras_that_it_asks_for(
    generate: Generate, project: Path, template: Path
) -> None:
    before = files(project)

    generate(project, adopt=True, extras=EXTRAS)

    assert added(project, before) == COMES
    ours = files(template / "template/src/{{ package_name }}/runtime")
    assert files(project / "src/flights/runtime") == ours


def test_answers_say_how_an_adopting_projects_runs_are_tracked(
    generate: Generate, project: Path
) -> None:
    before = files(project)
    address = "https://mlflow.example.org"

    generate(project, adopt=True, tracking_backend="server", tracking_uri=address, scale_out="dask")

    assert added(project, before) == COMES | {"src/flights/runner.py"}
    config = yaml.safe_load((project / "conf/base/mlflow.yml").read_text("utf-8"))
    assert config["server"]["mlflow_tracking_uri"] == address
    assert config["tracking"]["experiment"]["name"] == "flights"


@pytest.mark.parametrize("package", ["FlightDelays", "f" * 45, "_flights"])
def test_a_package_that_is_there_keeps_its_name(
    generate: Generate, project: Path, tmp_path: Path, package: str
) -> None:
    (project / "src/flights").rename(project / "src" / package)
    # Brackets in a path are no pattern.
    folder = project.rename(tmp_path / "work [1]")
    before = files(folder)

    generate(folder, adopt=True)

    assert f"src/{package}/cli.py" in added(folder, before)
    assert (folder / "src" / package / "runtime/VERSION").exists()


def test_an_adopting_project_may_say_which_of_its_packages_it_is(
    generate: Generate, project: Path
) -> None:
    shutil.copytree(project / "src/flights", project / "src/Airports")
    before = files(project)

    generate(project, adopt=True, package_name="Airports")

    assert "src/Airports/cli.py" in added(project, before)
    with pytest.raises(ValueError, match="A package name has lower-case letters"):
        generate(project, adopt=True, package_name="Trains")


def test_a_new_project_hears_nothing_of_adopting(generate: Generate, tmp_path: Path) -> None:
    project = generate(tmp_path / "penguins")

    assert "adopt" not in yaml.safe_load((project / ".copier-answers.yml").read_text("utf-8"))
