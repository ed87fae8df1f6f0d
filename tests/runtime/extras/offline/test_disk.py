"""The store on disk: one for each server, and nothing outside of its folder is touched."""

from __future__ import annotations

import math
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from runtime.offline import disk as disks
from runtime.offline.disk import FOLDER, Disk, DiskError, disk_of, ended_families, families
from runtime.offline.hook import replay_after_run
from runtime.offline.replay import delete, files_in, files_of_family, replay, replaying
from runtime.stores.server import Server


def server(uri: str) -> Server:
    return Server(uri, uri)


@pytest.fixture
def disk(tmp_path: Path, empty_store: Path) -> Disk:
    """A store on disk that is there already: making one takes seconds."""
    found = disk_of(server("http://127.0.0.1:1"), tmp_path)
    assert found
    found.folder.mkdir(parents=True)
    shutil.copy(empty_store, found.folder / "mlflow.db")
    return found


@pytest.fixture
def experiment(disk: Disk) -> str:
    return disk.client().create_experiment("penguins", disk.artifacts.as_uri())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://h/team-a", "http://h/team/a"),
        ("http://h:5000", "http://h-5000"),
        ("http://h", "https://h"),
        ("postgresql://h/a", "postgresql://h/b"),
    ],
)
def test_two_servers_have_two_folders(tmp_path: Path, one: str, other: str) -> None:
    folders = [disk_of(server(uri), tmp_path) for uri in (one, other)]

    assert folders[0]
    assert folders[1]
    assert folders[0].folder != folders[1].folder


def test_a_password_is_not_in_the_name_of_the_folder(tmp_path: Path) -> None:
    first, second = (
        disk_of(server(f"http://ada:{word}@h"), tmp_path) for word in ("t0ps3cr3t", "an0ther")
    )

    assert first
    assert second
    assert "t0ps3cr3t" not in first.folder.name
    assert first.folder == second.folder


@pytest.mark.parametrize("uri", ["sqlite:////tmp/mlflow.db", "file:///tmp/mlruns"])
def test_a_store_that_is_a_file_has_none(tmp_path: Path, uri: str) -> None:
    assert disk_of(server(uri), tmp_path) is None


@pytest.mark.parametrize("content", [b"no database", b"penguins" * 5000], ids=["short", "long"])
def test_a_file_that_is_no_store_is_named(tmp_path: Path, content: bytes) -> None:
    disk = disk_of(server("http://h"), tmp_path)
    assert disk
    disk.folder.mkdir(parents=True)
    (disk.folder / "mlflow.db").write_bytes(content)

    with pytest.raises(DiskError, match=r"mlflow\.db: .*store of MLflow") as told:
        disk.client()

    assert str(disk.folder / "mlflow.db") in str(told.value)


def test_a_truncated_store_is_named(disk: Disk) -> None:
    file = disk.folder / "mlflow.db"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    with pytest.raises(DiskError, match=r"can't be read as a store of MLflow"):
        disk.client()


def test_a_store_of_a_newer_mlflow_is_named(disk: Disk) -> None:
    file = disk.folder / "mlflow.db"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()

    with pytest.raises(DiskError, match=r"newer MLflow .*: update mlflow in this project") as told:
        disk.client()

    assert str(file) in told.value.message


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".mlflow-offline").write_text("a file in the way")
    disk = disk_of(server("http://h"), tmp_path)
    assert disk

    with pytest.raises(DiskError, match="on_unreachable") as told:
        disk.client()

    assert str(disk.folder) in told.value.message


@pytest.mark.parametrize("name", ["run", "a b", "job%2Ffeature"])
def test_files_are_found_in_a_project_that_was_moved(
    disk: Disk, experiment: str, tmp_path: Path, name: str
) -> None:
    run_id = disk.client().create_run(experiment).info.run_id
    disk.client().log_text(run_id, "Adelie", f"{name}.txt")
    moved = replace(disk, folder=tmp_path / name / FOLDER / disk.folder.name)
    moved.folder.parent.mkdir(parents=True)
    shutil.move(disk.folder, moved.folder)

    found = moved.files(moved.client().get_run(run_id).info.artifact_uri)

    assert found == moved.artifacts / run_id / "artifacts"
    assert (found / f"{name}.txt").read_text() == "Adelie"
    assert not disk.folder.exists()


@pytest.mark.parametrize(
    "uri",
    [
        "",
        None,
        "file:///etc",
        "s3://bucket/.mlflow-offline/x",
        "file:///p/.mlflow-offline/x/artifacts",
        "file:///p/.mlflow-offline/x/artifacts/../../../..",
        "file:///p/.mlflow-offline/x/artifacts/%2e%2e/%2e%2e/%2e%2e/elsewhere",
        "file:///p/.mlflow-offline/x/other/run/artifacts",
        "file:///p/.mlflow-offline/x//etc/passwd",
    ],
)
def test_a_place_outside_of_the_artifacts_is_refused(disk: Disk, uri: str | None) -> None:
    with pytest.raises(DiskError, match="outside of"):
        disk.files(uri)


def test_a_link_in_the_artifacts_leads_nowhere_else(disk: Disk, tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret.txt"
    elsewhere.write_text("secret")
    folder = disk.artifacts / "run" / "artifacts"
    folder.mkdir(parents=True)
    (folder / "link.txt").symlink_to(elsewhere)

    with pytest.raises(DiskError, match=r"link\.txt is a link"):
        files_in(disk.files(folder.as_uri()))

    (disk.artifacts / "other").symlink_to(tmp_path)
    with pytest.raises(DiskError, match="outside of"):
        disk.files((disk.artifacts / "other" / "artifacts").as_uri())


@pytest.mark.parametrize("place", ["", "file:///{outside}/run/artifacts"])
def test_a_run_from_somebody_else_deletes_nothing_outside(
    disk: Disk, experiment: str, tmp_path: Path, place: str
) -> None:
    outside = tmp_path / "outside" / "run" / "artifacts"
    outside.mkdir(parents=True)
    (outside / "thesis.txt").write_text("years of work")
    client = disk.client()
    run_id = client.create_run(experiment).info.run_id
    client.set_terminated(run_id)
    with sqlite3.connect(disk.folder / "mlflow.db") as connection:
        place = place.format(outside=tmp_path / "outside")
        connection.execute("UPDATE runs SET artifact_uri = ?", (place,))
    connection.close()
    (family,) = ended_families(client)

    assert files_of_family(disk, family) == []
    with pytest.raises(DiskError, match="outside of"):
        delete(disk, family)

    assert (outside / "thesis.txt").read_text() == "years of work"
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_is_deleted_leaves_nothing_and_others_alone(
    disk: Disk, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", disk.uri)  # MLflow looks for models there only
    client = disk.client()
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    child = client.create_run(experiment, tags={"mlflow.parentRunId": runs[0]}).info.run_id
    for run_id in (*runs, child):
        client.log_text(run_id, "a text", "a.txt")
        client.log_metric(run_id, "score", 1)
        client.set_terminated(run_id)
    model = client.create_logged_model(experiment, "line", runs[0])
    client.create_registered_model("line")
    client.create_model_version("line", model.model_uri, runs[0], model_id=model.model_id)

    first, _ = ended_families(client)
    delete(disk, first)

    assert [
        run.info.run_id for run in client.search_runs([experiment], run_view_type=ViewType.ALL)
    ] == [runs[1]]
    assert list(client.search_logged_models([experiment])) == []
    assert list(client.search_registered_models()) == []
    assert [f.parent.parent.name for f in disk.artifacts.rglob("a.txt")] == [runs[1]]


def test_families_are_runs_with_all_their_children_parents_first(
    disk: Disk, experiment: str
) -> None:
    client = disk.client()

    def run(parent: str | None, start: int) -> str:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        return str(client.create_run(experiment, start, tags).info.run_id)

    late = run(None, 2000)
    early = run(None, 1000)
    child = run(early, 3000)
    grandchild = run(child, 2500)  # by a clock that was set back
    orphan = run("0" * 32, 4000)
    circle = run(None, 5000)
    client.set_tag(circle, "mlflow.parentRunId", circle)

    found = [[run.info.run_id for run in family] for family in families(client)]

    assert found == [[early, child, grandchild], [late], [orphan], [circle]]


def test_only_what_has_ended_waits(disk: Disk, experiment: str) -> None:
    client = disk.client()
    ended, running = (client.create_run(experiment).info.run_id for _ in range(2))
    client.set_terminated(ended, "FAILED")

    assert [family[0].info.run_id for family in ended_families(client)] == [ended]
    assert client.get_run(running).info.status == "RUNNING"


def test_whoever_waits_too_long_for_another_process_is_told(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disks.LOCK_TIMEOUT == 60
    monkeypatch.setattr(disks, "LOCK_TIMEOUT", 0.1)
    disk.folder.mkdir(exist_ok=True)

    with (
        disk.locked(),
        pytest.raises(DiskError, match="another process has been replaying"),
        disk.locked(),
    ):
        raise AssertionError("two have the lock")

    with disk.locked():  # it is free again
        pass


def test_a_run_that_ends_while_another_process_replays_says_so_in_one_sentence(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disks, "LOCK_TIMEOUT", 0.1)

    with disk.locked():
        replay_after_run(disk, "its id", {})

    (told,) = [record for record in caplog.records if record.name.startswith("runtime.")]
    assert told.levelname == "WARNING"
    assert told.exc_info is None
    assert "its id" in told.message
    assert "another process has been replaying" in told.message
    assert disk.server.tracking_uri not in told.message  # the server has no part in it


def test_a_store_on_disk_is_an_ordinary_one(
    disk: Disk, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", disk.uri)
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_text("a text", "a.txt")

    client = MlflowClient(disk.uri)
    (family,) = ended_families(client)
    assert [found.info.run_id for found in family] == [run.info.run_id]
    assert [file.name for file in files_of_family(disk, family)] == ["a.txt"]


def test_metrics_of_a_model_are_replayed_once_also_where_one_is_not_a_number(
    disk: Disk,
    experiment: str,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(empty_store, tmp_path / "server.db")
    uri = f"sqlite:///{(tmp_path / 'server.db').as_posix()}"
    disk = replace(disk, server=server(uri))
    client = disk.client()
    run_id = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", disk.uri)  # MLflow looks for models there only
    model = client.create_logged_model(experiment, "line", run_id)
    for step, value in enumerate((0.5, math.nan)):
        client.log_metric(run_id, "loss", value, step=step, model_id=model.model_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    finalize = MlflowClient.finalize_logged_model

    def interrupt(*_: object) -> None:
        raise ValueError("interrupted")

    for method in (interrupt, finalize):
        monkeypatch.setattr(MlflowClient, "finalize_logged_model", method)
        with replaying(disk):
            (outcome,) = replay(disk, ended_families(client))
        assert bool(outcome.problem) == (method is interrupt)

    on_server = disk.server.client
    points = on_server.get_metric_history(outcome.id_on_server, "loss")
    assert [(point.step, repr(point.value)) for point in points] == [(0, "0.5"), (1, "nan")]
    experiment_there = on_server.get_experiment_by_name("penguins")
    assert experiment_there
    (logged,) = on_server.search_logged_models([experiment_there.experiment_id])
    assert [metric.step for metric in logged.metrics or ()] == [0, 1]
