"""Replay runs from the store on disk to the server, with MLflow's public client.

A run on the server has the id on disk in a tag, so that what an interrupted replay has left there
is found and completed. The status is set last: a run that has the same status on the server as on
disk is complete there.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..config.errors import SettingError
from ..config.keys import CreateExperimentOptions, ExperimentOptions
from ..config.uris import is_database
from ..stores import credentials
from ..stores.embedded import prepare
from ..stores.errors import is_away, reason_of
from ..stores.server import experiment_id
from . import _mlflow
from .disk import ARTIFACT_LOCATION, FOLDER, Disk, DiskError, has_ended, pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

# The tag of a run, a model or a version on the server that has its id on disk.
ORIGIN = "kedro_recorded_as"

# The tag of a model that lists the versions that it is registered as.
VERSIONS = "mlflow.modelVersions"

# A file that MLflow writes into the folder of a model when it loads it from there.
WRITTEN_BY_LOADING = "registered_model_meta"

# In the environment of a replay. A request that creates something, and whose answer is lost, must
# not be made again by MLflow: the next replay looks first whether the server has done it.
REPLAY_VARIABLES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_ID = re.compile(r"\b(m-)?[0-9a-f]{32}\b")  # of a run or a model
_MODEL_URI = re.compile(r"models:/(m-[0-9a-f]{32})")


class ReplayError(Exception):
    """A run can't be replayed: one sentence that says why."""


@dataclass(frozen=True)
class Outcome:
    """The replay of a run: its id on the server, or why it stays on disk."""

    run: Run
    id_on_server: str = ""
    problem: str = ""


@contextmanager
def replaying(disk: Disk, variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Hold the lock of a store on disk, in the environment of a replay.

    Args:
        disk: The store.
        variables: Credentials for its server, where they aren't in the environment yet.

    Raises:
        DiskError: When another process replays.
    """
    with credentials.exporting({**(variables or {}), **REPLAY_VARIABLES}), disk.locked():
        yield


def replay(
    disk: Disk, families: Sequence[Sequence[Run]], advance: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Replay families of runs, and delete from the disk what is complete on the server.

    What can't be replayed stays, and doesn't hold up the others.

    Args:
        disk: The store; its caller is in `replaying`.
        families: The runs, as `disk.families` returns them.
        advance: Called for each file that is uploaded, and for each run.

    Raises:
        Exception: When the server is away, as `stores.errors.is_away` knows it.
    """
    if families:
        prepare(disk.server.tracking_uri, None)  # MLflow would wait minutes for a database
    for family in families:
        replay_of_family = _Replay(disk, disk.client(), disk.server.client, advance)
        try:
            replay_of_family.replay(family)
            delete(disk, family)
        except (ReplayError, DiskError) as error:
            yield Outcome(family[0], problem=str(error))
        except SettingError as error:
            yield Outcome(family[0], problem=f"{'.'.join(error.key)}: {error}")
        except Exception as error:  # each kind of storage for artifacts has errors of its own
            if is_away(error):
                raise
            logger.debug("Not replayed", exc_info=True)
            yield Outcome(family[0], problem=f"{type(error).__name__}: {reason_of(error)}")
        else:
            yield Outcome(family[0], replay_of_family.ids[family[0].info.run_id])


@dataclass(frozen=True)
class _Replay:
    """The replay of one family, from the client `source` to the client `target`.

    `ids` has the server's id of each experiment, run and model on disk, `places` its URI of their
    files, `versions` its number of each registered version.
    """

    disk: Disk
    source: MlflowClient
    target: MlflowClient
    advance: Callable[[], None]
    ids: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    versions: dict[tuple[str, str], str] = field(default_factory=dict)

    def replay(self, family: Sequence[Run]) -> None:
        for run in family:
            self.disk.files(
                run.info.artifact_uri
            )  # refused before there is something on the server
            target = self._find_or_create_run(run)
            self.ids[run.info.run_id] = target.info.run_id
            self.places[run.info.artifact_uri] = target.info.artifact_uri
        models = {run.info.run_id: models_of(self.source, run) for run in family}
        for model in (model for models_of_run in models.values() for model in models_of_run):
            self.disk.files(model.artifact_location)
            target_model = self._find_or_create_model(model)
            self.ids[model.model_id] = target_model.model_id
            self.places[model.artifact_location] = target_model.artifact_location
        for run in reversed(family):  # a parent ends after its children
            self._complete_run(self.source.get_run(run.info.run_id), models[run.info.run_id])
            self.advance()

    def _find_or_create_run(self, run: Run) -> Run:
        from mlflow.entities import ViewType

        experiment = self._experiment_on_server(run.info.experiment_id)
        origin = f"tags.`{ORIGIN}` = '{run.info.run_id}'"
        for target in self.target.search_runs([experiment], origin, ViewType.ALL):
            if target.info.lifecycle_stage == "deleted":
                raise ReplayError(
                    f"its run on the server, {target.info.run_id}, is deleted there: restore it, "
                    f"or `kedro mlflow sync --discard {run.info.run_id}`"
                )
            return target
        tags = {ORIGIN: run.info.run_id}
        for name in ("mlflow.parentRunId", "mlflow.user"):
            if name in run.data.tags:
                tags[name] = self._translated(run.data.tags[name])
        return self.target.create_run(experiment, run.info.start_time, tags, run.info.run_name)

    def _experiment_on_server(self, id_on_disk: str) -> str:
        """Return the id of an experiment; it is created or restored when need be."""
        if id_on_disk not in self.ids:
            experiment = self.source.get_experiment(id_on_disk)
            tags = dict(experiment.tags)
            location = tags.pop(ARTIFACT_LOCATION, None)
            options = ExperimentOptions(
                name=experiment.name,
                create_experiment_kwargs=CreateExperimentOptions(
                    artifact_location=location, tags=tags
                ),
                restore_if_deleted=self.disk.restore_if_deleted,
            )
            self.ids[id_on_disk] = experiment_id(self.disk.server, options)
            for key, value in tags.items():
                if not key.startswith("mlflow."):
                    self.target.set_experiment_tag(self.ids[id_on_disk], key, value)
        return self.ids[id_on_disk]

    def _find_or_create_model(self, model: LoggedModel) -> LoggedModel:
        experiment = self._experiment_on_server(model.experiment_id)
        origin = f"tags.`{ORIGIN}` = '{model.model_id}'"
        for target in self.target.search_logged_models([experiment], origin):
            return target
        return self.target.create_logged_model(
            experiment,
            model.name,
            self.ids[str(model.source_run_id)],
            {ORIGIN: model.model_id},
            model_type=model.model_type,
        )

    def _complete_run(self, run: Run, models: Sequence[LoggedModel]) -> None:
        """Log to the run on the server what it lacks, then end it."""
        from mlflow.entities import Param, RunTag

        run_id = self.ids[run.info.run_id]
        target = self.target.get_run(run_id)
        if has_ended(target) and target.info.status == run.info.status:
            return
        params = [Param(key, value) for key, value in run.data.params.items()]
        self.target.log_batch(run_id, params=params)
        for model in models:
            self._complete_model(model, run)
        self._log_metrics(run)
        self._log_links(run, target)
        self._upload(
            run.info.artifact_uri,
            partial(self.target.list_artifacts, run_id),
            partial(self.target.log_artifact, run_id),
        )
        for version in sorted(versions_of(self.source, run), key=lambda v: int(v.version)):
            self._register(version)
        for model in models:
            self._tag_model(model)
        self._write_traces(run)
        tags = {key: self._translated(value) for key, value in run.data.tags.items()}
        self.target.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if has_ended(run):
            self.target.set_terminated(run_id, run.info.status, run.info.end_time)

    def _log_metrics(self, run: Run) -> None:
        """Log the points that the run on the server lacks."""
        target = self.target.get_run(self.ids[run.info.run_id])
        logged = _points(self.target, target)
        lacking = [point for key, point in _points(self.source, run).items() if key not in logged]
        self.target.log_batch(target.info.run_id, metrics=lacking)

    def _log_links(self, run: Run, target: Run) -> None:
        """Log which data and models the run has taken, and which models it has logged."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        data = getattr(run.inputs, "dataset_inputs", [])
        # A model that isn't of this family was read from the server.
        inputs = [
            LoggedModelInput(self.ids.get(entry.model_id, entry.model_id))
            for entry in getattr(run.inputs, "model_inputs", ())
        ]
        if data or inputs:
            self.target.log_inputs(target.info.run_id, data, inputs)
        # Other than inputs, MLflow refuses outputs that are there.
        logged = {entry.model_id for entry in getattr(target.outputs, "model_outputs", ())}
        outputs = [
            LoggedModelOutput(self.ids.get(entry.model_id, entry.model_id), entry.step)
            for entry in getattr(run.outputs, "model_outputs", ())
        ]
        outputs = [entry for entry in outputs if entry.model_id not in logged]
        if outputs:
            self.target.log_outputs(target.info.run_id, outputs)

    def _upload(
        self,
        uri: str,
        list_target: Callable[[str | None], list[Any]],
        log: Callable[[str, str | None], None],
    ) -> None:
        """Upload the files of a run or model, except those that are there with the same size."""
        folder, sizes = self.disk.files(uri), dict(_sizes(list_target))
        for file in files_in(folder):
            name = file.relative_to(folder)
            parent = None if name.parent == Path() else name.parent.as_posix()
            if file.name == "MLmodel":
                with TemporaryDirectory() as temporary:
                    translated = Path(temporary, file.name)
                    text = self._translated(file.read_text("utf-8"))
                    translated.write_text(text, encoding="utf-8")
                    log(str(translated), parent)
            elif sizes.get(name.as_posix()) != file.stat().st_size:
                log(str(file), parent)
            self.advance()

    def _translated(self, text: str) -> str:
        """Return a text with the ids and URIs of the server in the place of those on disk."""
        for place, on_server in self.places.items():
            # In files it still stands below the folder that the project was in when it ran.
            in_project = re.escape(place[place.index(f"/{FOLDER}/") :])
            text = re.sub(rf"file:[^\s\"']*?{in_project}", on_server.replace("\\", r"\\"), text)
        return _ID.sub(lambda match: self.ids.get(match[0], match[0]), text)

    def _complete_model(self, model: LoggedModel, run: Run) -> None:
        """Log to the model of a run on the server what it lacks, then finalize it."""
        from mlflow.entities import LoggedModelStatus, Metric

        model_id, run_id = self.ids[model.model_id], self.ids[run.info.run_id]
        target = self.target.get_logged_model(model_id)
        if target.status == model.status != LoggedModelStatus.PENDING:
            return
        lacking = (model.params or {}).items() - (target.params or {}).items()
        if lacking:
            self.target.log_model_params(model_id, dict(lacking))
        logged = {_key(metric) for metric in target.metrics or ()}
        points = _points(self.source, run)
        metrics = [
            Metric.from_dictionary(
                {
                    **metric.to_dictionary(),
                    # A NaN is 0 in the metrics of a model, not in those of its run (MLflow 3.17).
                    "value": metric.value if _key(metric) in points else math.nan,
                    "model_id": model_id,
                    "run_id": run_id,
                }
            )
            for metric in model.metrics or ()
            if metric.run_id == run.info.run_id and _key(metric) not in logged
        ]
        self.target.log_batch(run_id, metrics=metrics)
        self._upload(
            model.artifact_location,
            partial(self.target.list_logged_model_artifacts, model_id),
            partial(self.target.log_model_artifact, model_id),
        )
        if model.status != LoggedModelStatus.PENDING:
            self.target.finalize_logged_model(model_id, model.status)

    def _tag_model(self, model: LoggedModel) -> None:
        tags = {key: self._translated(text) for key, text in (model.tags or {}).items()}
        if VERSIONS in tags:
            entries = json.loads(tags[VERSIONS])
            for entry in entries:
                version = entry["name"], str(entry["version"])
                entry["version"] = self.versions.get(version, entry["version"])
            tags[VERSIONS] = json.dumps(entries)
        if tags:
            self.target.set_logged_model_tags(self.ids[model.model_id], tags)

    def _register(self, version: ModelVersion) -> None:
        """Register a version that was registered on disk, with its tags and aliases."""
        self._register_model(version.name)
        target = self._find_or_create_version(version)
        self.versions[version.name, str(version.version)] = str(target.version)
        for alias in self.source.get_model_version(version.name, version.version).aliases:
            self._set_alias(version, target, alias)

    def _register_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        model = self.source.get_registered_model(name)
        try:
            self.target.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for key, value in model.tags.items():
            self.target.set_registered_model_tag(name, key, value)
        if model.description:
            self.target.update_registered_model(name, model.description)

    def _find_or_create_version(self, version: ModelVersion) -> ModelVersion:
        origin = f"{version.run_id}/{version.version}"
        same = f"name = '{version.name}' and tags.`{ORIGIN}` = '{origin}'"
        for target in self.target.search_model_versions(same):
            return target
        model = _MODEL_URI.fullmatch(version.source or "")
        model_id = self.ids.get(model[1]) if model else None
        source = self._translated(str(version.source))
        if model_id and is_database(self.disk.server.registry_uri):
            # MLflow would look for the model in the store that this process is pointed at.
            source = str(self.target.get_logged_model(model_id).artifact_location)
        return self.target.create_model_version(
            version.name,
            source,
            self.ids[str(version.run_id)],
            {**version.tags, ORIGIN: origin},
            version.run_link,
            version.description,
            await_creation_for=0,
            model_id=model_id,
        )

    def _set_alias(self, version: ModelVersion, target: ModelVersion, alias: str) -> None:
        """Give an alias to a version, unless a newer version on the server has it."""
        aliases = self.target.get_registered_model(version.name).aliases
        if alias in aliases and str(aliases[alias]) != str(target.version):
            owner = self.target.get_model_version(version.name, str(aliases[alias]))
            if owner.creation_timestamp > version.creation_timestamp:
                logger.warning(
                    "The alias %r of %s stays at version %s, which is newer than this run's",
                    alias,
                    version.name,
                    owner.version,
                )
                return
        self.target.set_registered_model_alias(version.name, alias, str(target.version))

    def _write_traces(self, run: Run) -> None:
        from mlflow.entities.trace_location import TraceLocation

        location = TraceLocation.from_experiment_id(self.ids[run.info.experiment_id])
        for trace in traces_of(self.source, run):
            metadata, tags = (
                {key: self._translated(value) for key, value in texts.items()}
                for texts in (trace.info.trace_metadata, trace.info.tags)
            )
            info = replace(trace.info, trace_location=location, trace_metadata=metadata, tags=tags)
            _mlflow.write_trace(self.disk.server.tracking_uri, info, trace)


def _points(client: MlflowClient, run: Run) -> dict[tuple[Any, ...], Metric]:
    """Return every point of every metric of a run, by what sets it apart."""
    return {
        _key(point): point
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    }


def _key(metric: Metric) -> tuple[Any, ...]:
    # A NaN isn't equal to itself.
    return metric.key, repr(metric.value), metric.timestamp, metric.step


def _sizes(
    list_target: Callable[[str | None], list[Any]], path: str | None = None
) -> Iterator[tuple[str, int]]:
    """Yield each file on the server with its size."""
    for entry in list_target(path):
        if entry.is_dir:
            yield from _sizes(list_target, entry.path)
        else:
            yield entry.path, entry.file_size


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder of artifacts.

    Raises:
        DiskError: When one is a link to a file outside of it.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        if folder not in file.resolve().parents:
            raise DiskError(f"its artifact {file} is a link to a file elsewhere")
    return [file for file in files if file.name != WRITTEN_BY_LOADING]


def files_of_family(disk: Disk, family: Sequence[Run]) -> list[Path]:
    """Return the files of runs and of their models; none where `delete` would refuse them."""
    try:
        return [file for folder in _folders(disk, family) for file in files_in(folder)]
    except DiskError:
        return []


def _folders(disk: Disk, family: Sequence[Run]) -> list[Path]:
    """Return the folders with the files of runs and of their models.

    Raises:
        DiskError: When one isn't in the store's own folder.
    """
    client = disk.client()
    uris = [run.info.artifact_uri for run in family]
    uris += [model.artifact_location for run in family for model in models_of(client, run)]
    return [disk.files(uri) for uri in uris]


def models_of(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Return the models that a run has logged."""
    condition = f"source_run_id = '{run.info.run_id}'"
    return pages(client.search_logged_models, [run.info.experiment_id], condition)


def versions_of(client: MlflowClient, run: Run) -> list[ModelVersion]:
    """Return the versions of registered models that a run has registered."""
    return pages(client.search_model_versions, f"run_id = '{run.info.run_id}'")


def traces_of(client: MlflowClient, run: Run) -> list[Any]:
    """Return the traces of a run, with their spans."""
    condition = f"metadata.`mlflow.sourceRun` = '{run.info.run_id}'"
    return pages(client.search_traces, locations=[run.info.experiment_id], filter_string=condition)


def delete(disk: Disk, family: Sequence[Run]) -> None:
    """Delete runs from the disk, with all that belongs to them.

    Raises:
        DiskError: When their files are not in the store's own folder.
    """
    client, folders = disk.client(), _folders(disk, family)
    models = [model for run in family for model in models_of(client, run)]
    for run in family:
        for version in versions_of(client, run):
            client.delete_model_version(version.name, version.version)
            if not client.search_model_versions(f"name = '{version.name}'"):
                client.delete_registered_model(version.name)
        if traces := [trace.info.trace_id for trace in traces_of(client, run)]:
            client.delete_traces(run.info.experiment_id, trace_ids=traces)
    for folder in folders:
        if folder.parent.is_dir() and disk.artifacts.resolve() in folder.parent.parents:
            shutil.rmtree(folder.parent)
    run_ids, model_ids = [run.info.run_id for run in family], [model.model_id for model in models]
    _mlflow.delete_for_good(disk.uri, run_ids, model_ids)
