"""What is replayed from the disk is on the server as if it had been logged there, and only once.

Some faults at some requests are tried; with --all each at every request.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from ..support import everything
from ..support.everything import Recorded
from ..support.faults import Fault, writes
from ..support.projects import Project
from ..support.stores import differences

NewProject = Callable[..., Project]

FAULTS = [
    Fault("refuse"),
    Fault("reset"),
    Fault("reset", times=1),
    Fault("reset", processed=True),
    Fault("reset", processed=True, times=1),
    Fault("reset", processed=True, torn=True, times=1),
    Fault("hang", times=1),
    Fault("hang", processed=True, times=1),
    Fault("500"),
    Fault("500", processed=True, times=1),
    Fault("503"),
    Fault("503", processed=True, times=2),
    Fault("401"),
    Fault("slow", times=5),
    Fault("full"),
]

# Of each kind that happens most, at a few requests; the others are tried with --all.
SAMPLE = {str(FAULTS[index]) for index in (0, 4, 7, 10, 12)}


def sampled(fault: Fault) -> Any:
    marks = () if str(fault) in SAMPLE else pytest.mark.thorough
    return pytest.param(fault, marks=marks, id=str(fault).replace(" from 0", ""))


def left_on_disk(project: Project) -> list[Any]:
    """List what is on the disk of runs: rows of the store, and files."""
    (folder,) = project.path.glob(".mlflow-offline/*/")
    client = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    rows = [
        *client.search_runs(experiments, run_view_type=ViewType.ALL),
        *client.search_logged_models(experiments),
        *client.search_registered_models(),
    ]
    return [*rows, *(file for file in (folder / "artifacts").rglob("*") if file.is_file())]


def times(client: MlflowClient, experiment: str) -> dict[str, tuple[int, int]]:
    """Tell when each run began and ended."""
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    return {run.info.run_name: (run.info.start_time, run.info.end_time) for run in runs}


def test_a_replayed_run_is_what_it_would_be_if_it_had_been_logged_to_the_server(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project, proxy = to_replay.copy(tmp_path), to_replay.proxy
    (file,) = project.path.glob(".mlflow-offline/*/mlflow.db")
    recorded = times(MlflowClient(f"sqlite:///{file.as_posix()}"), project.package)
    before = len(proxy.requests)

    listed = everything.sync(project, "--dry-run")
    assert "__default__" in listed
    assert proxy.requests[before:] == []
    everything.sync(project)

    assert differences(to_replay.replayed(), to_replay.content) == []
    server = MlflowClient(f"http://127.0.0.1:{to_replay.port}")
    assert times(server, project.package) == recorded
    assert left_on_disk(project) == []
    before = len(proxy.requests)
    assert "nothing waits" in everything.sync(project).lower()
    assert proxy.requests[before:] == []


@pytest.mark.parametrize("fault", [sampled(fault) for fault in FAULTS])
def test_a_replay_that_something_disturbs_is_completed_by_the_next_one(
    to_replay: Recorded, tmp_path: Path, request: pytest.FixtureRequest, fault: Fault
) -> None:
    count = len(to_replay.requests)
    chosen = [random.Random(str(fault)).randrange(count - 1), count - 1]
    every = range(count) if request.config.getoption("--all") else chosen
    wrong: dict[int, Any] = {}
    for index in every:
        to_replay.proxy.heal()
        to_replay.put_away()
        project = to_replay.copy(tmp_path)
        at = len(to_replay.proxy.requests) + index
        to_replay.proxy.plan(everything.at(fault, at))
        everything.sync(project, status=None)
        to_replay.proxy.heal()
        everything.sync(project)
        if found := differences(to_replay.replayed(), to_replay.content):
            wrong[index] = found
        elif left := left_on_disk(project):
            wrong[index] = left
    assert wrong == {}


@pytest.mark.parametrize("processed", [False, True], ids=["before", "after"])
def test_a_replay_that_is_killed_at_a_request_is_completed_by_the_next_one(
    to_replay: Recorded, tmp_path: Path, request: pytest.FixtureRequest, processed: bool
) -> None:
    count, proxy = len(to_replay.requests), to_replay.proxy
    all_of_them, chosen = range(count), random.Random(f"killed {processed}").sample(range(count), 1)
    for index in all_of_them if request.config.getoption("--all") else chosen:
        proxy.heal()
        to_replay.put_away()
        project = to_replay.copy(tmp_path)
        proxy.plan(Fault("hang", at=len(proxy.requests) + index, processed=processed))
        with everything.process(project, "mlflow", "sync", MLFLOW_HTTP_REQUEST_TIMEOUT="60") as it:
            assert proxy.wait_until_struck_or_ended(it), index
            it.kill()
            it.wait()
        proxy.heal()
        everything.sync(project)
        assert differences(to_replay.replayed(), to_replay.content) == [], index
        assert left_on_disk(project) == []


def test_two_replays_at_once_double_nothing(to_replay: Recorded, tmp_path: Path) -> None:
    project = to_replay.copy(tmp_path)

    with (
        everything.process(project, "mlflow", "sync", MLFLOW_HTTP_REQUEST_TIMEOUT="60") as one,
        everything.process(project, "mlflow", "sync", MLFLOW_HTTP_REQUEST_TIMEOUT="60") as two,
    ):
        said = [sync.communicate()[0] for sync in (one, two)]

    assert [one.returncode, two.returncode] == [0, 0], said
    assert differences(to_replay.replayed(), to_replay.content) == []


def test_a_replay_without_a_server_says_so_and_keeps_all(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project = to_replay.copy(tmp_path)
    to_replay.proxy.plan(Fault("refuse"))

    said = everything.sync(project, status=1)

    assert to_replay.proxy.uri in said
    assert "connection refused" in said
    assert "Traceback" not in said
    to_replay.proxy.heal()
    everything.sync(project)
    assert differences(to_replay.replayed(), to_replay.content) == []


def test_ctrl_c_ends_a_replay_that_a_hanging_server_holds_up(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project, proxy = to_replay.copy(tmp_path), to_replay.proxy
    proxy.plan(Fault("hang", at=len(proxy.requests) + 9))

    with everything.process(project, "mlflow", "sync", MLFLOW_HTTP_REQUEST_TIMEOUT="60") as sync:
        assert proxy.wait_until_struck_or_ended(sync)
        sync.send_signal(signal.SIGINT)
        said, _ = sync.communicate()

    assert sync.returncode == 1, said
    assert "Traceback" not in said
    proxy.heal()
    everything.sync(project)
    assert differences(to_replay.replayed(), to_replay.content) == []


def the_run(recorded: Recorded) -> tuple[MlflowClient, str]:
    """Give the client of the server, and the id of the pipeline's run there."""
    client = MlflowClient(f"http://127.0.0.1:{recorded.port}")
    experiment = client.get_experiment_by_name(recorded.project.package)
    assert experiment
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    (found,) = [run.info.run_id for run in runs if run.info.run_name == "__default__"]
    return client, found


def cut_off(recorded: Recorded, project: Project) -> None:
    """Replay about half of the run."""
    at = len(recorded.proxy.requests) + len(recorded.requests) // 2
    recorded.proxy.plan(Fault("refuse", at=at))
    everything.sync(project, status=1)
    recorded.proxy.heal()


def test_a_run_that_was_deleted_on_the_server_is_named_and_kept_until_it_is_discarded(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project = to_replay.copy(tmp_path)
    cut_off(to_replay, project)
    client, run_id = the_run(to_replay)
    client.delete_run(run_id)
    later = project.kedro("run", **everything.IMPATIENT)  # its trouble doesn't hold up this one

    said = everything.sync(project, status=1)

    assert later.returncode == 0, later.stdout + later.stderr
    assert f"{run_id}, is deleted" in said
    assert "Traceback" not in said
    names = [
        run.info.run_name for run in client.search_runs([client.get_run(run_id).info.experiment_id])
    ]
    assert names.count("__default__") == 1
    (family,) = everything.on_disk(project)
    everything.sync(project, "--discard", "not-there", status=1)
    everything.sync(project, "--discard", family)
    assert left_on_disk(project) == []
    assert "nothing waits" in everything.sync(project).lower()


def test_a_run_that_the_server_refuses_is_named_in_one_sentence_and_kept(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project, proxy = to_replay.copy(tmp_path), to_replay.proxy
    first = next(i for i, asked in enumerate(to_replay.requests) if asked.endswith("log-batch"))
    proxy.plan(Fault("refuse", at=len(proxy.requests) + first))
    everything.sync(project, status=1)
    proxy.heal()
    client, run_id = the_run(to_replay)
    client.log_param(run_id, "depth", "99")  # MLflow changes no parameter

    said = everything.sync(project, status=1)

    (family,) = everything.on_disk(project)
    (sentence,) = (line for line in said.splitlines() if line.startswith("Not replayed: "))
    assert family in sentence
    assert "depth" in sentence
    assert "Traceback" not in said


def test_a_run_that_was_restored_on_the_server_is_completed(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project = to_replay.copy(tmp_path)
    cut_off(to_replay, project)
    client, run_id = the_run(to_replay)
    client.delete_run(run_id)
    everything.sync(project, status=1)

    client.restore_run(run_id)
    everything.sync(project)

    assert differences(to_replay.replayed(), to_replay.content) == []
    assert left_on_disk(project) == []


@pytest.mark.parametrize("restore", [True, False])
def test_an_experiment_that_was_deleted_is_restored_as_mlflow_yml_says(
    to_replay: Recorded, tmp_path: Path, restore: bool
) -> None:
    project = to_replay.copy(tmp_path)
    file = project.path / "conf" / "local" / "mlflow.yml"
    text = f"  experiment: {{restore_if_deleted: {str(restore).lower()}}}\n"
    file.write_text(file.read_text() + text)
    cut_off(to_replay, project)
    client, run_id = the_run(to_replay)
    experiment = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment)

    said = everything.sync(project, status=0 if restore else 1)

    if not restore:
        assert "restore_if_deleted" in said
        client.restore_experiment(experiment)
        everything.sync(project)
    # MLflow deletes the runs of an experiment with it, and restores them with it.
    assert differences(to_replay.replayed(), to_replay.content) == []


def test_a_project_that_was_moved_has_the_files_of_new_runs_with_it(
    to_replay: Recorded, tmp_path: Path
) -> None:
    project = to_replay.copy(tmp_path)
    before = {file.name for file in to_replay.project.path.rglob(".mlflow-offline/*/artifacts/*")}
    to_replay.proxy.plan(Fault("refuse"))
    ended = project.kedro("run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    to_replay.proxy.heal()

    everything.sync(project)

    runs = to_replay.replayed()["runs"]
    assert [run["artifacts"].keys() for run in runs if run["name"] == "__default__"] == [
        {"line.json", "notes/by_node.txt", "reports/report.csv"}
    ] * 2
    after = {file.name for file in to_replay.project.path.rglob(".mlflow-offline/*/artifacts/*")}
    assert after == before


def test_an_alias_that_a_newer_version_has_stays_there(to_replay: Recorded, tmp_path: Path) -> None:
    project = to_replay.copy(tmp_path)
    client = MlflowClient(f"http://127.0.0.1:{to_replay.port}")
    client.create_registered_model(project.package)
    newer = client.create_model_version(project.package, "s3://elsewhere/model")
    client.set_registered_model_alias(project.package, "champion", newer.version)

    everything.sync(project)

    assert client.get_registered_model(project.package).aliases == {"champion": newer.version}
    assert len(client.search_model_versions(f"name = '{project.package}'")) == 2


def test_requests_of_a_replay_read_before_they_write_what_could_be_doubled(
    to_replay: Recorded,
) -> None:
    asked = to_replay.requests
    creating = [request for request in asked if request.endswith("/runs/create")]

    assert len(creating) == 5  # the pipeline's, two trials and their folds
    assert sum(request.endswith("/runs/search") for request in asked) == 5
    assert writes(asked[-1])
