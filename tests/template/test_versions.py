"""No version takes a path away without a word; versions are found with their tags and without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pathspec
import pytest
import yaml

from ..conftest import REPOSITORY
from ..support import versions as versions_module
from ..support.versions import NOW, RUNTIME, Versions, make_versions, tag
from .conftest import git

ANSWERS: list[dict[str, Any]] = [
    {"example": True, "docker": True, "ci": "github", "scale_out": "dask", "licence": "MIT"},
    {"example": False, "docker": True, "ci": "gitlab", "scale_out": "none", "licence": "none"},
]
EXTRAS = ["offline", "serving", "console"]

# The runtime is the template's, and so was the schema, which is in the runtime now.
TEMPLATES_OWN = re.compile(r"src/penguin_study/runtime/.*|conf/base/mlflow\.schema\.json")


@pytest.fixture(scope="module")
def versions(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(template, tmp_path_factory.mktemp("versions") / "km-template")


@pytest.fixture
def released(versions: Versions) -> list[str]:
    if not versions.released:
        pytest.skip("This checkout has no history: its earlier versions can't be had.")
    return versions.released


def shipped(repository: Path, version: str) -> set[str]:
    """Name the files that a version generates with one answer or another, from their names."""
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    fixed: dict[str, Any] = {
        "package_name": "penguin_study",
        "instructions": "README",
        "_copier_conf": {"answers_file": ".copier-answers.yml"},
    }
    listed = git(repository, "ls-tree", "-r", "-z", "--name-only", f"{version}:template")
    fixed["extras"] = EXTRAS
    found = set()
    for name in listed.split("\0")[:-1]:
        path = jinja.from_string(name.removesuffix(".jinja"))
        found |= {path.render(fixed | answers) for answers in ANSWERS}
    # Nothing is generated where a folder or a file has no name.
    return {path for path in found if all(path.split("/"))}


def gone(repository: Path, old: str, new: str) -> set[str]:
    """Name the files that an update would delete: neither shipped any more nor in `_exclude`.

    The runtime is the template's: what is gone from it is to go from projects too.
    """
    settings = yaml.safe_load(git(repository, "show", f"{new}:copier.yml"))
    patterns = [
        jinja2.Template(pattern).render(_copier_operation="update", extras=EXTRAS)
        for pattern in settings["_exclude"]
    ]
    kept = pathspec.GitIgnoreSpec.from_lines(patterns)
    names = shipped(repository, old) - shipped(repository, new)
    return {
        name for name in names if not kept.match_file(name) and not TEMPLATES_OWN.fullmatch(name)
    }


def test_no_path_of_an_earlier_version_is_taken_away_without_a_word(
    versions: Versions, released: list[str]
) -> None:
    assert {version: gone(versions.repository, version, NOW) for version in released} == {
        version: set() for version in released
    }


def test_a_path_that_is_taken_away_without_a_word_is_noticed(
    versions: Versions, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "--quiet", f"--branch={NOW}", str(versions.repository), "clone")
    clone = tmp_path / "clone"
    git(clone, "mv", f"{RUNTIME}/hooks.py", f"{RUNTIME}/events.py")
    git(clone, "rm", "--quiet", "template/.telemetry", "template/notebooks/.gitkeep")
    tag(clone, "v2000.0.0")

    # The notebooks are the owner's, and the runtime is the template's.
    assert gone(clone, NOW, "v2000.0.0") == {".telemetry"}


def test_the_artificial_versions_take_paths_away_as_they_should(versions: Versions) -> None:
    assert gone(versions.repository, NOW, versions.artificial[-1]) == set()


def test_versions_without_tags_are_found_in_the_changelog(
    template: Path, released: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "--quiet", "--no-tags", REPOSITORY.as_posix(), "untagged")
    monkeypatch.setattr(versions_module, "REPOSITORY", tmp_path / "untagged")

    found = make_versions(template, tmp_path / "km-template")

    assert found.released == released


def test_a_checkout_without_history_has_the_artificial_versions_only(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    monkeypatch.setattr(versions_module, "REPOSITORY", tmp_path / "plain")
    plain = make_versions(template, tmp_path / "first")
    git(tmp_path / "plain", "init", "--quiet")
    for message in ("One", "Two"):
        git(tmp_path / "plain", "commit", "--quiet", "--allow-empty", f"--message={message}")
    git(tmp_path, "clone", "--quiet", "--depth=1", (tmp_path / "plain").as_uri(), "shallow")
    monkeypatch.setattr(versions_module, "REPOSITORY", tmp_path / "shallow")
    shallow = make_versions(template, tmp_path / "second")

    assert plain.all == shallow.all == [NOW, *plain.artificial]
    assert plain.artificial
