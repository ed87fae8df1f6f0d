"""The store on disk that runs are kept in: an ordinary MLflow store, one for each server."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError, SettingError
from ..config.keys import CreateExperimentOptions, ExperimentOptions
from ..config.uris import local_path, shown_uri, sqlite_file, sqlite_uri
from ..stores.embedded import prepare
from ..stores.server import Server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# The folder of a project that has the stores.
FOLDER = ".mlflow-offline"

# The tag of an experiment on disk that says where its artifacts go on the server.
ARTIFACT_LOCATION = "kedro_artifact_location"

# How long one process waits for another one that replays, in seconds.
LOCK_TIMEOUT = 60.0


class DiskError(ConfigError):
    """The store on disk can't be used: one sentence that names the file."""


@dataclass(frozen=True)
class Disk:
    """A store on disk, and the server that its runs are replayed to."""

    folder: Path
    server: Server
    restore_if_deleted: bool = True  # of tracking.experiment in mlflow.yml

    @property
    def file(self) -> Path:
        """The database."""
        return self.folder / "mlflow.db"

    @property
    def uri(self) -> str:
        """The URI under which MLflow opens the store."""
        return sqlite_uri(self.file)

    @property
    def address(self) -> str:
        """The address of the server, for messages."""
        return shown_uri(self.server.tracking_uri)

    @property
    def artifacts(self) -> Path:
        """The folder of all artifacts."""
        return self.folder / "artifacts"

    @property
    def store(self) -> Server:
        """The store, as what a run logs to."""
        return Server(self.uri, self.uri, replayed_to=self.server.tracking_uri)

    def client(self) -> MlflowClient:
        """Return a client of the store, which is created when it isn't there.

        Raises:
            DiskError: When it can't be created, isn't MLflow's, or is another version's.
        """
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise DiskError(
                f"Runs can't be kept in {self.folder} ({error.strerror}): make it writable, "
                "or set tracking.on_unreachable in mlflow.yml to fail."
            ) from error
        try:
            prepare(self.uri, self.artifacts.as_uri(), self.folder)
            client = self.store.client
            client.search_experiments(max_results=1)
        except SettingError as error:
            raise DiskError(f"{self.file}: {error}.") from error
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise DiskError(
                f"{self.file}: can't be read as a store of MLflow ({reason}): move it away."
            ) from error
        return client

    def files(self, uri: str | None) -> Path:
        """Return the folder with the files of a run or model.

        Args:
            uri: The `artifact_uri` of a run or `artifact_location` of a model, as the store has it.

        Raises:
            DiskError: When that isn't a folder inside of the store's own: the store may come
                from somebody else, and what is below is uploaded and removed.
        """
        root, folder = self.artifacts.resolve(), local_path(uri or "").resolve()
        if root not in folder.parents:
            raise DiskError(f"its artifacts are at {uri!r}, outside of {root}")
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock: one process at a time replays.

        SQLite's own lock on a file works on every system, and ends with the process.

        Raises:
            DiskError: When another process holds it for longer than a minute.
        """
        lock = sqlite3.connect(
            self.folder / "replay.lock", timeout=LOCK_TIMEOUT, isolation_level=None
        )
        try:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                raise DiskError(
                    f"{self.folder}: another process has been replaying its runs for a minute: "
                    "wait for its end, then try again."
                ) from error
            yield
        finally:
            lock.close()


def disk_of(server: Server, project_path: Path, *, restore_if_deleted: bool = True) -> Disk | None:
    """Return the store on disk for a server; None for one that is a file itself."""
    uri = shown_uri(server.tracking_uri)
    if sqlite_file(uri) or uri.startswith("file:"):
        return None
    readable = re.sub(r"[^\w.-]+", "-", uri).strip("-")
    # What is readable is alike for http://h/a-b and http://h/a/b.
    name = f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    return Disk(project_path / FOLDER / name, server, restore_if_deleted)


def disks(project_path: Path) -> list[Disk]:
    """Return every store on disk of a project, without the server that each is for."""
    folders = sorted(file.parent for file in (project_path / FOLDER).glob("*/mlflow.db"))
    return [Disk(folder, Server("", "")) for folder in folders]


def experiment_on_disk(disk: Disk, experiment: ExperimentOptions) -> ExperimentOptions:
    """Open the store for a run, and return the options of the run's experiment in it.

    Its artifacts are in the store's folder; where they go on the server is kept in a tag.
    """
    disk.client()
    options = experiment.create_experiment_kwargs
    tags = dict(options.tags or {})
    if options.artifact_location:
        tags[ARTIFACT_LOCATION] = options.artifact_location
    on_disk = CreateExperimentOptions(artifact_location=disk.artifacts.as_uri(), tags=tags)
    return experiment.model_copy(update={"create_experiment_kwargs": on_disk})


def families(client: MlflowClient) -> list[list[Run]]:
    """Return the runs of a store on disk, each with its children, parents first, by start."""
    from mlflow.entities import ViewType

    experiments = pages(client.search_experiments, view_type=ViewType.ALL)
    runs = pages(client.search_runs, [experiment.experiment_id for experiment in experiments])
    by_id = {run.info.run_id: run for run in runs}

    def line_of(run: Run) -> list[Run]:
        """Return a run and its ancestors, the root first."""
        line = [run]
        while parent := by_id.get(line[0].data.tags.get("mlflow.parentRunId", "")):
            if parent in line:  # in a store that somebody has written by hand
                break
            line.insert(0, parent)
        return line

    by_root: dict[str, list[Run]] = defaultdict(list)
    lines = [line_of(run) for run in runs]
    for line in sorted(lines, key=lambda line: (len(line), line[-1].info.start_time)):
        by_root[line[0].info.run_id].append(line[-1])
    return list(by_root.values())


def ended_families(client: MlflowClient) -> list[list[Run]]:
    """Return the families in a store on disk whose first run has ended: these can be replayed."""
    return [family for family in families(client) if has_ended(family[0])]


def runs_to_replay(project_path: Path) -> list[str]:
    """Return the ids of the runs in a project that are to be replayed, for `doctor`."""
    stores = [ended_families(disk.client()) for disk in disks(project_path)]
    return [family[0].info.run_id for store in stores for family in store]


def pages(search: Any, *arguments: Any, **options: Any) -> list[Any]:
    """Return all results of a search of MLflow's client, page after page."""
    results: list[Any] = []
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        results += page
        token = page.token
        if not token:
            return results


def has_ended(run: Run) -> bool:
    """Check whether a run has ended, so that nothing more will be logged to it."""
    return run.info.status not in ("RUNNING", "SCHEDULED")
