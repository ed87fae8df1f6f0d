"""Any Kedro dataset, with a copy of each saved file among the run's artifacts."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError

from .tracked import TrackedDataset


class MlflowArtifactDataset(TrackedDataset):
    """Wrap a dataset, so that what it saves becomes an artifact of the run as well.

    Args:
        dataset: The wrapped dataset as in `catalog.yml`: a dictionary with a `type`.
        run_id: Load the artifact of this run instead of the local file.
        artifact_path: Folder of the run's artifacts to put the file in; their root when None.
        credentials: Passed to the wrapped dataset.
        metadata: Kept and not used.

    Raises:
        DatasetError: When the wrapped dataset can't be made.
    """

    def __init__(
        self,
        dataset: dict[str, Any],
        run_id: str | None = None,
        artifact_path: str | None = None,
        credentials: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        config = dataset if credentials is None else {**dataset, "credentials": credentials}
        self._dataset = AbstractDataset.from_config("dataset", config)
        self.run_id = run_id
        self.artifact_path = artifact_path
        self.metadata = metadata

    def load(self) -> Any:
        """Load the local file, or with a `run_id` that run's artifact."""
        if self.run_id is None:
            return self._dataset.load()
        from mlflow.artifacts import download_artifacts

        run = self._resolve_run()
        file = PurePosixPath(self.artifact_path or "", self._path().name)
        with TemporaryDirectory() as folder:
            local = download_artifacts(
                run_id=run.run_id,
                artifact_path=str(file),
                dst_path=folder,
                tracking_uri=run.server.tracking_uri,
            )
            where: dict[str, Any] = {self._path_attribute: PurePosixPath(Path(local).as_posix())}
            if isinstance(self._dataset, AbstractVersionedDataset):
                where["_version"] = None  # the artifact is the one version that was saved
            return self._dataset._copy(**where).load()

    def save(self, data: Any) -> None:
        """Save with the wrapped dataset, then copy the file or folder to the run."""
        self._dataset.save(data)
        if self._is_tracked:
            self._resolve_run().log_artifact(str(self._path()), self.artifact_path)

    @property
    def _path_attribute(self) -> str:
        # Datasets of one file keep `_filepath`; those of a folder, such as partitions, `_path`.
        for attribute in ("_filepath", "_path"):
            if hasattr(self._dataset, attribute):
                return attribute
        raise DatasetError(
            f"{type(self._dataset).__name__} can't be an artifact: it has no file of its own."
        )

    def _path(self) -> PurePosixPath:
        path = PurePosixPath(getattr(self._dataset, self._path_attribute))
        if isinstance(self._dataset, AbstractVersionedDataset):
            version = self._dataset.resolve_save_version()
            return path / version / path.name if version else path
        return path

    def _exists(self) -> bool:
        return self._dataset.exists()

    def _release(self) -> None:
        self._dataset.release()

    def _describe(self) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "artifact_path": self.artifact_path,
            "run_id": self.run_id,
        }
