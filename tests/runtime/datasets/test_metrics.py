"""Metrics as datasets: what goes in, what comes out, and what the store has of it."""

from __future__ import annotations

import copy
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from kedro.io import DatasetError
from kedro.runner import SequentialRunner, ThreadRunner
from mlflow import MlflowClient
from mlflow.tracking import fluent

from runtime import (
    MlflowMetricDataset,
    MlflowMetricHistoryDataset,
    MlflowMetricsDataset,
    MlflowMetricsHistoryDataset,
)

from ...support.projects import Project
from ...support.servers import CountingProxy

BIGGEST = 1.7976931348623157e308


@pytest.fixture(params=["sqlite", "server"])
def client(
    request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path
) -> Iterator[MlflowClient]:
    """A client of an embedded store or of a server, with a run open as in a notebook."""
    if request.param == "server":
        uri = request.getfixturevalue("server").uri
    else:
        shutil.copy(empty_store, tmp_path)
        uri = f"sqlite:///{tmp_path.as_posix()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(experiment_id="0"):
        yield MlflowClient(uri)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    fluent._active_experiment_id = None
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


embedded = pytest.mark.parametrize("client", ["sqlite"], indirect=True)


def run_id() -> str:
    run = mlflow.active_run()
    assert run
    return str(run.info.run_id)


def history(client: MlflowClient, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id(), key)]


EACH_CLASS = pytest.mark.parametrize(
    ("dataset", "data"),
    [
        (MlflowMetricDataset("m", metadata={"a": 1}), 1.0),
        (MlflowMetricHistoryDataset("m", load_args={"mode": "list"}, metadata={"a": 1}), [1.0]),
        (MlflowMetricsDataset(prefix="p", metadata={"a": 1}), {"a": 1.0}),
        (
            MlflowMetricsHistoryDataset(prefix="p", metadata={"a": 1}),
            {"a": {"step": 0, "value": 1}},
        ),
    ],
    ids=lambda given: type(given).__name__,
)


@EACH_CLASS
def test_without_a_run_a_dataset_says_that_there_is_none(dataset: Any, data: Any) -> None:
    with pytest.raises(DatasetError, match="has no run to use"):
        dataset.save(data)
    with pytest.raises(DatasetError, match="has no run to use"):
        dataset.load()
    assert not dataset.exists()


@EACH_CLASS
def test_a_dataset_pickles_deep_copies_and_describes_itself_without_metadata(
    dataset: Any, data: Any
) -> None:
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert str(twin) == str(dataset)
        assert twin.metadata == {"a": 1}
    assert not [word for word in ("metadata", "None", "0x") if word in str(dataset)]
    config = dataset._init_config()  # what `catalog.to_config()` gives
    kind = config.pop("type").rpartition(".")[2]
    assert kind == type(dataset).__name__
    assert str(type(dataset)(**config)) == str(dataset)


@EACH_CLASS
def test_a_dataset_saves_to_and_loads_from_the_run_whose_id_it_has(
    client: MlflowClient, dataset: Any, data: Any
) -> None:
    other = client.create_run("0").info.run_id
    elsewhere = copy.deepcopy(dataset)
    elsewhere.run_id = other

    elsewhere.save(data)

    assert elsewhere.exists()
    assert elsewhere.load()
    assert list(client.get_run(other).data.metrics.values()) == [1.0]
    assert not dataset.exists()
    with pytest.raises(DatasetError, match=f"The run {run_id()} has no metric"):
        dataset.load()


@embedded
def test_a_value_overwrites_at_the_last_step_or_appends_after_it(client: MlflowClient) -> None:
    overwriting = MlflowMetricDataset("m")
    overwriting.save(1)
    overwriting.save(2.5)
    assert history(client, "m") == [(0, 1.0), (0, 2.5)]
    assert overwriting.load() == 2.5

    MlflowMetricDataset("m", save_args={"mode": "append"}).save(3)
    MlflowMetricDataset("m", save_args={"step": 7}).save(4)
    MlflowMetricDataset("m", save_args={"step": np.int64(-2)}).save(5)
    assert history(client, "m")[2:] == [(1, 3.0), (7, 4.0), (-2, 5.0)]
    assert MlflowMetricDataset("m", load_args={"step": 0}).load() == 2.5
    assert MlflowMetricDataset("m", load_args={"step": 1}).load() == 3.0
    assert MlflowMetricDataset("m").load() == 5.0
    with pytest.raises(DatasetError, match=f"The run {run_id()} has no metric 'm' at step 3"):
        MlflowMetricDataset("m", load_args={"step": 3}).load()


@embedded
def test_a_value_has_the_timestamp_that_it_is_given(client: MlflowClient) -> None:
    MlflowMetricDataset("m", save_args={"timestamp": 1000}).save(1)

    (point,) = client.get_metric_history(run_id(), "m")
    assert point.timestamp == 1000


NUMBERS = [
    3,
    0.1 + 0.2,
    1e-300,
    5e-324,
    -BIGGEST,
    2**53,
    True,
    Decimal("0.1"),
    Fraction(1, 3),
    np.float32(0.1),
    np.int64(3),
    np.bool_(False),
    np.array(0.25),
    np.array([0.25]),
    pd.Series([0.25]),
]


def test_a_number_of_any_kind_loads_as_the_float_that_was_saved(client: MlflowClient) -> None:
    values = {f"n{i}": number for i, number in enumerate(NUMBERS)}
    dataset = MlflowMetricsDataset(prefix="")

    dataset.save(values)

    loaded = dataset.load()
    assert set(map(type, loaded.values())) == {float}
    assert loaded == {
        name: number.item() if hasattr(number, "item") else float(number)
        for name, number in values.items()
    }
    single = MlflowMetricDataset("m")
    single.save(np.float64(1e-300))
    assert single.load() == 1e-300


def test_a_store_keeps_nan_and_gives_the_biggest_float_for_infinity(client: MlflowClient) -> None:
    dataset = MlflowMetricHistoryDataset("m")

    dataset.save([math.nan, math.inf, -math.inf, math.nan])

    first, *infinite, last = dataset.load()
    assert math.isnan(first)  # type: ignore[arg-type]
    assert math.isnan(last)  # type: ignore[arg-type]
    assert infinite == [BIGGEST, -BIGGEST]
    flat = MlflowMetricsDataset(prefix="p")
    flat.save({"nan": math.nan, "inf": math.inf})
    loaded = flat.load()
    assert math.isnan(loaded["nan"])
    assert loaded["inf"] == BIGGEST


@pytest.mark.parametrize(
    "given",
    [
        [3.0, 1.0, 2.0, 1.0],
        (3.0, 1.0),
        np.array([3.0, 1.0]),
        pd.Series([3.0, 1.0], index=["a", "b"]),
        [Decimal(3), np.float32(1), np.array(2)],
        range(3),
    ],
    ids=["list", "tuple", "array", "series", "scalars", "range"],
)
@embedded
def test_a_list_of_values_of_any_kind_loads_in_its_order(client: MlflowClient, given: Any) -> None:
    dataset = MlflowMetricHistoryDataset("m")

    dataset.save(given)

    assert dataset.load() == [float(value) for value in given]
    assert history(client, "m") == [(i, float(value)) for i, value in enumerate(given)]


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("dict", {0: 0.1, 5: 0.2, 10: 0.3}),
        ("dict", {10: 0.1, -5: 0.2, 7: 0.2, 0: 1e-300}),
        (
            "history",
            [
                {"step": -1, "value": 0.1, "timestamp": 1000},
                {"step": -1, "value": 0.2, "timestamp": 1000},
                {"step": 3, "value": 0.2, "timestamp": 1000},
                {"step": 2, "value": 0.2, "timestamp": 2000},
                {"step": 2, "value": 0.1, "timestamp": 2001},
            ],
        ),
    ],
    ids=["steps", "steps out of order", "timestamps"],
)
def test_a_history_loads_as_it_was_saved(client: MlflowClient, mode: str, data: Any) -> None:
    dataset = MlflowMetricHistoryDataset("h", load_args={"mode": mode}, save_args={"mode": mode})

    dataset.save(data)

    loaded = dataset.load()
    assert loaded == data
    assert list(loaded) == list(data)
    assert dataset.exists()


@embedded
def test_a_history_without_timestamps_keeps_points_that_are_equal_and_their_order(
    client: MlflowClient,
) -> None:
    points = [(0, 5.0), (0, 1.0), (0, 1.0), (3, 2.0), (np.int64(-1), 4.0), (2.0, 4.0)]
    listed = MlflowMetricHistoryDataset("m", save_args={"mode": "history"})

    listed.save([{"step": step, "value": value} for step, value in points])
    listed.save([{"step": step, "value": value} for step, value in points])

    assert listed.load() == [value for _, value in points] * 2
    assert history(client, "m") == points * 2
    assert MlflowMetricHistoryDataset("m", load_args={"mode": "dict"}).load() == {
        0: 1.0,
        3: 2.0,
        -1: 4.0,
        2: 4.0,
    }


def test_many_metrics_share_a_prefix(client: MlflowClient) -> None:
    flat = MlflowMetricsDataset(prefix="scores")
    flat.save({"a": 1, "b": 0.5})
    flat.save({"b": 0.25})
    assert client.get_run(run_id()).data.metrics == {"scores.a": 1.0, "scores.b": 0.25}
    assert flat.load() == {"a": 1.0, "b": 0.25}

    over_steps = MlflowMetricsHistoryDataset(prefix="fit")
    two = [{"step": 0, "value": 1.0}, {"step": 1, "value": 2.0}, {"step": 1, "value": 0.5}]
    over_steps.save({"one": {"step": 0, "value": 0.5}, "two": two})
    assert over_steps.load() == {"fit.one": {"step": 0, "value": 0.5}, "fit.two": two}
    assert set(MlflowMetricsDataset(prefix="").load()) == {
        "scores.a",
        "scores.b",
        "fit.one",
        "fit.two",
    }


@embedded
def test_points_of_many_metrics_may_have_timestamps(client: MlflowClient) -> None:
    over_steps = MlflowMetricsHistoryDataset(prefix="fit")

    over_steps.save({"a": [{"step": np.int32(4), "value": 1, "timestamp": 1000.0}]})

    (point,) = client.get_metric_history(run_id(), "fit.a")
    assert (point.step, point.value, point.timestamp) == (4, 1.0, 1000)


def saving(kind: Any, save_args: dict[str, Any] | None = None) -> Callable[[Any], None]:
    """Save to a metric `m`, or to metrics of which one is `m`."""
    of_one = kind in (MlflowMetricDataset, MlflowMetricHistoryDataset)
    dataset = kind("m", save_args=save_args) if of_one else kind(prefix="")
    save: Callable[[Any], None] = dataset.save
    return save


@pytest.mark.parametrize(
    ("save", "data", "message"),
    [
        *(
            (saving(MlflowMetricDataset), data, f"Metric 'm' takes a number, got {shown}")
            for data, shown in [
                ("high", "'high'"),
                ("0.5", "'0.5'"),
                (1 + 2j, r"\(1\+2j\)"),
                (np.complex128(1), r"np.complex128\(1\+0j\)"),
                (10**400, r"1000+\.\.\.0+\."),
                ([1.0], r"\[1.0\]"),
                ({"value": 1}, "{'value': 1}"),
                (np.arange(1000), r"array\(\[ *0, .*\.\.\..*\)\."),
                (pd.NA, "<NA>"),
            ]
        ),
        *(
            (saving(MlflowMetricHistoryDataset), data, f"Metric 'm' takes {what}, got {shown}")
            for data, what, shown in [
                ({0: 1.0}, "in mode 'list' a list of numbers", "{0: 1.0}"),
                (0.5, "in mode 'list' a list of numbers", "0.5"),
                (np.array(0.5), "in mode 'list' a list of numbers", r"array\(0.5\)"),
                ("high", "in mode 'list' a list of numbers", "'high'"),
                ({1, 2}, "in mode 'list' a list of numbers", "{1, 2}"),
                ([], "in mode 'list' a list of numbers", r"\[\]"),
                (pd.DataFrame({"a": [1]}), "in mode 'list' a list of numbers", "a 0 1"),
                ([1.0, None], "a number", "None"),
                ([[1.0], [2.0]], "a number", r"\[1.0\]"),
            ]
        ),
        *(
            (saving(MlflowMetricHistoryDataset, {"mode": "dict"}), data, message)
            for data, message in [
                ([1.0], r"in mode 'dict' a dictionary {step: value}, got \[1.0\]"),
                ({}, "in mode 'dict' a dictionary {step: value}, got {}"),
                ({"0": 1.0}, "A step of metric 'm' is a whole number, got '0'"),
                ({0.5: 1.0}, "A step of metric 'm' is a whole number, got 0.5"),
                ({2**63: 1.0}, "A step of metric 'm' is a whole number of 64 bits, got 92"),
            ]
        ),
        *(
            (saving(MlflowMetricHistoryDataset, {"mode": "history"}), data, message)
            for data, message in [
                ([1.0], r"in mode 'history' a list of {\"step\": …, \"value\": …}, got 1.0"),
                ({"step": 0, "value": 1}, "a list of .*, got {'step': 0, 'value': 1}"),
                ([{"step": 0}], "a list of .*, got {'step': 0}"),
                ([{"value": 0}], "a list of .*, got {'value': 0}"),
                (
                    [{"step": 0, "value": 1, "timestamp": 0.5}],
                    "A timestamp of metric 'm' is .* milliseconds since 1970, got 0.5",
                ),
                ([{"step": 0, "value": 1, "timestamp": -1}], "A timestamp of metric 'm' .* got -1"),
            ]
        ),
        *(
            (saving(MlflowMetricsDataset), data, message)
            for data, message in [
                (1.0, "MlflowMetricsDataset takes a dictionary {name: number}, got 1.0"),
                ({}, "MlflowMetricsDataset takes a dictionary {name: number}, got {}"),
                ({"m": "high"}, "Metric 'm' takes a number, got 'high'"),
                ({"m": {"a": 1}}, "Metric 'm' takes a number, got {'a': 1}"),
            ]
        ),
        *(
            (saving(MlflowMetricsHistoryDataset), data, message)
            for data, message in [
                ([1.0], r"MlflowMetricsHistoryDataset takes a dictionary .*, got \[1.0\]"),
                ({"m": 3}, "Metric 'm' takes {.*} or a list of them, got 3"),
                ({"m": []}, r"Metric 'm' takes {.*} or a list of them, got \[\]"),
                ({"m": [3]}, "Metric 'm' takes {.*} or a list of them, got 3"),
                ({"m": {"step": 1}}, "Metric 'm' takes {.*} or a list of them, got {'step': 1}"),
                ({"m": {"step": 1, "value": None}}, "Metric 'm' takes a number, got None"),
            ]
        ),
    ],
)
def test_a_wrong_shape_is_told_with_the_metric_and_what_is_right(
    save: Callable[[Any], None], data: Any, message: str
) -> None:
    with pytest.raises(DatasetError, match=message) as raised:
        save(data)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize("name", ["rmse%", "a//b", "a/", "../a", "/a", ".", "é" * 251])
@embedded
def test_a_name_that_mlflow_refuses_is_told_when_it_is_saved(
    client: MlflowClient, name: str
) -> None:
    with pytest.raises(DatasetError, match="MLflow refuses the metric name"):
        MlflowMetricDataset(name).save(1)
    with pytest.raises(DatasetError, match="MLflow refuses the metric name"):
        MlflowMetricsDataset(prefix="").save({"good": 1, name: 1})
    assert client.get_run(run_id()).data.metrics == {}


@embedded
def test_a_name_that_mlflow_takes_is_kept(client: MlflowClient) -> None:
    values = {"é" * 250: 1.0, "a/b": 2.0, "a b.c-d_e:f": 3.0}
    dataset = MlflowMetricsDataset(prefix="")

    dataset.save(values)

    assert dataset.load() == values


def test_a_mode_that_there_is_not_is_told_before_anything_runs() -> None:
    with pytest.raises(
        DatasetError, match=r"`save_args\.mode` is one of overwrite, append, got 'ad"
    ):
        MlflowMetricDataset(save_args={"mode": "add"})
    with pytest.raises(
        DatasetError, match=r"`load_args\.mode` is one of list, dict, history, got 1"
    ):
        MlflowMetricHistoryDataset(load_args={"mode": 1})
    with pytest.raises(DatasetError, match="needs a `key` outside a Kedro run"):
        MlflowMetricDataset().save(1)


# Nodes that save each kind of metric, and one that loads them all in the same run.
PIPELINE = """
from kedro.pipeline import Node, Pipeline, pipeline

POINTS = [{"step": 0, "value": 2.0}, {"step": 0, "value": 1.0}, {"step": -1, "value": 1.0}]

def measure():
    return 0.125, 3, [3.0, 1.0, 1.0], {"a": 1e-300, "b": 2}, {"a": POINTS, "b": POINTS[0]}

def check(one, last, curve, flat, steps):
    assert (one, last, curve, flat) == (0.125, 3, [3.0, 1.0, 1.0], {"a": 1e-300, "b": 2}), curve
    assert steps == {"inner.fit_steps.a": POINTS, "inner.fit_steps.b": POINTS[0]}, steps
    return "right"

def create_pipeline():
    names = ["one_value", "last_value", "fit_curve", "fit_flat", "fit_steps"]
    nodes = [Node(measure, None, names), Node(check, names, "checked")]
    return pipeline(Pipeline(nodes), namespace="inner", outputs="checked")
"""
CATALOG = """
"{namespace}.{name}_value": {type: PACKAGE.runtime.MlflowMetricDataset, metadata: {a: 1}}
"{namespace}.{name}_curve": {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
"{namespace}.{name}_flat": {type: PACKAGE.runtime.MlflowMetricsDataset, prefix: "flat {name}"}
"{namespace}.{name}_steps": {type: PACKAGE.runtime.MlflowMetricsHistoryDataset}
checked: {type: text.TextDataset, filepath: data/08_reporting/checked.txt}
"""


@pytest.mark.parametrize(
    ("runner", "store"),
    [
        ("SequentialRunner", "server"),
        ("ThreadRunner", "sqlite"),
        ("fork", "server"),
        pytest.param("spawn", "server", marks=pytest.mark.thorough),
    ],
)
def test_metrics_of_a_run_are_read_back_in_it_whatever_the_runner(
    new_project: Callable[..., Project], request: pytest.FixtureRequest, runner: str, store: str
) -> None:
    if store == "sqlite":
        project: Project = request.getfixturevalue("project")
    else:
        uri = request.getfixturevalue("server").uri
        project = new_project(tracking_backend="server", tracking_uri=uri)
        project.tracking_uri = uri
    project.pipeline(PIPELINE)
    project.catalog(CATALOG)

    if runner in ("fork", "spawn"):  # how the ParallelRunner starts its workers
        ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=runner)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        project.run(runner=ThreadRunner() if runner == "ThreadRunner" else SequentialRunner())

    assert (project.path / "data/08_reporting/checked.txt").read_text() == "right"
    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = project.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {
        "inner.one_value": 0.125,
        "inner.last_value": 3,
        "inner.fit_curve": 1.0,
        "flat fit.a": 1e-300,
        "flat fit.b": 2,
        "inner.fit_steps.a": 1.0,
        "inner.fit_steps.b": 2.0,
    }


def test_a_pipeline_that_is_not_tracked_logs_no_metric(project: Project) -> None:
    project.pipeline(PIPELINE.replace(", Node(check, names", ", Node(lambda: 'right', None"))
    project.catalog(CATALOG)
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [__default__]}}")

    project.run()

    assert (project.path / "data/08_reporting/checked.txt").read_text() == "right"
    assert project.all_runs() == []


def test_a_history_of_2500_points_is_three_requests(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def measure():
            return [float(i % 7) for i in range(2500)]

        def create_pipeline():
            return Pipeline([Node(measure, None, "curve")])
        """
    )
    project.catalog("curve: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}")
    server.requests.clear()

    project.run()

    assert server.requests.count("POST /api/2.0/mlflow/runs/log-batch") == 3, server.requests
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    dataset = MlflowMetricHistoryDataset("curve", run_id=run.info.run_id)
    mlflow.set_tracking_uri(server.uri)
    assert dataset.load() == [float(i % 7) for i in range(2500)]


def test_what_nodes_yield_is_kept_point_by_point_even_within_a_millisecond(
    project: Project,
) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def appended():
            yield from (3.0, 2.0, 2.0, 2.5)

        def overwritten():
            yield from (float(i) for i in range(100, 0, -1))

        def listed():
            yield [3.0, 1.0]
            yield [1.0, 1.0]
            yield [2.0]

        def check(appended, overwritten, listed):
            return appended, overwritten, listed

        def create_pipeline():
            names = ["appended", "overwritten", "listed"]
            nodes = [Node(globals()[name], None, name) for name in names]
            return Pipeline([*nodes, Node(check, names, "checked")])
        """
    )
    project.catalog(
        """
        appended: {type: PACKAGE.runtime.MlflowMetricDataset, save_args: {mode: append}}
        overwritten: {type: PACKAGE.runtime.MlflowMetricDataset}
        listed: {type: PACKAGE.runtime.MlflowMetricHistoryDataset}
        """
    )

    checked = project.run()["checked"].load()

    assert checked == (2.5, 1.0, [3.0, 1.0, 1.0, 1.0, 2.0])
    run = project.only_run()
    assert run.data.metrics == {"appended": 2.5, "overwritten": 1.0, "listed": 2.0}
    points = {
        key: [(p.step, p.value) for p in project.client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    assert points["appended"] == [(0, 3.0), (1, 2.0), (2, 2.0), (3, 2.5)]
    assert points["overwritten"] == [(0, float(i)) for i in range(100, 0, -1)]
    assert points["listed"] == [(0, 3.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
