"""Git keeps a project's sources, and neither its secrets nor what its runs write."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import copier
import pytest

from ..conftest import Generate
from ..support.versions import append, tag
from .conftest import git

WRITTEN = """
.env
.venv/bin/python
.viz/stats.json
.mypy_cache/3.10/cache.json
conf/base/credentials.yml
conf/local/credentials.yml
conf/local/mlflow.yml
conf/local/deeper/globals.yml
conf/prod/credentials.yml
conf/prod/aws_credentials.yml
data/01_raw/other.csv
data/02_intermediate/penguins.parquet
data/03_primary/penguins.csv
data/06_models/classifier.pkl/2024-01-01T00.00.00.000Z/classifier.pkl
data/07_model_output/predictions.csv
data/08_reporting/confusion_matrix.png
data/09_more/table.csv
dist/penguin_study-0.1.0-py3-none-any.whl
info.log
mlartifacts/1/run/artifacts/model/MLmodel
mlflow.db
mlflow.db-shm
mlflow.db-wal
mlruns/1/meta.yaml
notebooks/.ipynb_checkpoints/first-checkpoint.ipynb
src/penguin_study/__pycache__/settings.cpython-311.pyc
""".split()


@pytest.fixture(params=[True, False], ids=["with the example", "without the example"])
def example(request: pytest.FixtureRequest) -> bool:
    with_example: bool = request.param
    return with_example


@pytest.fixture
def project(generate: Generate, tmp_path: Path, example: bool) -> Path:
    """A generated project in its first commit."""
    folder = generate(tmp_path / "penguin-study", example=example, docker=True, ci="github")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=Generate the project")
    return folder


def test_what_runs_write_leaves_git_status_clean(project: Path) -> None:
    assert git(project, "status", "--short") == ""

    for name in WRITTEN:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"written\n")

    assert git(project, "status", "--short", "--untracked-files=all") == ""


def test_all_that_is_generated_is_tracked_except_credentials(project: Path) -> None:
    generated = {
        path.relative_to(project).as_posix()
        for path in project.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(project).parts
    }

    assert generated - set(git(project, "ls-files").split()) == {"conf/local/credentials.yml"}


def test_the_table_of_the_example_is_tracked(project: Path, example: bool) -> None:
    tracked = git(project, "ls-files", "data/01_raw").split()

    assert ("data/01_raw/penguins.csv" in tracked) is example


def test_new_sources_are_not_ignored(project: Path) -> None:
    names = ["src/penguin_study/pipelines/second/nodes.py", "conf/prod/parameters.yml"]
    for name in [*names, "notebooks/first.ipynb", "tests/test_more.py"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"written\n")

    assert len(git(project, "status", "--short", "--untracked-files=all").splitlines()) == 4


def test_a_pipeline_may_be_called_as_anything_that_git_ignores(project: Path) -> None:
    names = set(re.findall(r"[a-z][a-z_]*[a-z]", (project / ".gitignore").read_text()))
    assert {"build", "dist", "mlruns", "sessions", "credentials"} < names

    # What `kedro pipeline create` writes.
    written = [
        file.format(name)
        for name in sorted(names)
        for file in (
            "conf/base/parameters_{}.yml",
            "src/penguin_study/pipelines/{}/__init__.py",
            "tests/pipelines/{}/test_pipeline.py",
        )
    ]
    for name in written:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()

    untracked = git(project, "ls-files", "--others", "--exclude-standard").splitlines()
    assert set(written) <= set(untracked)


def test_an_update_of_a_checkout_with_other_line_ends_shows_what_has_changed(
    template: Path, tmp_path: Path
) -> None:
    shutil.copytree(template, tmp_path / "km-template")
    git(tmp_path / "km-template", "init", "--quiet")
    tag(tmp_path / "km-template", "v1.0.0")
    copier.run_copy(str(tmp_path / "km-template"), tmp_path / "project", defaults=True, quiet=True)
    git(tmp_path / "project", "init", "--quiet")
    git(tmp_path / "project", "add", "--all")
    git(tmp_path / "project", "commit", "--quiet", "--message=Generate the project")
    append(tmp_path / "km-template/template/.telemetry", "# New.")
    tag(tmp_path / "km-template", "v2.0.0")
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", "--config=core.autocrlf=true", "project", checkout.name)

    copier.run_update(checkout, defaults=True, overwrite=True, quiet=True)

    assert git(checkout, "status", "--short") == " M .copier-answers.yml\n M .telemetry\n"


def test_data_keeps_its_line_ends(project: Path) -> None:
    (project / "data/table.csv").write_bytes(b"1\r\n2\r\n")
    git(project, "add", "--force", "data/table.csv")
    git(project, "commit", "--quiet", "--message=Data")
    (project / "data/table.csv").unlink()
    git(project, "restore", "data/table.csv")

    assert (project / "data/table.csv").read_bytes() == b"1\r\n2\r\n"
