"""Where a dataset has its file or folder, and the same dataset at another path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError

from .._kedro import PATH_ARGUMENTS, file_system_of, partition_of, path_of


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
    places = {}
    for name in data:
        path, version = partition_of(dataset, name)
        path = file_system._strip_protocol(path)
        inside = place / PurePosixPath(path).relative_to(folder)
        places[f"{path}/{version}/{inside.name}" if version else path] = inside
    return places


def download(file_system: Any, path: str, target: Path) -> Path:
    """Copy a file or folder, when it is there, to a local path, and return that path."""
    sources = files(file_system, path)
    copies = [target / PurePosixPath(source).relative_to(path) for source in sources]
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
    file_system.get(sources, [str(copy) for copy in copies])
    return target


def path_argument(config: Mapping[str, Any]) -> str | None:
    """Return the argument in a dataset's configuration that says where its file or folder is."""
    return next((name for name in PATH_ARGUMENTS if name in config), None)


def at_path(config: Mapping[str, Any], path: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the configuration of a dataset with its file or folder at a local path instead.

    Args:
        config: The configuration, and with the key `dataset` that of each partition.
        path: The local path.
        without: Arguments to leave out.

    Raises:
        DatasetError: When the dataset isn't told its place by an argument.
    """
    argument = path_argument(config)
    if argument is None:
        kind = config["type"] if isinstance(config["type"], str) else config["type"].__name__
        raise DatasetError(
            f"{kind} can only be loaded from its own place: it has none of the arguments "
            f"{', '.join(PATH_ARGUMENTS)}."
        )
    local = {**_local(config, without), argument: path}
    local.pop("checkpoint", None)  # of the partitions that are new in the original place
    return local


def _local(config: Mapping[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration of a dataset without what is for a remote file system."""
    local = {name: config[name] for name in config if name not in ("credentials", *without)}
    if fs_args := config.get("fs_args"):
        kept = {name: value for name, value in fs_args.items() if name.startswith("open_args")}
        local["fs_args"] = kept
    if isinstance(config.get("dataset"), dict):
        local["dataset"] = _local(config["dataset"], without)
    return local
