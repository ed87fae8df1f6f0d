"""Files: where a dataset has its own, the same dataset at another path, and artifacts of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError

from .._kedro import PATH_ARGUMENTS, file_system_of, is_partitioned, partition_of, path_of
from ..tracking.handle import RunHandle
from .base import info_of

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository


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


def list_files(file_system: Any, path: str) -> list[str]:
    """List the files at a path: the file itself, or all that are in the folder."""
    file_system.invalidate_cache(path)
    return sorted(file_system.find(path))


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
    sources = list_files(file_system, path)
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
        DatasetError: When no argument says where its file or folder is.
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


def log_file(
    run: RunHandle,
    dataset: AbstractDataset[Any, Any],
    artifact_path: str | None = None,
    data: Any = None,
) -> None:
    """Log the file or folder that a dataset has just saved, wherever it is.

    Args:
        run: The run to log to.
        dataset: A dataset that has a file or folder.
        artifact_path: Folder of the run's artifacts to put it in; their root when None.
        data: What was saved. Of a partitioned dataset only these partitions are logged.

    Raises:
        DatasetError: When the dataset has saved nothing there.
    """
    file_system, path = location(dataset)
    place = PurePosixPath(artifact_path or "", PurePosixPath(path).name)
    places = {path: place}
    if data is not None and is_partitioned(dataset):
        places = partitions(file_system, dataset, data, path, place)
    is_local = isinstance(file_system, LocalFileSystem)
    with TemporaryDirectory() as folder:
        for path, place in places.items():
            local = Path(path) if is_local else download(file_system, path, Path(folder, place))
            if not local.exists():
                raise DatasetError(
                    f"{type(dataset).__name__} has saved nothing to '{path}' that can be logged."
                )
            if is_local:
                run.log_artifact(local, folder_of(place))
        for downloaded in Path(folder).iterdir():
            run.log_artifact(downloaded)


def folder_of(place: PurePosixPath) -> str | None:
    """Return the folder of a place among a run's artifacts; None when that is their root."""
    return None if place.parent == PurePosixPath() else str(place.parent)


def fetch(run: RunHandle, artifact: PurePosixPath, folder: str | Path) -> Path:
    """Download an artifact of a run to a local folder, and return where it is.

    Raises:
        DatasetError: When there is no such run, or it has no such artifact.
    """
    if not has_artifact(run, artifact):
        raise DatasetError(f"The run {run.run_id} has no artifact '{artifact}'.")
    return Path(_repository(run).download_artifacts(str(artifact), str(folder)))


def has_artifact(run: RunHandle, artifact: PurePosixPath) -> bool:
    """Check whether a run has an artifact at a path."""
    listed = _repository(run).list_artifacts(folder_of(artifact))
    return str(artifact) in [file.path for file in listed]


def _repository(run: RunHandle) -> ArtifactRepository:
    """Return the store of a run's artifacts.

    By the run's id MLflow looks among its models too, with a handful of requests, and hides why a
    download fails.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = run.artifact_uri or info_of(run).artifact_uri
    return get_artifact_repository(uri, tracking_uri=run.server.tracking_uri)
