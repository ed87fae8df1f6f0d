"""Any Kedro dataset, with a copy of what it saves among the run's artifacts."""

from __future__ import annotations

import shutil
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any, ClassVar

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError
from kedro.io.core import Version

from .._kedro import is_partitioned, set_version, version_of
from ..tracking.handle import RunHandle
from .base import TrackedDataset, check
from .files import at_path, fetch, has_artifact, has_file, location, log_file


@AbstractVersionedDataset.register  # Kedro hands `catalog.load(name, version=…)` to these alone
class MlflowArtifactDataset(TrackedDataset):
    """Wrap a dataset, so that what it saves becomes an artifact of the run as well.

    The artifact has the name of the file or folder. Of a partitioned dataset only the partitions
    that this run has saved are logged. A file that a node yields in chunks is logged when the run
    ends; in a worker process, or with `log_only`, after each chunk. Where tracking is disabled the
    wrapped dataset saves and loads as if it stood alone, with `log_only` too.

    Args:
        dataset: The wrapped dataset as in `catalog.yml`: a dictionary with a `type`, and with
            `versioned: true` where it has versions.
        run_id: Load the artifact of this run instead of the local file.
        artifact_path: Folder of the run's artifacts to put the file in; their root when None.
        credentials: Passed to the wrapped dataset, unless that has its own.
        metadata: Kept and not used; by default that of the wrapped dataset.
        version: The versions to load and save, from Kedro.
        log_only: Keep no local copy: what is saved is in the run alone, and is loaded from there.
        save_to_run: Save to the run `run_id` too, instead of the current one.

    Raises:
        DatasetError: When the wrapped dataset can't be made, or has no file.
    """

    SHOWN = ("artifact_path", "run_id", "log_only", "save_to_run")

    # Has Kedro pass its versions to every one of these datasets; the wrapped one uses them if it
    # has versions.
    versioned: ClassVar[bool] = True

    # With `log_only`: the dataset in a temporary folder, where all chunks of a node go.
    _draft: AbstractDataset[Any, Any] | None = None

    def __init__(
        self,
        dataset: dict[str, Any],
        run_id: str | None = None,
        artifact_path: str | None = None,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        version: Version | None = None,
        log_only: bool = False,
        save_to_run: bool = False,
    ) -> None:
        given: Any = dataset
        if not (isinstance(given, dict) and "type" in given):
            shown = f"one with {list(given)}" if isinstance(given, dict) else repr(given)
            raise DatasetError(
                f"`dataset` is the dataset to wrap, a dictionary with a `type`, got {shown}."
            )
        folder = PurePosixPath(artifact_path or "")
        is_inside = not folder.is_absolute() and ".." not in folder.parts
        rule = "is a folder inside the run's artifacts"
        check(is_inside, "artifact_path", rule, artifact_path)
        self._config = {**({"credentials": credentials} if credentials else {}), **dataset}
        self._make_dataset(version)
        if not has_file(self._dataset):
            raise DatasetError(
                f"{type(self._dataset).__name__} can't be an artifact: it has no file of its own."
            )
        self.run_id = run_id
        self.artifact_path = artifact_path
        self.log_only = log_only
        self.save_to_run = save_to_run
        self.metadata = getattr(self._dataset, "metadata", None) if metadata is None else metadata

    def _make_dataset(self, version: Version | None) -> None:
        self._dataset = AbstractDataset.from_config("dataset", self._config, *(version or ()))
        if version is None and self._version:
            set_version(self._dataset, Version(None, None))  # a new one at each save

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run."""
        super().bind(*args)
        self._draft = None

    def load(self) -> Any:
        """Load the local file, or with a `run_id` or `log_only` the artifact of the run.

        An artifact is fetched to a temporary folder, which stays until the Kedro run ends, or the
        process: partitions, for one, are read later.
        """
        if not self._loads_from_run:
            return self._dataset.load()
        return self._dataset_at(self._fetch(_temporary_folder(self._resolve_run()))).load()

    def save(self, data: Any) -> None:
        """Save with the wrapped dataset, then copy what was saved to the run."""
        if not self._is_tracked:
            self._dataset.save(data)
            return
        run = self._run_with(self.run_id if self.save_to_run else None)
        saved = self._dataset
        if self.log_only:
            if self._draft is None or not self.in_chunks:
                self._draft = self._dataset_at(_temporary_folder(run) / self._artifact.name)
            saved = self._draft
        saved.save(data)
        # A partition is whole with its chunk, and a worker doesn't know which chunk is the last.
        is_growing = self.in_chunks and not is_partitioned(saved)
        if is_growing and run.is_ours and not self.log_only:
            log = partial(log_file, run, saved, self.artifact_path)
            run.before_end(log, key=f"artifact of {self._name}")
        else:
            log_file(run, saved, self.artifact_path, data)

    @property
    def _loads_from_run(self) -> bool:
        return self.run_id is not None or (self.log_only and self._is_tracked)

    @property
    def _artifact(self) -> PurePosixPath:
        path = location(self._dataset, None)[1]
        return PurePosixPath(self.artifact_path or "", PurePosixPath(path).name)

    def _dataset_at(self, path: Path) -> AbstractDataset[Any, Any]:
        """Make the wrapped dataset once more, with its file or folder at a local path."""
        return AbstractDataset.from_config("dataset", self._config_at(path.as_posix()))

    def _config_at(self, path: str) -> dict[str, Any]:
        # An artifact is the version that was saved.
        return at_path(self._config, path, without=("versioned",))

    @property
    def local_dataset(self) -> AbstractDataset[Any, Any] | None:
        """The wrapped dataset where that is what would be loaded, and not an artifact."""
        return None if self._loads_from_run else self._dataset

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the artifact that would be loaded to a local folder.

        Returns:
            The configuration of the dataset that loads the copy.
        """
        return self._config_at(self._fetch(folder).relative_to(folder).as_posix())

    def _fetch(self, folder: Path) -> Path:
        with self._reading():
            return fetch(self._resolve_run(), self._artifact, folder)

    def _exists(self) -> bool:
        if not self._loads_from_run:
            return self._dataset.exists()
        return super()._exists()

    def _is_in(self, run: RunHandle) -> bool:
        return has_artifact(run, self._artifact)

    def _release(self) -> None:
        self._dataset.release()

    def _describe(self) -> dict[str, Any]:
        return {"dataset": self._dataset, **super()._describe()}

    def _init_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._init_config()
        config.pop("versioned", None)  # Kedro's reading of `version`, which it always passes
        return config

    @property
    def _version(self) -> Version | None:
        return version_of(self._dataset)

    @_version.setter
    def _version(self, version: Version | None) -> None:
        set_version(self._dataset, version)

    def __getattr__(self, name: str) -> Any:
        # Its path, `preview`, `confirm`, the versions that there are: what only the wrapped
        # dataset has. While an instance is copied or unpickled there is none yet.
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_draft": None}
        # s3fs, for one, lets no dataset be pickled that has kept its `glob`.
        if not isinstance(location(self._dataset, None)[0], LocalFileSystem):
            state["version"] = self._version
            del state["_dataset"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_dataset" not in state:
            self._make_dataset(self.__dict__.pop("version"))


def _temporary_folder(run: RunHandle) -> Path:
    """Make a folder that is removed when the Kedro run ends, else when this process does."""
    folder = mkdtemp()
    # Unlike `atexit`, this works in the processes of a ParallelRunner too.
    remove = Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    if run.is_ours:
        run.before_end(remove)
    return Path(folder)
