"""Whatever goes wrong on the way to the server, and whenever: in the end it has the whole run.

A sample of all that can go wrong is tried; with --all every request is broken in every way.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric

from ..runtime.conftest import Project
from . import everything
from .everything import Undisturbed
from .faults import Fault, FaultyProxy, faulty_proxy, writes
from .stores import differences

# What may go wrong; at which request is filled in.
FAULTS = [
    Fault("refuse"),
    Fault("reset"),
    Fault("reset", times=1),
    Fault("reset", processed=True),
    Fault("reset", processed=True, times=1),
    Fault("reset", processed=True, torn=True),
    Fault("reset", processed=True, torn=True, times=1),
    Fault("hang"),
    Fault("hang", times=1),
    Fault("hang", processed=True),
    Fault("hang", processed=True, times=1),
    Fault("500"),
    Fault("500", times=1),
    Fault("500", processed=True, times=1),
    Fault("503"),
    Fault("503", times=3),
    Fault("503", processed=True, times=2),
    Fault("401"),
    Fault("401", times=1),
    Fault("slow", times=5),
    Fault("full"),
    Fault("full", times=4),
]

# What the client asks for in a run, by the end of the paths. The number of a request changes with
# what is sent in between, so that a fault at a number doesn't always meet the same one.
ASKED = [
    "experiments/create",
    "runs/create",
    "runs/log-batch",
    "mlflow/logged-models",
    "mlflow-artifacts/artifacts/",
    "model-versions/create",
    "runs/update",
    *(
        pytest.param(asked, marks=pytest.mark.thorough)
        for asked in [
            "experiments/get-by-name",
            "runs/log-inputs",
            "runs/outputs",
            "registered-models/create",
            "registered-models/get",
            "registered-models/alias",
        ]
    ),
]

NewProject = Callable[..., Project]


@pytest.fixture
def undisturbed(port: int, new_project: NewProject, monkeypatch: pytest.MonkeyPatch) -> Undisturbed:
    for name, value in everything.IMPATIENT.items():
        monkeypatch.setenv(name, value)
    return everything.undisturbed(port, new_project)


# One of each kind, of those that happen most; the others are tried with --all.
SAMPLE = {str(fault) for fault in (FAULTS[0], FAULTS[4], FAULTS[9], *FAULTS[15:18], FAULTS[20])}


def sampled(fault: Fault) -> Any:
    """Leave a fault that isn't in the sample to `--all`."""
    marks = () if str(fault) in SAMPLE else pytest.mark.thorough
    return pytest.param(fault, marks=marks, id=str(fault).replace(" from 0", ""))


def chosen(fault: Fault, count: int, *, every: bool) -> list[Fault]:
    """Give a fault at a request somewhere in a run, or at each; one kind at both ends too."""
    if every:
        return [replace(fault, at=index) for index in range(count)]
    at = random.Random(str(fault)).randrange(1, count - 1)
    ends = [0, count - 1] if fault == Fault("refuse") else []
    return [replace(fault, at=index) for index in sorted([*ends, at])]


@pytest.mark.parametrize("fault", map(sampled, FAULTS))
def test_a_run_that_something_disturbs_is_on_the_server_whole_after_sync(
    port: int,
    new_project: NewProject,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    fault: Fault,
) -> None:
    wrong = {}

    for each in chosen(fault, len(undisturbed.requests), every=request.config.getoption("--all")):
        # MLflow's client may ask once more by itself, whatever it asks for.
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(each.at % 2))
        if found := what_is_wrong(each, port, new_project(), undisturbed):
            wrong[str(each)] = found

    assert wrong == {}


@pytest.mark.parametrize(
    ("times", "processed"),
    [
        pytest.param(1, False, id="once"),
        pytest.param(1, True, id="once, done", marks=pytest.mark.thorough),
        pytest.param(None, False, id="on", marks=pytest.mark.thorough),
        pytest.param(None, True, id="on, done", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("asked", ASKED)
def test_a_run_is_whole_after_sync_whatever_it_was_asking_for_when_the_connection_broke(
    port: int,
    new_project: NewProject,
    undisturbed: Undisturbed,
    asked: str,
    processed: bool,
    times: int | None,
) -> None:
    assert any(asked in request for request in undisturbed.requests)
    fault = Fault("reset", times=times, processed=processed, only=asked)

    assert what_is_wrong(fault, port, new_project(), undisturbed) == []


def what_is_wrong(fault: Fault, port: int, project: Project, undisturbed: Undisturbed) -> list[str]:
    """Run, with something that goes wrong, then sync; tell what the server has otherwise."""
    with faulty_proxy(port, fault) as proxy:
        everything.fill(project, proxy.uri)
        try:
            project.run()
            proxy.heal()
            everything.sync(project)
        except Exception as error:  # the caller may have more to try
            return [f"{type(error).__name__}: {error}"]
        found = everything.on_server(port, project, proxy)
    return differences(found, undisturbed.content)


def test_two_runs_have_the_same_content_until_one_gets_anything_more(
    port: int, new_project: NewProject, proxy: FaultyProxy
) -> None:
    found = []
    for _ in range(2):
        project = everything.fill(new_project(), proxy.uri, on_unreachable=None)
        project.run()
        found.append(everything.on_server(port, project, proxy))
    assert differences(found[0], found[1]) == []

    client = project.client
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    run = next(
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.info.run_name == "fold of 1"
    ).info.run_id
    (model,) = client.search_logged_models([experiment.experiment_id])
    for change in (
        lambda: client.log_metric(run, "score", 0.0625, timestamp=1_700_000_000_001, step=0),
        lambda: client.log_param(run, "depth", 1),
        lambda: client.set_tag(run, "species", "adelie"),
        lambda: client.log_text(run, "another fold", "fold.txt"),
        lambda: client.set_terminated(run, "FAILED"),
        lambda: client.log_batch(run, metrics=[Metric("of model", 1, 1, 1, model.model_id)]),
        lambda: client.set_logged_model_tags(model.model_id, {"kind": "bent"}),
        lambda: client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)]),
        lambda: client.set_experiment_tag(experiment.experiment_id, "kind", "trials"),
        lambda: client.set_registered_model_alias(project.package, "runner-up", "1"),
        lambda: client.set_model_version_tag(project.package, "1", "kind", "bent"),
        lambda: client.create_model_version(
            project.package, model.model_uri, model_id=model.model_id
        ),
        lambda: client.create_run(experiment.experiment_id),
    ):
        change()
        found.append(everything.on_server(port, project, proxy))
        assert differences(found[-1], found[-2]), found[-1]


@pytest.fixture
def proxy(port: int) -> Any:
    with faulty_proxy(port) as proxy:
        yield proxy


class Client(requests.Session):
    """A client that uses one connection as long as it lasts."""

    def __init__(self, proxy: FaultyProxy) -> None:
        super().__init__()
        self.uri = proxy.uri

    def read(self) -> requests.Response:
        return self.get(f"{self.uri}/version", timeout=1)

    def make(self, experiment: str) -> requests.Response:
        path = "/api/2.0/mlflow/experiments/create"
        return self.post(f"{self.uri}{path}", json={"name": experiment}, timeout=1)


def fails(fault: Fault) -> AbstractContextManager[Any]:
    """Expect what a client says that meets a fault."""
    errors: dict[str, type[Exception]] = {
        "refuse": requests.ConnectionError,
        "reset": requests.ConnectionError,
        "hang": requests.ReadTimeout,
    }
    if fault.torn:  # the head of the answer has arrived
        return pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
    return pytest.raises(errors[fault.kind]) if fault.kind in errors else nullcontext()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault).replace(" from 0", ""))
def test_the_proxy_fails_from_the_request_on_that_was_asked_for(
    port: int, proxy: FaultyProxy, fault: Fault, request: pytest.FixtureRequest
) -> None:
    fault = replace(fault, at=2)
    client, name = Client(proxy), f"made by {request.node.name}"
    direct = MlflowClient(f"http://127.0.0.1:{port}")

    proxy.plan(fault)
    assert [client.read().status_code for _ in range(2)] == [200, 200]
    assert proxy.struck.is_set() == (fault.kind == "refuse")
    with fails(fault):
        answer = client.make(name)
        assert answer.status_code == {"503": 503, "401": 401, "slow": 200}.get(fault.kind, 500)
    made = direct.get_experiment_by_name(name)

    assert (made is not None) == (fault.processed or fault.kind == "slow")
    assert proxy.struck.is_set()
    proxy.heal()
    assert client.read().status_code == 200
    writing = ["POST /api/2.0/mlflow/experiments/create"] * (fault.kind != "refuse")
    assert proxy.requests == ["GET /version", "GET /version", *writing, "GET /version"]


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.times])
def test_the_proxy_fails_as_often_as_was_asked_for(proxy: FaultyProxy, fault: Fault) -> None:
    client = Client(proxy)
    proxy.plan(fault)

    for number in range(fault.times or 0):
        with fails(fault):
            client.make(f"{fault} number {number}")

    assert client.make(f"{fault} at last").status_code == 200


def test_a_server_with_a_full_disk_reads(proxy: FaultyProxy) -> None:
    client = Client(proxy)
    proxy.plan(Fault("full"))

    assert client.read().status_code == 200
    assert "full" in json.loads(client.make("too much").text)["message"]


def test_a_torn_answer_has_begun(proxy: FaultyProxy) -> None:
    proxy.plan(Fault("reset", processed=True, torn=True))

    answer = Client(proxy).get(f"{proxy.uri}/version", stream=True)

    assert answer.status_code == 200
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        answer.content  # noqa: B018


def test_searches_do_not_write() -> None:
    assert not writes("POST /api/2.0/mlflow/runs/search")
    assert not writes("GET /api/2.0/mlflow/runs/get")
    assert writes("POST /api/2.0/mlflow/runs/create")
    assert writes("PUT /api/2.0/mlflow-artifacts/artifacts/1/a.txt")
