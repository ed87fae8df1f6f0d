"""Whatever the runner, a Kedro run is one MLflow run that has every value, and its own children."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from kedro.runner import AbstractRunner, SequentialRunner, ThreadRunner
from mlflow.entities import Run
from mlflow.tracking import fluent

from ..support import forks
from ..support.projects import Project, has
from ..support.servers import CountingProxy

# How often each runner has to get everything right; set it to 20 for a thorough check.
REPETITIONS = int(os.environ.get("RUNNER_REPETITIONS", "1"))

NODES = 20
NESTING = (3, 8, 13, 18)  # the nodes whose child run has a child itself

# Twenty nodes that log in every way there is; each file, key and run is a node's own. The last
# but one also logs a model, and the last loads what others have logged.
WORK = """
import tempfile
from pathlib import Path

import mlflow
from kedro.pipeline import Node, Pipeline
from mlflow.tracking import fluent


def log(number):
    open_runs = {run.info.run_id for run in fluent._active_run_stack.get()}
    mlflow.log_param(f"open_{number}", " ".join(sorted(open_runs)))
    mlflow.log_metric(f"fluent_{number}", number, step=0)
    mlflow.log_text(f"written by {number}", f"fluent_{number}.txt")
    with mlflow.start_run(nested=True, run_name=f"child_{number}"):
        mlflow.log_param("inner", number)
        mlflow.log_metric("inner", number)
        if number in NESTING:
            with mlflow.start_run(nested=True, run_name=f"grandchild_{number}"):
                mlflow.log_metric("innermost", number)
    mlflow.log_metric(f"fluent_{number}", number + 0.5, step=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"file_{number}.txt")
        file.write_text(f"copied by {number}")
        mlflow.log_artifact(str(file), "copied")


def make(number):
    log(number)
    many = {"low": number - 1, "high": number + 1}
    return float(number), [number + 0.5, number + 0.25, number], many, f"text {number}"


def fit(number):
    from sklearn.linear_model import LinearRegression

    return *make(number), LinearRegression().fit([[0], [1]], [1, 3])


def use(number, line, value, history, many, text):
    assert (value, text) == (0.0, "text 0")
    assert history == [1.5, 1.25, 1]
    assert many == {"low": 1, "high": 3}
    return *make(number), round(float(line.coef_[0]), 6)


def create_pipeline():
    def node(function, number, inputs=(), outputs=()):
        kinds = ("value", "history", "many", "text")
        return Node(
            function,
            [f"params:n{number}", *inputs],
            [*(f"{kind}_{number}" for kind in kinds), *outputs],
            name=f"{function.__name__}_{number}",
        )

    return Pipeline([
        *(node(make, number) for number in range(18)),
        node(fit, 18, outputs=["line"]),
        node(use, 19, ["line", "value_0", "history_1", "many_2", "text_0"], ["slope"]),
    ])
""".replace("NESTING", str(NESTING))

CATALOG = """
"value_{number}": {type: PACKAGE.runtime.MlflowMetricDataset}
"history_{number}": {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
"many_{number}": {type: PACKAGE.runtime.MlflowMetricsDataset}
"text_{number}":
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: "data/08_reporting/{number}.txt"}
  artifact_path: texts
line:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {pip_requirements: []}
slope: {type: PACKAGE.runtime.MlflowMetricDataset}
"""

# Two pipelines of nodes that log, one way tidy and one way not; `quiet` isn't tracked.
SMALL = """
import mlflow
from kedro.pipeline import Node, Pipeline

def work(x):
    mlflow.log_metric("fluent", x)
    with mlflow.start_run(nested=True):
        mlflow.log_metric("inner", x)

def create_pipeline():
    return Pipeline([Node(work, "params:x", None, name=f"work_{i}") for i in range(8)])
"""
FORGETFUL = """
import mlflow
from kedro.pipeline import Node, Pipeline

def forget(x):
    mlflow.start_run(nested=True, run_name="left open")
    mlflow.start_run(nested=True, run_name="left open inside")
    return x

def fail(x):
    mlflow.start_run(nested=True, run_name="left open by an error")
    raise ValueError("no penguins")

def create_pipeline():
    return Pipeline([Node(forget, "params:x", "y"), Node(fail, "y", None)])
"""
QUIET = """
import mlflow
from kedro.pipeline import Node, Pipeline

def look():
    return str(mlflow.active_run())

def create_pipeline():
    return Pipeline([Node(look, None, f"seen_{i}", name=f"look_{i}") for i in range(8)])
"""
THREADS = 4


class StayingThreads(ThreadPoolExecutor):
    """Threads that outlive the Kedro run, as those of a server do."""

    def __init__(self) -> None:
        super().__init__(THREADS)

    def __exit__(self, *error: object) -> None:
        """Leave the threads alone."""

    def in_each(self, function: Callable[[], Any]) -> list[Any]:
        """Call a function in every thread."""
        together = threading.Barrier(THREADS)

        def call() -> Any:
            together.wait(60)
            return function()

        return [future.result() for future in [self.submit(call) for _ in range(THREADS)]]


class StayingThreadRunner(ThreadRunner):
    def __init__(self, threads: StayingThreads) -> None:
        super().__init__()
        self.threads = threads

    def _get_executor(self, max_workers: int) -> StayingThreads:  # noqa: ARG002
        return self.threads


@pytest.fixture
def threads() -> Iterator[StayingThreads]:
    pool = StayingThreads()
    yield pool
    pool.shutdown()


def left_active() -> list[Any]:
    """Name the runs that are active in any thread of this process."""
    stacks = fluent._active_run_stack.get_all_thread_values().values()
    return [run.info.run_id for stack in stacks for run in stack]


def tracked_on(
    store: str, new_project: Callable[..., Project], request: pytest.FixtureRequest
) -> Project:
    """Make a project whose runs are kept in its own SQLite store or on a server."""
    if store == "sqlite":
        project: Project = request.getfixturevalue("project")
        return project
    server: CountingProxy = request.getfixturevalue("server")
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.tracking_uri = server.uri
    return project


def expected_metrics() -> dict[str, list[tuple[int, float]]]:
    """Give the points, as step and value, of every metric of the pipeline."""
    metrics: dict[str, list[tuple[int, float]]] = {"slope": [(0, 2)]}
    for i in range(NODES):
        metrics[f"value_{i}"] = [(0, i)]
        metrics[f"history_{i}"] = [(0, i + 0.5), (1, i + 0.25), (2, i)]
        metrics[f"many_{i}.low"] = [(0, i - 1)]
        metrics[f"many_{i}.high"] = [(0, i + 1)]
        metrics[f"fluent_{i}"] = [(0, i), (1, i + 0.5)]
    return metrics


def expected_files() -> dict[str, str]:
    """Give path and content of every artifact of the pipeline."""
    return {
        path: text
        for i in range(NODES)
        for path, text in (
            (f"texts/{i}.txt", f"text {i}"),
            (f"fluent_{i}.txt", f"written by {i}"),
            (f"copied/file_{i}.txt", f"copied by {i}"),
        )
    }


def check_everything(project: Project, runs: list[Run], folder: Path) -> None:
    """Check that these runs are those of one Kedro run, whole and without anything else."""
    client = project.client
    assert {run.info.status for run in runs} == {"FINISHED"}
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    run_id = main.info.run_id
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    assert {run.info.experiment_id for run in runs} == {experiment.experiment_id}

    assert main.data.params == {
        key: value
        for i in range(NODES)
        for key, value in ((f"n{i}", str(i)), (f"open_{i}", run_id))
    }
    metrics = expected_metrics()
    assert main.data.metrics == {key: points[-1][1] for key, points in metrics.items()}
    for key, points in metrics.items():
        history = client.get_metric_history(run_id, key)
        assert sorted((point.step, point.value) for point in history) == points, key
    folder.mkdir(parents=True)
    client.download_artifacts(run_id, "", str(folder))
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    assert {path.as_posix(): file.read_text() for path, file in files.items()} == expected_files()

    children = {run.info.run_name: run for run in runs if run is not main}
    names = [f"child_{i}" for i in range(NODES)] + [f"grandchild_{i}" for i in NESTING]
    assert len(runs) == 1 + len(names)
    assert sorted(children) == sorted(names)
    for name, run in children.items():
        parent, value = run.data.tags["mlflow.parentRunId"], float(name.rpartition("_")[2])
        if name.startswith("child"):
            assert parent == run_id, name
            assert run.data.metrics == {"inner": value}
            assert run.data.params == {"inner": str(int(value))}
        else:
            assert parent == children[name.removeprefix("grand")].info.run_id, name
            assert run.data.metrics == {"innermost": value}

    models = client.search_logged_models(
        [experiment.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    assert [(model.name, str(model.status)) for model in models] == [("line", "READY")]


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    ("runner", "start_method", "is_async", "store"),
    [
        ("SequentialRunner", "", False, "sqlite"),
        pytest.param("SequentialRunner", "", True, "sqlite", marks=THOROUGH),
        ("ThreadRunner", "", False, "server"),
        pytest.param("ThreadRunner", "", True, "sqlite", marks=THOROUGH),
        pytest.param("ParallelRunner", "fork", False, "sqlite", marks=THOROUGH),
        ("ParallelRunner", "fork", True, "server"),
        pytest.param("ParallelRunner", "spawn", False, "sqlite", marks=THOROUGH),
        pytest.param("ParallelRunner", "spawn", True, "sqlite", marks=THOROUGH),
        pytest.param("ParallelRunner", "forkserver", False, "sqlite", marks=THOROUGH),
        pytest.param("ParallelRunner", "forkserver", True, "sqlite", marks=THOROUGH),
    ],
)
def test_twenty_nodes_log_all_they_have_to_one_run(
    new_project: Callable[..., Project],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    runner: str,
    start_method: str,
    is_async: bool,
    store: str,
) -> None:
    project = tracked_on(store, new_project, request)
    project.pipeline(WORK)
    project.catalog(CATALOG)
    project.parameters({f"n{i}": i for i in range(NODES)})
    words = ["run", f"--runner={runner}", *(["--async"] if is_async else [])]
    if has("kedro", "1.6"):  # which deprecates --async
        words[2:] = [f"--runner-params=is_async={is_async}"]
    seen = {run.info.run_id for run in project.all_runs()}

    for repetition in range(REPETITIONS):
        ended = project.kedro(*words, KEDRO_MP_CONTEXT=start_method)

        assert ended.returncode == 0, ended.stdout + ended.stderr
        runs = [run for run in project.all_runs() if run.info.run_id not in seen]
        seen |= {run.info.run_id for run in runs}
        check_everything(project, runs, tmp_path / "artifacts" / str(repetition))


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner])
@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
@pytest.mark.filterwarnings("ignore:'ThreadRunner' doesn't support")
def test_two_runs_in_one_process_leave_no_active_run(
    project: Project, runner: Callable[..., AbstractRunner], is_async: bool
) -> None:
    project.pipeline(SMALL)

    for x in (1, 2):
        project.run(params={"x": x}, runner=runner(is_async=is_async))
        assert mlflow.active_run() is None
        assert left_active() == []

    runs = project.all_runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 18
    second, first = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    for main, x in ((first, 1), (second, 2)):
        assert (main.data.params, main.data.metrics) == ({"x": str(x)}, {"fluent": x})
        of_main = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == main.info.run_id]
        assert [child.data.metrics for child in of_main] == [{"inner": x}] * 8


def test_threads_that_stay_carry_no_run_into_the_next(
    project: Project, threads: StayingThreads
) -> None:
    project.pipeline(SMALL, "small")
    project.pipeline(QUIET, "quiet")
    project.parameters({"x": 1})
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [quiet]}}")

    for x in (1, 2):
        project.run(pipeline_names=["small"], params={"x": x}, runner=StayingThreadRunner(threads))
        assert threads.in_each(mlflow.active_run) == [None] * THREADS
        seen = project.run(pipeline_names=["quiet"], runner=StayingThreadRunner(threads))
        assert [data.load() for data in seen.values()] == ["None"] * 8
    assert left_active() == []

    runs = project.all_runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 18
    mains = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [main.data.metrics for main in mains] == [{"fluent": 2}, {"fluent": 1}]


def test_runs_that_nodes_leave_open_are_ended_and_not_carried_on(
    project: Project, threads: StayingThreads
) -> None:
    project.pipeline(FORGETFUL, "forgetful")
    project.pipeline(SMALL, "small")
    project.parameters({"x": 1})

    for _ in range(THREADS):
        with pytest.raises(ValueError, match="no penguins"):
            project.run(pipeline_names=["forgetful"], runner=StayingThreadRunner(threads))
        assert threads.in_each(mlflow.active_run) == [None] * THREADS
    project.run(pipeline_names=["small"], runner=StayingThreadRunner(threads))

    runs = project.all_runs()
    assert not [run.info.run_name for run in runs if run.info.status == "RUNNING"]
    mains = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [main.info.status for main in mains] == ["FINISHED"] + ["FAILED"] * THREADS
    names = {run.info.run_id: run.info.run_name for run in runs}
    parents = [
        (run.info.run_name, names[run.data.tags["mlflow.parentRunId"]])
        for run in runs
        if run not in mains and run.info.run_name and run.info.run_name.startswith("left open")
    ]
    assert sorted(parents) == sorted(
        [
            ("left open", "forgetful"),
            ("left open inside", "left open"),
            ("left open by an error", "forgetful"),
        ]
        * THREADS
    )


def test_workers_of_a_server_that_was_forked_before_have_the_environment_of_the_run(
    project: Project,
) -> None:
    project.pipeline(
        """
        import os
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def look():
            mlflow.log_metric("length", len(os.environ["MLFLOW_TRACKING_TOKEN"]))
            with mlflow.start_run(nested=True):
                mlflow.log_param("owner", os.environ.get("MLFLOW_RUN_ID"))
            return 1

        def create_pipeline():
            return Pipeline([Node(look, None, "seen")])
        """
    )
    project.mlflow_yml("server: {credentials: mlflow}")
    project.write("conf/local/credentials.yml", "mlflow: {MLFLOW_TRACKING_TOKEN: secret}")
    given = project.client.create_run("0").info.run_id
    # The default from Python 3.14: the runner's manager starts the server before there is a run.
    script = (
        "import multiprocessing, sys\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('forkserver')\n"
        "    from kedro.framework.cli import main\n"
        "    main()\n"
    )
    project.write("start.py", script)

    words = ["run", "--runner=ParallelRunner"]
    ended = forks.run("start", words, project.path, {**os.environ, "MLFLOW_RUN_ID": given})

    assert ended.returncode == 0, ended.stdout + ended.stderr
    main, child = project.client.get_run(given), project.all_runs()[0]
    assert main.data.metrics == {"length": len("secret")}
    assert child.data.tags["mlflow.parentRunId"] == given
    assert child.data.params == {"owner": "None"}
