"""Embedded stores: moved, copied, in folders with any name, older, newer, locked."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path

import mlflow
import pytest
from _pytest.mark.structures import ParameterSet

from runtime.config.uris import sqlite_file, sqlite_uri

from ...support.projects import Project

# A file, a figure of a past run and a model that is registered.
WORK = """
    from kedro.pipeline import node, Pipeline
    from sklearn.linear_model import LinearRegression


    def fit():
        return LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]), [1, 2, 3]


    def ask(model, of_run, copy):
        return [float(each.predict([[2.0]])[0]) for each in (model, of_run, copy)]


    def create_pipeline():
        fitting = Pipeline([node(fit, None, ["model", "numbers"], name="fit")])
        saving = node(lambda model: model, "model", "copy", name="save")
        asking = node(ask, ["registered", "of_run", "copy"], "answers", name="ask", tags="ask")
        return fitting + Pipeline([saving, asking])
"""
CATALOG = """
    model:
      type: PACKAGE.runtime.MlflowModelTrackingDataset
      flavor: mlflow.sklearn
      save_args:
        registered_model_name: lines
    registered:
      type: PACKAGE.runtime.MlflowModelRegistryDataset
      model_name: lines
      flavor: mlflow.sklearn
    of_run:
      type: PACKAGE.runtime.MlflowModelTrackingDataset
      flavor: mlflow.sklearn
      load_args:
        model_uri: models:/lines/1
    copy:
      type: PACKAGE.runtime.MlflowModelLocalFileSystemDataset
      flavor: mlflow.sklearn
      filepath: data/06_models/copy
    answers:
      type: json.JSONDataset
      filepath: data/07_model_output/answers.json
    numbers:
      type: PACKAGE.runtime.MlflowArtifactDataset
      dataset:
        type: json.JSONDataset
        filepath: data/02_intermediate/numbers.json
"""

# MLflow 3.9's tables, which the one that is installed migrates.
OLDER = "5d2d30f0abce"


def fill(project: Project) -> None:
    project.pipeline(WORK)
    project.catalog(CATALOG)


def files_of(project: Project, run_id: str) -> list[str]:
    """Download the artifacts of a run, and list them."""
    client = project.client
    entries = [entry.path for entry in client.list_artifacts(run_id)]
    for entry in entries:
        assert Path(client.download_artifacts(run_id, entry)).exists()
    return entries


def uris_in(store: Path) -> list[str]:
    """List all that an embedded store has of URIs of files."""
    with closing(sqlite3.connect(store)) as connection:
        return [line for line in connection.iterdump() if "file:" in line]


# What means something in a URI, at once.
ANY_NAME = "100% a#b c?%2F"


def thorough(*values: object) -> list[ParameterSet]:
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


@pytest.mark.parametrize(
    "name", [ANY_NAME, *thorough("new", "job%2Ffeature", "what?", "a#b c", "100%")]
)
def test_a_project_that_was_moved_has_its_earlier_files_and_models_with_it(
    project: Project, tmp_path: Path, name: str
) -> None:
    fill(project)
    assert project.kedro("run").returncode == 0
    moved = Project(tmp_path / name, project.package, sqlite_uri(tmp_path / name / "mlflow.db"))
    project.path.rename(moved.path)

    ended = moved.kedro("run")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not project.path.exists()
    assert [run.info.status for run in moved.all_runs()] == ["FINISHED"] * 2
    for run in moved.all_runs():
        assert files_of(moved, run.info.run_id) == ["numbers.json"]
    for number in ("1", "2"):
        version = moved.client.get_model_version("lines", number)
        loaded = moved.client.get_model_version_download_uri("lines", version.version)
        assert moved.path.as_uri() in loaded or loaded.startswith("models:/")
    old = f"{project.path.as_uri()}/mlartifacts"
    assert [line for line in uris_in(moved.path / "mlflow.db") if old in line] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "working directory"])


def test_a_copy_of_a_project_keeps_its_runs_in_itself(project: Project, tmp_path: Path) -> None:
    fill(project)
    assert project.kedro("run").returncode == 0
    before = sorted((project.path / "mlartifacts").rglob("*")), uris_in(project.path / "mlflow.db")
    copy = Project(tmp_path / "copy", project.package)
    shutil.copytree(project.path, copy.path)

    assert copy.kedro("run").returncode == 0

    after = sorted((project.path / "mlartifacts").rglob("*")), uris_in(project.path / "mlflow.db")
    assert after == before
    assert len(copy.all_runs()) == 2
    for run in copy.all_runs():
        assert run.info.artifact_uri.startswith(copy.path.as_uri())
        assert files_of(copy, run.info.run_id) == ["numbers.json"]


def test_a_place_for_files_that_mlflow_yml_names_is_left_as_it_is(
    project: Project, tmp_path: Path
) -> None:
    shared = tmp_path / "shared" / "mlartifacts"
    fill(project)
    project.mlflow_yml(
        "tracking:\n  experiment:\n    create_experiment_kwargs:\n"
        f"      artifact_location: {shared.as_uri()}\n"
    )
    assert project.kedro("run").returncode == 0
    moved = Project(tmp_path / "moved", project.package)
    project.path.rename(moved.path)

    assert moved.kedro("run").returncode == 0

    assert all(run.info.artifact_uri.startswith(shared.as_uri()) for run in moved.all_runs())
    assert not (moved.path / "mlartifacts").exists()


def test_a_project_that_is_reached_by_another_path_is_not_taken_for_a_copy(
    project: Project, tmp_path: Path
) -> None:
    fill(project)
    assert project.kedro("run").returncode == 0
    link = Project(tmp_path / "link", project.package)
    link.path.symlink_to(project.path)
    before = uris_in(project.path / "mlflow.db")

    listed = link.kedro("mlflow", "runs")

    assert listed.returncode == 0, listed.stderr
    assert uris_in(project.path / "mlflow.db") == before


@pytest.mark.parametrize("command", [("mlflow", "runs"), ("mlflow", "doctor", "--fix")])
def test_commands_that_look_at_a_moved_project_mend_it_too(
    project: Project, tmp_path: Path, command: tuple[str, ...]
) -> None:
    fill(project)
    assert project.kedro("run").returncode == 0
    moved = Project(tmp_path / "moved", project.package)
    project.path.rename(moved.path)
    told = moved.kedro("mlflow", "doctor")
    assert told.returncode == 1
    assert f"mlflow.db was in {project.path}" in " ".join(told.stdout.split())
    assert not project.path.exists()

    mended = moved.kedro(*command)

    assert mended.returncode == 0, mended.stdout + mended.stderr
    (run,) = moved.all_runs()
    assert files_of(moved, run.info.run_id) == ["numbers.json"]
    assert moved.kedro("mlflow", "doctor").returncode == 0


@pytest.mark.parametrize("name", ["plain", "job%2Ffeature", "50%", "%", "a?b", "a#b", "a b", "ü'"])
def test_a_path_is_the_same_after_it_was_a_uri(tmp_path: Path, name: str) -> None:
    file = tmp_path / name / "mlflow.db"

    assert sqlite_file(sqlite_uri(file)) == file


@pytest.mark.parametrize("name", [ANY_NAME, *thorough("job%2Ffeature", "what?", "a#b")])
def test_a_folder_with_any_name_has_a_project_that_runs(
    new_project: Callable[..., Project], tmp_path: Path, name: str
) -> None:
    project = new_project()
    fill(project)
    named = Project(tmp_path / name, project.package, sqlite_uri(tmp_path / name / "mlflow.db"))
    project.path.rename(named.path)

    ended = named.kedro("run")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert files_of(named, named.only_run().info.run_id) == ["numbers.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "working directory"])
    assert named.kedro("mlflow", "runs").returncode == 0
    assert named.kedro("mlflow", "doctor").returncode == 0


def test_a_store_that_cannot_be_made_is_told_at_once(project: Project) -> None:
    (project.path / "mlflow.db").unlink()
    (project.path / "mlflow.db.d").touch()  # a file where a folder has to be
    fill(project)
    project.mlflow_yml("server:\n  mlflow_tracking_uri: sqlite:///mlflow.db.d/mlflow.db\n")

    ended = project.kedro("run")

    assert ended.returncode == 1
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "server.mlflow_tracking_uri" in said
    assert "can't be made" in said
    assert "will be retried" not in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def older_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of an older MLflow, to copy."""
    file = tmp_path_factory.mktemp("older") / "mlflow.db"
    code = (
        "from alembic import command; from mlflow.store.db import utils;"
        "from mlflow.store.db.base_sql_model import Base;"
        "from mlflow.store.tracking.dbmodels.initial_models import Base as Initial;"
        f"engine = utils.create_sqlalchemy_engine('sqlite:///{file.as_posix()}');"
        "Initial.metadata.create_all(engine);"
        f"config = utils._get_alembic_config('sqlite:///{file.as_posix()}');"
        f"command.upgrade(config, '{OLDER}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return file


@pytest.fixture
def older(older_store: Path, project: Project) -> Path:
    """The project's store, which is that of an older MLflow."""
    return Path(shutil.copy(older_store, project.path / "mlflow.db"))


def version_of(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        ((version,),) = connection.execute("SELECT version_num FROM alembic_version")
    return str(version)


def git_ignores(project: Project, name: str) -> bool:
    """Check whether a project's .gitignore has a pattern for a file in its folder."""
    patterns = (project.path / ".gitignore").read_text().split()
    return any(fnmatch(f"/{name}", f"/{pattern.lstrip('/')}") for pattern in patterns)


@pytest.mark.parametrize("words", [("run",), *thorough(("mlflow", "runs"))])
def test_a_projects_own_store_of_an_older_mlflow_is_migrated_after_a_copy(
    project: Project, empty_store: Path, older: Path, words: tuple[str, ...]
) -> None:
    fill(project)
    newest = version_of(empty_store)
    assert version_of(older) == OLDER

    ended = project.kedro(*words)

    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 0, said
    assert version_of(older) == newest
    (copy,) = project.path.glob("mlflow.db.before-*")
    assert version_of(copy) == OLDER
    assert copy.name in said
    assert git_ignores(project, copy.name)


def test_two_runs_that_start_at_once_migrate_a_store_once(project: Project, older: Path) -> None:
    fill(project)

    one, two = project.start("run"), project.start("run")
    said = [one.communicate()[0], two.communicate()[0]]

    assert [one.returncode, two.returncode] == [0, 0], said
    assert len(project.all_runs()) == 2
    assert sum("mlflow.db.before" in text for text in said) == 1
    assert version_of(older) != OLDER


def test_the_doctor_tells_of_an_older_store_and_migrates_it_when_asked_to(
    project: Project, older: Path
) -> None:
    fill(project)

    told = project.kedro("mlflow", "doctor")

    assert told.returncode == 1
    assert "the next run migrates them" in " ".join(told.stdout.split())
    assert version_of(older) == OLDER
    assert project.kedro("mlflow", "doctor", "--fix").returncode == 0
    assert version_of(older) != OLDER


def test_somebody_elses_store_of_an_older_mlflow_is_left_and_told(
    project: Project, older: Path, tmp_path: Path
) -> None:
    fill(project)
    older.rename(tmp_path / "team.db")
    uri = f"sqlite:///{(tmp_path / 'team.db').as_posix()}"
    project.mlflow_yml(f"server:\n  mlflow_tracking_uri: {uri}\n")
    before = (tmp_path / "team.db").read_bytes()

    for words in (("run",), ("mlflow", "runs"), ("mlflow", "ui")):
        ended = project.kedro(*words)

        said = " ".join((ended.stdout + ended.stderr).split())
        assert ended.returncode == 1, said
        assert f"back the database up, then run `mlflow db upgrade {uri}`" in said
        assert "conf/local/mlflow.yml:2: server.mlflow_tracking_uri" in said
        assert "Traceback" not in said
        assert (tmp_path / "team.db").read_bytes() == before


@pytest.mark.parametrize("words", [("run",), ("mlflow", "runs"), ("mlflow", "ui")])
def test_a_store_of_a_newer_mlflow_is_left_and_told(
    project: Project, words: tuple[str, ...]
) -> None:
    fill(project)
    file = project.path / "mlflow.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")

    ended = project.kedro(*words)

    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 1, said
    assert "newer MLflow" in said
    assert "update mlflow in this project" in said
    assert "db upgrade" not in said
    assert "Traceback" not in said


def test_a_store_that_another_program_has_locked_is_told_as_locked(project: Project) -> None:
    fill(project)
    with closing(sqlite3.connect(project.path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        ended = project.kedro("run")

    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 1
    assert "mlflow.db is locked: another program is writing to it" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("words", [("run",), *thorough(("mlflow", "runs"), ("mlflow", "ui"))])
def test_an_environment_that_mlflow_cannot_work_in_is_told(
    project: Project, tmp_path: Path, words: tuple[str, ...]
) -> None:
    fill(project)
    environment = tmp_path / "job%2Ffeature"
    environment.symlink_to(Path(mlflow.__file__).parents[1])

    ended = project.kedro_anew(*words, PYTHONPATH=str(environment))

    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 1
    assert "MLflow can't open a database from a folder with a per cent sign" in said
    assert "UV_PROJECT_ENVIRONMENT" in said
    assert "Traceback" not in said
