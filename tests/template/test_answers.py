"""Answers arrive as they were given, and the package's name is derived from the project's."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from ..conftest import REPOSITORY, Generate
from .conftest import changed_by_hooks, read_toml, ruff

DIFFICULT = {
    "quotes": 'the "quoted" \'words\' and """docs"""',
    "final quote": 'the last word is "quoted"',
    "backslash": r"C:\new\users \N{DASH} \u0041 \\",
    "markup": "R&D for <b>everyone</b> & `code`",
    "umlauts": "Größe der Vögel: 100 % für Ärzte",
    "emoji": "Penguins 🐧 swim",
    "apostrophe": "it's the penguin's",
    "hash": "# 1 of all projects #really",
    "colon": "birds: penguins - and: others",
    "list": "- birds",
    "anchor": "*birds &fish !tag",
    "spaces": "  padded on both sides   ",
    "yes": "yes",
    "null": "null",
    "true": "true",
    "number": "1.0",
    "date": "2024-01-01",
    "jinja": "{{ project_name }} {% raw %} {# no comment #}",
    "variables": "${oc.env:HOME} $HOME %HOME%",
    "long": "A well-known sentence " + "that goes on-and-on and " * 8 + "ends.",
}


class Project(NamedTuple):
    folder: Path
    text: str
    package: str


@pytest.fixture(scope="module", params=list(DIFFICULT.values()), ids=list(DIFFICULT))
def difficult(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    text: str = request.param
    folder = tmp_path_factory.mktemp("answers") / "project"
    # A long name would make a long package's name, which is another matter.
    name = text[:30] if len(text) > 100 else text
    answers = {"project_name": name, "description": text, "author_name": text}
    generate(folder, **answers, author_email="a.b+c@example.org", licence="MIT", example=False)
    package = read_toml(folder / "pyproject.toml")["tool"]["kedro"]["package_name"]
    return Project(folder, text, package)


def test_difficult_text_is_exact_in_pyproject(difficult: Project) -> None:
    pyproject = read_toml(difficult.folder / "pyproject.toml")

    assert pyproject["project"]["description"] == difficult.text
    assert pyproject["project"]["authors"] == [
        {"name": difficult.text, "email": "a.b+c@example.org"}
    ]
    assert difficult.text.startswith(pyproject["tool"]["kedro"]["project_name"])
    assert pyproject["project"]["name"] == difficult.package.replace("_", "-")


def test_difficult_text_is_the_docstring_of_the_package(difficult: Project) -> None:
    code = (difficult.folder / "src" / difficult.package / "__init__.py").read_text("utf-8")

    docstring = ast.get_docstring(ast.parse(code)) or ""

    # Where its lines break is the formatter's matter.
    assert docstring.split() == difficult.text.split()


def test_difficult_text_reads_back_from_the_answers_file(difficult: Project) -> None:
    answers = yaml.safe_load((difficult.folder / ".copier-answers.yml").read_text("utf-8"))

    assert answers["description"] == difficult.text
    assert answers["author_name"] == difficult.text
    assert answers["package_name"] == difficult.package
    assert isinstance(answers["project_name"], str)
    assert difficult.text.startswith(answers["project_name"])


def test_difficult_text_leaves_the_experiment_named_like_the_package(difficult: Project) -> None:
    config = yaml.safe_load((difficult.folder / "conf/base/mlflow.yml").read_text("utf-8"))

    assert config["tracking"]["experiment"]["name"] == difficult.package


def test_difficult_text_leaves_the_project_tidy(difficult: Project) -> None:
    assert changed_by_hooks(difficult.folder) == []
    assert ruff(difficult.folder, "check") == ""
    assert ruff(difficult.folder, "format", "--diff") == ""


def test_the_readme_lists_every_question_and_its_choices() -> None:
    questions = {
        name: question
        for name, question in yaml.safe_load((REPOSITORY / "copier.yml").read_text("utf-8")).items()
        if not name.startswith("_")
        and not question.get("secret")
        and question.get("when") is not False
    }
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", readme, flags=re.MULTILINE))

    assert list(rows) == list(questions)
    for name, question in questions.items():
        for choice in question.get("choices", {}).values():
            assert f"`{str(choice).lower() if choice in (True, False) else choice}`" in rows[name]


@pytest.mark.parametrize(
    ("project_name", "package_name"),
    [
        ("My Project 2", "my_project_2"),
        ("penguins-demo", "penguins_demo"),
        ("already_a_package", "already_a_package"),
        ("2024 sales", "sales"),
        ("Sales (EU) & more!", "sales_eu_more"),
        ("  padded  ", "padded"),
        ("__private__", "private"),
        ("v1.0", "v1_0"),
        ("Ünïcode", "unicode"),
        ("Crème Brûlée", "creme_brulee"),
        ("Straße", "strasse"),
        ("日本", "my_project"),
        ("🐧", "my_project"),
        ("---", "my_project"),
        ("1.0", "my_project"),
        ("a long name of many words " * 3, "a_long_name_of_many_words_a_long_name_of"),
    ],
)
def test_the_package_is_named_after_the_project(
    generate: Generate, tmp_path: Path, project_name: str, package_name: str
) -> None:
    project = generate(tmp_path / "project", project_name=project_name, example=False)

    answers = yaml.safe_load((project / ".copier-answers.yml").read_text("utf-8"))
    assert answers["package_name"] == package_name
    assert (project / "src" / package_name / "__init__.py").exists()


@pytest.mark.parametrize(
    ("project_name", "wrong"),
    [
        ("Class", '"class" is a keyword of Python'),
        ("JSON", '"json" is a module of Python\'s standard library'),
        ("Test", '"test" is a module of Python\'s standard library'),
        ("MLflow", '"mlflow" is the name of something'),
        ("Data", '"data" is the name of something'),
    ],
)
def test_a_project_whose_package_would_hide_another_module_is_refused(
    generate: Generate, tmp_path: Path, project_name: str, wrong: str
) -> None:
    with pytest.raises(ValueError, match=wrong):
        generate(tmp_path / "project", project_name=project_name)

    assert not (tmp_path / "project").exists()


def test_the_project_is_named_after_its_folder(generate: Generate, tmp_path: Path) -> None:
    project = generate(tmp_path / "penguin-study", example=False)

    pyproject = read_toml(project / "pyproject.toml")
    assert pyproject["tool"]["kedro"]["project_name"] == "penguin-study"
    assert pyproject["tool"]["kedro"]["package_name"] == "penguin_study"
    assert pyproject["project"]["name"] == "penguin-study"


@pytest.mark.parametrize(
    ("name", "email", "authors"),
    [
        ("", "", None),
        ("Ada", "", [{"name": "Ada"}]),
        ("", "ada@example.org", [{"email": "ada@example.org"}]),
        ("Ada", "ada@example.org", [{"name": "Ada", "email": "ada@example.org"}]),
    ],
)
def test_the_authors_are_what_is_known_of_them(
    generate: Generate,
    tmp_path: Path,
    name: str,
    email: str,
    authors: list[dict[str, str]] | None,
) -> None:
    project = generate(tmp_path / "project", author_name=name, author_email=email, example=False)

    assert read_toml(project / "pyproject.toml")["project"].get("authors") == authors


def test_an_empty_description_leaves_the_project_tidy(generate: Generate, tmp_path: Path) -> None:
    project = generate(tmp_path / "project", description="", example=False)

    assert read_toml(project / "pyproject.toml")["project"]["description"] == ""
    assert changed_by_hooks(project) == []
    assert ruff(project, "check") == ""
    assert ruff(project, "format", "--diff") == ""


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:5000",
        "http://[::1]:5000/",
        "https://mlflow.example.org/it's/a/path?team=birds&page=1#runs",
    ],
)
def test_the_address_of_the_server_arrives_exactly(
    generate: Generate, tmp_path: Path, address: str
) -> None:
    project = generate(
        tmp_path / "project", tracking_backend="server", tracking_uri=address, example=False
    )

    config = yaml.safe_load((project / "conf/base/mlflow.yml").read_text("utf-8"))
    assert config["server"]["mlflow_tracking_uri"] == address
