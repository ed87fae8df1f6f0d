"""Copies of what datasets would load, which travel with a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import cloudpickle  # type: ignore[import-untyped] # comes with MLflow
from kedro.io import AbstractDataset, DatasetError

from .._kedro import arguments_of, is_partitioned, version_of
from ..datasets.artifacts import MlflowArtifactDataset
from ..datasets.base import TrackedDataset
from ..datasets.files import at_path, download, has_file, list_files, location, path_argument

# Datasets that take this may have a query in their file: the data is in a database.
_QUERY_ARGUMENT = "sql"

# Where a dataset that is in no file has its data.
_PICKLE = "data.pkl"


def copy(dataset: AbstractDataset[Any, Any], folder: Path) -> dict[str, Any] | None:
    """Copy what a dataset would load to a local folder.

    Returns:
        The configuration of the dataset that loads the copy, with a path relative to the folder;
        None where the copy is a pickle.

    Raises:
        DatasetError: When there is nothing to load.
    """
    if isinstance(dataset, MlflowArtifactDataset):
        dataset = dataset.local_dataset or dataset
    if isinstance(dataset, TrackedDataset):
        config = dataset.copy_to(folder)
    else:
        config = _copy_files(dataset, folder)
    if config is None:
        (folder / _PICKLE).write_bytes(cloudpickle.dumps(dataset.load()))
    return config


def load(config: Mapping[str, Any] | None, folder: Path) -> Any:
    """Load what `copy` has copied to a folder, wherever that is now, into memory."""
    if config is None:
        return cloudpickle.loads((folder / _PICKLE).read_bytes())
    argument = path_argument(config)
    assert argument, "it was copied from a file"
    config = {**config, argument: (folder / config[argument]).as_posix()}
    dataset: AbstractDataset[Any, Any] = AbstractDataset.from_config(folder.name, config)
    data = dataset.load()
    if not is_partitioned(dataset):
        return data
    # Partitions are functions that read a file; here they have read it.
    return {
        name: partial(_same, value()) if callable(value) else value for name, value in data.items()
    }


def _same(value: Any) -> Any:
    return value


def _copy_files(dataset: AbstractDataset[Any, Any], folder: Path) -> dict[str, Any] | None:
    """Copy the files of a dataset; None when it has none, or can't be loaded from another place."""
    given = arguments_of(dataset)
    config = {name: given[name] for name in given if name not in ("version", "metadata")}
    config["type"] = type(dataset)
    if not has_file(dataset) or path_argument(config) is None or _QUERY_ARGUMENT in config:
        return None
    name = PurePosixPath(location(dataset, None)[1]).name
    dataset.release()  # another process may have saved a version
    file_system, path = location(dataset, "save" if _is_of_this_run(dataset) else "load")
    if not download(file_system, path, folder / name).exists():
        raise DatasetError(f"{type(dataset).__name__} has nothing to load at '{path}'.")
    return at_path(config, name)


def _is_of_this_run(dataset: Any) -> bool:
    """Check whether there is the version that this run saves, when it isn't to load another.

    Another run may have saved a later one meanwhile.
    """
    version = version_of(dataset)
    if version is None or version.load or not version.save:
        return False
    return bool(list_files(*location(dataset, "save")))
