"""However a run ends, it ends in MLflow too, and says why."""

from __future__ import annotations

import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from runtime.stores.server import Server
from runtime.tracking.ending import MARKERS, where_to_look
from runtime.tracking.handle import RunHandle
from runtime.tracking.process import Process, mark, this_process

from ...support.forks import Fork
from ...support.projects import ONE_NODE, Project, needs_kedro
from ...support.servers import CountingProxy

THOROUGH = pytest.mark.thorough

RUNNERS = [
    ("SequentialRunner", "fork"),
    pytest.param("ThreadRunner", "fork", marks=THOROUGH),
    ("ParallelRunner", "fork"),
    pytest.param("ParallelRunner", "spawn", marks=THOROUGH),
    pytest.param("ParallelRunner", "forkserver", marks=THOROUGH),
]

FAILING = """
from kedro.pipeline import Node, Pipeline

class Sad(Exception):
    def __init__(self, what, why):  # can't be unpickled: a worker's error may not arrive
        super().__init__(what)

def lay():
    return "egg"

def hatch(egg):
    raise ERROR

def create_pipeline():
    return Pipeline([Node(lay, None, "egg", name="lay"), Node(hatch, "egg", "y", name="hatch")])
"""

# A validator that says what is wrong as Pandera's does, and a function.
CHECKS = """
from kedro.validation import CheckFailure, DataValidationError

class Weights:
    def validate(self, data):
        wrong = [weight for weight in data if weight <= 0]
        if wrong:
            examples = {"failure_count": len(wrong), "failure_examples": wrong}
            raise DataValidationError("refused", failures=[
                CheckFailure("too light", check="greater_than(0)", column="weight", **examples),
                CheckFailure(f"no order in {data}"),
            ])
        return data

def is_penguin(data):
    assert data == "penguin", "no penguin has hatched"
"""

# `hatch` tells through a named pipe that it runs, with a child run open, and never ends.
WAITING = """
import threading

import mlflow
from kedro.io import AbstractDataset
from kedro.pipeline import Node, Pipeline

def wait():
    open(FIFO, "w").close()
    threading.Event().wait()

class Slow(AbstractDataset):
    def load(self): ...
    def save(self, data):
        wait()
    def _describe(self):
        return {}

def lay():
    return "egg"

def hatch(egg):
    mlflow.start_run(nested=True, run_name="chick")
    if egg == "egg":
        wait()

def give(egg):
    return egg

def create_pipeline():
    return Pipeline([NODES])
"""
IN_A_NODE = 'Node(lay, None, "egg"), Node(hatch, "egg", None, name="hatch"), Node(lay, None, "b")'
IN_A_SAVE = 'Node(lay, None, "egg"), Node(give, "egg", "slow")'


@contextmanager
def running(
    project: Project, nodes: str, runner: str = "SequentialRunner", start_method: str = "fork"
) -> Iterator[Fork]:
    """Run a pipeline that waits in a node or in a save; gives its process when it does."""
    fifo = project.path / "waiting"
    os.mkfifo(fifo)
    project.pipeline(WAITING.replace("FIFO", repr(str(fifo))).replace("NODES", nodes))
    project.catalog("slow: {type: PACKAGE.pipelines.work.Slow}")
    process = project.start(
        "run", f"--runner={runner}", new_session=True, KEDRO_MP_CONTEXT=start_method
    )
    try:
        with fifo.open():  # opened once the pipeline waits
            pass
        yield process
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(group: int) -> list[int]:
    """Give the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_all(group: int) -> None:
    """Wait until no process of a group is left."""
    for pid in alive(group):
        try:
            ended = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([ended], [], [], 60)[0], f"process {pid} stays behind"
        os.close(ended)


def main_and_child(project: Project) -> tuple[Run, Run | None]:
    runs = project.all_runs()
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return main, next((run for run in runs if run is not main), None)


def last_lines(project: Project, *options: str) -> list[str]:
    """What a run that succeeds logs at its end, in a terminal of 80 columns."""
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    ended = project.kedro("run", *options, COLUMNS="80")
    assert (ended.returncode, ended.stdout) == (0, "")
    return ended.stderr.splitlines()[-2:]


@pytest.mark.parametrize("options", [[], ["--env=prod"]])
def test_the_last_lines_of_a_run_say_how_it_ended_and_where_to_look(
    project: Project, options: list[str]
) -> None:
    ending, look = last_lines(project, *options)

    assert re.fullmatch(r"INFO     MLflow run '__default__' FINISHED after \d+\.\d s", ending)
    assert look == " ".join(["INFO     Look at it: kedro mlflow ui", *options])


def test_the_last_line_of_a_run_on_a_server_is_the_address_of_its_page(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    address = server.uri.replace("//", "//ada:t0p@")
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.mlflow_yml(f"server: {{mlflow_tracking_uri: '{address}/'}}")

    _, look = last_lines(project)

    address, _, page = look.removeprefix("INFO     Look at it: ").partition("/#/")
    assert address == server.uri
    _, experiment_id, _, run_id = page.split("/")
    run = MlflowClient(server.uri).get_run(run_id)
    assert page == f"experiments/{experiment_id}/runs/{run_id}"
    assert run.info.experiment_id == experiment_id


def test_the_page_of_a_run_is_in_the_workspace_of_its_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team a")
    run = RunHandle(Server("http://mlflow", "http://mlflow"), "ab12", "7", artifact_uri="")

    page = where_to_look(run, None)

    assert page == "http://mlflow/#/experiments/7/runs/ab12?workspace=team%20a"


def test_the_page_of_a_run_on_databricks_is_in_its_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "https://adb-1.azuredatabricks.net/")
    run = RunHandle(Server("databricks", "databricks-uc"), "ab12", "7", artifact_uri="")

    page = where_to_look(run, None)

    assert page == "https://adb-1.azuredatabricks.net/ml/experiments/7/runs/ab12"


@pytest.mark.parametrize(("runner", "start_method"), RUNNERS)
def test_a_failing_node_fails_the_run_and_says_why(
    project: Project, runner: str, start_method: str
) -> None:
    project.pipeline(FAILING.replace("ERROR", 'ValueError("no penguins, only s3cr3t")'))
    project.write("conf/local/credentials.yml", "db: {password: s3cr3t}")

    ended = project.kedro("run", f"--runner={runner}", KEDRO_MP_CONTEXT=start_method)

    assert ended.returncode == 1
    run = project.only_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["kedro_failed_node"] == "hatch"
    assert run.data.tags["kedro_error"] == "ValueError: no penguins, only ***"
    traceback = project.client.download_artifacts(run.info.run_id, "traceback.txt")
    assert 'raise ValueError("no penguins, only ***")' in Path(traceback).read_text()


@needs_kedro("1.6")
@pytest.mark.parametrize(
    ("runner", "start_method"),
    [*RUNNERS, pytest.param("ThreadRunner", "fork", marks=THOROUGH, id="async")],
)
def test_data_that_a_validator_refuses_is_named_with_the_rule_and_without_its_values(
    project: Project, runner: str, start_method: str, request: pytest.FixtureRequest
) -> None:
    project.write(f"src/{project.package}/checks.py", CHECKS)
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    project.write("data/weights.json", "[12, -7613, -7614]")
    project.catalog(
        """
        egg:
          type: json.JSONDataset
          filepath: data/weights.json
          validator: PACKAGE.checks.Weights
        """
    )
    is_async = ["--async"] if "async" in request.node.name else []
    words = ["run", f"--runner={runner}", "--nodes=hatch", *is_async]

    ended = project.kedro(*words, KEDRO_MP_CONTEXT=start_method)

    assert ended.returncode == 1
    run = project.only_run()
    tags = run.data.tags
    assert tags["kedro_failed_dataset"] == "egg"
    assert tags["kedro_failed_rule"] == (
        f"{project.package}.checks.Weights: weight greater_than(0), schema"
    )
    assert "'egg' on load" in tags["kedro_error"]
    assert "weight: greater_than(0) — 2 cases" in tags["kedro_error"]
    assert not [name for name, text in tags.items() if "-7613" in text]
    traceback = project.client.download_artifacts(run.info.run_id, "traceback.txt")
    assert "-7613" in Path(traceback).read_text()


@needs_kedro("1.6")
def test_an_output_that_a_function_refuses_is_named_with_the_function(project: Project) -> None:
    project.write(f"src/{project.package}/checks.py", CHECKS)
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    project.catalog("y: {type: MemoryDataset, validator: PACKAGE.checks.is_penguin}")

    assert project.kedro("run").returncode == 1

    tags = project.only_run().data.tags
    assert tags["kedro_failed_dataset"] == "y"
    assert tags["kedro_failed_rule"] == f"{project.package}.checks.is_penguin"
    assert tags["kedro_error"].endswith("no penguin has hatched")


def test_an_error_that_cannot_leave_its_worker_is_told_all_the_same(project: Project) -> None:
    project.pipeline(FAILING.replace("ERROR", 'Sad("no penguins", "ice")'))

    assert project.kedro("run", "--runner=ParallelRunner").returncode == 1

    tags = project.only_run().data.tags
    assert project.only_run().info.status == "FAILED"
    assert tags["kedro_failed_node"] == "hatch"
    # The worker's word for it, or that of the pool which lost it on the way.
    assert tags["kedro_error"].startswith(("Sad: no penguins", "BrokenProcessPool"))


def test_a_failing_save_fails_the_run_and_says_why(project: Project) -> None:
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    project.catalog("y: {type: json.JSONDataset, filepath: /proc/nowhere/y.json}")

    assert project.kedro("run").returncode == 1

    run = project.only_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["kedro_error"].startswith("DatasetError: ")
    assert "kedro_failed_node" not in run.data.tags


@pytest.mark.parametrize(
    ("nodes", "runner", "start_method"),
    [
        (IN_A_NODE, "SequentialRunner", "fork"),
        (IN_A_NODE, "ThreadRunner", "fork"),
        (IN_A_SAVE, "SequentialRunner", "fork"),
        (IN_A_NODE, "ParallelRunner", "fork"),
        pytest.param(IN_A_NODE, "ParallelRunner", "spawn", marks=THOROUGH),
        pytest.param(IN_A_NODE, "ParallelRunner", "forkserver", marks=THOROUGH),
    ],
    ids=lambda value: {IN_A_NODE: "node", IN_A_SAVE: "save"}.get(value, value),
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_ends_the_run(
    project: Project, nodes: str, runner: str, start_method: str, number: signal.Signals
) -> None:
    if number == signal.SIGHUP and runner != "SequentialRunner":
        pytest.skip("handled as SIGTERM is")
    with running(project, nodes, runner, start_method) as process:
        process.send_signal(number)

        assert process.wait(60) == -number
        wait_for_all(process.pid)

    main, child = main_and_child(project)
    assert (main.info.status, main.data.tags["kedro_error"]) == ("KILLED", number.name)
    assert child is None or child.info.status == "KILLED"
    assert (child is None) == (nodes == IN_A_SAVE)


@pytest.mark.parametrize(
    ("nodes", "runner", "start_method"),
    [
        (IN_A_NODE, "SequentialRunner", "fork"),
        (IN_A_SAVE, "SequentialRunner", "fork"),
        (IN_A_NODE, "ParallelRunner", "fork"),
        pytest.param(IN_A_NODE, "ParallelRunner", "spawn", marks=THOROUGH),
        pytest.param(IN_A_NODE, "ParallelRunner", "forkserver", marks=THOROUGH),
    ],
    ids=lambda value: {IN_A_NODE: "node", IN_A_SAVE: "save"}.get(value, value),
)
def test_ctrl_c_ends_the_run(project: Project, nodes: str, runner: str, start_method: str) -> None:
    with running(project, nodes, runner, start_method) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does

        # That of `kedro run` without tracking: click says "Aborted!".
        assert process.wait(60) == 1
        wait_for_all(process.pid)

    main, child = main_and_child(project)
    assert main.info.status == "KILLED"
    assert main.data.tags["kedro_error"].startswith(("interrupted", "KeyboardInterrupt"))
    assert child is None or child.info.status in ("KILLED", "FAILED")


@pytest.mark.parametrize(("runner", "start_method"), RUNNERS)
def test_a_run_whose_process_was_killed_is_ended_by_the_next_one(
    project: Project, runner: str, start_method: str
) -> None:
    with running(project, IN_A_NODE, runner, start_method) as process:
        process.kill()
        process.wait(60)
        wait_for_all(process.pid)
    (killed, child) = main_and_child(project)
    assert (killed.info.status, child and child.info.status) == ("RUNNING", "RUNNING")
    assert killed.data.tags["pid"] == str(process.pid)

    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    assert project.kedro("run").returncode == 0

    statuses = {run.info.run_id: run.info.status for run in project.all_runs()}
    assert statuses.pop(killed.info.run_id) == "KILLED"
    assert child
    assert statuses.pop(child.info.run_id) == "KILLED"
    assert list(statuses.values()) == ["FINISHED"]
    reason = project.client.get_run(killed.info.run_id).data.tags["kedro_error"]
    assert f"process {process.pid} " in reason
    assert list((project.path / MARKERS).glob("*.json")) == []


def test_a_killed_worker_fails_the_run(project: Project) -> None:
    with running(project, IN_A_NODE, "ParallelRunner", "fork") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for worker in children[1:]:  # the first one is the manager
            os.kill(int(worker), signal.SIGKILL)

        assert process.wait(60) == 1
        wait_for_all(process.pid)

    main, child = main_and_child(project)
    assert main.info.status == "FAILED"
    assert main.data.tags["kedro_error"].startswith("BrokenProcessPool: ")
    assert child
    assert child.info.status == "FAILED"


def test_only_runs_whose_process_is_surely_gone_are_ended(project: Project) -> None:
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    experiment = project.client.create_experiment(project.package)
    here = this_process()
    assert here.start_time
    gone = Process(here.host, here.pid, here.start_time - 60, here.namespace)
    others = {
        "alive": here,
        "another host": Process("elsewhere", here.pid, here.start_time - 60),
        "unknown start": Process(here.host, here.pid, None, here.namespace),
    }
    if here.start_ticks:  # what the clock says counts only where the system tells nothing else
        others["alive, and the clock was set"] = replace(here, start_time=here.start_time - 60)
    ids = {}
    for name, process in {"gone": gone, "already ended": gone, **others}.items():
        ids[name] = project.client.create_run(experiment, run_name=name).info.run_id
        mark(project.path / MARKERS, ids[name], project.tracking_uri)
        file = project.path / MARKERS / f"{ids[name]}.json"
        marker = json.loads(file.read_text())
        file.write_text(json.dumps({**marker, "process": vars(process)}))
    mark(project.path / MARKERS, "on-another-server", "http://localhost:1")
    (project.path / MARKERS / "broken.json").write_text("{")
    project.client.set_terminated(ids["already ended"], "FINISHED")

    project.run()

    statuses = {run.info.run_name: run.info.status for run in project.all_runs()}
    assert statuses == {
        "gone": "KILLED",
        "already ended": "FINISHED",
        **dict.fromkeys(others, "RUNNING"),
        "__default__": "FINISHED",
    }


def test_a_folder_that_cannot_be_written_does_not_hinder_a_run(project: Project) -> None:
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    (project.path / MARKERS).touch()  # a file where the folder should be

    project.run()

    assert project.only_run().info.status == "FINISHED"


HOOK = """
from kedro.framework.hooks import hook_impl

class Grumpy:
    @hook_impl
    def EVENT(self):
        raise RuntimeError("not today")
"""


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize(
    "event",
    ["before_pipeline_run", "before_node_run", "after_node_run", "after_pipeline_run"],
)
def test_a_run_whose_other_hook_fails_is_failed(project: Project, event: str, order: str) -> None:
    project.pipeline(FAILING.replace("raise ERROR", "return egg"))
    project.write(f"src/{project.package}/grumpy.py", HOOK.replace("EVENT", event))
    settings = project.path / "src" / project.package / "settings.py"
    hooks = "(MlflowHook(), Grumpy())" if order == "first" else "(Grumpy(), MlflowHook())"
    settings.write_text(
        settings.read_text() + f"\nfrom {project.package}.grumpy import Grumpy\nHOOKS = {hooks}\n"
    )

    with pytest.raises(RuntimeError, match="not today"):
        project.run()

    run = project.only_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["kedro_error"] == "RuntimeError: not today"


def test_a_failing_error_hook_hides_neither_the_error_nor_the_end(project: Project) -> None:
    project.pipeline(FAILING.replace("ERROR", 'ValueError("no penguins")'))
    project.write(f"src/{project.package}/grumpy.py", HOOK.replace("EVENT", "on_pipeline_error"))
    settings = project.path / "src" / project.package / "settings.py"
    settings.write_text(
        settings.read_text()
        + f"\nfrom {project.package}.grumpy import Grumpy\nHOOKS = (Grumpy(), *HOOKS)\n"
    )

    with pytest.raises(RuntimeError, match="not today"):
        project.run()

    run = project.only_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["kedro_error"] == "ValueError: no penguins"


def test_signals_are_handled_only_while_a_run_is_on_and_only_when_nobody_else_does(
    project: Project,
) -> None:
    project.pipeline(
        """
        import signal
        from kedro.pipeline import Node, Pipeline

        def handlers():
            return [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGHUP)]

        def create_pipeline():
            return Pipeline([Node(handlers, None, "handlers")])
        """
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    terminate = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result = project.run()

        term, hup = result["handlers"].load()
        assert "watch_signals" in term
        assert hup == str(signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, terminate)
