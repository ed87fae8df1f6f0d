"""Where a dataset has its file or folder, and how the same is read from another place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError

from .._kedro import (
    PATH_ARGUMENTS,
    arguments_of,
    file_system_of,
    is_partitioned,
    partition_of,
    path_of,
    version_of,
)

# Datasets that take this may have a query in their file: the data is in a database.
_QUERY_ARGUMENT = "sql"


def has_file(dataset: AbstractDataset[Any, Any]) -> bool:
    """Check whether a dataset keeps its data in a file or folder of its own."""
    return path_of(dataset) is not None


def location(
    dataset: AbstractDataset[Any, Any], version: Literal["load", "save"] | None = "save"
) -> tuple[Any, str]:
    """Return the file system and the path of a dataset that has a file or folder.

    Of a versioned one that is the version which would be loaded or saved next, or with None the
    path that all versions are under.
    """
    path = path_of(dataset) or ""
    if version and isinstance(dataset, AbstractVersionedDataset):
        is_load = version == "load"
        wanted = dataset.resolve_load_version() if is_load else dataset.resolve_save_version()
        if wanted:
            path = str(PurePosixPath(path, wanted, PurePosixPath(path).name))
    file_system = file_system_of(dataset)
    if not isinstance(file_system, fsspec.AbstractFileSystem):
        file_system, path = fsspec.core.url_to_fs(path)
    return file_system, file_system._strip_protocol(path)


def files(file_system: Any, path: str) -> list[str]:
    """List the files at a path: the file itself, or all that are in the folder."""
    file_system.invalidate_cache(path)
    return sorted(file_system.find(path))


def state(dataset: AbstractDataset[Any, Any]) -> dict[str, Any]:
    """Return the files of a dataset, so that a change shows."""
    file_system, path = location(dataset)
    return {file: file_system.info(file) for file in files(file_system, path)}


def partitions(
    file_system: Any, dataset: Any, data: Any, folder: str, place: PurePosixPath
) -> dict[str, PurePosixPath]:
    """Map the path of each partition in `data` to its place below another folder."""
    found = {}
    for name in data:
        path, version = partition_of(dataset, name)
        path = file_system._strip_protocol(path)
        inside = place / PurePosixPath(path).relative_to(folder)
        found[f"{path}/{version}/{inside.name}" if version else path] = inside
    return found


def moved(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the configuration of a dataset with its file or folder at a local path instead.

    Raises:
        DatasetError: When the dataset isn't told its place by an argument.
    """
    argument = _path_argument(config)
    if argument is None:
        kind = config["type"] if isinstance(config["type"], str) else config["type"].__name__
        raise DatasetError(
            f"{kind} can only be loaded from its own place: it has none of the arguments "
            f"{', '.join(PATH_ARGUMENTS)}."
        )
    made = {**_made_local(config), argument: path}
    made.pop("checkpoint", None)  # of the partitions that are new in the original place
    return made


def _path_argument(config: Mapping[str, Any]) -> str | None:
    return next((name for name in PATH_ARGUMENTS if name in config), None)


def _made_local(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take out of a dataset's configuration what is for a remote file system."""
    local = {name: value for name, value in config.items() if name != "credentials"}
    if fs_args := config.get("fs_args"):
        kept = {name: value for name, value in fs_args.items() if name.startswith("open_args")}
        local["fs_args"] = kept
    if isinstance(config.get("dataset"), dict):
        local["dataset"] = _made_local(config["dataset"])
    return local


def copy_files(dataset: AbstractDataset[Any, Any], folder: Path) -> dict[str, Any] | None:
    """Copy what a dataset would load to a local folder, wherever it is now.

    Returns the configuration of the dataset that loads the copy, with a path relative to the folder
    (see `load_copy`); None when the dataset has no file, or can't be loaded from another place.

    Raises:
        DatasetError: When there is nothing to load.
    """
    given = arguments_of(dataset)
    config = {name: given[name] for name in given if name not in ("version", "metadata")}
    config["type"] = type(dataset)
    if not has_file(dataset) or _path_argument(config) is None or _QUERY_ARGUMENT in config:
        return None
    name = PurePosixPath(location(dataset, None)[1]).name
    dataset.release()  # another process may have saved a version
    file_system, path = location(dataset, "save" if _is_of_this_run(dataset) else "load")
    found = files(file_system, path)
    if not found:
        raise DatasetError(f"{type(dataset).__name__} has nothing to load at '{path}'.")
    copies = [folder / name / PurePosixPath(file).relative_to(path) for file in found]
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
    file_system.get(found, [str(copy) for copy in copies])
    return moved(config, name)


def _is_of_this_run(dataset: Any) -> bool:
    """Check whether there is the version that this run saves, when it isn't to load another.

    Another run may have saved a later one meanwhile.
    """
    version = version_of(dataset)
    if version is None or version.load or not version.save:
        return False
    return bool(files(*location(dataset, "save")))


def load_copy(config: Mapping[str, Any], folder: Path) -> Any:
    """Load what `copy_files` has copied to a folder, wherever that is now, into memory."""
    argument = _path_argument(config)
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
