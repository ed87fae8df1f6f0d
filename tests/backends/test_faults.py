"""The proxy fails as tests ask it to, and what they compare shows each difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric

from ..support import everything
from ..support.faults import Fault, FaultyProxy, faulty_proxy, writes
from ..support.projects import Project
from ..support.stores import differences

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

NewProject = Callable[..., Project]


def test_two_runs_have_the_same_content_until_one_gets_anything_more(
    port: int, new_project: NewProject, proxy: FaultyProxy
) -> None:
    found = []
    for _ in range(2):
        project = everything.fill(new_project(), proxy.uri, on_unreachable=None)
        project.run()
        found.append(everything.on_server(port, project, proxy.uri))
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
        found.append(everything.on_server(port, project, proxy.uri))
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
