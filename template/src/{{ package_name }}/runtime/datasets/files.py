"""Where a dataset has its file or folder, and how the same is read from another place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, AbstractVersionedDataset, CachedDataset, DatasetError

# Arguments with which datasets are told where their file or folder is.
_PATH_ARGUMENTS = ("filepath", "path", "filename")

# Datasets that take this may have a query in their file: the data is in a database.
_QUERY_ARGUMENT = "sql"


def uncached(dataset: AbstractDataset[Any, Any] | None) -> AbstractDataset[Any, Any] | None:
    """Give the dataset itself, or the one that it keeps a copy of in memory."""
    return dataset._dataset if isinstance(dataset, CachedDataset) else dataset


def has_file(dataset: AbstractDataset[Any, Any]) -> bool:
    """Tell whether a dataset keeps its data in a file or folder of its own."""
    return _path_of(dataset) is not None


def location(
    dataset: AbstractDataset[Any, Any], version: Literal["load", "save"] | None = "save"
) -> tuple[Any, str]:
    """Give the file system and the path of a dataset.

    Of a versioned one that is the version which would be loaded or saved next, or with None the
    path that all versions are under.
    """
    path = _path_of(dataset)
    if version and isinstance(dataset, AbstractVersionedDataset) and dataset._version:
        if version == "load":
            wanted = dataset.resolve_load_version()
        else:
            wanted = dataset.resolve_save_version()
        path = str(dataset._get_versioned_path(wanted or ""))
    file_system = getattr(dataset, "_fs", None) or getattr(dataset, "_filesystem", None)
    if not isinstance(file_system, fsspec.AbstractFileSystem):
        file_system, path = fsspec.core.url_to_fs(path)
    return file_system, file_system._strip_protocol(path)


def _path_of(dataset: AbstractDataset[Any, Any]) -> str | None:
    given = getattr(dataset, "_init_args", {})
    given = {**given.get("kwargs", {}), **given}  # as Kedro keeps those of an inherited `__init__`
    places = [getattr(dataset, name, None) for name in ("_filepath", "_path")]
    places += [given.get(name) for name in _PATH_ARGUMENTS]
    return next((str(path) for path in places if isinstance(path, str | os.PathLike)), None)


def files(file_system: Any, path: str) -> list[str]:
    """List the files at a path: the file itself, or all that are in the folder."""
    file_system.invalidate_cache(path)
    return sorted(file_system.find(path))


def state(dataset: AbstractDataset[Any, Any]) -> dict[str, Any]:
    """Describe the files of a dataset, so that a change shows."""
    file_system, path = location(dataset)
    return {file: file_system.info(file) for file in files(file_system, path)}


def is_partitioned(dataset: Any) -> bool:
    """Tell whether a dataset has a file for each partition of its data."""
    return hasattr(dataset, "_partition_to_path")


def partitions(
    file_system: Any, dataset: Any, data: Any, folder: str, place: PurePosixPath
) -> dict[str, PurePosixPath]:
    """Map the path of each partition in `data` to its place below another folder."""
    found = {}
    for partition in data:
        path = file_system._strip_protocol(dataset._partition_to_path(partition))
        inside = place / PurePosixPath(path).relative_to(folder)
        version = dataset._dataset_config.get("version")
        found[f"{path}/{version.save}/{inside.name}" if version else path] = inside
    return found


def moved(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Give the configuration of a dataset with its file or folder at a local path instead.

    Raises:
        DatasetError: When the dataset isn't told its place by an argument.
    """
    argument = _path_argument(config)
    if argument is None:
        kind = config["type"] if isinstance(config["type"], str) else config["type"].__name__
        raise DatasetError(
            f"{kind} can only be loaded from its own place: it has none of the arguments "
            f"{', '.join(_PATH_ARGUMENTS)}."
        )
    made = {**_made_local(config), argument: path}
    made.pop("checkpoint", None)  # of the partitions that are new in the original place
    return made


def _path_argument(config: Mapping[str, Any]) -> str | None:
    return next((name for name in _PATH_ARGUMENTS if name in config), None)


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

    Gives the configuration of the dataset that loads the copy, with a path relative to the folder
    (see `load_copy`); None when the dataset has no file, or can't be loaded from another place.

    Raises:
        DatasetError: When there is nothing to load.
    """
    config = _config_of(dataset)
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
    """Tell whether there is the version that this run saves, when it isn't to load another.

    Another run may have saved a later one meanwhile.
    """
    version = getattr(dataset, "_version", None)
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


def _config_of(dataset: AbstractDataset[Any, Any]) -> dict[str, Any]:
    """Give the configuration that makes a dataset as it is, but for its version."""
    kind = type(dataset)
    given: dict[str, Any] = dict(getattr(dataset, "_init_args", {}))
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, None) or {})
    return {
        "type": kind,
        **{name: value for name, value in given.items() if name not in ("version", "metadata")},
    }
