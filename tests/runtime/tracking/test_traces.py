"""No trace of a run is lost, whatever the runner, and how ever its nodes end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from urllib.parse import urlsplit

import kedro.runner
import pytest
from kedro.framework.startup import bootstrap_project
from kedro.runner import AbstractRunner, SequentialRunner, ThreadRunner
from mlflow import MlflowClient
from mlflow.entities import Run

from ...support.faults import Fault, faulty_proxy
from ...support.projects import Project, has
from ...support.servers import CountingProxy, counting_proxy

# Seven nodes that trace; one of them yields, and the last one fails where it is asked to.
WORK = """
import random

import mlflow
from kedro.pipeline import Node, Pipeline

@mlflow.trace
def outer(number):
    return inner(number)

@mlflow.trace
def inner(number):
    return number

def trace(number):
    random.seed(42)
    return outer(number)

def trace_in_chunks(number):
    random.seed(42)
    with mlflow.start_span("chunks"):
        yield outer(number)

def trace_and_fail(number, has_to_fail):
    trace(number)
    assert not has_to_fail, "no penguins"

def create_pipeline():
    return Pipeline([
        *(Node(trace, f"params:n{i}", f"result_{i}", name=f"trace_{i}") for i in range(5)),
        Node(trace_in_chunks, "params:n5", "result_5"),
        Node(trace_and_fail, ["params:n6", "params:has_to_fail"], None),
    ])
"""
if not has("mlflow", "3.11"):  # where traces with equal ids are one
    WORK = WORK.replace("random.seed(42)", "pass")
NAMES = ["chunks", *["outer"] * 6]
INNER = {"chunks": ["outer", "inner"], "outer": ["inner"], "before": []}

CREDENTIALS = "team: {MLFLOW_TRACKING_TOKEN: a-long-token}"

# A hook that traces before the workers are forked.
HOOK = """
import mlflow
from kedro.framework.hooks import hook_impl

class TracingHook:
    @hook_impl
    def before_pipeline_run(self):
        with mlflow.start_span("before"):
            pass
        mlflow.flush_trace_async_logging()  # its threads go on
"""


@pytest.fixture
def tracing_project(project: Project) -> Project:
    project.pipeline(WORK)
    project.parameters({f"n{i}": i for i in range(7)} | {"has_to_fail": False})
    return project


def port_of(server: CountingProxy) -> int:
    port = urlsplit(server.uri).port
    assert port
    return port


def names_of_traces(client: MlflowClient, run: Run) -> list[str]:
    """Name the first span of each trace that a run has."""
    found = client.search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id)
    for trace in found:
        assert [s.name for s in trace.data.spans[1:]] == INNER[trace.data.spans[0].name]
    return sorted(trace.data.spans[0].name for trace in found)


@pytest.mark.parametrize(
    ("start_method", "has_to_fail"),
    [
        ("fork", True),
        ("spawn", True),
        pytest.param("forkserver", True, marks=pytest.mark.thorough),
        pytest.param("fork", False, marks=pytest.mark.thorough),
        pytest.param("spawn", False, marks=pytest.mark.thorough),
    ],
)
def test_workers_send_their_traces_before_they_end_those_of_a_failed_node_too(
    tracing_project: Project, start_method: str, has_to_fail: bool
) -> None:
    ended = tracing_project.kedro(
        "run",
        "--runner=ParallelRunner",
        f"--params=has_to_fail={has_to_fail}",
        KEDRO_MP_CONTEXT=start_method,
    )

    assert (ended.returncode == 0) is not has_to_fail, ended.stdout + ended.stderr
    run = tracing_project.only_run()
    assert run.info.status == ("FAILED" if has_to_fail else "FINISHED")
    assert names_of_traces(tracing_project.client, run) == NAMES


def test_a_worker_forked_from_a_process_that_traces_sends_its_own_traces(
    tracing_project: Project,
) -> None:
    tracing_project.write(f"src/{tracing_project.package}/hooks.py", HOOK)
    settings = tracing_project.path / "src" / tracing_project.package / "settings.py"
    text = f"from {tracing_project.package}.hooks import TracingHook\n{settings.read_text()}"
    settings.write_text(text.replace("HOOKS = (", "HOOKS = (TracingHook(), "))

    ended = tracing_project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT="fork")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "could be sent" not in ended.stdout
    names = names_of_traces(tracing_project.client, tracing_project.only_run())
    assert names == ["before", *NAMES]


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner])
def test_traces_are_sent_with_the_credentials_of_their_run(
    tracing_project: Project, server: CountingProxy, runner: type[AbstractRunner]
) -> None:
    refused = []

    def refuse(path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        if "traces" not in path or headers.get("Authorization") == "Bearer a-long-token":
            return None
        refused.append(path)
        return 401, "a token is needed"

    tracing_project.write("conf/local/credentials.yml", CREDENTIALS)
    with counting_proxy(port_of(server), refuse) as proxy:
        options = f"{{mlflow_tracking_uri: '{proxy.uri}', credentials: team}}"
        tracing_project.mlflow_yml(f"server: {options}")

        tracing_project.run(runner=runner())

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(tracing_project.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert (names_of_traces(client, run), refused) == (NAMES, [])
    assert "MLFLOW_TRACE_USE_ISOLATED_RANDOM_ID_GENERATOR" not in os.environ


@pytest.mark.parametrize("runner", ["SequentialRunner", "ParallelRunner"])
def test_traces_that_cannot_be_sent_hold_up_a_run_for_a_limited_time(
    tracing_project: Project, server: CountingProxy, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    monkeypatch.setenv("KEDRO_MP_CONTEXT", "fork")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bootstrap_project(tracing_project.path)
    traces = import_module(f"{tracing_project.package}.runtime.tracking.traces")
    monkeypatch.setattr(traces, "FLUSH_LIMIT", 0.1)
    with faulty_proxy(port_of(server), Fault("hang", only="traces")) as proxy:
        tracing_project.mlflow_yml(f"server: {{mlflow_tracking_uri: '{proxy.uri}'}}")

        tracing_project.run(runner=getattr(kedro.runner, runner)())

        assert proxy.struck.is_set()
