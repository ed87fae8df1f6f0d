"""What a pipeline's model requires: what the project declares, and its libraries as code."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from runtime.serving.requirements import of_project

from ....support.pyprojects import pyproject_of_shop

KEDRO, MLFLOW = (f"{name}=={version(name)}" for name in ("kedro", "mlflow"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed to for a test."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def install(site: Path) -> Callable[..., None]:
    """Install a distribution with a package, as pip and uv leave it."""

    def install(name: str, *requires: str, release: str = "1.0", **origin: Any) -> None:
        package = name.lower().replace("-", "_")
        about = site / f"{package}-{release}.dist-info"
        about.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {release}"]
        lines = [*head, *(f"Requires-Dist: {required}" for required in requires)]
        (about / "METADATA").write_text("\n".join(lines))
        if origin:
            (about / "direct_url.json").write_text(json.dumps(origin))
        if origin.get("dir_info", {}).get("editable"):
            recorded = f"_{package}.pth"
            (site / recorded).write_text(f"{url2pathname(urlsplit(origin['url']).path)}/src\n")
        else:
            (site / package).mkdir()
            (site / package / "__init__.py").touch()
            recorded = f"{package}/__init__.py"
        (about / "RECORD").write_text(f"{recorded},,\n{about.name}/METADATA,,")

    return install


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the pyproject.toml of a project whose package is `shop`."""
    return pyproject_of_shop(tmp_path, monkeypatch)


# What a project declares.


def test_what_a_project_declares_is_required_at_the_installed_version(
    described: Callable[[str], None], install: Callable[..., None]
) -> None:
    install("Penguin-Feed", "krill", release="2.1+cpu")
    described(
        """[project]
        dependencies = [
            "penguin_feed[fast, dry]>=2", "kedro>=1", "mlflow<4; python_version > '3'",
            "ruff; python_version < '3'", "not-installed>=3; sys_platform != 'none'",
        ]"""
    )

    assert of_project("shop") == (
        [KEDRO, MLFLOW, "Penguin-Feed[dry,fast]==2.1", "not-installed>=3"],
        [],
    )


def test_the_wheel_of_a_project_requires_the_same(install: Callable[..., None]) -> None:
    install("Shop", "penguin-feed>=2", "pytest; extra == 'dev'", "ruff; sys_platform == 'none'")
    install("penguin-feed", "krill")

    assert of_project("shop") == ([KEDRO, MLFLOW, "penguin-feed==1.0"], [])


def test_a_tool_that_builds_the_project_may_declare_what_it_requires(
    described: Callable[[str], None], install: Callable[..., None]
) -> None:
    install("our-shop", "penguin-feed>=2")
    install("penguin-feed")
    described('[project]\nname = "our.shop"\ndynamic = ["dependencies"]')

    assert of_project("shop") == ([KEDRO, MLFLOW, "penguin-feed==1.0"], [])


def test_a_project_that_declares_nothing_is_told_so(
    described: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    described("")

    assert of_project("shop") == ([KEDRO, MLFLOW], [])

    assert "expected `dependencies` under [project] in pyproject.toml" in caplog.text


def test_a_distribution_of_another_name_is_required_by_its_own(
    described: Callable[[str], None],
) -> None:
    described('[project]\ndependencies = ["xgboost>=2"]')

    assert of_project("shop")[0][2:] == [f"xgboost-cpu=={version('xgboost-cpu')}"]


def test_a_package_of_conda_is_no_library_of_the_projects_own(
    described: Callable[[str], None], install: Callable[..., None], site: Path
) -> None:
    install("feed", url="file:///home/conda/feedstock_root/feed", dir_info={})
    (site / "feed-1.0.dist-info" / "INSTALLER").write_text("conda\n")
    described('[project]\ndependencies = ["feed"]')

    assert of_project("shop") == ([KEDRO, MLFLOW, "feed==1.0"], [])


GIT = {"vcs": "git", "commit_id": "abc123"}


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ({"url": "https://me:secret@git.example/feed.git", "vcs_info": GIT}, "git+{}/feed.git@abc"),
        (
            {"url": "ssh://git:secret@git.example/a", "vcs_info": GIT, "subdirectory": "feed"},
            "git+ssh://git@git.example/a@abc123#subdirectory=feed",
        ),
        ({"url": "https://t@git.example/feed.whl", "archive_info": {}}, "{}/feed.whl"),
    ],
)
def test_what_was_installed_from_elsewhere_is_required_from_there_without_a_password(
    described: Callable[[str], None],
    install: Callable[..., None],
    origin: dict[str, Any],
    line: str,
) -> None:
    install("feed", **origin)
    described('[project]\ndependencies = ["feed"]')

    (found,) = of_project("shop")[0][2:]

    assert found.startswith(f"feed @ {line.format('https://git.example')}")
    assert "secret" not in found


# Libraries of the project's own.


def library(folder: Path, monkeypatch: pytest.MonkeyPatch, *modules: str) -> str:
    """Write a library into a folder of its own; gives the folder's URL."""
    for module in modules:
        (folder / "src" / module).mkdir(parents=True)
        (folder / "src" / module / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder / "src")  # as the .pth of its installation does
    return folder.as_uri()


def test_a_library_of_the_projects_own_travels_with_what_it_requires_in_turn(
    described: Callable[[str], None],
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    site: Path,
) -> None:
    editable = {"dir_info": {"editable": True}}
    cages = library(
        tmp_path / "libs" / "cages", monkeypatch, "zoo_cages", "zoo_keepers", "zoo_locks"
    )
    food = library(tmp_path / "libs with space" / "food", monkeypatch, "food")
    install("zoo-cages", "food[fast]", "zoo-keys", url=cages, **editable)
    install(
        "food", "krill", "gravel; extra == 'fast'", "sand; extra == 'slow'", url=food, **editable
    )
    wheel = (tmp_path / "wheels" / "zoo_keys-1.0-py3-none-any.whl").as_uri()
    install("zoo-keys", "zoo-cages", url=wheel, archive_info={})
    for name in ("krill", "gravel", "sand"):
        install(name)
    described('[project]\ndependencies = ["zoo-cages"]')

    lines, code = of_project("shop")

    assert lines == [KEDRO, MLFLOW, "krill==1.0", "gravel==1.0"]
    assert set(code) == {
        tmp_path / "libs with space/food/src/food",
        tmp_path / "libs/cages/src/zoo_cages",
        tmp_path / "libs/cages/src/zoo_keepers",
        tmp_path / "libs/cages/src/zoo_locks",
        site / "zoo_keys",
    }


def test_of_a_library_that_has_its_modules_beside_its_tests_those_that_are_imported_travel(
    described: Callable[[str], None],
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    site: Path,
) -> None:
    folder = tmp_path / "cages"
    for module in ("cages", "locks_of_cages", "tests_of_cages"):
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    install("cages", url=folder.as_uri(), dir_info={"editable": True})
    (site / "_cages.pth").write_text(f"{folder}\n")
    described('[project]\ndependencies = ["cages"]')
    monkeypatch.setitem(sys.modules, "locks_of_cages", import_module("locks_of_cages"))

    assert of_project("shop")[1] == [folder / "cages", folder / "locks_of_cages"]


def test_a_library_whose_code_is_not_found_is_told(
    described: Callable[[str], None],
    install: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install("cages", url=(tmp_path / "cages").as_uri(), dir_info={"editable": True})
    described('[project]\ndependencies = ["cages"]')

    assert of_project("shop") == ([KEDRO, MLFLOW], [])

    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.startswith(
        f"The model lacks 'cages', which was installed from {tmp_path}"
    )
