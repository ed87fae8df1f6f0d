"""A project is the same wherever the template is copied from, and nobody has to trust it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import copier
import pytest
import yaml
from copier.errors import DirtyLocalWarning

from .conftest import files, git

LINK = "template/src/{{ package_name }}/runtime"
CHANGED = "conf/README.md"


def copy(source: str | Path, folder: Path, vcs_ref: str | None = None) -> dict[str, bytes]:
    """Generate a project and read it, without the file that says where it came from."""
    data = {"project_name": "Penguin Study"}
    copier.run_copy(str(source), folder, data=data, defaults=True, quiet=True, vcs_ref=vcs_ref)
    project = files(folder)
    del project[".copier-answers.yml"]
    return project


@pytest.fixture(scope="module")
def expected(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return copy(template, tmp_path_factory.mktemp("plain") / "project")


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a git repository, one commit past its tag v0.1.0."""
    folder = tmp_path_factory.mktemp("sources") / "km-template"
    shutil.copytree(template, folder)
    (folder / "runtime").symlink_to(LINK, target_is_directory=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=First version")
    git(folder, "tag", "v0.1.0")
    change(folder)
    git(folder, "commit", "--quiet", "--all", "--message=Change a file")
    return folder


def change(template: Path) -> None:
    with (template / "template" / f"{CHANGED}.jinja").open("a", encoding="utf-8") as file:
        file.write("\nMore.\n")


def with_change(project: dict[str, bytes], times: int = 1) -> dict[str, bytes]:
    return {**project, CHANGED: project[CHANGED] + b"\nMore.\n" * times}


def test_a_plain_folder_gives_a_project(expected: dict[str, bytes]) -> None:
    assert "pyproject.toml" in expected
    assert "src/penguin_study/runtime/__init__.py" in expected


def test_a_repository_gives_its_newest_tag(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(repository, tmp_path / "project") == expected

    answers = yaml.safe_load((tmp_path / "project/.copier-answers.yml").read_text("utf-8"))
    assert answers["_commit"] == "v0.1.0"


def test_a_tag_can_be_named(repository: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert copy(repository, tmp_path / "project", vcs_ref="v0.1.0") == expected


def test_a_branch_can_be_named(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(repository, tmp_path / "project", vcs_ref="main") == with_change(expected)


def test_a_url_of_a_repository_gives_the_same(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(f"git+{repository.as_uri()}", tmp_path / "project") == expected


def test_a_change_that_is_not_committed_arrives(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    git(tmp_path, "clone", "--quiet", str(repository), "checkout")
    change(tmp_path / "checkout")
    (tmp_path / "checkout" / "template" / "new.txt").write_bytes(b"New.\n")

    with pytest.warns(DirtyLocalWarning):
        project = copy(tmp_path / "checkout", tmp_path / "project", vcs_ref="HEAD")

    assert project == {**with_change(expected, times=2), "new.txt": b"New.\n"}


@pytest.mark.parametrize("kept", ["as a repository", "as a plain folder"])
def test_a_checkout_without_symbolic_links_gives_the_same(
    repository: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: str,
) -> None:
    # For Copier's own clone as well.
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.symlinks")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "false")
    git(tmp_path, "clone", "--quiet", "--branch=v0.1.0", str(repository), "checkout")
    checkout = tmp_path / "checkout"
    assert not (checkout / "runtime").is_symlink()
    assert (checkout / "runtime").read_text("utf-8") == LINK
    if kept == "as a plain folder":
        shutil.rmtree(checkout / ".git")

    assert copy(checkout, tmp_path / "project") == expected


def test_the_template_has_nothing_to_trust(template: Path) -> None:
    settings = yaml.safe_load((template / "copier.yml").read_text("utf-8"))

    assert not {"_tasks", "_migrations", "_jinja_extensions"} & settings.keys()


def test_the_command_line_needs_no_trust(
    template: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "copier", "copy", "--defaults", "--quiet"),
            *("--data", "project_name=Penguin Study", str(template), "project"),
        ],
        cwd=tmp_path,
        check=True,
    )

    project = files(tmp_path / "project")
    del project[".copier-answers.yml"]
    assert project == expected


def test_no_link_lies_in_the_template(template: Path) -> None:
    assert [path for path in (template / "template").rglob("*") if path.is_symlink()] == []
