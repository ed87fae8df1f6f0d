"""What the runtime uses of MLflow and Kedro that isn't public is there, and does what it should."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import mlflow
import pytest
from kedro.config import OmegaConfigLoader
from kedro.framework.hooks import hook_impl, manager
from kedro.io import AbstractDataset, CachedDataset, DataCatalog, MemoryDataset, Version
from kedro.pipeline import Node, Pipeline
from kedro.runner.task import Task
from kedro_datasets.partitions import PartitionedDataset  # type: ignore[import-untyped]
from kedro_datasets.text import TextDataset  # type: ignore[import-untyped]
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.entities.trace_location import TraceLocation
from mlflow.store.model_registry import sqlalchemy_store as registry_store
from mlflow.store.tracking import sqlalchemy_store as tracking_store
from mlflow.tracing import client as tracing_client
from mlflow.tracing import provider
from mlflow.tracking import fluent
from mlflow.tracking.request_header import registry
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider
from mlflow.utils.autologging_utils import client as autologging_client
from mlflow.utils.autologging_utils import metrics_queue
from s3fs import S3FileSystem  # type: ignore[import-untyped]
from sqlalchemy import create_engine

from runtime import _kedro, _mlflow
from runtime.offline import _mlflow as mlflow_of_offline
from runtime.serving import _kedro as kedro_of_serving
from runtime.stores.embedded import part_when_forked

from ..conftest import REPOSITORY
from ..support.projects import has
from ..support.s3 import S3


def check(holder: Any, *names: str) -> None:
    """Say in a sentence that something isn't there any more."""
    where = getattr(holder, "__name__", holder)
    for name in names:
        assert hasattr(holder, name), f"{where} has no {name} any more: find another way to it"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A store of its own, which `mlflow.…` is pointed at."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path.as_posix()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri, uri)


def test_active_runs(store: MlflowClient) -> None:
    check(fluent, "_active_run_stack")

    with mlflow.start_run() as run:
        (entered,) = _mlflow.active_runs()
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(_mlflow.active_runs).result()
        _mlflow.active_runs().pop()
        left = mlflow.active_run()
        _mlflow.active_runs().append(entered)
        again = mlflow.active_run()

    assert (entered, elsewhere, left, again) == (run, [], None, run)
    assert store.get_run(run.info.run_id).info.status == "FINISHED"


def test_set_active_experiment(store: MlflowClient) -> None:
    check(fluent, "_active_experiment_id")
    experiment = store.create_experiment("penguins")

    _mlflow.set_active_experiment(experiment)
    with mlflow.start_run() as inside:
        pass
    _mlflow.set_active_experiment(None)
    with mlflow.start_run() as outside:
        pass

    assert (inside.info.experiment_id, outside.info.experiment_id) == (experiment, "0")
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ


def test_exchange_active_model(store: MlflowClient) -> None:
    check(fluent, "_ACTIVE_MODEL_CONTEXT", "ActiveModelContext")
    model = store.create_logged_model("0", "classifier").model_id

    before = _mlflow.exchange_active_model(model)
    inside = mlflow.get_active_model_id()
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(mlflow.get_active_model_id).result()
    _mlflow.restore_active_model(before)

    assert (inside, elsewhere, mlflow.get_active_model_id()) == (model, None, None)


def test_restore_active_model() -> None:
    outer = _mlflow.exchange_active_model("m-1")
    inner = _mlflow.exchange_active_model(None)
    without = mlflow.get_active_model_id()
    _mlflow.restore_active_model(inner)
    again = mlflow.get_active_model_id()
    _mlflow.restore_active_model(outer)

    assert (without, again, mlflow.get_active_model_id()) == (None, "m-1", None)


@pytest.mark.skipif(not has("mlflow", "3.10"), reason="MLflow puts them where it is used")
def test_artifact_root_variable(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    files = (tmp_path / "files").as_uri()

    for name, value in _mlflow.artifact_root_variable(files).items():
        monkeypatch.setenv(name, str(value))
    client = MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    location = client.get_experiment(client.create_experiment("penguins")).artifact_location

    assert location.startswith(files), "MLflow has another name for _MLFLOW_SERVER_ARTIFACT_ROOT"


def test_engines(store: MlflowClient, tmp_path: Path) -> None:
    check(tracking_store.SqlAlchemyStore, "_engine_map")
    check(registry_store.SqlAlchemyStore, "_engine_map")

    store.search_experiments()
    store.search_registered_models()

    files = [engine.url.database for engine in _mlflow.engines()]
    assert files.count(str(tmp_path / "mlflow.db")) == 2


def test_a_forked_process_parts_with_the_engines_of_mlflow_and_no_others(
    store: MlflowClient, tmp_path: Path
) -> None:
    sqlite3.connect(tmp_path / "other.db").close()
    other = create_engine(f"sqlite:///{tmp_path.as_posix()}/other.db")
    other.connect().close()
    part_when_forked()
    store.search_experiments()
    engines = [*_mlflow.engines(), other]
    before = [engine.pool for engine in engines]

    def kept(found: Any) -> None:
        found.put([engine.pool is pool for engine, pool in zip(engines, before, strict=True)])

    context = get_context("fork")
    found = context.SimpleQueue()
    child = context.Process(target=kept, args=(found,))
    child.start()
    *of_mlflow, of_others = found.get()
    child.join()

    assert of_mlflow
    assert not any(of_mlflow)
    assert of_others
    assert [engine.pool for engine in engines] == before


class Provider(RequestHeaderProvider):
    def in_context(self) -> bool:
        return True

    def request_headers(self) -> dict[str, str]:
        return {"X-Team": "penguins"}


def test_register_header_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    check(registry, "_request_header_provider_registry")
    known = registry._request_header_provider_registry
    monkeypatch.setattr(known, "_registry", known._registry[:])

    _mlflow.register_header_provider(Provider())

    assert registry.resolve_request_headers()["X-Team"] == "penguins"


def test_renew_autologging_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [
        (autologging_client, "_AUTOLOGGING_QUEUEING_CLIENT_THREAD_POOL"),
        (metrics_queue, "_thread_pool"),
    ]
    before = []
    for module, name in pools:
        check(module, name)
        check(getattr(module, name), "_max_workers")
        before.append(getattr(module, name))
        monkeypatch.setattr(module, name, getattr(module, name))

    _mlflow.renew_autologging_threads()

    after = [getattr(module, name) for module, name in pools]
    for old, new in zip(before, after, strict=True):
        assert new is not old
        assert new._max_workers == old._max_workers
        with new:
            assert new.submit(int, "7").result() == 7


def test_renew_trace_queue(store: MlflowClient) -> None:
    check(provider, "_get_trace_exporter")
    with mlflow.start_span("before"):
        pass
    mlflow.flush_trace_async_logging()
    exporter = provider._get_trace_exporter()
    check(exporter, "_async_queue")
    before = exporter._async_queue

    _mlflow.renew_trace_queue()
    with mlflow.start_span("after"):
        pass
    mlflow.flush_trace_async_logging()

    assert exporter._async_queue is not before
    assert len(store.search_traces(locations=["0"])) == 2


def test_use_globals_of(tmp_path: Path) -> None:
    check(OmegaConfigLoader, "_register_globals_resolver")
    loaders = []
    for name in ("first", "second"):
        base = tmp_path / name / "base"
        base.mkdir(parents=True)
        (base / "globals.yml").write_text(f"name: {name}")
        (base / "parameters.yml").write_text("name: ${globals:name}")
        loaders.append(OmegaConfigLoader(str(base.parent), base_env="base", default_run_env="base"))

    found = []
    for loader in loaders:
        _kedro.use_globals_of(loader)
        found.append(loader["parameters"]["name"])

    assert found == ["first", "second"]


def test_configuration_folder(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "conf" / "base"
    base.mkdir(parents=True)
    (base / "mlflow.yml").write_text("ui: {port: 5000}")
    archive = shutil.make_archive(str(tmp_path / "archive"), "gztar", tmp_path, "conf")
    S3FileSystem(**s3.credentials).put(
        str(base / "mlflow.yml"), f"{s3.bucket}/conf/base/mlflow.yml"
    )
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    found = []
    for source in ("conf", archive, f"s3://{s3.bucket}/conf/"):
        loader = OmegaConfigLoader(source, base_env="base", default_run_env="base")
        check(loader, "_fs", *["_remote_root_path"] * source.startswith("s3:"))
        file_system, path, address = _kedro.configuration_folder(loader)
        assert file_system.cat_file(f"{path}/base/mlflow.yml") == b"ui: {port: 5000}"
        found.append((path, address))
    S3FileSystem.clear_instance_cache()  # others have another address

    folder = base.parent.as_posix()
    assert found == [
        (folder, folder),
        ("conf", f"{archive}/conf"),
        (f"{s3.bucket}/conf", f"s3://{s3.bucket}/conf"),
    ]


class Hooks:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    @hook_impl
    def before_dataset_loaded(self, dataset_name: str) -> None:
        self.loaded.append(dataset_name)


def test_hook_manager() -> None:
    check(manager, "_create_hook_manager", "_register_hooks", "_register_hooks_entry_points")
    hooks = Hooks()

    made = _kedro.hook_manager([hooks], ["kedro-telemetry"])
    made.hook.before_dataset_loaded(dataset_name="penguins", node=None)

    assert hooks.loaded == ["penguins"]
    plugins = [type(plugin).__module__ for plugin in made.get_plugins()]
    assert "kedro_telemetry.plugin" not in plugins


class Gathering(AbstractDataset[str, str]):
    """A dataset that takes any arguments."""

    def __init__(self, filepath: str, **options: Any) -> None:
        self.place, self.options = filepath, options

    def load(self) -> str:
        return ""

    def save(self, data: str) -> None:
        pass

    def _describe(self) -> dict[str, Any]:
        return {}


class Inheriting(Gathering):
    """One that inherits its `__init__`, whose arguments Kedro keeps in another way."""

    def load(self) -> str:
        return "inherited"


def same(x: Any) -> Any:
    return x


def test_part_that_runs(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    nodes = [Node(same, "x", "a", name="a"), Node(same, "x", "b", name="b")]
    files = {name: TextDataset(filepath=(tmp_path / name).as_posix()) for name in "ab"}
    catalog = DataCatalog({"x": MemoryDataset(1), **files})

    part = _kedro.part_that_runs(Pipeline(nodes), catalog)
    (tmp_path / "b").touch()
    nothing = _kedro.part_that_runs(Pipeline(nodes), catalog)

    assert [node.name for node in part.nodes] == ["b"]
    assert nothing.nodes == []


def test_uncached() -> None:
    inside = MemoryDataset(1)
    cached = CachedDataset(inside)
    check(cached, "_dataset")
    assert _kedro.uncached(cached) is inside
    assert _kedro.uncached(inside) is inside
    assert _kedro.uncached(None) is None


@pytest.mark.parametrize("kind", [Gathering, Inheriting])
def test_arguments_of(kind: type[Gathering]) -> None:
    dataset = kind(filepath="a", encoding="utf-8")
    check(dataset, "_init_args")
    assert _kedro.arguments_of(dataset) == {"filepath": "a", "encoding": "utf-8"}


def test_path_of(tmp_path: Path) -> None:
    file, folder = TextDataset(filepath="/a/b.txt"), partitioned(tmp_path)
    check(file, "_filepath")
    check(folder, "_path")
    assert _kedro.path_of(file) == "/a/b.txt"
    assert _kedro.path_of(folder) == str(tmp_path)
    assert _kedro.path_of(Inheriting(filepath="c.txt")) == "c.txt"
    assert _kedro.path_of(MemoryDataset()) is None


def test_file_system_of(tmp_path: Path) -> None:
    file, folder = TextDataset(filepath="memory://a.txt"), partitioned(tmp_path)
    check(file, "_fs")
    check(folder, "_filesystem")
    assert _kedro.file_system_of(file) is fsspec.filesystem("memory")
    assert _kedro.file_system_of(folder) is fsspec.filesystem("file")
    assert _kedro.file_system_of(MemoryDataset()) is None


def test_version_of() -> None:
    dataset = TextDataset(filepath="a.txt", version=Version("1", "2"))
    check(dataset, "_version")
    assert _kedro.version_of(dataset) == Version("1", "2")
    assert _kedro.version_of(MemoryDataset()) is None


def test_set_version() -> None:
    dataset, without = TextDataset(filepath="a.txt", version=Version("1", "2")), MemoryDataset()
    _kedro.set_version(dataset, Version("3", "4"))
    _kedro.set_version(without, Version("3", "4"))
    assert (dataset.resolve_load_version(), dataset.resolve_save_version()) == ("3", "4")
    assert _kedro.version_of(without) is None


def test_is_partitioned(tmp_path: Path) -> None:
    check(PartitionedDataset, "_partition_to_path")
    assert _kedro.is_partitioned(partitioned(tmp_path))
    assert not _kedro.is_partitioned(MemoryDataset())


def test_partition_of(tmp_path: Path) -> None:
    dataset = partitioned(tmp_path)
    check(dataset, "_partition_to_path", "_dataset_config")
    assert _kedro.partition_of(dataset, "a/b") == ((tmp_path / "a" / "b.txt").as_posix(), None)
    path, version = _kedro.partition_of(partitioned(tmp_path, versioned=True), "a")
    assert path == (tmp_path / "a.txt").as_posix()
    assert version


def partitioned(folder: Path, **more: Any) -> Any:
    kind = {"type": TextDataset, **more}
    return PartitionedDataset(path=str(folder), dataset=kind, filename_suffix=".txt")


def test_default_experiment_id(monkeypatch: pytest.MonkeyPatch) -> None:
    check(fluent, "_get_experiment_id", "_active_experiment_id")
    monkeypatch.setattr(fluent, "_active_experiment_id", "7")
    assert _mlflow.default_experiment_id() == "7"


def test_write_trace(store: MlflowClient, tmp_path: Path, empty_store: Path) -> None:
    check(tracing_client.TracingClient, "start_trace", "log_spans")
    experiment = store.create_experiment("penguins")
    mlflow.set_experiment(experiment_id=experiment)
    with mlflow.start_span("count") as span:
        span.set_inputs({"x": 1})
    (trace,) = store.search_traces(locations=[experiment], flush=True)
    (tmp_path / "other").mkdir()
    shutil.copy(empty_store, tmp_path / "other")
    uri = f"sqlite:///{tmp_path.as_posix()}/other/mlflow.db"
    other = MlflowClient(uri, uri)
    there = other.create_experiment("penguins")
    info = replace(trace.info, trace_location=TraceLocation.from_experiment_id(there))

    for _ in range(2):
        mlflow_of_offline.write_trace(uri, info, trace)

    (written,) = other.search_traces(locations=[there])
    assert written.info.trace_id == trace.info.trace_id
    assert [span.name for span in written.data.spans] == ["count"]
    assert written.data.spans[0].inputs == {"x": 1}


def test_delete_for_good(store: MlflowClient) -> None:
    check(tracking_store.SqlAlchemyStore, "_hard_delete_run", "_hard_delete_logged_model")
    experiment = store.create_experiment("penguins")
    runs = [store.create_run(experiment).info.run_id for _ in range(2)]
    models = [store.create_logged_model(experiment, source_run_id=run).model_id for run in runs]

    mlflow_of_offline.delete_for_good(store.tracking_uri, runs[:1], models[:1])

    left = store.search_runs([experiment], run_view_type=ViewType.ALL)
    assert [run.info.run_id for run in left] == runs[1:]
    assert [model.model_id for model in store.search_logged_models([experiment])] == models[1:]


def test_without_confirms() -> None:
    node = Node(in_a_process, {"code": "a"}, None, name="it", confirms="a")

    assert hasattr(Node, "_copy"), "Kedro's Node has no _copy: how is one made without `confirms`?"
    assert kedro_of_serving.without_confirms(node).confirms == []
    assert str(kedro_of_serving.without_confirms(node)) == str(node)


def test_keep_hooks_out() -> None:
    name = "_run_node_synchronization"
    assert hasattr(Task, name), f"Kedro's Task has no {name}: where do its workers get hooks?"
    in_a_process(  # nothing takes it back
        "from kedro.runner.task import Task\nfrom runtime.serving._kedro import keep_hooks_out\n"
        "keep_hooks_out()\n"
        "assert not Task._run_node_synchronization('a', {}).hook.before_node_run(node=1)"
    )


def test_skip_type_hint_validation() -> None:
    told = in_a_process("import runtime.serving.pipeline_model")

    assert "type hint" not in told, "MLflow's PythonModel has no _skip_type_hint_validation"


def in_a_process(code: str) -> str:
    """Run code in a process of its own; gives what it says, warnings included."""
    words = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr
