"""Where runs are recorded before they are sent to a server that may go away.

Each server has a folder in `.mlflow-offline` with a store of MLflow's own (`mlflow.db` and
`artifacts/`), and in `runs/` one folder for each Kedro run that notes what has been sent of it.
Nothing here talks to a server.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from uuid import uuid4

from . import endings
from .loading import ConfigError, is_database, shown_uri, sqlite_file

if TYPE_CHECKING:
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlRegistry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

# The folder of a project that runs are recorded in.
FOLDER = ".mlflow-offline"

# Begins the URI under which MLflow finds the recording stores.
SCHEME = "offline"

# The tag that has the id which a run, model or version was given on the disk. It tells whether
# the server has it already when the answer to its creation was lost.
ORIGIN = "kedro_recorded_as"

# The tag of an experiment on the disk that the server hasn't got yet: how to create it there.
EXPERIMENT = "kedro_experiment"

# Versions and experiments on the disk are numbered from here, so that none is taken for another
# one on the server. MLflow keeps the numbers of experiments in 64 bits, those of versions in 32.
FIRST_VERSION = 1_000_000_000
FIRST_EXPERIMENT = 5 * 10**18


@dataclass(frozen=True)
class Recording:
    """The folder of a server, whose two URIs are here too."""

    folder: Path
    tracking_uri: str
    registry_uri: str

    @classmethod
    def of(cls, uri: str) -> Recording:
        """Read the URI of a recording store."""
        uris, _, folder = uri.removeprefix(f"{SCHEME}:").rpartition("#")
        tracking_uri, _, registry_uri = uris.partition("|")
        return cls(Path(folder), tracking_uri, registry_uri)

    @property
    def uri(self) -> str:
        """The URI under which MLflow finds the recording stores."""
        return f"{SCHEME}:{self.tracking_uri}|{self.registry_uri}#{self.folder.as_posix()}"

    @property
    def away(self) -> Away:
        """Whether the server is away, as far as is known."""
        return Away(self.folder / "away")

    def store(self) -> SqlAlchemyStore:
        """Give the store on the disk; it is made when it isn't there."""
        return _stores(self.folder)[0]

    def registry(self) -> SqlRegistry:
        """Give the store of registered models on the disk."""
        return _stores(self.folder)[1]

    def files(self, uri: str | None) -> Path:
        """Give the folder with the files of a run or model, also when the project was moved."""
        _, _, path = (uri or "").partition(f"/{FOLDER}/")
        return self.folder.joinpath(*unquote(path).split("/")[1:])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others from making an experiment on the disk meanwhile."""
        self.store()  # it makes the folder
        with _locked(self.folder / "experiments.lock"):
            yield

    def kedro_runs(self) -> list[KedroRun]:
        """List the Kedro runs that are on the disk, the oldest first."""
        found = [KedroRun(folder) for folder in self.folder.glob("runs/*") if folder.is_dir()]
        opened = {run: min((n.opened for n in run.notes()), default=None) for run in found}
        return sorted((run for run in found if opened[run]), key=lambda run: opened[run] or 0)

    def kedro_run_of(self, run_id: str) -> KedroRun | None:
        """Find the Kedro run that an MLflow run on the disk belongs to."""
        for file in self.folder.glob(f"runs/*/{run_id}.json"):
            return KedroRun(file.parent)
        return None

    def open_kedro_run(self, name: str) -> KedroRun:
        """Make the notes of a Kedro run that this process does."""
        run = KedroRun(self.folder / "runs" / name)
        run.folder.mkdir(parents=True, exist_ok=True)
        run.take_part()
        return run


def recording(tracking_uri: str, registry_uri: str, project_path: Path) -> Recording | None:
    """Say where the runs of a project for a server are recorded; None where nothing can go away."""
    if sqlite_file(tracking_uri) or tracking_uri.startswith("file:"):
        return None
    name = re.sub(r"[^\w.-]+", "-", shown_uri(tracking_uri)).strip("-")
    return Recording(project_path / FOLDER / name, tracking_uri, registry_uri)


def waiting(project_path: Path) -> list[str]:
    """Name the Kedro runs that are recorded and not sent, and that no process works on."""
    return [
        run.name
        for folder in sorted((project_path / FOLDER).glob("*"))
        for run in Recording(folder, "", "").kedro_runs()
        if not run.is_sent and not run.is_in_progress
    ]


# How long one waits for another who sends the same run, in seconds.
WAITING = 24 * 3600.0

# So long it holds, in seconds, that a server is away: whoever sends looks for it more often.
HOLDS = 90.0


@dataclass(frozen=True)
class Away:
    """A file that tells all processes of the project that the server is away, and why."""

    file: Path

    def __bool__(self) -> bool:
        try:
            noted = self.file.stat().st_mtime
        except FileNotFoundError:
            return False
        return time.time() - noted < HOLDS

    def note(self, reason: str) -> bool:
        """Note that the server is away; tells whether this was news."""
        news = not self.file.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(reason, encoding="utf-8")
        return news

    def forget(self) -> bool:
        """Note that the server answers; tells whether this was news."""
        news = self.file.exists()
        self.file.unlink(missing_ok=True)
        return news

    @property
    def reason(self) -> str:
        """Why the server was away when that was noted; nothing when it wasn't."""
        return self.file.read_text(encoding="utf-8") if self.file.exists() else ""


@dataclass(frozen=True)
class KedroRun:
    """A Kedro run on the disk: a folder with the notes of its MLflow run and of their children."""

    folder: Path

    @property
    def name(self) -> str:
        """The id that the run had on the disk first."""
        return self.folder.name

    @property
    def is_in_progress(self) -> bool:
        """Whether a process works on it."""
        return any(not process.is_gone() for process in self.processes())

    @property
    def is_sent(self) -> bool:
        """Whether the server has all of it."""
        return (self.folder / "sent").exists()

    def processes(self) -> list[endings.Process]:
        """List the processes that have begun to work on it and not ended that."""
        found = sorted(self.folder.glob("*.process"))
        return [endings.Process(**json.loads(file.read_text(encoding="utf-8"))) for file in found]

    def take_part(self) -> None:
        """Note that this process works on it; tasks of an orchestrator may be several."""
        _write(self._process, asdict(endings.this_process()))

    def leave(self) -> bool:
        """Note that this process has ended its work; tells whether it was the last one."""
        self._process.unlink(missing_ok=True)
        return not self.is_in_progress

    @property
    def _process(self) -> Path:
        process = endings.this_process()
        return self.folder / f"{process.host}-{process.pid}.process"

    def note_sent(self) -> None:
        """Note that the server has all of it."""
        (self.folder / "sent").touch()

    def notes(self) -> list[Notes]:
        """Read what is noted of each MLflow run, parents before their children."""
        read = [Notes.read(file) for file in self.folder.glob("*.json")]
        return sorted((notes for notes in read if notes), key=lambda notes: notes.opened)

    def write(self, notes: Notes) -> None:
        """Write what is noted of an MLflow run, as a whole or not at all."""
        _write(self.folder / f"{notes.run_id}.json", asdict(notes))

    def remove(self, notes: Notes) -> None:
        """Forget an MLflow run."""
        (self.folder / f"{notes.run_id}.json").unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others from sending or removing it meanwhile."""
        file = self.folder.with_name(f"{self.name}.lock")
        try:
            with _locked(file):
                yield
        finally:
            if not self.folder.exists():
                with suppress(PermissionError):  # on Windows, where somebody else waits for it
                    file.unlink(missing_ok=True)


@dataclass
class ModelNotes:
    """What has been sent of a logged model.

    Args:
        remote_id: Its id on the server; empty while that isn't known.
        location: Where its files are for the server.
        files: What each looked like when it was sent: size, time and number.
        params: The names of those that the server has.
        tags: Those that the server has.
        status: That which the server has; empty before the model is whole.
    """

    remote_id: str = ""
    location: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)
    params: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = ""


@dataclass
class Notes:
    """What has been sent of an MLflow run.

    Args:
        run_id: Its id on the disk.
        opened: When it was opened, in nanoseconds since 1970.
        remote_id: Its id on the server; empty while that isn't known.
        given: Whether it was on the server before.
        attached: Whether somebody else ends it.
        opening: The process that is about to create it on the server.
        params, metrics, model_metrics: The last row of each that was sent.
        tags: Those that the server has.
        files: As those of a model.
        models: By their ids on the disk.
        versions: The version on the server of each `name/version` on the disk.
        links: Inputs and outputs that were sent.
        status: That with which its end was sent.
        ended: Whether nothing more will be sent.
        refused: What the server refused for good, in sentences.
    """

    run_id: str
    opened: int = 0
    remote_id: str = ""
    given: bool = False
    attached: bool = False
    opening: dict[str, Any] | None = None
    params: int = 0
    metrics: int = 0
    model_metrics: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    models: dict[str, ModelNotes] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    status: str = ""
    ended: bool = False
    refused: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Notes | None:
        """Read a file; None when another process has just removed it."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        found["models"] = {key: ModelNotes(**value) for key, value in found["models"].items()}
        return cls(**found)

    @property
    def is_being_opened(self) -> bool:
        """Whether a process is about to create it on the server."""
        return self.opening is not None and not endings.Process(**self.opening).is_gone()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock.

    SQLite locks a file in a way that every system knows, and that ends with the process.
    """
    connection = sqlite3.connect(file, timeout=WAITING, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        connection.close()


def _write(file: Path, content: Any) -> None:
    draft = file.with_name(f".{file.name}.{uuid4().hex}")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(file)


# The stores on the disk that this process has open.
_open: dict[Path, tuple[SqlAlchemyStore, SqlRegistry]] = {}
_opening = Lock()


def _stores(folder: Path) -> tuple[SqlAlchemyStore, SqlRegistry]:
    """Open the stores of a folder; they are made when they aren't there, or not any more."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlRegistry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from .server import part_when_forked, prepare

    exists = (folder / "mlflow.db").exists()
    if exists and (known := _open.get(folder)):
        return known
    with _opening:
        if folder in _open and not exists:  # somebody has removed it meanwhile
            for store in _open.pop(folder):
                store.engine.dispose()
        if folder not in _open:
            part_when_forked()
            _make(folder)
            uri, artifacts = _uri(folder), (folder / "artifacts").as_uri()
            prepare(uri, artifacts)
            _open[folder] = SqlAlchemyStore(uri, artifacts), SqlRegistry(uri)
        return _open[folder]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Runs can't be recorded in {folder.parent} ({error.strerror}): make it writable, or "
            "set tracking.on_unreachable in mlflow.yml to fail."
        ) from error


def _uri(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').as_posix()}"


def remove(found: Recording, run: KedroRun) -> None:
    """Remove all that is on the disk of a Kedro run."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    store = found.store()
    for notes in run.notes():
        for model_id in notes.models:
            if is_there(store.get_logged_model, model_id):
                _remove(found.files(store.get_logged_model(model_id).artifact_location))
                store._hard_delete_logged_model(model_id)
            _artifact_repos_cache.pop(model_id, None)
        if is_there(store.get_run, notes.run_id):
            _remove(found.files(store.get_run(notes.run_id).info.artifact_uri))
            store._hard_delete_run(notes.run_id)
        _artifact_repos_cache.pop(notes.run_id, None)  # the same id may be the server's
        for name, _, version in (key.rpartition("/") for key in notes.versions):
            _unregister(found.registry(), name, version)
    if run.folder.is_dir():  # else another process was first
        shutil.rmtree(run.folder)


def _unregister(registry: SqlRegistry, name: str, version: str) -> None:
    if is_there(lambda name: registry.get_model_version(name, version), name):
        registry.delete_model_version(name, version)
    left = registry.search_model_versions(f"name = '{name}'")
    if not left and is_there(registry.get_registered_model, name):
        registry.delete_registered_model(name)


def _remove(files: Path) -> None:
    if files.parent.is_dir():
        shutil.rmtree(files.parent)


def is_there(get: Callable[[str], Any], name: str) -> bool:
    """Tell whether a store on the disk has something."""
    from mlflow.exceptions import MlflowException

    try:
        get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def tidy(found: Recording, run: KedroRun) -> None:
    """Forget notes of MLflow runs that aren't there: their process was killed on opening them."""
    store = found.store()
    for notes in run.notes():
        if not notes.is_being_opened and not is_there(store.get_run, notes.run_id):
            run.remove(notes)


def is_recorded_experiment(experiment_id: str) -> bool:
    """Tell whether an experiment is on the disk only."""
    return str(experiment_id).isdecimal() and int(experiment_id) >= FIRST_EXPERIMENT


def is_remote_database(uri: str) -> bool:
    """Tell whether a URI names a database that is not a file."""
    return is_database(uri) and sqlite_file(uri) is None


def change_id(found: Recording, kind: str, old: str, new: str) -> None:
    """Give a run, a model or an experiment on the disk the id that it has on the server."""
    from sqlalchemy import text

    statements = {
        "run": (
            "UPDATE runs SET run_uuid = :new WHERE run_uuid = :old",
            "UPDATE tags SET run_uuid = :new WHERE run_uuid = :old",
        ),
        "model": (
            "UPDATE logged_models SET model_id = :new WHERE model_id = :old",
            "UPDATE logged_model_params SET model_id = :new WHERE model_id = :old",
            "UPDATE logged_model_tags SET model_id = :new WHERE model_id = :old",
        ),
        "experiment": (
            "UPDATE experiments SET experiment_id = :new WHERE experiment_id = :old",
            "UPDATE experiment_tags SET experiment_id = :new WHERE experiment_id = :old",
        ),
    }[kind]
    with found.store().engine.begin() as connection:
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
        for statement in statements:
            connection.execute(text(statement), {"old": old, "new": new})


def number_version(found: Recording, name: str, old: int, new: int | None = None) -> int:
    """Give a version on the disk another number, by default one that the server never gives."""
    from sqlalchemy import text

    with found.registry().engine.begin() as connection:
        if new is None:
            last = connection.execute(
                text("SELECT max(version) FROM model_versions WHERE name = :name"), {"name": name}
            ).scalar_one()
            new = max(int(last), FIRST_VERSION) + 1
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
        for table in ("model_versions", "model_version_tags"):
            connection.execute(
                text(f"UPDATE {table} SET version = :new WHERE name = :name AND version = :old"),
                {"name": name, "old": old, "new": new},
            )
    return new
