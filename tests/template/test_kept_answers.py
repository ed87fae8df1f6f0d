"""An update keeps the answers that a project lives with, and refuses wrong new ones."""

from __future__ import annotations

import io
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import copier
import pytest
import yaml
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.plain_text import PlainTextOutput

from ..conftest import EXTRAS
from ..support.versions import NOW, Versions, append, make_versions, tag
from .conftest import git

Answers = dict[str, Any]

# One for each question with a validator, and with what else has to be answered then. A new project
# can't have them, though an earlier version might have taken them.
REFUSED_NOW: list[Answers] = [
    {"project_name": "penguins\tand more"},
    {"package_name": "p" * 45},
    {"package_name": "Penguins"},
    {"package_name": "mlflow"},
    {"description": "of\tpenguins"},
    {"author_name": "Ada\x7f"},
    {"author_email": "ada"},
    {"tracking_backend": "server", "tracking_uri": "http://ada:secret@mlflow.example.org"},
    {"tracking_backend": "server", "tracking_uri": "mlflow:5000"},
    {"tracking_backend": "databricks", "unity_catalog_schema": "models"},
    {"artifact_store": "s3", "artifact_location": "s3://bucket/my folder"},
]
# All of them, in as few projects as can have them.
REFUSED_TOGETHER: list[Answers] = [
    {
        "project_name": "penguins\tand more",
        "package_name": "p" * 45,
        "description": "of\tpenguins",
        "author_name": "Ada\x7f",
        "author_email": "ada",
        "tracking_backend": "server",
        "tracking_uri": "http://ada:secret@mlflow.example.org",
        "artifact_store": "s3",
        "artifact_location": "s3://bucket/my folder",
    },
    {
        "package_name": "Penguins",
        "tracking_backend": "server",
        "tracking_uri": "mlflow:5000",
    },
    {
        "package_name": "mlflow",
        "tracking_backend": "databricks",
        "unity_catalog_schema": "models",
    },
]
# What versions have accepted, each for one reason or another that a later one refuses.
POOL: dict[str, list[Any]] = {
    "project_name": [
        "Penguins",
        "  of\x85penguins ",
        "a long name of many words " * 3,
        "1.0",
        "[x]",
    ],
    # Without an answer it is made from the project's name.
    "package_name": [None, None, "penguins", "p" * 45, "penguins_", "waitress", "sessions", "con"],
    "description": ["", "two\x85lines", "{{ package_name }}", "é " * 90, "null", "🐧\u2028"],
    "author_name": ["", "Ada", "Ada\x90", "yes"],
    "author_email": ["", "ada@example.org"],
    "licence": ["none", "MIT", "Apache-2.0", "BSD-3-Clause"],
    "example": [True, False],
    "tracking_backend": ["sqlite", "server", "server", "databricks"],
    "tracking_uri": [
        "http://127.0.0.1:5000",
        "http://mlflow",
        "http://mlflow:",
        "https://ada@mlflow.example.org",
        "https://ada:secret@mlflow.example.org/path?team=birds#runs",
    ],
    "unity_catalog_schema": ["workspace.default", "main.birds"],
    "artifact_store": ["local", "s3", "gcs", "azure"],
    "docker": [True, False],
    "ci": ["none", "github", "gitlab"],
    "scale_out": ["none", "dask"],
    "extras": [[], ["console"], list(EXTRAS)],
}


@pytest.fixture(scope="module")
def versions(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(template, tmp_path_factory.mktemp("versions") / "km-template")


def copy(repository: Path, folder: Path, version: str, answers: Answers) -> Path:
    """Generate a project and put it under git."""
    copier.run_copy(
        str(repository), folder, data=answers, vcs_ref=version, defaults=True, quiet=True
    )
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def copy_with_others(
    repository: Path, folder: Path, version: str, answers: Answers, chosen: random.Random
) -> Path:
    """Generate a project, with another answer in place of each that the version refuses."""
    try:
        given = {name: answer for name, answer in answers.items() if answer is not None}
        return copy(repository, folder, version, given)
    except ValueError as error:
        (name,) = [name for name in POOL if f"'{name}'" in str(error)]
        others = answers | {name: chosen.choice(POOL[name])}
        return copy_with_others(repository, folder, version, others, chosen)


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--allow-empty", "--message=Mine")


def update(project: Path, version: str | None = None, **options: Any) -> None:
    options = {"defaults": True} | options
    copier.run_update(project, vcs_ref=version, overwrite=True, quiet=True, **options)


def read_answers(project: Path) -> Answers:
    answers: Answers = yaml.safe_load((project / ".copier-answers.yml").read_text("utf-8"))
    return answers


@pytest.mark.parametrize(
    "seed",
    [*range(2), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(2, 80))],
)
def test_what_a_released_version_accepted_stays_in_an_update(
    versions: Versions, tmp_path: Path, seed: int
) -> None:
    if not versions.released:
        pytest.skip("This checkout has no history: its earlier versions can't be had.")
    chosen = random.Random(seed)
    version = versions.released[seed % len(versions.released)]
    answers = {name: chosen.choice(of) for name, of in POOL.items()}
    project = tmp_path / "penguins [x]"
    copy_with_others(versions.repository, project, version, answers, chosen)
    before = read_answers(project)

    update(project, NOW)
    commit(project)
    update(project)

    after = read_answers(project)
    assert {name: after.get(name) for name in before if name != "_commit"} == {
        name: answer for name, answer in before.items() if name != "_commit"
    }
    assert [path.parent.name for path in project.glob("src/*/settings.py")] == [
        before["package_name"]
    ]
    if "extras" not in before:
        assert after["extras"] == list(EXTRAS)


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template in three versions, of which the first accepts every answer."""
    folder = tmp_path_factory.mktemp("kept") / "km-template"
    shutil.copytree(template, folder)
    questions = yaml.safe_load((folder / "copier.yml").read_text("utf-8"))
    for name, question in questions.items():
        if not name.startswith("_"):
            question.pop("validator", None)
    (folder / "copier.yml").write_text(yaml.safe_dump(questions, sort_keys=False), "utf-8")
    git(folder, "init", "--quiet")
    tag(folder, "v1.0.0")
    shutil.copy(template / "copier.yml", folder)
    tag(folder, "v2.0.0")
    append(folder / "template/.telemetry", "# New.")
    tag(folder, "v3.0.0")
    return folder


def test_each_question_with_a_validator_has_an_answer_that_is_refused(template: Path) -> None:
    questions = yaml.safe_load((template / "copier.yml").read_text("utf-8"))
    validated = {name for name, question in questions.items() if "validator" in question}

    assert validated <= {name for answers in REFUSED_NOW for name in answers}


@pytest.mark.parametrize("answers", REFUSED_NOW, ids=str)
def test_an_answer_that_a_version_refuses_is_refused_in_a_new_project(
    repository: Path, tmp_path: Path, answers: Answers
) -> None:
    with pytest.raises(ValueError, match="Validation error"):
        copy(repository, tmp_path / "new", "v2.0.0", answers)


def test_each_answer_that_is_refused_is_in_one_of_the_projects() -> None:
    together = [answers.items() for answers in REFUSED_TOGETHER]

    assert all(any(answers.items() <= items for items in together) for answers in REFUSED_NOW)


@pytest.mark.parametrize("answers", REFUSED_TOGETHER)
def test_an_answer_that_a_later_version_refuses_stays(
    repository: Path, tmp_path: Path, answers: Answers
) -> None:
    project = copy(repository, tmp_path / "penguins", "v1.0.0", answers)

    for version in ("v2.0.0", "v3.0.0"):
        update(project, version)
        commit(project)
        assert read_answers(project)["_commit"] == version
        assert answers.items() <= read_answers(project).items()


@pytest.fixture(scope="module")
def unchanged(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unchanged") / "penguins"
    return copy(repository, folder, "v2.0.0", {"example": True})


@pytest.mark.parametrize("answers", REFUSED_NOW, ids=str)
def test_an_update_refuses_a_wrong_answer_and_changes_nothing(
    repository: Path, unchanged: Path, answers: Answers
) -> None:
    with pytest.raises(ValueError, match="Validation error"):
        update(unchanged, "v3.0.0", data=answers)

    assert git(unchanged, "status", "--porcelain") == ""


def test_a_place_of_the_store_before_is_no_answer_for_the_next(
    repository: Path, tmp_path: Path
) -> None:
    answers = {"artifact_store": "s3", "artifact_location": "s3://bucket/penguins"}
    project = copy(repository, tmp_path / "penguins", "v2.0.0", answers)

    update(project, data={"artifact_store": "gcs"})

    assert read_answers(project)["artifact_location"] == "gs://change-me/penguins"


def test_a_new_project_is_asked_what_it_is_to_be_and_nothing_of_before(
    template: Path, tmp_path: Path
) -> None:
    asked = press_enter(lambda: copier.run_copy(str(template), tmp_path / "penguins", quiet=True))

    assert "What is its Python package called?" in asked
    assert "Include the example, which classifies penguins?" in asked
    assert "last_answers" not in read_answers(tmp_path / "penguins")
    assert not any("last_answers" in question for question in asked)


def test_what_is_answered_once_is_not_asked_in_an_update(repository: Path, tmp_path: Path) -> None:
    answers = {"package_name": "birds", "example": True, "tracking_backend": "databricks"}
    project = copy(repository, tmp_path / "penguins", "v2.0.0", answers)
    before = read_answers(project)

    asked = press_enter(lambda: update(project, defaults=False))

    assert "What is the project called?" in asked
    assert asked.isdisjoint(
        {
            "What is its Python package called?",
            "Include the example, which classifies penguins?",
            "In which schema of Unity Catalog are models registered?",
        }
    )
    assert read_answers(project) == before | {"_commit": "v3.0.0"}


def test_an_update_that_skips_what_is_answered_asks_what_is_new(
    repository: Path, tmp_path: Path
) -> None:
    project = copy(repository, tmp_path / "penguins", "v2.0.0", {"example": False})

    asked = press_enter(
        lambda: update(
            project, defaults=False, skip_answered=True, data={"tracking_backend": "server"}
        )
    )

    assert asked == {"What is the server's address?"}


def press_enter(command: Callable[[], object]) -> set[str]:
    """Take the default of whatever a command asks; gives the questions."""
    shown = io.StringIO()
    with create_pipe_input() as keyboard:
        keyboard.send_text("\r" * 30)
        with create_app_session(input=keyboard, output=PlainTextOutput(shown)):
            command()
    return set(re.findall(r"🎤 (.*\?)", shown.getvalue()))
