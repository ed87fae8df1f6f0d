"""Send what is recorded on the disk to the server.

What has been sent is noted after each request. When the answer to one is lost it is made again:
whatever could be doubled by that is looked for on the server first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .contact import brisk_registry, brisk_store, is_http, is_patient
from .failures import reason_of
from .offline import as_the_server_sees, find_again, is_refusal
from .recording import (
    EXPERIMENT,
    ORIGIN,
    KedroRun,
    ModelNotes,
    Notes,
    Recording,
    is_recorded_experiment,
    is_remote_database,
    tidy,
)
from .server import prepare

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

# As many as MLflow takes in one request (mlflow.utils.validation).
METRICS, PARAMS, TAGS = 1000, 100, 100

# A tag that has ids of runs of the same store.
PARENT = "mlflow.parentRunId"

# The tag of a model that has the versions it is registered as.
VERSIONS = "mlflow.modelVersions"

# Called after each request that sends something.
Step = Callable[[], None]


def _no_step() -> None:
    pass


def look_for(recording: Recording, *, once: bool = False) -> bool:
    """See whether a server answers, and note it; gives up after ten seconds, or at once."""
    try:
        contact(recording, once=once)
    except Exception as error:  # each kind of store has errors of its own
        recording.away.note(reason_of(error))
        return False
    find_again(recording)
    return True


def contact(recording: Recording, *, once: bool = False) -> None:
    """Ask a server for what costs it little, and needs all that the rest will need."""
    there = client_of(recording)  # knocks at a database
    uri = recording.tracking_uri
    store = there._tracking_client.store
    if not is_patient(uri):
        store = brisk_store(uri, ()) if once else brisk_store(uri)
    store.search_experiments(max_results=1)


def send(recording: Recording, run: KedroRun, step: Step = _no_step) -> None:
    """Send what is recorded of a Kedro run and is not sent yet.

    Raises:
        Exception: What the server's client or that of a storage raises while one is away.
    """
    with run.lock():
        send_locked(recording, run, step)


def send_locked(
    recording: Recording, run: KedroRun, step: Step = _no_step, *, is_last: bool = False
) -> None:
    """Send it where nobody else can at the same time; `is_last` when no more will be recorded."""
    ids: dict[str, str] = {}
    there = client_of(recording)
    stores = _Creating.of(recording, there)
    tidy(recording, run)
    for notes in run.notes():
        if not notes.ended and not notes.is_being_opened:
            _Sender(recording, run, notes, ids, step, there, stores).send(is_last=is_last)
        ids[notes.run_id] = notes.remote_id


@dataclass(frozen=True)
class _Creating:
    """Stores of the server that ask only once for what would be there twice."""

    runs: Any
    registry: Any

    @classmethod
    def of(cls, recording: Recording, client: MlflowClient) -> _Creating:
        uri, registry_uri = recording.tracking_uri, recording.registry_uri
        runs = brisk_store(uri) if is_http(uri) else client._tracking_client.store
        if is_http(registry_uri):
            return cls(runs, brisk_registry(registry_uri))
        return cls(runs, client._get_registry_client().store)


class _Sender:
    """Sends one MLflow run."""

    def __init__(
        self,
        recording: Recording,
        run: KedroRun,
        notes: Notes,
        ids: dict[str, str],
        step: Step,
        there: MlflowClient,
        stores: _Creating,
    ) -> None:
        self._recording = recording
        self._run = run
        self._notes = notes
        self._ids = ids  # on the server, of the runs on the disk that come before this one
        self._step = step
        self._here = recording.store()
        self._there = there
        self._stores = stores

    def send(self, *, is_last: bool) -> None:
        run: Run = self._here.get_run(self._notes.run_id)
        has_ended = run.info.status not in ("RUNNING", "SCHEDULED")
        if not self._notes.remote_id:
            self._notes.remote_id = self._create(run)
            self._noted()
        self._ids[self._notes.run_id] = self._notes.remote_id
        self._send_params()
        self._send_tags(run)
        self._send_metrics()
        self._send_files(run)
        models = self._models()
        for model in models:
            self._send_model(model)
        self._send_model_metrics()
        self._send_links(run)
        self._send_versions()
        for model in models:
            self._send_model_tags(model)
        if has_ended and run.info.status != self._notes.status:
            self._there.set_terminated(
                self._notes.remote_id, run.info.status, end_time=run.info.end_time
            )
            self._notes.status = run.info.status
        self._notes.ended = is_last and (has_ended or self._notes.attached)
        self._noted()

    def _noted(self) -> None:
        self._run.write(self._notes)
        self._step()

    @contextmanager
    def _refusable(self, what: str) -> Iterator[None]:
        """Note what the server won't ever take, and go on with the rest."""
        try:
            yield
        except Exception as error:
            if not is_refusal(error):
                raise
            self._notes.refused.append(f"{what}: {reason_of(error)}")
            logger.warning("The server refuses %s of %s", self._notes.refused[-1], self._run.name)

    def _create(self, run: Run) -> str:
        """Create the run on the server, unless it is there."""
        from mlflow.entities import RunTag

        tags = dict(run.data.tags)
        experiment = experiment_on_server(self._recording, self._there, run.info.experiment_id)
        known = self._there.search_runs([experiment], f"tags.{ORIGIN} = '{tags[ORIGIN]}'")
        if known:
            return str(known[0].info.run_id)
        parent = tags.get(PARENT)
        tags = {**tags, PARENT: self._ids[parent]} if parent in self._ids else tags
        entities = [RunTag(key, value) for key, value in self._on_server(tags).items()]
        created = self._stores.runs.create_run(
            experiment, run.info.user_id, run.info.start_time, entities, run.info.run_name
        )
        return str(created.info.run_id)

    def _on_server(self, tags: dict[str, str]) -> dict[str, str]:
        """Replace what runs are called on the disk."""
        return {
            key: self._ids.get(value) or value if key == PARENT else value
            for key, value in tags.items()
        }

    def _rows(self, table: str, columns: str, run_column: str, after: int, limit: int) -> Any:
        from sqlalchemy import text

        statement = (
            f"SELECT rowid, {columns} FROM {table} "
            f"WHERE {run_column} = :run AND rowid > :after ORDER BY rowid LIMIT :limit"
        )
        values = {"run": self._notes.run_id, "after": after, "limit": limit}
        with self._here.engine.connect() as connection:
            return connection.execute(text(statement), values).all()

    def _log(self, kind: str, entities: Sequence[Any]) -> None:
        """Send entities in one request, or one by one when the server refuses one of them."""
        send: Any = self._there.log_batch
        try:
            send(self._notes.remote_id, **{kind: entities})
        except Exception as error:
            if not is_refusal(error):
                raise
            for entity in entities:
                with self._refusable(f"{kind} {entity.key!r}"):
                    send(self._notes.remote_id, **{kind: [entity]})

    def _send_params(self) -> None:
        from mlflow.entities import Param

        while rows := self._rows("params", "key, value", "run_uuid", self._notes.params, PARAMS):
            self._log("params", [Param(row.key, row.value) for row in rows])
            self._notes.params = rows[-1].rowid
            self._noted()

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        columns = "key, value, timestamp, step, is_nan"
        while rows := self._rows("metrics", columns, "run_uuid", self._notes.metrics, METRICS):
            points = [
                Metric(row.key, float("nan") if row.is_nan else row.value, row.timestamp, row.step)
                for row in rows
            ]
            self._log("metrics", points)
            self._notes.metrics = rows[-1].rowid
            self._noted()

    def _send_model_metrics(self) -> None:
        """Link points of metrics with models."""
        from mlflow.entities import Metric

        columns = (
            "model_id, metric_name, metric_value, metric_timestamp_ms, metric_step, dataset_name, "
            "dataset_digest"
        )
        after = "model_metrics"
        while rows := self._rows(
            "logged_model_metrics", columns, "run_id", getattr(self._notes, after), METRICS
        ):
            points = [
                Metric(
                    row.metric_name,
                    row.metric_value,
                    row.metric_timestamp_ms,
                    row.metric_step,
                    model_id=self._model_on_server(row.model_id),
                    dataset_name=row.dataset_name,
                    dataset_digest=row.dataset_digest,
                    run_id=self._notes.remote_id,
                )
                for row in rows
            ]
            self._log("metrics", points)
            self._notes.model_metrics = rows[-1].rowid
            self._noted()

    def _send_tags(self, run: Run) -> None:
        from mlflow.entities import RunTag

        tags = self._on_server(run.data.tags)
        known = self._notes.tags
        new = [RunTag(key, value) for key, value in tags.items() if known.get(key) != value]
        for start in range(0, len(new), TAGS):
            self._log("tags", new[start : start + TAGS])
        for key in known.keys() - tags.keys():
            self._there.delete_tag(self._notes.remote_id, key)
        if known != tags:
            self._notes.tags = tags
            self._noted()

    def _send_files(self, run: Run) -> None:
        folder = self._recording.files(run.info.artifact_uri)
        if new := _new_files(folder, self._notes.files):
            location = self._there.get_run(self._notes.remote_id).info.artifact_uri
            self._upload(folder, new, self._notes.files, location or "")

    def _upload(
        self,
        folder: Path,
        files: Sequence[Path],
        known: dict[str, list[int]],
        location: str,
        replaced: dict[str, str] | None = None,
    ) -> None:
        """Send files, with other words in the description of a model."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        storage = get_artifact_repository(location, self._recording.tracking_uri)
        for file in files:
            name = file.relative_to(folder)
            path = name.parent.as_posix() if name.parent.parts else None
            while (looks := _looks(file)) != known.get(name.as_posix()):  # else written meanwhile
                if replaced and file.name == "MLmodel":
                    with _other_words(file, replaced) as copy:
                        storage.log_artifact(str(copy), path)
                else:
                    storage.log_artifact(str(file), path)
                known[name.as_posix()] = looks
                self._noted()

    def _models(self) -> list[LoggedModel]:
        rows = self._rows("logged_models", "model_id", "source_run_id", -1, -1)
        return [self._here.get_logged_model(row.model_id) for row in rows]

    def _model_on_server(self, model_id: str) -> str:
        notes = self._notes.models.get(model_id)
        return notes.remote_id if notes else model_id

    def _send_model(self, model: LoggedModel) -> None:
        """Send a model's parameters and files."""
        from mlflow.entities import LoggedModelParameter

        notes = self._notes.models.setdefault(model.model_id, ModelNotes())
        if not notes.remote_id:
            there = self._model_there(model)
            notes.remote_id, notes.location = there.model_id, there.artifact_location
            notes.params = sorted(there.params)
            notes.tags = dict(there.tags)
            self._noted()
        if missing := (model.params or {}).keys() - notes.params:
            known = self._there.get_logged_model(notes.remote_id).params or {}
            params = [
                LoggedModelParameter(key, value)
                for key, value in model.params.items()
                if key in missing and key not in known
            ]
            with self._refusable(f"parameters of the model {model.name!r}"):
                self._stores.runs.log_logged_model_params(notes.remote_id, params)
            notes.params += sorted(missing)
            self._noted()
        folder = self._recording.files(model.artifact_location)
        replaced = {
            model.artifact_location: notes.location,
            model.model_id: notes.remote_id,
            self._notes.run_id: self._notes.remote_id,
        }
        if new := _new_files(folder, notes.files):
            self._upload(folder, new, notes.files, notes.location, replaced)
        if str(model.status) != notes.status and str(model.status) != "PENDING":
            self._there.finalize_logged_model(notes.remote_id, model.status)
            notes.status = str(model.status)
            self._noted()

    def _model_there(self, model: LoggedModel) -> LoggedModel:
        """Find the model on the server, or create it there."""
        from mlflow.entities import LoggedModelParameter, LoggedModelTag

        experiment = experiment_on_server(self._recording, self._there, model.experiment_id)
        found = self._there.search_logged_models(
            [experiment], f"tags.{ORIGIN} = '{model.tags[ORIGIN]}'"
        )
        if found:
            return found[0]
        created: LoggedModel = self._stores.runs.create_logged_model(
            experiment,
            model.name,
            self._notes.remote_id,
            [LoggedModelTag(ORIGIN, model.tags[ORIGIN])],
            [LoggedModelParameter(key, value) for key, value in (model.params or {}).items()],
            model.model_type,
        )
        return created

    def _send_model_tags(self, model: LoggedModel) -> None:
        """Send a model's tags; one of them names its versions, which are sent by now."""
        notes = self._notes.models[model.model_id]
        tags = dict(model.tags)
        if VERSIONS in tags:
            tags[VERSIONS] = self._versions_on_server(tags[VERSIONS])
        new = {key: value for key, value in tags.items() if notes.tags.get(key) != value}
        if new:
            self._there.set_logged_model_tags(notes.remote_id, new)
        for key in notes.tags.keys() - tags.keys():
            self._there.delete_logged_model_tag(notes.remote_id, key)
        if notes.tags != tags:
            notes.tags = tags
            self._noted()

    def _versions_on_server(self, text: str) -> str:
        versions = json.loads(text)
        for found in versions:
            known = self._notes.versions.get(f"{found['name']}/{found['version']}")
            found["version"] = known or found["version"]
        return json.dumps(versions)

    def _send_links(self, run: Run) -> None:
        """Say which data and models the run took, and which models it made."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        inputs, outputs = run.inputs, run.outputs
        data = {
            f"data {item.dataset.name} {item.dataset.digest}": item
            for item in (inputs.dataset_inputs if inputs else ())
        }
        taken = {
            f"in {item.model_id}": LoggedModelInput(self._model_on_server(item.model_id))
            for item in (inputs.model_inputs if inputs else ())
        }
        made = {
            f"out {item.model_id} {item.step}": LoggedModelOutput(
                self._model_on_server(item.model_id), item.step
            )
            for item in (outputs.model_outputs if outputs else ())
        }
        known = set(self._notes.links)
        if not (data.keys() | taken.keys() | made.keys()) - known:
            return
        new_data = [item for key, item in data.items() if key not in known]
        new_taken = [item for key, item in taken.items() if key not in known]
        if new_data or new_taken:  # MLflow takes each of them only once
            self._there.log_inputs(self._notes.remote_id, new_data, new_taken)
        there = self._there.get_run(self._notes.remote_id).outputs
        has = {(model.model_id, model.step) for model in (there.model_outputs if there else ())}
        new_made = [
            model
            for key, model in made.items()
            if key not in known and (model.model_id, model.step) not in has
        ]
        if new_made:
            self._stores.runs.log_outputs(self._notes.remote_id, new_made)
        self._notes.links = sorted(known | data.keys() | taken.keys() | made.keys())
        self._noted()

    @cached_property
    def _registry(self) -> Any:
        return self._recording.registry()

    def _send_versions(self) -> None:
        """Register what was registered on the disk."""
        for model in self._registry.search_registered_models():
            key = f"registered {model.name} {sorted(model.tags.items())} {model.description}"
            if key not in self._notes.links:
                self._send_registered_model(model)
                self._notes.links.append(key)
                self._noted()
        found = self._registry.search_model_versions(f"run_id = '{self._notes.run_id}'")
        for version in sorted(found, key=lambda version: int(version.version)):
            key = f"{version.name}/{version.version}"
            if key not in self._notes.versions:
                self._notes.versions[key] = str(self._version_there(version).version)
                self._noted()
            self._send_version_tags(version, self._notes.versions[key])
            self._send_aliases(version, self._notes.versions[key])

    def _send_registered_model(self, model: RegisteredModel) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._there.create_registered_model(model.name, dict(model.tags), model.description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            for key, value in model.tags.items():
                self._there.set_registered_model_tag(model.name, key, value)
            if model.description:
                self._there.update_registered_model(model.name, model.description)

    def _version_there(self, version: ModelVersion) -> ModelVersion:
        """Find the version on the server, or make it there."""
        from mlflow.entities.model_registry import ModelVersionTag

        origin = version.tags[ORIGIN]
        known = self._there.search_model_versions(
            f"name = '{version.name}' and tags.{ORIGIN} = '{origin}'"
        )
        if known:
            return known[0]
        model_id = model_of(version.source or "")  # the store on the disk doesn't keep it
        with as_the_server_sees():
            created: ModelVersion = self._stores.registry.create_model_version(
                version.name,
                f"models:/{self._model_on_server(model_id)}"
                if model_id
                else source_on_server(self._recording, version.source or ""),
                self._notes.remote_id,
                [ModelVersionTag(key, value) for key, value in version.tags.items()],
                version.run_link,
                version.description,
                model_id=self._model_on_server(model_id) if model_id else None,
            )
        return created

    def _send_version_tags(self, version: ModelVersion, there: str) -> None:
        key = f"tags {version.name} {version.version} {sorted(version.tags.items())}"
        if key not in self._notes.links:
            for name, value in version.tags.items():
                if name != ORIGIN:
                    self._there.set_model_version_tag(version.name, there, name, value)
            self._notes.links.append(key)
            self._noted()

    def _send_aliases(self, version: ModelVersion, there: str) -> None:
        """Set the aliases of a version, but for those that a newer one has got since."""
        from mlflow.exceptions import MlflowException

        for alias in self._registry.get_model_version(version.name, version.version).aliases:
            key = f"alias {version.name} {alias} {version.version}"
            if key in self._notes.links:
                continue
            try:
                has = self._there.get_model_version_by_alias(version.name, alias)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                has = None
            if has and has.creation_timestamp > version.creation_timestamp and has.version != there:
                logger.warning(
                    "The alias %r of %s stays at version %s, which is newer than this run's",
                    alias,
                    version.name,
                    has.version,
                )
            else:
                self._there.set_registered_model_alias(version.name, alias, there)
            self._notes.links.append(key)
            self._noted()


def model_of(source: str) -> str | None:
    """Tell which model a version is made of."""
    found = re.fullmatch(r"models:/(m-[0-9a-f]+)", source)
    return found[1] if found else None


def source_on_server(recording: Recording, source: str) -> str:
    """Say where the files of a run or a model on the disk are on the server."""
    artifacts = (recording.folder / "artifacts").as_uri()
    if not source.startswith((artifacts, str(recording.folder))):
        return source
    store, there = recording.store(), client_of(recording)
    for run in recording.kedro_runs():
        for notes in run.notes():
            here = store.get_run(notes.run_id).info.artifact_uri
            for start in (here, str(recording.files(here))):
                if source.startswith(start):
                    location = there.get_run(notes.remote_id).info.artifact_uri
                    return f"{location}{source.removeprefix(start)}"
    return source


def client_of(recording: Recording) -> MlflowClient:
    """Give the client of the server itself."""
    from mlflow import MlflowClient

    if is_remote_database(recording.tracking_uri):
        prepare(recording.tracking_uri, None)
    return MlflowClient(recording.tracking_uri, recording.registry_uri)


def experiment_on_server(recording: Recording, there: MlflowClient, experiment_id: str) -> str:
    """Find the experiment of runs on the disk, or create it as `mlflow.yml` said."""
    here = recording.store()
    experiment = here.get_experiment(experiment_id)
    tags = dict(experiment.tags)
    how = json.loads(tags.pop(EXPERIMENT, "{}"))
    if is_recorded_experiment(experiment_id):
        found = there.get_experiment_by_name(how["name"])
        if found is None:
            return there.create_experiment(how["name"], how["artifact_location"], tags)
        if found.lifecycle_stage == "deleted":
            there.restore_experiment(found.experiment_id)
        experiment_id = found.experiment_id
    for key, value in tags.items():
        there.set_experiment_tag(experiment_id, key, value)
    return experiment_id


def _new_files(folder: Path, known: dict[str, list[int]]) -> list[Path]:
    """List the files that are new, or not as they were when they were sent."""
    from mlflow.store.artifact import local_artifact_repo
    from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

    draft = getattr(local_artifact_repo, "_TEMP_ARTIFACT_PREFIX", "\0")  # of MLflow, not there yet
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [
        file
        for file in files
        if not file.name.startswith(draft)
        and file.name != REGISTERED_MODEL_META_FILE_NAME  # MLflow's own, where it has loaded one
        and _looks(file) != known.get(file.relative_to(folder).as_posix())
    ]


def _looks(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


@contextmanager
def _other_words(file: Path, replaced: dict[str, str]) -> Iterator[Path]:
    """Copy a text with other words in it."""
    text = file.read_text(encoding="utf-8")
    for old, new in replaced.items():
        text = text.replace(old, new)
    with TemporaryDirectory() as folder:
        copy = Path(folder, file.name)
        copy.write_text(text, encoding="utf-8")
        yield copy
