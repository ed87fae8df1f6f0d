"""All checks of sp-repo-review that apply pass, in generated projects and in this repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from repo_review.processor import process

from ..conftest import REPOSITORY, Generate

# These look for the address of a git host in .pre-commit-config.yaml, and the hooks need none.
BY_ADDRESS = {
    "PC100": "the hooks for files come from PyPI",
    "PC110": "ruff format comes from PyPI",
    "PC190": "ruff check comes from PyPI",
    "PC140": "mypy needs the project's own packages: CI and the README run it beside the hooks",
    "PC160": "which words a field has, its people know",
    "PC170": "nothing is written in reStructuredText",
    "PC180": "the owner's texts are the owner's",
    "PC901": "pre-commit.ci needs a git host",
    "PC902": "pre-commit.ci needs a git host",
    "PC903": "pre-commit.ci needs a git host",
}
ON_GITHUB = {"SEC001": "the workflow is checked by zizmor before it is generated: test_ci.py"}
ELSEWHERE = {"GH100": "its changes are checked on GitLab, or nowhere"}
OF_A_PROJECT = BY_ADDRESS | {
    "PY004": "a project is explained where its parts are: README.md, conf/, data/",
    "PY007": "uv runs its three commands",
    "MY101": "how strict types are is the owner's choice: a node without any passes",
    "MY103": "as MY101",
    "MY104": "as MY101",
    "MY105": "as MY101",
    "MY106": "as MY101",
}
HERE = {
    **BY_ADDRESS,
    **ON_GITHUB,
    "PP002": "nothing is built here",
    "PP003": "nothing is built here",
}


def failing(folder: Path) -> set[str]:
    return {check.name for check in process(folder).results if check.result is False}


@pytest.mark.parametrize("ci", ["github", "gitlab", "none"])
def test_a_generated_project_passes_all_checks_that_apply(
    generate: Generate, tmp_path: Path, ci: str
) -> None:
    project = generate(tmp_path / "project", ci=ci, licence="MIT", author_name="Ada Lovelace")

    of_ci = ON_GITHUB if ci == "github" else ELSEWHERE
    assert failing(project) == (OF_A_PROJECT | of_ci).keys()


def test_hooks_that_need_no_git_host_do_what_is_asked_of_others(
    generate: Generate, tmp_path: Path
) -> None:
    project = generate(tmp_path / "project", example=False)
    config = yaml.safe_load((project / ".pre-commit-config.yaml").read_text("utf-8"))

    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    entries = " ".join(hook["entry"] for repo in config["repos"] for hook in repo["hooks"])
    for command in ("check-yaml", "end-of-file-fixer", "ruff check", "ruff format"):
        assert command in entries


def test_this_repository_passes_all_checks_that_apply() -> None:
    assert failing(REPOSITORY) == HERE.keys()
