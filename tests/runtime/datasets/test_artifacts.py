"""Any dataset as an artifact of a run: on a SQLite store, through a server, from any runner."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec  # type: ignore[import-untyped]
import matplotlib.pyplot as plt
import mlflow
import pandas as pd
import pytest
import yaml
from kedro.io import (
    AbstractDataset,
    AbstractVersionedDataset,
    CachedDataset,
    DataCatalog,
    DatasetError,
)
from kedro.io.core import Version
from kedro.runner import ThreadRunner
from kedro_datasets.partitions import PartitionedDataset  # type: ignore[import-untyped]
from kedro_datasets.text import TextDataset  # type: ignore[import-untyped]
from mlflow import MlflowClient
from mlflow.entities import Run

from runtime import MlflowArtifactDataset

from ...support.projects import Project, has
from ...support.s3 import S3
from ...support.servers import CountingProxy


class Note(AbstractDataset[str, str]):
    """A user's own dataset, with nothing that Kedro's have but `load` and `save`."""

    def __init__(self, filepath: str) -> None:
        self.place = Path(filepath)

    def load(self) -> str:
        return self.place.read_text()

    def save(self, data: str) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self.place.write_text(data)

    def _exists(self) -> bool:
        return self.place.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self.place)}


class OldNote(Note):
    """The same as it was written for older Kedros, with a path that it keeps privately."""

    _SINGLE_PROCESS = True

    def __init__(self, filepath: str) -> None:
        self._filepath = PurePosixPath(filepath)
        self.place = Path(filepath)

    def _load(self) -> str:
        return f"read {self.place.read_text()}"

    def _save(self, data: str) -> None:
        Note.save.__wrapped__(self, data)  # type: ignore[attr-defined]


class Pages(Note):
    """A dataset whose file is a folder."""

    def load(self) -> str:
        return "".join(page.read_text() for page in sorted(self.place.iterdir()))

    def save(self, data: str) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for number, page in enumerate(data):
            (self.place / f"{number}.txt").write_text(page)


class Placeless(AbstractDataset[str, str]):
    """A dataset that tells nobody where its file is."""

    def __init__(self, where: str) -> None:
        self._filepath = Path(where)

    def load(self) -> str:
        return self._filepath.read_text()

    def save(self, data: str) -> None:
        self._filepath.write_text(data)

    def _describe(self) -> dict[str, Any]:
        return {}


class Elsewhere(Note):
    """A dataset that saves to another place than it says."""

    def save(self, data: str) -> None:
        pass


@pytest.fixture
def client(project: Project) -> Iterator[MlflowClient]:
    """A client, with a run open as in a notebook."""
    mlflow.set_tracking_uri(project.tracking_uri)
    mlflow.set_experiment(
        experiment_id=project.client.create_experiment(
            "artifacts", artifact_location=(project.path / "mlartifacts").as_uri()
        )
    )
    with mlflow.start_run():
        yield project.client


def run_id() -> str:
    run = mlflow.active_run()
    assert run
    return str(run.info.run_id)


def other_run() -> str:
    """Make another run in the same experiment."""
    run = mlflow.active_run()
    assert run
    return str(MlflowClient().create_run(run.info.experiment_id).info.run_id)


def artifacts(client: MlflowClient, run: str) -> dict[str, str]:
    """Give the text of every artifact of a run."""
    with tempfile.TemporaryDirectory() as folder:
        if not client.list_artifacts(run):
            return {}
        local = Path(client.download_artifacts(run, "", folder))
        files = (file for file in local.rglob("*") if file.is_file())
        return {f.relative_to(local).as_posix(): f.read_text(errors="replace") for f in files}


def note(folder: Path, **more: Any) -> dict[str, Any]:
    return {"type": "text.TextDataset", "filepath": str(folder / "note.txt"), **more}


def parts(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "type": "partitions.PartitionedDataset",
        "path": str(folder / "parts"),
        "filename_suffix": ".txt",
        "dataset": "text.TextDataset",
        **more,
    }


# Each way to wrap a file.


@pytest.mark.parametrize(
    "dataset",
    [
        {"type": "text.TextDataset"},
        {"type": "text.TextDataset", "versioned": True},
        {"type": TextDataset},
        {"type": Note},
        {"type": f"{__name__}.OldNote"},
        {"type": "pickle.PickleDataset"},
    ],
    ids=["text", "versioned", "a class", "load and save", "_load and _save", "pickle"],
)
def test_a_file_is_saved_locally_and_is_an_artifact_under_its_own_name(
    client: MlflowClient, tmp_path: Path, dataset: dict[str, Any]
) -> None:
    file = tmp_path / "folder" / "note.txt"
    artifact = MlflowArtifactDataset({**dataset, "filepath": str(file)}, artifact_path="a/b")
    assert not artifact.exists()

    artifact.save("hello")

    assert artifact.exists()
    local = artifact.load()
    assert local.endswith("hello")
    assert list(artifacts(client, run_id())) == ["a/b/note.txt"]
    shutil.rmtree(file.parent)
    artifact.run_id = run_id()
    assert artifact.exists()
    assert artifact.load() == local


def test_a_folder_is_an_artifact_with_all_that_is_in_it(
    client: MlflowClient, tmp_path: Path
) -> None:
    pages = MlflowArtifactDataset({"type": Pages, "filepath": str(tmp_path / "pages")})
    figures = MlflowArtifactDataset(
        {
            "type": "matplotlib.MatplotlibDataset",
            "filepath": str(tmp_path / "figures"),
            "versioned": True,
        },
        artifact_path="plots",
    )

    pages.save("ab")
    figures.save({"one.png": plt.figure(), "more/two.png": plt.figure()})

    assert sorted(artifacts(client, run_id())) == [
        "pages/0.txt",
        "pages/1.txt",
        "plots/figures/more/two.png",
        "plots/figures/one.png",
    ]
    pages.run_id = run_id()
    shutil.rmtree(tmp_path / "pages")
    assert pages.load() == "ab"


def test_only_the_partitions_that_are_saved_now_are_logged(
    client: MlflowClient, tmp_path: Path
) -> None:
    PartitionedDataset(path=str(tmp_path / "parts"), dataset=TextDataset).save({"old.txt": "old"})
    dataset = MlflowArtifactDataset(parts(tmp_path), artifact_path="data")

    dataset.save({"a": "A", "2026/01/b": "B", "lazy": lambda: "made when it is saved"})

    logged = {
        "data/parts/a.txt": "A",
        "data/parts/2026/01/b.txt": "B",
        "data/parts/lazy.txt": "made when it is saved",
    }
    assert artifacts(client, run_id()) == logged
    assert sorted(dataset.load()) == ["2026/01/b", "a", "lazy", "old"]
    dataset.save({"a": "again"})
    assert artifacts(client, run_id()) == {**logged, "data/parts/a.txt": "again"}


def test_partitions_of_a_run_can_be_read_as_long_as_the_process_lives(
    client: MlflowClient, tmp_path: Path
) -> None:
    versioned = {"type": "text.TextDataset", "versioned": True}
    for dataset in (parts(tmp_path), parts(tmp_path / "with versions", dataset=versioned)):
        run = other_run()
        saving = MlflowArtifactDataset(dataset, run_id=run, save_to_run=True)
        saving.save({"a": "A", "b/c": "C"})
        assert artifacts(client, run) == {"parts/a.txt": "A", "parts/b/c.txt": "C"}
        shutil.rmtree(dataset["path"])

        loaded = MlflowArtifactDataset(dataset, run_id=run).load()

        assert {name: load() for name, load in loaded.items()} == {"a": "A", "b/c": "C"}
        in_another_process = pickle.loads(pickle.dumps(loaded))
        assert in_another_process["a"]() == "A"


def test_the_partitions_of_an_incremental_dataset_are_confirmed(
    client: MlflowClient, tmp_path: Path
) -> None:
    config = parts(tmp_path, type="partitions.IncrementalDataset")
    catalog = DataCatalog({"parts": MlflowArtifactDataset(config)})
    catalog.save("parts", {"1": "one", "2": "two"})
    assert catalog.load("parts") == {"1": "one", "2": "two"}

    catalog.confirm("parts")
    catalog.release("parts")

    assert catalog.load("parts") == {}
    catalog.save("parts", {"3": "three"})
    catalog.release("parts")
    assert catalog.load("parts") == {"3": "three"}
    assert sorted(artifacts(client, run_id())) == ["parts/1.txt", "parts/2.txt", "parts/3.txt"]
    of_run = MlflowArtifactDataset(config, run_id=run_id())
    assert of_run.load() == {"1": "one", "2": "two", "3": "three"}


# Versions.


def test_a_version_is_saved_and_loaded_as_the_catalog_says(
    client: MlflowClient, tmp_path: Path
) -> None:
    wrapped = note(tmp_path, versioned=True)
    entry = {"type": MlflowArtifactDataset, "dataset": wrapped}
    for version in ("v1", "v2", "v3"):
        DataCatalog.from_config({"note": entry}, save_version=version).save("note", version)
    assert {path.name for path in (tmp_path / "note.txt").iterdir()} == {"v1", "v2", "v3"}
    assert artifacts(client, run_id()) == {"note.txt": "v3"}

    catalog = DataCatalog.from_config({"note": entry}, load_versions={"note": "v1"})
    assert catalog.load("note") == "v1"
    assert catalog.load("note", version="v2") == "v2"
    dataset: Any = DataCatalog.from_config({"note": entry}, save_version="v4")["note"]
    assert isinstance(dataset, AbstractVersionedDataset)
    assert (dataset.resolve_load_version(), dataset.resolve_save_version()) == ("v3", "v4")
    if has("kedro", "1.3"):
        assert dataset.list_versions(full_path=False) == ["v3", "v2", "v1"]
    assert not MlflowArtifactDataset(wrapped, version=Version("v5", None)).exists()


def test_without_a_catalog_each_save_makes_a_version(client: MlflowClient, tmp_path: Path) -> None:
    both = {
        name: MlflowArtifactDataset(note(tmp_path / name, versioned=True), artifact_path=name)
        for name in ("a", "b")
    }
    catalog = DataCatalog(both)  # type: ignore[arg-type]

    for text in ("first", "second"):
        catalog.save("a", text)
        assert catalog.load("a") == text

    assert len(list((tmp_path / "a" / "note.txt").iterdir())) == 2
    assert artifacts(client, run_id()) == {"a/note.txt": "second"}


def test_the_version_asked_for_on_the_command_line_is_loaded(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def create_pipeline():
            return Pipeline([
                Node(lambda x: f"text {x}", "params:x", "a.note", name="write"),
                Node(lambda text: text, "a.note", "seen", name="read"),
            ])
        """
    )
    project.catalog(
        """
        "{namespace}.note":
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: "data/{namespace}.txt", versioned: true}
        """
    )
    for x in (1, 2):
        project.run(params={"x": x})
    versions = sorted(path.name for path in (project.path / "data" / "a.txt").iterdir())

    seen = project.run(params={"x": 3}, node_names=["read"], load_versions={"a.note": versions[0]})

    assert seen["seen"].load() == "text 1"
    _, second, first = project.all_runs()
    for run, text in ((first, "text 1"), (second, "text 2")):
        assert artifacts(project.client, run.info.run_id) == {"a.txt": text}


# Other file systems.


@pytest.mark.parametrize("dataset", [{}, {"versioned": True}], ids=["plain", "versioned"])
def test_a_file_in_memory_is_fetched_and_logged(
    client: MlflowClient, tmp_path: Path, dataset: dict[str, Any]
) -> None:
    where = f"memory:///{tmp_path.name}/{len(dataset)}"
    remote = MlflowArtifactDataset(
        {"type": "text.TextDataset", "filepath": f"{where}/note.txt", **dataset},
        artifact_path="notes",
    )
    several = MlflowArtifactDataset(
        {"type": "partitions.PartitionedDataset", "path": where, "dataset": "text.TextDataset"}
    )

    remote.save("hello")
    several.save({"x/a": "A"})

    logged = {"notes/note.txt": "hello", f"{len(dataset)}/x/a": "A"}
    assert artifacts(client, run_id()) == logged
    fsspec.filesystem("memory").rm(where, recursive=True)
    assert MlflowArtifactDataset(remote._config, run_id(), "notes").load() == "hello"
    of_run = MlflowArtifactDataset(several._config, run_id()).load()
    assert {name: load() for name, load in of_run.items()} == {"x/a": "A"}


def test_files_in_s3_are_fetched_and_logged(client: MlflowClient, s3: S3, tmp_path: Path) -> None:
    where = f"s3://{s3.bucket}/{tmp_path.name}"
    credentials = {"dev_s3": s3.credentials}
    kind = {"type": MlflowArtifactDataset, "artifact_path": "from s3"}
    frame = {"type": "pandas.CSVDataset", "filepath": f"{where}/frame.csv"}
    partitioned = {
        "type": "partitions.PartitionedDataset",
        "path": f"{where}/parts",
        "filename_suffix": ".csv",
        "dataset": {"type": "pandas.CSVDataset", "save_args": {"index": False}},
        "credentials": "dev_s3",
    }
    entries: dict[str, dict[str, Any]] = {
        "frame": {**kind, "dataset": frame, "credentials": "dev_s3"},
        "versioned": {
            **kind,
            "dataset": {
                **frame,
                "filepath": f"{where}/versioned.csv",
                "versioned": True,
                "credentials": "dev_s3",
            },
        },
        "parts": {**kind, "dataset": partitioned},
    }
    catalog = DataCatalog.from_config(entries, credentials, save_version="v1")
    data = pd.DataFrame({"x": [1, 2]})

    catalog["frame"] = pickle.loads(pickle.dumps(catalog["frame"]))

    catalog.save("frame", data)
    catalog.save("versioned", data)
    catalog.save("parts", {"a": data})
    catalog.save("parts", {"b/c": data})

    saved = ["frame.csv", "parts/a.csv", "parts/b/c.csv", "versioned.csv/v1/versioned.csv"]
    assert s3.files(tmp_path.name) == saved
    logged = artifacts(client, run_id())
    names = ["frame.csv", "parts/a.csv", "parts/b/c.csv", "versioned.csv"]
    assert logged == {f"from s3/{name}": "x\n1\n2\n" for name in names}
    assert catalog.load("versioned").equals(data)
    of_run = {name: {**entry, "run_id": run_id()} for name, entry in entries.items()}
    catalog = DataCatalog.from_config(of_run, credentials)
    assert catalog.load("frame").equals(data)
    assert catalog.load("versioned").equals(data)
    assert catalog.load("parts")["b/c"]().equals(data)
    assert s3.credentials["secret"] not in repr(catalog)


# Which run.


def test_a_run_id_is_for_loading_and_what_is_saved_goes_to_the_current_run(
    client: MlflowClient, tmp_path: Path
) -> None:
    earlier = other_run()
    dataset = MlflowArtifactDataset(note(tmp_path), run_id=earlier, save_to_run=True)
    dataset.save("then")
    assert artifacts(client, earlier) == {"note.txt": "then"}
    assert artifacts(client, run_id()) == {}

    dataset = MlflowArtifactDataset(note(tmp_path))
    dataset.run_id = earlier
    dataset.save("now")

    assert dataset.load() == "then"
    assert artifacts(client, run_id()) == {"note.txt": "now"}
    assert (tmp_path / "note.txt").read_text() == "now"
    dataset.run_id = None
    assert dataset.load() == "now"


def test_without_a_run_it_says_that_there_is_none_and_saves_nothing(
    project: Project, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(project.tracking_uri)
    with pytest.raises(DatasetError, match="has no run to use"):
        MlflowArtifactDataset(note(tmp_path)).save("hello")
    with pytest.raises(DatasetError, match="has no run to use"):
        MlflowArtifactDataset(note(tmp_path), run_id="0" * 32).save("hello")
    with pytest.raises(DatasetError, match="has no run to use"):
        MlflowArtifactDataset(note(tmp_path), log_only=True).load()
    assert not MlflowArtifactDataset(note(tmp_path), log_only=True).exists()
    assert not (tmp_path / "note.txt").exists()


# Wrong use.


def test_wrong_use_is_told_in_a_sentence(client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a dictionary with a `type`, got 'text\.TextDataset'"):
        MlflowArtifactDataset("text.TextDataset")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"got one with \['filepath', 'credentials'\]"):
        MlflowArtifactDataset({"filepath": "a.txt", "credentials": {"key": "secret"}})
    with pytest.raises(DatasetError, match="MemoryDataset can't be an artifact: it has no file"):
        MlflowArtifactDataset({"type": "MemoryDataset"})
    for outside in ("/notes", "../notes"):
        with pytest.raises(DatasetError, match=f"folder inside the run's .*, got '{outside}'"):
            MlflowArtifactDataset(note(tmp_path), artifact_path=outside)
    with pytest.raises(DatasetError, match=f"There is no run '{'0' * 32}' on sqlite"):
        MlflowArtifactDataset(note(tmp_path), run_id="0" * 32).load()
    with pytest.raises(DatasetError, match=r"^The run .* has no artifact 'notes/note.txt'\.$"):
        MlflowArtifactDataset(note(tmp_path), run_id=run_id(), artifact_path="notes").load()
    with pytest.raises(DatasetError, match=r"No such file or directory: .*note\.txt"):
        MlflowArtifactDataset(note(tmp_path)).load()
    elsewhere = {"type": Elsewhere, "filepath": str(tmp_path / "nowhere.txt")}
    with pytest.raises(DatasetError, match=r"Elsewhere has saved nothing to '.*nowhere\.txt'"):
        MlflowArtifactDataset(elsewhere).save("hello")
    placeless = MlflowArtifactDataset({"type": Placeless, "where": str(tmp_path / "there.txt")})
    placeless.save("hello")
    assert artifacts(client, run_id()) == {"there.txt": "hello"}
    placeless.run_id = run_id()
    with pytest.raises(DatasetError, match="none of the arguments filepath, path, filename"):
        placeless.load()


# What Kedro sees of it.


@pytest.mark.parametrize(
    "arguments",
    [
        {"metadata": {"kedro-viz": {"layer": "reporting"}}},
        {"run_id": "0" * 32, "save_to_run": True, "artifact_path": "notes"},
        {"log_only": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kind", [note, parts, lambda folder: note(folder, versioned=True)], ids=["", "parts", "version"]
)
def test_it_pickles_deep_copies_describes_itself_and_gives_its_configuration(
    tmp_path: Path, kind: Callable[[Path], dict[str, Any]], arguments: dict[str, Any]
) -> None:
    dataset = MlflowArtifactDataset(kind(tmp_path), **arguments)

    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert str(twin) == str(dataset)
        assert twin.metadata == dataset.metadata
    shown = without_version(dataset)
    assert str(tmp_path) in shown
    for noise in ("metadata", "=None", "=False", " object at 0x", "layer"):
        assert noise not in shown
    for name in set(arguments) - {"metadata"}:
        assert f"{name}={arguments[name]!r}" in shown
    config = DataCatalog({"x": dataset}).to_config()
    assert "versioned" not in config[0]["x"]
    again = DataCatalog.from_config(*config)["x"]  # type: ignore[arg-type]
    assert without_version(again) == shown


def without_version(dataset: Any) -> str:
    """Describe a dataset as Kedro does, but for the versions, which Kedro shows in its own way."""
    return re.sub(r"version=Version\(.*?\)", "", str(dataset))


def test_credentials_are_in_the_configuration_by_name_alone(tmp_path: Path) -> None:
    secret = {"key": "hidden"}
    entry = {"type": MlflowArtifactDataset, "dataset": note(tmp_path), "credentials": "mine"}
    catalog = DataCatalog.from_config({"x": entry}, {"mine": secret})
    dataset: Any = catalog["x"]

    assert dataset._fs.storage_options["key"] == "hidden"
    config, credentials, *_ = catalog.to_config()
    assert config["x"]["credentials"] == "x_credentials"
    assert credentials == {"x_credentials": secret}
    assert "hidden" not in f"{catalog} {config}"
    of_its_own = {**note(tmp_path), "credentials": {"key": "inner"}}
    wrapped: Any = MlflowArtifactDataset(of_its_own, credentials=secret)
    assert wrapped._fs.storage_options["key"] == "inner"


def test_what_only_the_wrapped_dataset_has_is_found(client: MlflowClient, tmp_path: Path) -> None:
    frame = {"type": "pandas.CSVDataset", "filepath": str(tmp_path / "frame.csv")}
    shown = {"kedro-viz": {"layer": "raw"}}
    dataset: Any = MlflowArtifactDataset({**frame, "metadata": shown})
    dataset.save(pd.DataFrame({"x": [1, 2]}))

    assert dataset._filepath == PurePosixPath(tmp_path / "frame.csv")
    assert dataset._protocol == "file"
    assert dataset.preview(nrows=1)["data"] == [[1]]
    assert dataset.metadata == shown
    assert MlflowArtifactDataset(frame, metadata={}).metadata == {}
    assert dataset._EPHEMERAL is False
    assert not hasattr(dataset, "_SINGLE_PROCESS")
    assert not hasattr(dataset, "confirm")
    old: Any = MlflowArtifactDataset({"type": OldNote, "filepath": str(tmp_path / "note.txt")})
    assert old._SINGLE_PROCESS
    cached = CachedDataset(
        {"type": MlflowArtifactDataset, "dataset": note(tmp_path, versioned=True)},
        version=Version(None, "v1"),
    )
    cached.save("hello")
    cached.release()
    assert cached.load() == "hello"
    assert (tmp_path / "note.txt" / "v1" / "note.txt").exists()


# In Kedro runs. Factories, namespaces and transcoding; text and csv are loaded by later nodes.

WORK = """
import pandas as pd
from kedro.pipeline import Node, Pipeline

def make():
    frame = pd.DataFrame({"x": [1, 2]})
    return "hello", frame, {"a": "A", "b/c": "C"}, "log only", frame

def use(text, csv, parts, alone, frame):
    assert text == "hello"
    assert csv == "x\\n1\\n2\\n"
    assert {name: part() for name, part in parts.items()} == {"a": "A", "b/c": "C"}
    assert (alone, len(frame)) == ("log only", 2)
    return "right"

def create_pipeline():
    kinds = ["text", "frame@pandas", "parts", "alone", "alone_frame"]
    loaded = ["text", "frame@text", "parts", "alone", "alone_frame"]
    return Pipeline([
        Node(make, None, kinds, name="make"),
        Node(use, loaded, "checked", name="use"),
    ], namespace="team")
"""
CATALOG = """
"team.{name}ext":
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: "data/{name}ext.txt", versioned: true}
  metadata: {kedro-viz: {layer: reporting}}
team.frame@pandas:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: pandas.CSVDataset, filepath: data/frame.csv}
  artifact_path: frames
team.frame@text: {type: text.TextDataset, filepath: data/frame.csv}
team.parts:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: partitions.PartitionedDataset, path: "PARTS", dataset: text.TextDataset}
  credentials: parts
team.alone:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: data/alone.txt}
  log_only: true
team.alone_frame:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: pandas.ParquetDataset, filepath: data/alone.parquet}
  log_only: true
team.checked: {type: text.TextDataset, filepath: data/checked.txt}
"""
LOGGED = [
    "alone.parquet",
    "alone.txt",
    "frames/frame.csv",
    "parts/a",
    "parts/b/c",
    "text.txt",
]


def prepare(project: Project, parts: str = "data/parts", **credentials: Any) -> None:
    project.pipeline(WORK)
    project.catalog(CATALOG.replace("PARTS", parts))
    project.write("conf/local/credentials.yml", yaml.safe_dump({"parts": credentials}))


def saved(project: Project) -> list[str]:
    """Name the files in the project's folder `data`, without their versions."""
    data = project.path / "data"
    files = (f for f in data.rglob("*") if f.is_file() and f.name not in (".gitkeep", "README.md"))
    return sorted(f.relative_to(data).parts[0] for f in files)


# The last two are start methods of the ParallelRunner.
RUNNERS = [None, ThreadRunner, "fork", pytest.param("spawn", marks=pytest.mark.thorough)]


@pytest.fixture
def served(new_project: Callable[..., Project], server: CountingProxy) -> Project:
    """A project whose runs are on the server."""
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.tracking_uri = server.uri
    return project


def run_with(project: Project, runner: Any) -> Run:
    """Run a project whose only run this is."""
    if isinstance(runner, str):
        ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=runner)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        project.run(runner=runner and runner())
    experiment = project.client.get_experiment_by_name(project.package)
    assert experiment
    (run,) = project.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return run


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_pipeline_logs_and_loads_through_a_server_and_s3_with_every_runner(
    served: Project, s3: S3, runner: Any
) -> None:
    prepare(served, f"s3://{s3.bucket}/{served.package}", **s3.credentials)

    run = run_with(served, runner)

    names = sorted(artifacts(served.client, run.info.run_id))
    assert names == sorted(name.replace("parts", served.package) for name in LOGGED)
    assert saved(served) == ["checked.txt", "frame.csv", "text.txt"]
    assert s3.files(served.package) == ["a", "b/c"]


def test_a_run_is_asked_for_an_artifact_with_few_requests(
    served: Project, server: CountingProxy, tmp_path: Path
) -> None:
    experiment = served.client.create_experiment(served.package)
    mlflow.set_tracking_uri(server.uri)
    mlflow.set_experiment(experiment_id=experiment)
    with mlflow.start_run():
        dataset = MlflowArtifactDataset(note(tmp_path), artifact_path="notes", log_only=True)
        server.requests.clear()
        dataset.save("hello")
        assert len(server.requests) == 2, server.requests  # where the run's files are, the upload
        dataset.load()
        server.requests.clear()
        assert dataset.load() == "hello"
        # Whether it is there, whether it is a file or a folder, the download.
        assert len(server.requests) == 3, server.requests
        assert dataset.exists()
        assert len(server.requests) == 4, server.requests


def test_with_tracking_disabled_all_is_saved_locally_and_nothing_logged(project: Project) -> None:
    prepare(project)
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [work]}}")

    project.run(pipeline_names=["work"])

    assert project.all_runs() == []
    alone = ["alone.parquet", "alone.txt"]
    assert saved(project) == [*alone, "checked.txt", "frame.csv", "parts", "parts", "text.txt"]


# Nodes that yield.

CHUNKS = """
import pandas as pd
from kedro.pipeline import Node, Pipeline

def tables():
    for number in range(20):
        yield pd.DataFrame({"x": [number]}), pd.DataFrame({"y": [number]}), {f"p{number}": "text"}

def count(table, alone):
    return f"{len(table)} and {len(alone)}"

def create_pipeline():
    return Pipeline([
        Node(tables, None, ["table", "alone", "parts"], name="tables"),
        Node(count, ["table", "alone"], "counted", name="count"),
    ])
"""
CHUNKS_CATALOG = """
_append: &append
  save_args: {header: false, mode: a}
  load_args: {names: [x]}
  fs_args: {open_args_save: {mode: a}}
table:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: pandas.CSVDataset, filepath: data/table.csv, <<: *append}
alone:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: pandas.CSVDataset, filepath: data/alone.csv, <<: *append}
  log_only: true
parts:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: partitions.PartitionedDataset, path: data/parts, dataset: text.TextDataset}
counted: {type: text.TextDataset, filepath: data/counted.txt}
"""


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_what_a_node_yields_in_chunks_is_logged_complete(
    served: Project, server: CountingProxy, runner: Any
) -> None:
    served.pipeline(CHUNKS)
    served.catalog(CHUNKS_CATALOG)
    server.requests.clear()

    run = run_with(served, runner)

    uploads = [made for made in server.requests if made.startswith("PUT")]
    names = ("/table.csv", "/alone.csv", "/parts/")
    made = {name: sum(name in upload for upload in uploads) for name in names}
    # A worker can't know which chunk is the last, nor anybody who loads what is in the run alone.
    of_table = 20 if isinstance(runner, str) else 1
    assert made == {"/table.csv": of_table, "/alone.csv": 20, "/parts/": 20}
    logged = artifacts(served.client, run.info.run_id)
    assert logged["table.csv"] == logged["alone.csv"] == "".join(f"{i}\n" for i in range(20))
    assert (served.path / "data" / "counted.txt").read_text() == "20 and 20"
    assert not (served.path / "data" / "alone.csv").exists()


def test_a_file_in_chunks_that_this_run_does_not_write_is_not_logged(project: Project) -> None:
    project.pipeline(CHUNKS)
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def nothing():
            yield from ()

        def create_pipeline():
            return Pipeline([Node(nothing, None, "table"), Node(nothing, None, "alone")])
        """,
        "quiet",
    )
    project.catalog(CHUNKS_CATALOG)

    for names in (["work"], ["work"], ["quiet"]):
        project.run(pipeline_names=names)

    quiet, second, first = [artifacts(project.client, r.info.run_id) for r in project.all_runs()]
    assert quiet == {}
    assert second["table.csv"] == first["table.csv"] * 2  # the local file goes on
    assert second["alone.csv"] == first["alone.csv"] == first["table.csv"]


def test_a_chunked_file_that_cannot_be_logged_fails_the_run(project: Project) -> None:
    project.pipeline(
        """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def write():
            yield "text"

        def stand_in_the_way(text):
            mlflow.log_text("a file", "notes")

        def create_pipeline():
            return Pipeline([Node(write, None, "text"), Node(stand_in_the_way, "text", None)])
        """
    )
    project.catalog(
        """
        text:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: data/text.txt}
          artifact_path: notes
        """
    )
    with pytest.raises(OSError, match="notes"):
        project.run()
    assert project.only_run().info.status == "FAILED"


def test_what_a_node_has_yielded_before_it_fails_is_logged(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def write():
            yield "text"
            raise ValueError("no more")

        def create_pipeline():
            return Pipeline([Node(write, None, "text")])
        """
    )
    project.catalog(
        """
        text:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: data/text.txt}
        """
    )
    with pytest.raises(ValueError, match="no more"):
        project.run()
    run = project.only_run()
    assert run.info.status == "FAILED"
    assert artifacts(project.client, run.info.run_id)["text.txt"] == "text"


def test_why_a_pipeline_fails_is_not_hidden_by_a_file_that_cannot_be_logged(
    project: Project,
) -> None:
    project.pipeline(
        """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def write():
            yield "text"

        def stand_in_the_way(text):
            mlflow.log_text("a file", "notes")
            raise ValueError("real")

        def create_pipeline():
            return Pipeline([Node(write, None, "text"), Node(stand_in_the_way, "text", None)])
        """
    )
    project.catalog(
        """
        text:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: data/text.txt}
          artifact_path: notes
        """
    )
    with pytest.raises(ValueError, match="real"):
        project.run()
    assert project.only_run().info.status == "FAILED"


def test_a_run_that_has_ended_leaves_no_temporary_files(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepare(project)
    catalog = project.path / "conf" / "base" / "catalog.yml"
    catalog.write_text(catalog.read_text().replace("credentials: parts", "log_only: true"))
    before = set(os.listdir(tmp_path))  # noqa: PTH208

    project.run()

    assert set(os.listdir(tmp_path)) == before  # noqa: PTH208
    assert saved(project) == ["checked.txt", "frame.csv", "text.txt"]
    assert sorted(artifacts(project.client, project.only_run().info.run_id)) == LOGGED


def test_an_artifact_of_the_run_before_is_loaded_by_its_id(project: Project) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def create_pipeline():
            return Pipeline([Node(lambda text, x: f"{text}{x}", ["before", "params:x"], "after")])
        """
    )
    project.catalog(
        """
        before:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: data/text.txt}
          run_id: ${runtime_params:earlier, null}
        after:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: text.TextDataset, filepath: data/text.txt}
        """
    )
    project.write("data/text.txt", "0")
    project.run(params={"x": 1})
    first = project.only_run().info.run_id
    project.run(params={"x": 2})

    project.run(params={"x": 3, "earlier": first})

    texts = [artifacts(project.client, run.info.run_id) for run in project.all_runs()]
    assert texts == [{"text.txt": "013"}, {"text.txt": "012"}, {"text.txt": "01"}]
