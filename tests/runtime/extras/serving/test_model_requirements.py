"""What a model requires, from the indexes of the project."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow.pyfunc
import pytest

from runtime.datasets.flavors import with_requirements
from runtime.serving.requirements import indexes_of

from ....support.pyprojects import pyproject_of_shop

CLOUDPICKLE = f"cloudpickle=={version('cloudpickle')}"


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the pyproject.toml of a project whose package is `shop`."""
    return pyproject_of_shop(tmp_path, monkeypatch)


def listed(more: list[str], **arguments: Any) -> dict[str, Any]:
    """Give the arguments of log_model for a pyfunc model of the project `shop`."""
    found = with_requirements(mlflow.pyfunc, None, arguments, more, indexes_of("shop"))
    assert not Path(found.pop("uv_project_path", "nowhere"), "uv.lock").exists()
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"pip_requirements": []},
        {"pip_requirements": "requirements.txt"},
        {"conda_env": {"name": "own"}},
        {"uv_groups": ["serving"]},
    ],
)
def test_what_the_user_gives_stays(given: dict[str, Any]) -> None:
    assert listed(["feed"], name="it", **given) == {"name": "it", **given}


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        (None, [CLOUDPICKLE, "feed"]),
        (["krill==1", "-c limits.txt"], [CLOUDPICKLE, "feed", "krill==1", "-c limits.txt"]),
        ("more.txt", [CLOUDPICKLE, "feed", "-r more.txt"]),
    ],
)
def test_extra_requirements_are_added(more: Any, lines: list[str]) -> None:
    arguments = listed(["feed"], extra_pip_requirements=more)

    assert arguments == {"pip_requirements": lines, "extra_pip_requirements": None}


OWN, OTHER = "https://me:secret@own.example/simple", "https://other.example/simple"


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ("", []),
        (f'[[tool.uv.index]]\nurl = "{OWN}"', ["--extra-index-url https://own.example/simple"]),
        (
            (
                f'[[tool.uv.index]]\nurl = "{OTHER}"\nname = "other"\nexplicit = true\n'
                f'[[tool.uv.index]]\nurl = "{OWN}"\ndefault = true'
            ),
            ["--index-url https://own.example/simple", f"--extra-index-url {OTHER}"],
        ),
        (
            f'[tool.uv]\nindex-url = "{OWN}"\nextra-index-url = ["{OTHER}", "file:///srv/simple"]',
            ["--index-url https://own.example/simple", f"--extra-index-url {OTHER}"],
        ),
        (
            f'[tool.uv.pip]\nextra-index-url = ["{OWN}"]',
            ["--extra-index-url https://own.example/simple"],
        ),
    ],
)
def test_the_package_indexes_of_the_project_are_listed_without_passwords(
    described: Callable[[str], None], settings: str, lines: list[str]
) -> None:
    described(settings)

    assert listed([])["pip_requirements"] == [*lines, CLOUDPICKLE]


def test_a_uv_toml_goes_before_the_settings_in_pyproject_toml(
    described: Callable[[str], None], tmp_path: Path
) -> None:
    described(f'[tool.uv]\nindex-url = "{OWN}"')
    (tmp_path / "uv.toml").write_text(f'[[index]]\nurl = "{OTHER}"')

    assert listed([])["pip_requirements"] == [f"--extra-index-url {OTHER}", CLOUDPICKLE]


def test_a_flavor_of_ones_own_that_does_not_say_is_left_to_mlflow() -> None:
    assert with_requirements(ModuleType("flavor"), None, {"name": "it"}) == {"name": "it"}
