"""Every use of something of Kedro, or of Kedro's datasets, that isn't public.

Each function says why there is no public way, and the version that it was seen in; a test named
after it (tests/runtime/test_private.py) fails when it is there no more.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fsspec.archive import AbstractArchiveFileSystem  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from kedro.config import OmegaConfigLoader
    from kedro.io import DataCatalog, Version
    from kedro.pipeline import Pipeline
    from pluggy import PluginManager


def use_globals_of(loader: OmegaConfigLoader) -> None:
    """Let `${globals:…}` give the values of this loader.

    A loader registers the resolver only when it is made, in place of the one before, and where it
    looks values up isn't public. Seen in Kedro 1.0 to 1.7.
    """
    loader._register_globals_resolver()


class ConfigurationFolder(NamedTuple):
    """A folder with the environments of a configuration: on disk, in an archive or a bucket."""

    file_system: Any  # of fsspec
    path: str
    address: str  # how a user names it


def configuration_folder(loader: Any) -> ConfigurationFolder:
    """Return where a loader finds its environments.

    It reads a `conf_source` of any kind, but doesn't say which file a value is from. Seen in Kedro
    1.0 to 1.7.
    """
    file_system, source = loader._fs, str(loader.conf_source).rstrip("/")
    if isinstance(file_system, AbstractArchiveFileSystem):
        path = file_system.ls("", detail=False)[-1].rstrip("/")
        return ConfigurationFolder(file_system, path, f"{source}/{path}")
    if root := getattr(loader, "_remote_root_path", None):
        return ConfigurationFolder(file_system, root, source)
    path = Path(source).absolute().as_posix()
    return ConfigurationFolder(file_system, path, path)


def hook_manager(hooks: Iterable[Any], disabled_plugins: Iterable[str]) -> PluginManager:
    """Return a manager of a project's hooks, and of those of plugins that aren't disabled.

    A session makes one for itself; `kedro.runner.task.Task` makes one in a worker from the settings
    of the process, which a worker of several projects doesn't have. Seen in Kedro 1.0 to 1.7.
    """
    from kedro.framework.hooks import manager

    made: PluginManager = manager._create_hook_manager()
    manager._register_hooks(made, hooks)
    manager._register_hooks_entry_points(made, disabled_plugins)
    return made


def part_that_runs(pipeline: Pipeline, catalog: DataCatalog) -> Pipeline:
    """Return the part of a pipeline that a runner runs with `only_missing_outputs`.

    A runner chooses it in its `run`, which is after `before_pipeline_run`. Seen in Kedro 1.0 to
    1.7.
    """
    from kedro.pipeline import Pipeline
    from kedro.runner import runner

    nodes = runner._determine_nodes_to_run(
        pipeline.nodes[::-1],
        catalog,
        runner._build_node_children_map(pipeline),
        logging.getLogger(__name__),
    )
    return pipeline.filter(node_names=[n.name for n in nodes]) if nodes else Pipeline([])


# Arguments with which datasets are told where their file or folder is.
PATH_ARGUMENTS = ("filepath", "path", "filename")


def uncached(dataset: Any) -> Any:
    """Return the dataset that a `CachedDataset` keeps in memory; any other as it is.

    Kedro 1.7 shows the one inside only in a description.
    """
    from kedro.io import CachedDataset

    return dataset._dataset if isinstance(dataset, CachedDataset) else dataset


def arguments_of(dataset: Any) -> dict[str, Any]:
    """Return the arguments that a dataset was made with, those of its `**` among them.

    `DataCatalog.to_config` of Kedro 1.7 copies them deeply, which those of a ParallelRunner's
    datasets can't be. They are there when `__init__` has ended.
    """
    given: dict[str, Any] = dict(getattr(dataset, "_init_args", {}))
    parameters = inspect.signature(type(dataset)).parameters
    # What Kedro has of an inherited `__init__`.
    if "kwargs" in given and "kwargs" not in parameters:
        given = dict(given["kwargs"])
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, None) or {}
    return given


def path_of(dataset: Any) -> str | None:
    """Return the file or folder that a dataset keeps its data in; None when it has none.

    Kedro 1.7 has no method for it. Datasets of Kedro keep it in one of two attributes, and others
    are told it by an argument.
    """
    places = [getattr(dataset, name, None) for name in ("_filepath", "_path")]
    if not any(places):
        arguments = arguments_of(dataset)
        places = [arguments.get(name) for name in PATH_ARGUMENTS]
    return next((str(place) for place in places if isinstance(place, str | os.PathLike)), None)


def file_system_of(dataset: Any) -> Any:
    """Return the file system of fsspec that a dataset uses; None when it has none of its own.

    Kedro's datasets (kedro-datasets 9) make it of arguments that each reads in its own way.
    """
    return getattr(dataset, "_fs", None) or getattr(dataset, "_filesystem", None)


def version_of(dataset: Any) -> Version | None:
    """Return the versions that a dataset was told to load and to save.

    `resolve_load_version` of Kedro 1.7 tells what it loads, not whether it was told to.
    """
    return getattr(dataset, "_version", None)


def set_version(dataset: Any, version: Version | None) -> None:
    """Set the versions that a dataset loads and saves; one without versions stays as it is.

    Kedro 1.7 does the same in `catalog.load(name, version=…)`, and gives no other way to do it
    with a dataset that was made from a configuration.
    """
    from kedro.io import AbstractVersionedDataset

    if isinstance(dataset, AbstractVersionedDataset):
        dataset._version = version


def is_partitioned(dataset: Any) -> bool:
    """Check whether a dataset has a file for each partition of its data.

    Such datasets (kedro-datasets 9) have no class in common with Kedro's others, and the package
    that theirs is in may not be installed.
    """
    return hasattr(dataset, "_partition_to_path")


def partition_of(dataset: Any, name: str) -> tuple[str, str | None]:
    """Return the path of a partition, and the version that it is saved as.

    Kedro's datasets (kedro-datasets 9) give only the partitions' names.
    """
    version = dataset._dataset_config.get("version")
    return dataset._partition_to_path(name), version and version.save
