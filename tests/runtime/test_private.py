"""What the runtime uses of MLflow and Kedro that isn't public is there, and does what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from kedro.io import AbstractDataset, CachedDataset, MemoryDataset, Version
from kedro_datasets.partitions import PartitionedDataset  # type: ignore[import-untyped]
from kedro_datasets.text import TextDataset  # type: ignore[import-untyped]
from mlflow.tracking import fluent

from runtime import _kedro, _mlflow


def require(owner: Any, *names: str) -> None:
    """Fail with a sentence that names what is gone, and so what to look for."""
    gone = [name for name in names if not hasattr(owner, name)]
    assert not gone, f"{owner!r} has no {' and no '.join(gone)} any more."


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


def test_uncached() -> None:
    inside = MemoryDataset(1)
    cached = CachedDataset(inside)
    require(cached, "_dataset")
    assert _kedro.uncached(cached) is inside
    assert _kedro.uncached(inside) is inside
    assert _kedro.uncached(None) is None


@pytest.mark.parametrize("kind", [Gathering, Inheriting])
def test_arguments_of(kind: type[Gathering]) -> None:
    dataset = kind(filepath="a", encoding="utf-8")
    require(dataset, "_init_args")
    assert _kedro.arguments_of(dataset) == {"filepath": "a", "encoding": "utf-8"}


def test_path_of(tmp_path: Path) -> None:
    file, folder = TextDataset(filepath="/a/b.txt"), partitioned(tmp_path)
    require(file, "_filepath")
    require(folder, "_path")
    assert _kedro.path_of(file) == "/a/b.txt"
    assert _kedro.path_of(folder) == str(tmp_path)
    assert _kedro.path_of(Inheriting(filepath="c.txt")) == "c.txt"
    assert _kedro.path_of(MemoryDataset()) is None


def test_file_system_of(tmp_path: Path) -> None:
    file, folder = TextDataset(filepath="memory://a.txt"), partitioned(tmp_path)
    require(file, "_fs")
    require(folder, "_filesystem")
    assert _kedro.file_system_of(file) is fsspec.filesystem("memory")
    assert _kedro.file_system_of(folder) is fsspec.filesystem("file")
    assert _kedro.file_system_of(MemoryDataset()) is None


def test_version_of() -> None:
    dataset = TextDataset(filepath="a.txt", version=Version("1", "2"))
    require(dataset, "_version")
    assert _kedro.version_of(dataset) == Version("1", "2")
    assert _kedro.version_of(MemoryDataset()) is None


def test_set_version() -> None:
    dataset, without = TextDataset(filepath="a.txt", version=Version("1", "2")), MemoryDataset()
    _kedro.set_version(dataset, Version("3", "4"))
    _kedro.set_version(without, Version("3", "4"))
    assert (dataset.resolve_load_version(), dataset.resolve_save_version()) == ("3", "4")
    assert _kedro.version_of(without) is None


def test_is_partitioned(tmp_path: Path) -> None:
    require(PartitionedDataset, "_partition_to_path")
    assert _kedro.is_partitioned(partitioned(tmp_path))
    assert not _kedro.is_partitioned(MemoryDataset())


def test_partition_of(tmp_path: Path) -> None:
    dataset = partitioned(tmp_path)
    require(dataset, "_partition_to_path", "_dataset_config")
    assert _kedro.partition_of(dataset, "a/b") == ((tmp_path / "a" / "b.txt").as_posix(), None)
    path, version = _kedro.partition_of(partitioned(tmp_path, versioned=True), "a")
    assert path == (tmp_path / "a.txt").as_posix()
    assert version


def partitioned(folder: Path, **more: Any) -> Any:
    kind = {"type": TextDataset, **more}
    return PartitionedDataset(path=str(folder), dataset=kind, filename_suffix=".txt")


def test_default_experiment_id(monkeypatch: pytest.MonkeyPatch) -> None:
    require(fluent, "_get_experiment_id", "_active_experiment_id")
    monkeypatch.setattr(fluent, "_active_experiment_id", "7")
    assert _mlflow.default_experiment_id() == "7"
