"""Tables among a run's artifacts, and the table of past runs, as datasets."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from pandas.testing import assert_frame_equal

from runtime import MlflowRunsDataset, MlflowTableDataset
from runtime.datasets import tables

from ...support.projects import Project
from ...support.servers import CountingProxy


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
    client = MlflowClient(uri)
    location = (tmp_path / "artifacts").as_uri() if request.param == "sqlite" else None
    mlflow.set_experiment(experiment_id=client.create_experiment(tmp_path.name, location))
    with mlflow.start_run():
        yield client
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    fluent._active_experiment_id = None
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


embedded = pytest.mark.parametrize("client", ["sqlite"], indirect=True)


def active() -> mlflow.ActiveRun:
    run = mlflow.active_run()
    assert run
    return run


def run_id() -> str:
    return str(active().info.run_id)


EACH_CLASS = pytest.mark.parametrize(
    "dataset",
    [
        MlflowTableDataset("t.json", save_args={"mode": "append"}, metadata={"a": 1}),
        MlflowRunsDataset("metrics.rmse < 1", "metrics.rmse", limit=3, metadata={"a": 1}),
    ],
    ids=lambda dataset: type(dataset).__name__,
)


@EACH_CLASS
def test_a_dataset_pickles_deep_copies_and_describes_itself_without_metadata(dataset: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert str(twin) == str(dataset)
        assert twin.metadata == {"a": 1}
    assert not [word for word in ("metadata", "None", "0x") if word in str(dataset)]
    config = dataset._init_config()  # what `catalog.to_config()` gives
    kind = config.pop("type").rpartition(".")[2]
    assert kind == type(dataset).__name__
    assert str(type(dataset)(**config)) == str(dataset)


# --- tables of a run


TABLE = pd.DataFrame(
    {
        "text": ["007", "2024-01-01", 'ü "quoted"'],
        "date": ["2024-01-01", "x", "y"],
        "number": [1e-10, 0.1, 123456789.25],
        "count": [2**60, 0, -1],
        "flag": [True, False, True],
        "gap": [1.5, None, 3.0],
    }
)


@pytest.mark.parametrize("file", ["table.json", "deep/er/table.json", "table.parquet"])
def test_a_table_loads_as_it_was_saved_and_mlflow_loads_it_too(
    client: MlflowClient, file: str
) -> None:
    dataset = MlflowTableDataset(file)
    assert not dataset.exists()

    dataset.save(TABLE)

    assert dataset.exists()
    assert_frame_equal(dataset.load(), TABLE)
    assert Path(client.download_artifacts(run_id(), file)).is_file()
    by_mlflow = mlflow.load_table(file, run_ids=[run_id()])
    assert by_mlflow["count"].tolist() == [2**60, 0, -1]


@embedded
def test_parquet_keeps_types_that_json_does_not(client: MlflowClient) -> None:
    typed = pd.DataFrame(
        {
            "time": pd.to_datetime(["2024-01-01T00:00:00.123456Z"]),
            "kind": pd.Categorical(["a"]),
            "infinite": [float("inf")],
            "third": [1 / 3],
            "list": [np.array([1.0, 2.0])],
        }
    )
    in_parquet, in_json = MlflowTableDataset("t.parquet"), MlflowTableDataset("t.json")

    in_parquet.save(typed)
    in_json.save(typed)

    assert_frame_equal(in_parquet.load(), typed)
    (row,) = in_json.load().to_dict("records")
    assert row.pop("time").startswith("2024-01-01T00:00:00.123")
    assert row.pop("third") == 0.3333333333
    assert row == {"kind": "a", "infinite": None, "list": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ({"a": [1, 2], "b": ["x", "y"]}, [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        ({"a": 1, "b": "x"}, [{"a": 1, "b": "x"}]),
        ({"a": np.array([1, 2]), "b": "x"}, [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]),
        (pd.DataFrame({"a": [1, 2]}, index=["x", "y"]), [{"a": 1}, {"a": 2}]),
    ],
    ids=["lists", "one row", "array and scalar", "index"],
)
@embedded
def test_a_table_may_be_a_dictionary(client: MlflowClient, data: Any, rows: Any) -> None:
    dataset = MlflowTableDataset("t.json")

    dataset.save(data)

    assert dataset.load().to_dict("records") == rows


@embedded
def test_an_empty_table_keeps_its_columns(client: MlflowClient) -> None:
    dataset = MlflowTableDataset("t.json")

    dataset.save(pd.DataFrame({"a": [], "b": []}))

    assert dataset.load().empty
    assert list(dataset.load()) == ["a", "b"]


def test_a_table_saved_again_is_replaced_or_gets_more_rows(client: MlflowClient) -> None:
    first, second = pd.DataFrame({"a": ["one"]}), pd.DataFrame({"a": ["02"]})
    replaced = MlflowTableDataset("replaced.json")
    appended = MlflowTableDataset("deep/appended.json", save_args={"mode": "append"})
    for table in (first, second):
        replaced.save(table)
        appended.save(table)

    assert replaced.load()["a"].tolist() == ["02"]
    assert appended.load()["a"].tolist() == ["one", "02"]
    listed = client.get_run(run_id()).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(listed) == [
        {"path": path, "type": "table"} for path in ("replaced.json", "deep/appended.json")
    ]


@embedded
def test_rows_can_be_appended_to_what_mlflow_has_logged(client: MlflowClient) -> None:
    mlflow.log_table({"a": [1]}, "t.json")

    dataset = MlflowTableDataset("t.json", save_args={"mode": "append"})
    dataset.save({"a": [2]})

    assert dataset.load()["a"].tolist() == [1, 2]
    assert mlflow.load_table("t.json", [run_id()])["a"].tolist() == [1, 2]


def test_images_in_a_table_become_files_beside_it(client: MlflowClient) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("RGB", (4, 2))
    table = pd.DataFrame({"n": [1, 2], "image": [image, mlflow.Image(np.zeros((2, 2, 3)))]})
    dataset = MlflowTableDataset("shown/t.json")

    dataset.save(table)

    assert table["image"][0] is image
    cells = dataset.load()["image"].tolist()
    assert [cell["type"] for cell in cells] == ["image", "image"]
    files = {f.path for f in client.list_artifacts(run_id(), "table_images/shown/t")}
    paths = {cell[key] for cell in cells for key in ("filepath", "compressed_filepath")}
    assert files == paths
    assert len(files) == 4
    with pytest.raises(
        DatasetError, match="Column `image` contains a mix of images and non-images"
    ):
        dataset.save({"image": [image, 1]})


def test_a_run_that_has_no_such_table_is_named(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match=rf"^The run {run_id()} has no artifact 'a/t\.json'\.$"):
        MlflowTableDataset("a/t.json").load()


def test_wrong_use_of_a_table_is_told() -> None:
    for file in ("t.csv", "table"):
        with pytest.raises(DatasetError, match=rf"ends in \.json or \.parquet, got '{file}'"):
            MlflowTableDataset(file)
    for file in ("a:b.json", "/t.json", "../t.json"):
        with pytest.raises(
            DatasetError, match=f"a path inside the run's artifacts .* got '{file}'"
        ):
            MlflowTableDataset(file)
    with pytest.raises(DatasetError, match=r"`save_args\.mode` is one of .*, got 'add'"):
        MlflowTableDataset(save_args={"mode": "add"})
    with pytest.raises(DatasetError, match="takes a DataFrame or a dictionary of lists, got list"):
        MlflowTableDataset("t.json").save([1])
    with pytest.raises(DatasetError, match="needs an `artifact_file` outside a Kedro run"):
        MlflowTableDataset().save({"a": [1]})
    with pytest.raises(DatasetError, match="has no run to use"):
        MlflowTableDataset("t.json").save({"a": [1]})
    assert not MlflowTableDataset("t.json").exists()


def test_tables_saved_at_once_are_all_on_the_runs_list(client: MlflowClient) -> None:
    files = [f"t{i}.json" for i in range(8)]
    given = run_id()

    with ThreadPoolExecutor(8) as threads:
        for saved in [
            threads.submit(MlflowTableDataset(file, run_id=given).save, {"a": [1]})
            for file in files
        ]:
            saved.result()

    listed = json.loads(client.get_run(given).data.tags["mlflow.loggedArtifacts"])
    assert sorted(entry["path"] for entry in listed) == files


@embedded
def test_a_table_that_has_no_place_in_mlflows_list_is_saved_all_the_same(
    client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    listed = json.dumps([{"path": f"{i:064}.json", "type": "table"} for i in range(80)])
    client.set_tag(run_id(), "mlflow.loggedArtifacts", listed)
    dataset = MlflowTableDataset("one-more-with-a-long-enough-name-to-be-too-much-for-it.json")

    for number in range(2):
        dataset.save({"a": [number]})

    assert dataset.load()["a"].tolist() == [1]
    assert "list of tables is full" in caplog.text


# --- past runs


def log_runs(client: MlflowClient, experiment_id: str) -> list[str]:
    """Make three runs that have ended, the oldest first."""
    made = []
    for number in range(3):
        run = client.create_run(
            experiment_id, start_time=1000 * (number + 1), run_name=f"r{number}"
        )
        client.log_metric(run.info.run_id, "rmse", 3 - number)
        client.log_param(run.info.run_id, "seed", number)
        if number == 1:
            client.log_metric(run.info.run_id, "only", 0.5)
            client.set_tag(run.info.run_id, "note", "ü")
        client.set_terminated(run.info.run_id, end_time=9000)
        made.append(run.info.run_id)
    return made


def test_past_runs_are_a_table_like_mlflows_without_the_run_that_loads_it(
    client: MlflowClient,
) -> None:
    made = log_runs(client, active().info.experiment_id)

    found = MlflowRunsDataset().load()

    assert found["run_id"].tolist() == made[::-1]
    assert found["run_name"].tolist() == ["r2", "r1", "r0"]
    expected = mlflow.search_runs().drop(0).reset_index(drop=True)  # the open run comes first
    assert set(found) - set(expected) == {"run_name"}
    missing = set(expected) - set(found)  # tags of the open run
    assert all(column.startswith("tags.") for column in missing)
    shared = [column for column in found if column in expected]
    assert found[shared].to_json(date_format="iso") == expected[shared].to_json(date_format="iso")
    assert str(found["start_time"].dt.tz) == str(found["end_time"].dt.tz) == "UTC"
    assert MlflowRunsDataset().exists()


@embedded
def test_past_runs_are_filtered_ordered_and_limited(client: MlflowClient) -> None:
    made = log_runs(client, active().info.experiment_id)

    def found(**how: Any) -> list[str]:
        return list(MlflowRunsDataset(**how).load()["run_id"])

    assert found(order_by="metrics.rmse ASC", limit=2) == [made[2], made[1]]
    assert found(order_by=["params.seed DESC"], filter="metrics.rmse > 1") == [made[1], made[0]]
    assert found(filter="params.seed = '0' and metrics.rmse = 3") == [made[0]]
    assert found(limit=1, include_current=True) == [run_id()]
    client.delete_run(made[0])
    assert found() == made[:0:-1]
    with pytest.raises(DatasetError, match="Invalid"):
        found(filter="rmse is low")


@embedded
def test_columns_are_those_asked_for_and_empty_where_no_run_has_one(client: MlflowClient) -> None:
    log_runs(client, active().info.experiment_id)
    columns = ["tags.note", "metrics.only", "run_name", "params.none", "metrics.none", "end_time"]

    found = MlflowRunsDataset(columns=columns).load()

    assert list(found) == columns
    assert found["tags.note"].fillna("").tolist() == ["", "ü", ""]
    assert found["metrics.only"].tolist() == pytest.approx([np.nan, 0.5, np.nan], nan_ok=True)
    assert found["params.none"].isna().all()
    assert found["metrics.none"].isna().all()

    none = MlflowRunsDataset(columns=columns, filter="metrics.rmse < 0").load()
    assert none.empty
    assert list(none) == columns
    assert str(none["end_time"].dt.tz) == "UTC"


@embedded
def test_no_past_run_is_an_empty_table_with_its_columns(client: MlflowClient) -> None:
    none = MlflowRunsDataset().load()

    assert none.empty
    assert list(none) == [
        "run_id",
        "experiment_id",
        "run_name",
        "status",
        "artifact_uri",
        "start_time",
        "end_time",
    ]
    assert str(none["start_time"].dt.tz) == str(none["end_time"].dt.tz) == "UTC"


@embedded
def test_experiments_are_found_by_name(client: MlflowClient) -> None:
    for name in ("one", "two"):
        log_runs(client, client.create_experiment(name))

    assert len(MlflowRunsDataset(experiment_names="one").load()) == 3
    assert len(MlflowRunsDataset(experiment_names=["one", "two"]).load()) == 6
    with pytest.raises(DatasetError, match="`experiment_names`: there is no experiment 'three'"):
        MlflowRunsDataset(experiment_names=["one", "three"]).load()


@pytest.mark.parametrize(("limit", "pages"), [(None, 2), (3, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("client", ["server"], indirect=True)
def test_runs_are_asked_for_by_the_page(
    client: MlflowClient,
    server: CountingProxy,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    pages: int,
) -> None:
    made = log_runs(client, active().info.experiment_id)
    monkeypatch.setattr(tables, "PAGE", 2)
    server.requests.clear()

    found = MlflowRunsDataset(limit=limit).load()

    assert found["run_id"].tolist() == made[::-1][:limit]
    assert server.requests == ["POST /api/2.0/mlflow/runs/search"] * pages


def test_wrong_use_of_past_runs_is_told() -> None:
    with pytest.raises(DatasetError, match="`limit` is a number of runs from 1, got 0"):
        MlflowRunsDataset(limit=0)
    with pytest.raises(DatasetError, match=r"`columns` are among run_id, .*, got 'rmse'"):
        MlflowRunsDataset(columns=["rmse"])
    with pytest.raises(DatasetError, match="`experiment_names` is a list of texts, got 3 in it"):
        MlflowRunsDataset(experiment_names=[3])  # type: ignore[list-item]
    with pytest.raises(DatasetError, match="only loads"):
        MlflowRunsDataset().save(1)


# --- in a pipeline


PIPELINE = """
import pandas as pd
from kedro.pipeline import Node, Pipeline, pipeline

def make():
    return pd.DataFrame({"a": ["01", "02"]}), {"a": [1.5]}, 0.5

def check(scores, errors, past):
    assert scores["a"].tolist() == ["01", "02"], scores
    assert errors["a"].tolist() == [1.5], errors
    return str(past.to_dict("list"))

def more():
    return {"a": [1]}

def create_pipeline():
    nodes = [
        *(Node(more, None, f"more{i}_table", name=f"more{i}") for i in range(4)),
        Node(make, None, ["scores_table", "errors_table", "rmse"]),
        Node(check, ["scores_table", "errors_table", "past"], "checked"),
    ]
    return pipeline(Pipeline(nodes), namespace="inner", inputs="past", outputs="checked")
"""
CATALOG = """
"{namespace}.{name}_table": {type: PACKAGE.runtime.MlflowTableDataset, metadata: {a: 1}}
"{namespace}.rmse": {type: PACKAGE.runtime.MlflowMetricDataset}
past:
  type: PACKAGE.runtime.MlflowRunsDataset
  columns: [status, metrics.inner.rmse]
  limit: 10
checked: {type: text.TextDataset, filepath: data/08_reporting/checked.txt}
"""


@pytest.mark.parametrize(
    ("runner", "store"),
    [
        ("SequentialRunner", "server"),
        ("ThreadRunner", "sqlite"),
        ("fork", "sqlite"),
        pytest.param("spawn", "sqlite", marks=pytest.mark.thorough),
    ],
)
def test_tables_and_past_runs_in_a_pipeline_whatever_the_runner(
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

    project.run(runner=ThreadRunner() if runner == "ThreadRunner" else SequentialRunner())
    if runner in ("fork", "spawn"):  # how the ParallelRunner starts its workers
        ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=runner)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        project.run(runner=ThreadRunner() if runner == "ThreadRunner" else SequentialRunner())

    checked = (project.path / "data/08_reporting/checked.txt").read_text()
    assert checked == "{'status': ['FINISHED'], 'metrics.inner.rmse': [0.5]}"
    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    for run in project.client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED"
        names = ("errors", "more0", "more1", "more2", "more3", "scores")
        files = [f"inner.{name}_table.json" for name in names]
        logged = [artifact.path for artifact in project.client.list_artifacts(run.info.run_id)]
        assert sorted(path for path in logged if path.endswith("_table.json")) == files
        listed = json.loads(run.data.tags["mlflow.loggedArtifacts"])
        # MLflow's list may lack a table that two processes saved at once.
        assert {entry["path"] for entry in listed} <= set(files)
        assert len(listed) == len(files) or runner in ("fork", "spawn")


def test_a_pipeline_that_is_not_tracked_logs_no_table_and_may_name_an_experiment(
    project: Project,
) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def make():
            return {"a": [1]}

        def create_pipeline():
            return Pipeline([
                Node(make, None, "inner.made_table"),
                Node(lambda past: str(past), "past", "checked"),
            ])
        """
    )
    project.catalog(CATALOG)
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [__default__]}}")

    with pytest.raises(DatasetError, match="needs `experiment_names` in a pipeline that isn't"):
        project.run()
    project.catalog(CATALOG.replace("limit: 10", "experiment_names: Default"))
    project.run()

    checked = (project.path / "data/08_reporting/checked.txt").read_text()
    assert checked.startswith("Empty DataFrame\nColumns: [status, metrics.inner.rmse]")
    assert project.all_runs() == []


def test_what_a_node_yields_is_one_table(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def make():
            for number in range(3):
                yield {"a": [f"00{number}"]}

        def create_pipeline():
            return Pipeline([
                Node(make, None, "inner.made_table"),
                Node(lambda table: table["a"].tolist(), "inner.made_table", "read"),
            ])
        """
    )
    project.catalog(CATALOG)

    for _ in range(2):
        assert project.run()["read"].load() == ["000", "001", "002"]


def test_a_table_takes_few_requests(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    MlflowClient(server.uri).create_experiment(project.package)
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def create_pipeline():
            return Pipeline([Node(lambda: {"a": [1]}, None, "inner.made_table")])
        """
    )
    project.catalog(CATALOG)
    server.requests.clear()

    project.run()

    assert len(server.requests) <= 4 + 8, server.requests  # those of a run, and of a table
