"""Every combination of the answers gives a project that is whole and tidy."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest
import yaml

from ..conftest import EXTRAS, Generate
from .conftest import changed_by_hooks, complaints, files, read_toml, ruff, texts

# Of the runtime the list is that of its sources.
ALWAYS = """
.copier-answers.yml
.gitattributes
.gitignore
.pre-commit-config.yaml
.telemetry
README.md
conf/README.md
conf/base/catalog.yml
conf/base/mlflow.yml
conf/base/parameters.yml
conf/local/.gitkeep
conf/local/credentials.yml
conf/logging.yml
conf/prod/mlflow.yml
data/01_raw/.gitkeep
data/02_intermediate/.gitkeep
data/03_primary/.gitkeep
data/04_feature/.gitkeep
data/05_model_input/.gitkeep
data/06_models/.gitkeep
data/07_model_output/.gitkeep
data/08_reporting/.gitkeep
data/README.md
notebooks/.gitkeep
pyproject.toml
src/penguin_study/__init__.py
src/penguin_study/__main__.py
src/penguin_study/cli.py
src/penguin_study/pipeline_registry.py
src/penguin_study/pipelines/__init__.py
src/penguin_study/settings.py
tests/test_run.py
""".split()

WITH_EXAMPLE = """
data/01_raw/penguins.csv
src/penguin_study/pipelines/data_processing/__init__.py
src/penguin_study/pipelines/data_processing/nodes.py
src/penguin_study/pipelines/data_processing/pipeline.py
src/penguin_study/pipelines/inference/__init__.py
src/penguin_study/pipelines/inference/nodes.py
src/penguin_study/pipelines/inference/pipeline.py
src/penguin_study/pipelines/training/__init__.py
src/penguin_study/pipelines/training/nodes.py
src/penguin_study/pipelines/training/pipeline.py
tests/pipelines/data_processing/__init__.py
tests/pipelines/data_processing/test_pipeline.py
tests/pipelines/inference/__init__.py
tests/pipelines/inference/test_pipeline.py
tests/pipelines/training/__init__.py
tests/pipelines/training/test_pipeline.py
""".split()

WITHOUT_EXAMPLE = """
src/penguin_study/pipelines/first/__init__.py
src/penguin_study/pipelines/first/nodes.py
src/penguin_study/pipelines/first/pipeline.py
tests/pipelines/.gitkeep
""".split()

WITH_DOCKER = """
.dockerignore
.env.example
Dockerfile
compose.yml
conf/docker/mlflow.yml
""".split()

WITH_CI = {
    "github": [".github/dependabot.yml", ".github/workflows/ci.yml"],
    "gitlab": [".gitlab-ci.yml"],
    "none": [],
}

WITH_DASK = ["src/penguin_study/runner.py"]

RUNTIME = "src/penguin_study/runtime/"

LICENCES = {
    "Apache-2.0": "Apache License",
    "BSD-3-Clause": "BSD 3-Clause License",
    "MIT": "MIT License",
}


class Answers(NamedTuple):
    example: bool
    tracking_backend: str
    artifact_store: str
    licence: str
    docker: bool
    ci: str
    scale_out: str


# Every pair of answers stands in one of these; that Databricks has no other store, too.
COMBINATIONS = [
    Answers(True, "sqlite", "local", "none", False, "github", "dask"),
    Answers(False, "server", "s3", "none", True, "none", "dask"),
    Answers(False, "databricks", "gcs", "none", False, "none", "none"),
    Answers(True, "server", "azure", "none", True, "gitlab", "dask"),
    Answers(False, "server", "local", "MIT", False, "gitlab", "none"),
    Answers(True, "sqlite", "s3", "MIT", True, "none", "dask"),
    Answers(True, "server", "gcs", "MIT", False, "none", "dask"),
    Answers(False, "databricks", "azure", "MIT", True, "github", "none"),
    Answers(True, "databricks", "local", "BSD-3-Clause", True, "none", "dask"),
    Answers(False, "server", "s3", "BSD-3-Clause", False, "github", "dask"),
    Answers(False, "sqlite", "gcs", "BSD-3-Clause", True, "gitlab", "none"),
    Answers(True, "server", "azure", "BSD-3-Clause", False, "none", "dask"),
    Answers(False, "server", "local", "Apache-2.0", True, "none", "none"),
    Answers(True, "databricks", "s3", "Apache-2.0", False, "gitlab", "none"),
    Answers(True, "server", "gcs", "Apache-2.0", True, "github", "dask"),
    Answers(False, "sqlite", "azure", "Apache-2.0", False, "none", "dask"),
]


class Project(NamedTuple):
    folder: Path
    answers: Answers


def in_words(answers: Answers) -> str:
    return ", ".join(f"{question}={answer}" for question, answer in answers._asdict().items())


@pytest.fixture(scope="module", params=COMBINATIONS, ids=in_words)
def project(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    answers: Answers = request.param
    folder = tmp_path_factory.mktemp("rendering") / "project"
    generate(folder, project_name="Penguin Study", **answers._asdict())
    return Project(folder, answers)


def test_every_pair_of_answers_is_rendered(template: Path) -> None:
    questions = yaml.safe_load((template / "copier.yml").read_text(encoding="utf-8"))
    values = {
        question: set(questions[question]["choices"].values()) for question in Answers._fields
    }

    for one, other in itertools.combinations(Answers._fields, 2):
        rendered = {(getattr(each, one), getattr(each, other)) for each in COMBINATIONS}
        assert rendered == set(itertools.product(values[one], values[other]))


def test_the_files_are_exactly_those_expected(project: Project, template: Path) -> None:
    expected = ALWAYS + (WITH_EXAMPLE if project.answers.example else WITHOUT_EXAMPLE)
    expected = expected + (WITH_DOCKER if project.answers.docker else [])
    expected = expected + WITH_CI[project.answers.ci]
    if project.answers.licence != "none":
        expected = [*expected, "LICENSE"]
    if (project.answers.tracking_backend, project.answers.artifact_store) != ("sqlite", "local"):
        expected = [*expected, "conf/test/mlflow.yml"]
    if project.answers.scale_out == "dask":
        expected = expected + WITH_DASK

    names = [name for name in files(project.folder) if not name.startswith(RUNTIME)]

    assert sorted(names) == sorted(expected)


def test_the_runtime_is_copied_byte_for_byte(project: Project, template: Path) -> None:
    source = files(template / "template" / "src" / "{{ package_name }}" / "runtime")
    of_core = {name: text for name, text in source.items() if name.split("/")[0] not in EXTRAS}

    assert files(project.folder / RUNTIME) == of_core


def test_no_jinja_is_left_over(project: Project) -> None:
    left = [
        name
        for name, text in texts(project.folder).items()
        # `${{ }}` is GitHub's.
        if re.search(r"(?<!\$)\{\{|\{%|\{#", name if name.startswith(RUNTIME) else name + text)
    ]

    assert left == []


def test_every_yaml_and_toml_file_parses(project: Project) -> None:
    for path in project.folder.rglob("*"):
        if path.suffix in {".yml", ".yaml"} or path.name == ".telemetry":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".toml":
            read_toml(path)


def test_every_python_file_compiles(project: Project) -> None:
    for name, text in texts(project.folder).items():
        if name.endswith(".py"):
            ast.parse(text, name, feature_version=(3, 10))


def test_no_folder_is_empty(project: Project) -> None:
    folders = [path for path in project.folder.rglob("*") if path.is_dir()]

    assert [folder for folder in folders if not any(folder.iterdir())] == []


def test_windows_takes_every_file_name(project: Project) -> None:
    names = list(files(project.folder))
    devices = {"con", "prn", "aux", "nul"}
    devices |= {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}

    for part in {part for name in names for part in PurePosixPath(name).parts}:
        assert not re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', part)
        assert part.split(".")[0].lower() not in devices
    assert len({name.lower() for name in names}) == len(names)


def test_the_whitespace_hooks_change_nothing(project: Project) -> None:
    assert changed_by_hooks(project.folder) == []


def test_ruff_checks_every_python_file_but_those_of_the_runtime(project: Project) -> None:
    shown = ruff(project.folder, "check", "--show-files").splitlines()

    runtime = project.folder / RUNTIME
    assert {Path(name) for name in shown if name.endswith(".py")} == {
        path for path in project.folder.rglob("*.py") if runtime not in path.parents
    }


def test_ruff_changes_nothing(project: Project) -> None:
    assert ruff(project.folder, "check") == ""
    assert ruff(project.folder, "format", "--diff") == ""


@pytest.mark.thorough
@pytest.mark.xdist_group("mypy")
def test_mypy_finds_nothing(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.getbasetemp() / "mypy_cache"  # most of what it reads is the same

    assert complaints(project.folder, "mypy", f"--cache-dir={cache}") == ""


def test_the_licence_is_the_one_chosen(project: Project) -> None:
    licence = project.answers.licence
    metadata = read_toml(project.folder / "pyproject.toml")["project"]

    if licence == "none":
        assert not (project.folder / "LICENSE").exists()
        assert "license" not in metadata
        assert "license-files" not in metadata
    else:
        assert LICENCES[licence] in (project.folder / "LICENSE").read_text(encoding="utf-8")
        assert metadata["license"] == licence
        assert metadata["license-files"] == ["LICENSE"]


def test_only_a_project_that_scales_out_knows_of_dask(project: Project) -> None:
    knowing = {
        name
        for name, text in texts(project.folder).items()
        if re.search(r"\bdask\b|\bdistributed\b", text)
        if name != "LICENSE" and not name.startswith(RUNTIME)
    }
    saying = {"README.md", "pyproject.toml", *WITH_DASK}

    assert knowing - {".copier-answers.yml"} == (
        saying if project.answers.scale_out == "dask" else set()
    )


@pytest.mark.parametrize("licence", ["MIT", "BSD-3-Clause"])
def test_the_licence_names_who_gives_it(generate: Generate, tmp_path: Path, licence: str) -> None:
    named = generate(tmp_path / "named", licence=licence, author_name="Ada Lovelace")
    unnamed = generate(tmp_path / "unnamed", licence=licence, project_name="Penguin Study")

    assert "(c) Ada Lovelace\n" in (named / "LICENSE").read_text(encoding="utf-8")
    assert "the authors of Penguin Study\n" in (unnamed / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("tracking_backend", ["sqlite", "databricks"])
def test_the_longest_names_leave_the_code_formatted(
    generate: Generate, tmp_path: Path, tracking_backend: str
) -> None:
    project = generate(
        tmp_path / "project",
        package_name="p" * 40,
        tracking_backend=tracking_backend,
        unity_catalog_schema="c" * 39 + "." + "s" * 40,
    )

    assert ruff(project, "check") == ""
    assert ruff(project, "format", "--diff") == ""
