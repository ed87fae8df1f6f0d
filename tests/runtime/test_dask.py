"""In Dask's workers a Kedro run is the MLflow run that it is in one process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow.entities import Run

from ..support.dask_clusters import Cluster, dask_cluster
from ..support.projects import Project, has, needs_kedro
from ..support.servers import CountingProxy, counting_proxy
from .test_runners import CATALOG, NODES, WORK, check_everything

# What the nodes below need: a place to meet, since they run in other processes than the test.
MEET = """
import os
import signal
from pathlib import Path

import mlflow
from kedro.pipeline import Node, Pipeline

HERE = Path(__file__).parent

def tell(name):
    os.open(made(name), os.O_RDWR)  # stays open, for those who wait later too

def wait_for(name):
    os.close(os.open(made(name), os.O_RDONLY))  # opens when somebody tells

def made(name):
    place = HERE / f"{name}.fifo"
    try:
        os.mkfifo(place)
    except FileExistsError:  # by another, who tells or waits
        pass
    return place

def is_first(name):
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
"""


def fifo(place: Path) -> Path:
    with suppress(FileExistsError):
        os.mkfifo(place)
    return place


def tell(place: Path) -> None:
    """Let the nodes go on that wait, now or later, as long as the tests run."""
    os.open(fifo(place), os.O_RDWR)


def wait_for(place: Path) -> None:
    """Wait until a node tells."""
    os.close(os.open(fifo(place), os.O_RDONLY))


@pytest.fixture
def dask_project(new_project: Callable[..., Project], empty_store: Path) -> Project:
    """A project without pipelines that has the runner, with an empty store."""
    project = new_project(scale_out="dask")
    (project.path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return project


@pytest.fixture
def cluster(dask_project: Project, tmp_path: Path) -> Iterator[Cluster]:
    """Two workers that find the project's package, and know nothing else of it."""
    with dask_cluster(tmp_path, dask_project.path / "src") as started:
        yield started


def on(cluster: Cluster, project: Project, **params: Any) -> list[str]:
    """Give the words of a command that runs a project on a cluster."""
    if not has("kedro", "1.6"):
        pytest.skip("Kedro 1.6 brought --runner-params")
    given = {"address": cluster.address, **params}
    text = ",".join(f"{name}={value}" for name, value in given.items())
    return ["run", f"--runner={project.package}.runner.DaskRunner", f"--runner-params={text}"]


def main_of(runs: list[Run]) -> Run:
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return main


@pytest.mark.parametrize(
    "is_async", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["", "async"]
)
def test_twenty_nodes_log_all_they_have_to_one_run(
    dask_project: Project, cluster: Cluster, tmp_path: Path, is_async: bool
) -> None:
    dask_project.pipeline(WORK)
    dask_project.catalog(CATALOG)
    dask_project.parameters({f"n{i}": i for i in range(NODES)})

    ended = dask_project.kedro(*on(cluster, dask_project, is_async=is_async))

    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_everything(dask_project, dask_project.all_runs(), tmp_path / "artifacts")


def test_traces_are_sent_when_their_node_has_ended(dask_project: Project, cluster: Cluster) -> None:
    dask_project.pipeline(
        """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        @mlflow.trace
        def trace():
            return 1

        def create_pipeline():
            return Pipeline([Node(trace, None, f"traced_{i}", name=f"trace_{i}") for i in range(4)])
        """
    )

    ended = dask_project.kedro(*on(cluster, dask_project))

    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = main_of(dask_project.all_runs())
    traces = dask_project.client.search_traces(
        locations=[run.info.experiment_id], run_id=run.info.run_id
    )
    assert len(traces) == 4


@pytest.mark.thorough
@needs_kedro("1.6")
def test_the_run_is_the_one_that_the_sequential_runner_makes(
    new_project: Callable[..., Project], empty_store: Path
) -> None:
    project = new_project(scale_out="dask", example=True)
    (project.path / "mlflow.db").write_bytes(empty_store.read_bytes())
    here = f"--runner={project.package}.runner.DaskRunner"

    for words in ([], [here, "--runner-params=n_workers=2,threads_per_worker=1"]):
        ended = project.kedro("run", "--pipelines=service", *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    runs = project.all_runs()
    dask, sequential = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    values = [everything(project, run, runs) for run in (sequential, dask)]
    assert values[0] == values[1]
    assert values[0]["metrics"]
    assert values[0]["models"]


def everything(project: Project, run: Run, runs: list[Run]) -> dict[str, Any]:
    """Give what a run holds that doesn't depend on when and where it ran."""
    client, run_id = project.client, run.info.run_id
    files: list[str] = []
    folders = [""]
    while folders:
        for file in client.list_artifacts(run_id, folders.pop()):
            (folders if file.is_dir else files).append(file.path)
    models = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    own = {"pid", "process_start", "process_start_ticks", "kedro_command", "run_id", "runner"}
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == run_id]
    return {
        "status": run.info.status,
        "params": run.data.params,
        "metrics": {
            key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "tags": {k: v for k, v in run.data.tags.items() if k not in own and "mlflow." not in k},
        "files": sorted(files),
        "models": sorted((model.name, str(model.status)) for model in models),
        "children": sorted(
            (r.info.run_name, r.info.status, str(r.data.params), str(r.data.metrics))
            for r in children
        ),
    }


def test_data_goes_from_worker_to_worker_and_what_is_left_comes_back(
    dask_project: Project, cluster: Cluster
) -> None:
    # The two that take `table` run at once, so in two workers; each changes its own copy only.
    dask_project.pipeline(
        MEET
        + """
def make():
    return [1, 2, 3], os.getpid()

def change(table, me, other):
    tell(me)
    wait_for(other)
    table.append(me)
    return table, os.getpid()

def change_a(table): return change(table, "a", "b")
def change_b(table): return change(table, "b", "a")

def look(table, a, b):
    return table, a, b

def create_pipeline():
    return Pipeline([
        Node(make, None, ["table", "pid"]),
        Node(change_a, "table", ["with_a", "pid_a"]),
        Node(change_b, "table", ["with_b", "pid_b"]),
        Node(look, ["table", "with_a", "with_b"], ["table_after", "a_after", "b_after"]),
    ])
"""
    )
    sys.path.insert(0, str(dask_project.path / "src"))
    runner = import_module(f"{dask_project.package}.runner").DaskRunner(cluster.address)
    outputs = {name: data.load() for name, data in dask_project.run(runner=runner).items()}

    workers = {worker.pid for worker in cluster.workers}
    assert outputs.pop("pid") in workers
    assert {outputs.pop("pid_a"), outputs.pop("pid_b")} == workers
    assert outputs == {
        "table_after": [1, 2, 3],
        "a_after": [1, 2, 3, "a"],
        "b_after": [1, 2, 3, "b"],
    }
    assert dask_project.only_run().info.status == "FINISHED"
    with cluster.client() as client:
        kept = client.run_on_scheduler(
            lambda dask_scheduler: list(dask_scheduler.extensions["events"]._events)
        )
    assert kept == []


LOST = (
    MEET
    + """
def work():
    mlflow.log_metric("begun", 1)
    with mlflow.start_run(nested=True):
        if is_first("killed"):
            mlflow.set_tag("lost", "yes")
            os.kill(os.getpid(), signal.SIGKILL)
        mlflow.log_metric("inner", 1)
    return 1

def use(value):
    mlflow.log_metric("used", value)

def create_pipeline():
    return Pipeline([Node(work, None, "value", name="work"), Node(use, "value", None)])
"""
)


def test_a_run_whose_worker_is_killed_is_failed_and_says_where(
    dask_project: Project, cluster: Cluster
) -> None:
    dask_project.pipeline(LOST)

    ended = dask_project.kedro(*on(cluster, dask_project))

    assert ended.returncode == 1
    assert [worker.poll() is None for worker in cluster.workers].count(True) == 1
    runs = dask_project.all_runs()
    main = main_of(runs)
    assert main.data.tags["kedro_failed_node"] == "work"
    assert "WorkerLostError: work had begun on a worker" in main.data.tags["kedro_error"]
    assert main.data.metrics == {"begun": 1}
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


def test_a_node_that_may_begin_anew_does_so_on_another_worker(
    dask_project: Project, cluster: Cluster
) -> None:
    dask_project.pipeline(LOST)

    ended = dask_project.kedro(*on(cluster, dask_project, retries=1))

    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = dask_project.all_runs()
    main = main_of(runs)
    assert main.info.status == "FINISHED"
    assert main.data.metrics == {"begun": 1, "used": 1}
    children = [
        (run.info.status, run.data.tags.get("lost"), run.data.metrics)
        for run in runs
        if run is not main
    ]
    assert children == [("FINISHED", None, {"inner": 1}), ("KILLED", "yes", {})]


def test_data_that_is_lost_with_its_worker_fails_the_run(
    dask_project: Project, cluster: Cluster
) -> None:
    # `use` takes data of two workers, so that one of them is another than its own.
    dask_project.pipeline(
        MEET
        + """
def make(me, other):
    tell(me)
    wait_for(other)
    return os.getpid()

def make_a(): return make("a", "b")
def make_b(): return make("b", "a")

def kill(a, b):
    mlflow.log_metric("killing", 1)
    for pid in {a, b} - {os.getpid()}:
        os.kill(pid, signal.SIGKILL)
    return 1

def use(a, b, killed):
    mlflow.log_metric("used", a + b)

def create_pipeline():
    return Pipeline([
        Node(make_a, None, "a", name="make_a"),
        Node(make_b, None, "b", name="make_b"),
        Node(kill, ["a", "b"], "killed"),
        Node(use, ["a", "b", "killed"], None),
    ])
"""
    )

    ended = dask_project.kedro(*on(cluster, dask_project))

    run = dask_project.only_run()
    if ended.returncode == 0:  # the worker that is left has had a copy of everything
        assert (run.info.status, set(run.data.metrics)) == ("FINISHED", {"killing", "used"})
    else:
        assert run.info.status == "FAILED"
        assert "WorkerLostError: make_" in run.data.tags["kedro_error"]


def test_a_node_that_raises_fails_the_run_after_those_that_have_begun(
    dask_project: Project, cluster: Cluster
) -> None:
    dask_project.pipeline(
        MEET
        + """
def work(number):
    if is_first("raising"):
        wait_for("begun")
        raise ValueError("no penguins")
    tell("begun")
    wait_for("go on")
    mlflow.log_metric(f"after_{number}", number)

def create_pipeline():
    return Pipeline([Node(work, f"params:n{i}", None, name=f"work_{i}") for i in range(12)])
"""
    )
    dask_project.parameters({f"n{i}": i for i in range(12)})
    process = dask_project.start(*on(cluster, dask_project), COLUMNS="200")
    assert process.stdout
    assert any("Waiting for the nodes that have begun" in line for line in process.stdout)
    work = dask_project.path / "src" / dask_project.package / "pipelines" / "work"
    tell(work / "go on.fifo")
    output = process.stdout.read()

    assert process.wait() == 1
    assert "ValueError: no penguins" in output
    run = dask_project.only_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["kedro_error"] == "ValueError: no penguins"
    assert run.data.tags["kedro_failed_node"].startswith("work_")
    # At most one in each of the two workers had begun before it was known.
    assert len(run.data.metrics) in (1, 2)
    files = {file.path for file in dask_project.client.list_artifacts(run.info.run_id)}
    assert files == {"traceback.txt"}


def test_a_node_that_exits_fails_the_run_and_not_its_worker(
    dask_project: Project, cluster: Cluster
) -> None:
    dask_project.pipeline(
        """
        import sys
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def leave():
            mlflow.start_run(nested=True)
            sys.exit(3)

        def create_pipeline():
            return Pipeline([Node(leave, None, "nothing", name="leaving")])
        """
    )

    assert dask_project.kedro(*on(cluster, dask_project)).returncode == 1

    runs = dask_project.all_runs()
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
    tags = main_of(runs).data.tags
    assert tags["kedro_error"] == "RuntimeError: leaving called sys.exit(3)"
    assert tags["kedro_failed_node"] == "leaving"
    assert [worker.poll() for worker in cluster.workers] == [None, None]


@pytest.mark.parametrize("where", ["cluster", "this machine"])
def test_ctrl_c_ends_the_run_as_killed(
    dask_project: Project, request: pytest.FixtureRequest, where: str
) -> None:
    dask_project.pipeline(
        MEET
        + """
def work():
    with mlflow.start_run(nested=True):
        tell("begun")
        wait_for("go on")

def create_pipeline():
    return Pipeline([Node(work, None, "nothing")])
"""
    )
    words = ["run", f"--runner={dask_project.package}.runner.DaskRunner"]
    if where == "cluster":
        words = on(request.getfixturevalue("cluster"), dask_project)
    process = dask_project.start(*words, new_session=True)
    work = dask_project.path / "src" / dask_project.package / "pipelines" / "work"
    wait_for(work / "begun.fifo")

    os.killpg(process.pid, signal.SIGINT)
    process.communicate()

    runs = dask_project.all_runs()
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert main_of(runs).data.tags["kedro_error"].startswith("interrupted: ")
    tell(work / "go on.fifo")


@pytest.fixture
def own_proxy(server: CountingProxy) -> Iterator[CountingProxy]:
    """The server behind a proxy that nobody else asks."""
    port = urlsplit(server.uri).port
    assert port
    with counting_proxy(port) as proxy:
        yield proxy


def test_workers_have_the_credentials_of_the_run_and_nobody_elses(
    new_project: Callable[..., Project], own_proxy: CountingProxy, tmp_path: Path
) -> None:
    code = """
        import os
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def look():
            return os.environ.get("MLFLOW_TRACKING_TOKEN", "")

        def log(seen):
            mlflow.log_metric("length", len(seen))
            raise ValueError("after logging")

        def create_pipeline():
            return Pipeline([Node(look, None, "seen"), Node(log, "seen", None, name="log")])
        """
    projects = [
        new_project(scale_out="dask", tracking_backend="server", tracking_uri=own_proxy.uri)
        for _ in range(2)
    ]
    for project in projects:
        project.tracking_uri = own_proxy.uri
        project.pipeline(code)
    first = projects[0]
    first.mlflow_yml("server: {credentials: mlflow}")
    first.write(
        "conf/local/credentials.yml", "mlflow: {MLFLOW_TRACKING_TOKEN: 'one token, very secret'}"
    )

    with dask_cluster(tmp_path, *(project.path / "src" for project in projects), workers=1) as one:
        for project in projects:
            asked = len(own_proxy.requests)
            ended = project.kedro(*on(one, project))

            assert ended.returncode == 1
            told = own_proxy.headers[asked:]
            experiment = project.client.get_experiment_by_name(project.package)
            assert experiment
            (run,) = project.client.search_runs([experiment.experiment_id])
            assert run.info.status == "FAILED"
            assert run.data.tags["kedro_error"] == "ValueError: after logging"
            token = "one token, very secret" if project is first else ""
            assert run.data.metrics == {"length": len(token)}
            bearers = {headers.get("Authorization") for headers in told}
            assert bearers == ({f"Bearer {token}"} if token else {None})
            assert "very secret" not in ended.stdout + ended.stderr
    assert "very secret" not in "".join(one.log)
    assert "Compute Failed" in "".join(one.log)
