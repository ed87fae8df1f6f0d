"""Replay runs from the store on disk to the server, by MLflow's public client.

A run on the server has the id on disk in a tag, so that what a replay that was cut off has left
there is found and completed. The status is set last: a run that has the same status on the server
as on disk is there as a whole.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .. import _mlflow
from ..config.errors import SettingError
from ..config.keys import CreateExperimentOptions, ExperimentOptions
from ..config.uris import is_database
from ..stores.errors import is_away, reason_of
from ..stores.server import experiment_id
from .disk import ARTIFACT_LOCATION, EXPERIMENT, Disk, DiskError, families, has_ended, pages

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

# As many parameters as MLflow takes for a model in one request.
PARAMS = 100

# In the environment of a replay. A request that creates something, and whose answer is lost, must
# not be made again by MLflow: the next replay looks first whether the server has done it.
OF_REPLAYS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# A path on the server, and how to list what is in it.
List = Callable[[str | None], list[Any]]


class ReplayError(Exception):
    """A run can't be replayed: one sentence that says why."""


@dataclass(frozen=True)
class Outcome:
    """What has become of a run: its id on the server, or what is wrong."""

    run: Run
    id_on_server: str = ""
    problem: str = ""


def replay(
    disk: Disk, found: Sequence[Sequence[Run]], step: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Replay families of runs, and remove from the disk what the server has as a whole.

    What can't be replayed stays, and doesn't hold up the others.

    Args:
        disk: The store, whose lock is held.
        found: The families, as `disk.families` gives them.
        step: Called for each file that is uploaded, and for each run.

    Raises:
        Exception: What `failures.is_away` knows, where the server is away.
    """
    there = disk.server.client
    for family in found:
        replaying = _Replay(disk, disk.client(), there, step)
        try:
            replaying.replay(family)
            remove(disk, family)
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
            yield Outcome(family[0], replaying.ids[family[0].info.run_id])


@dataclass(frozen=True)
class _Replay:
    """The replay of one family.

    `ids` has the server's id of each run, model and experiment on disk, `places` where the server
    has the files of a model, `versions` its number of each version.
    """

    disk: Disk
    here: MlflowClient
    there: MlflowClient
    step: Callable[[], None]
    ids: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    versions: dict[tuple[str, str], str] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)  # on the server, by this replay

    def replay(self, family: Sequence[Run]) -> None:
        for run in family:
            self.ids[run.info.run_id] = self._run_on_server(run)
        models = {run.info.run_id: models_of(self.here, run) for run in family}
        for model in (model for made in models.values() for model in made):
            self.ids[model.model_id] = self._model_on_server(model)
        for run in reversed(family):  # a parent ends after its children
            self._complete(self.here.get_run(run.info.run_id), models[run.info.run_id])
            self.step()

    def _run_on_server(self, run: Run) -> str:
        """Return the id of a run on the server, where it is created unless it is there."""
        from mlflow.entities import ViewType

        experiment = self._experiment_on_server(run.info.experiment_id)
        origin = f"tags.`{ORIGIN}` = '{run.info.run_id}'"
        for found in self.there.search_runs([experiment], origin, ViewType.ALL):
            if found.info.lifecycle_stage == "deleted":
                raise ReplayError(
                    f"its run on the server, {found.info.run_id}, is deleted there: restore it, "
                    f"or `kedro mlflow sync --discard {run.info.run_id}`"
                )
            return str(found.info.run_id)
        tags = {ORIGIN: run.info.run_id}
        for name in ("mlflow.parentRunId", "mlflow.user"):
            if name in run.data.tags:
                tags[name] = self._with_ids_of_server(run.data.tags[name])
        created = self.there.create_run(experiment, run.info.start_time, tags, run.info.run_name)
        self.created.add(created.info.run_id)
        return str(created.info.run_id)

    def _experiment_on_server(self, id_on_disk: str) -> str:
        """Return the id of an experiment on the server, where it is made or restored if need be."""
        if id_on_disk not in self.ids:
            experiment = self.here.get_experiment(id_on_disk)
            tags = dict(experiment.tags)
            location = tags.pop(ARTIFACT_LOCATION, None)
            options = ExperimentOptions(
                name=tags.pop(EXPERIMENT, experiment.name),
                create_experiment_kwargs=CreateExperimentOptions(
                    artifact_location=location, tags=tags
                ),
                restore_if_deleted=self.disk.restore_if_deleted,
            )
            found = experiment_id(self.disk.server, options)
            own = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
            if own.items() - self.there.get_experiment(found).tags.items():
                for key, value in own.items():
                    self.there.set_experiment_tag(found, key, value)
            self.ids[id_on_disk] = found
        return self.ids[id_on_disk]

    def _complete(self, run: Run, models: Sequence[LoggedModel]) -> None:
        """Log to the run on the server what it lacks, then end it."""
        from mlflow.entities import Param, RunTag

        there = self.there.get_run(self.ids[run.info.run_id])
        if has_ended(there) and there.info.status == run.info.status:
            return
        run_id = there.info.run_id
        params = [Param(key, value) for key, value in run.data.params.items()]
        self.there.log_batch(run_id, params=params)
        self.there.log_batch(run_id, metrics=list(self._missing_metrics(run, there, models)))
        self._log_links(run, there)
        self._upload(
            self.disk.files(run.info.artifact_uri),
            lambda path: self.there.list_artifacts(run_id, path),
            lambda file, path: self.there.log_artifact(run_id, str(file), path),
            known=run_id not in self.created,
        )
        for model in models:
            self._complete_model(model)
        self._register(run)
        for model in models:
            self._tag_model(model)
        self._write_traces(run)
        tags = {key: self._with_ids_of_server(value) for key, value in run.data.tags.items()}
        self.there.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if has_ended(run):
            self.there.set_terminated(run_id, run.info.status, run.info.end_time)

    def _missing_metrics(
        self, run: Run, there: Run, models: Sequence[LoggedModel]
    ) -> Iterator[Metric]:
        """Give the points that the server lacks, with the models that they belong to."""
        from mlflow.entities import Metric

        known = {
            _values(metric)
            for key in there.data.metrics
            for metric in self.there.get_metric_history(there.info.run_id, key)
        }
        of_models = [
            metric
            for model in models
            for metric in model.metrics or ()
            if metric.run_id == run.info.run_id
        ]
        linked = {_values(metric) for metric in of_models}
        for key in run.data.metrics:
            for metric in self.here.get_metric_history(run.info.run_id, key):
                if _values(metric) not in known | linked:
                    yield metric
        known_of = {
            model.model_id: {
                _values(metric)
                for metric in self.there.get_logged_model(self.ids[model.model_id]).metrics or ()
            }
            for model in models
            if self.ids[model.model_id] not in self.created
        }
        for metric in of_models:
            if _values(metric) not in known_of.get(str(metric.model_id), ()):
                yield Metric(
                    metric.key,
                    metric.value,
                    metric.timestamp,
                    metric.step,
                    self.ids[str(metric.model_id)],
                    metric.dataset_name,
                    metric.dataset_digest,
                )

    def _log_links(self, run: Run, there: Run) -> None:
        """Log which data and models the run took, and which models it made."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        inputs, outputs = there.inputs, there.outputs  # None where there are none
        has = {
            *((e.dataset.name, e.dataset.digest) for e in getattr(inputs, "dataset_inputs", ())),
            *(entry.model_id for entry in getattr(inputs, "model_inputs", ())),
            *((entry.model_id, entry.step) for entry in getattr(outputs, "model_outputs", ())),
        }
        data = [
            entry
            for entry in getattr(run.inputs, "dataset_inputs", ())
            if (entry.dataset.name, entry.dataset.digest) not in has
        ]
        # A model that isn't of this family has been read from the server.
        taken = [
            LoggedModelInput(self.ids.get(entry.model_id, entry.model_id))
            for entry in getattr(run.inputs, "model_inputs", ())
        ]
        made = [
            LoggedModelOutput(self.ids.get(entry.model_id, entry.model_id), entry.step)
            for entry in getattr(run.outputs, "model_outputs", ())
        ]
        taken = [entry for entry in taken if entry.model_id not in has]
        made = [entry for entry in made if (entry.model_id, entry.step) not in has]
        if data or taken:
            self.there.log_inputs(there.info.run_id, data, taken)
        if made:
            self.there.log_outputs(there.info.run_id, made)

    def _upload(
        self,
        folder: Path,
        listed: List,
        log: Callable[[Path, str | None], None],
        *,
        known: bool,
    ) -> None:
        """Upload the files of a folder, but for those that are there with the same size."""
        sizes = dict(_sizes(listed)) if known else {}
        for file in files_of(folder):
            name = file.relative_to(folder)
            parent = None if name.parent == Path() else name.parent.as_posix()
            if file.name == "MLmodel":
                with TemporaryDirectory() as temporary:
                    described = Path(temporary, file.name)
                    text = file.read_text("utf-8")
                    described.write_text(self._with_ids_of_server(text), encoding="utf-8")
                    log(described, parent)
            elif sizes.get(name.as_posix()) != file.stat().st_size:
                log(file, parent)
            self.step()

    def _with_ids_of_server(self, text: str) -> str:
        """Replace the ids of runs and models on disk, and their places, by those on the server."""
        for place, on_server in self.places.items():
            text = text.replace(place, on_server)
        return _ID.sub(lambda found: self.ids.get(found[0], found[0]), text)

    def _model_on_server(self, model: LoggedModel) -> str:
        """Return the id of a model on the server, where it is created unless it is there."""
        experiment = self._experiment_on_server(model.experiment_id)
        origin = f"tags.`{ORIGIN}` = '{model.model_id}'"
        for found in self.there.search_logged_models([experiment], origin):
            return str(found.model_id)
        created = self.there.create_logged_model(
            experiment,
            model.name,
            self.ids[str(model.source_run_id)],
            {ORIGIN: model.model_id},
            dict(list((model.params or {}).items())[:PARAMS]),
            model.model_type,
        )
        self.created.add(created.model_id)
        return str(created.model_id)

    def _complete_model(self, model: LoggedModel) -> None:
        from mlflow.entities import LoggedModelStatus

        model_id = self.ids[model.model_id]
        there = self.there.get_logged_model(model_id)
        if there.status == model.status != LoggedModelStatus.PENDING:
            return
        lacking = (model.params or {}).keys() - (there.params or {}).keys()
        params = [(key, value) for key, value in (model.params or {}).items() if key in lacking]
        for start in range(0, len(params), PARAMS):
            self.there.log_model_params(model_id, dict(params[start : start + PARAMS]))
        self.places[model.artifact_location] = there.artifact_location
        self._upload(
            self.disk.files(model.artifact_location),
            lambda path: self.there.list_logged_model_artifacts(model_id, path),
            lambda file, path: self.there.log_model_artifact(model_id, str(file), path),
            known=model_id not in self.created,
        )
        if model.status != LoggedModelStatus.PENDING:
            self.there.finalize_logged_model(model_id, model.status)

    def _tag_model(self, model: LoggedModel) -> None:
        tags = {key: self._with_ids_of_server(text) for key, text in (model.tags or {}).items()}
        if VERSIONS in tags:
            listed = json.loads(tags[VERSIONS])
            for entry in listed:
                known = (entry["name"], str(entry["version"]))
                entry["version"] = self.versions.get(known, entry["version"])
            tags[VERSIONS] = json.dumps(listed)
        if tags:
            self.there.set_logged_model_tags(self.ids[model.model_id], tags)

    def _register(self, run: Run) -> None:
        """Register the versions that were registered on disk, with their tags and aliases."""
        for version in sorted(versions_of(self.here, run), key=lambda v: int(v.version)):
            there = self._version_on_server(version)
            self.versions[version.name, str(version.version)] = str(there.version)
            for key, value in version.tags.items():
                self.there.set_model_version_tag(version.name, there.version, key, value)
            for alias in self.here.get_model_version(version.name, version.version).aliases:
                self._set_alias(version, there, alias)

    def _version_on_server(self, version: ModelVersion) -> ModelVersion:
        """Return a version on the server, where it is created unless it is there."""
        self._create_registered_model(version.name)
        origin = f"{version.run_id}/{version.version}"
        known = self.there.search_model_versions(
            f"name = '{version.name}' and tags.`{ORIGIN}` = '{origin}'"
        )
        if known:
            found: ModelVersion = known[0]
            return found
        of_model = _MODEL.fullmatch(version.source or "")
        return self.there.create_model_version(
            version.name,
            self._source_on_server(version),
            self.ids[str(version.run_id)],
            {**version.tags, ORIGIN: origin},
            version.run_link,
            version.description,
            await_creation_for=0,
            model_id=self.ids.get(of_model[1]) if of_model else None,
        )

    def _create_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        model = self.here.get_registered_model(name)
        try:
            self.there.create_registered_model(name, dict(model.tags), model.description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            for key, value in model.tags.items():
                self.there.set_registered_model_tag(name, key, value)
            if model.description:
                self.there.update_registered_model(name, model.description)

    def _source_on_server(self, version: ModelVersion) -> str:
        """Say where the files of a version are: a model, or a folder of a run's artifacts."""
        source = str(version.source)
        if (found := _MODEL.fullmatch(source)) and is_database(self.disk.server.registry_uri):
            # MLflow would look for the model in the store that this process is pointed at.
            return str(self.there.get_logged_model(self.ids[found[1]]).artifact_location)
        run = self.here.get_run(str(version.run_id))
        if source.startswith(str(run.info.artifact_uri)):
            there = self.there.get_run(self.ids[str(version.run_id)])
            return source.replace(str(run.info.artifact_uri), str(there.info.artifact_uri), 1)
        return self._with_ids_of_server(source)

    def _set_alias(self, here: ModelVersion, there: ModelVersion, alias: str) -> None:
        """Give an alias to a version, unless a newer version on the server has it."""
        aliases = self.there.get_registered_model(here.name).aliases
        if alias in aliases and str(aliases[alias]) != str(there.version):
            owner = self.there.get_model_version(here.name, str(aliases[alias]))
            if owner.creation_timestamp > here.creation_timestamp:
                logger.warning(
                    "The alias %r of %s stays at version %s, which is newer than this run's",
                    alias,
                    here.name,
                    owner.version,
                )
                return
        self.there.set_registered_model_alias(here.name, alias, str(there.version))

    def _write_traces(self, run: Run) -> None:
        from mlflow.entities.trace_location import TraceLocation

        experiment = self.ids[run.info.experiment_id]
        for trace in traces_of(self.here, run):
            texts = [
                {key: self._with_ids_of_server(value) for key, value in texts.items()}
                for texts in (trace.info.trace_metadata, trace.info.tags)
            ]
            info = replace(
                trace.info,
                trace_location=TraceLocation.from_experiment_id(experiment),
                trace_metadata=texts[0],
                tags=texts[1],
            )
            _mlflow.write_trace(self.disk.server.tracking_uri, info, trace)


_ID = re.compile(r"\b(m-)?[0-9a-f]{32}\b")  # of a run or a model
_MODEL = re.compile(r"models:/(m-[0-9a-f]{32})")


def _values(metric: Metric) -> tuple[Any, ...]:
    # A NaN isn't equal to itself.
    return metric.key, repr(metric.value), metric.timestamp, metric.step


def _sizes(listed: List, path: str | None = None) -> Iterator[tuple[str, int]]:
    """Give the size of each file on the server."""
    for entry in listed(path):
        if entry.is_dir:
            yield from _sizes(listed, entry.path)
        else:
            yield entry.path, entry.file_size


def files_of(folder: Path) -> list[Path]:
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
    """Return the files of runs and of their models; none where `remove` would refuse them."""
    client = disk.client()
    places = [run.info.artifact_uri for run in family]
    places += [model.artifact_location for run in family for model in models_of(client, run)]
    try:
        return [file for place in places for file in files_of(disk.files(place))]
    except DiskError:
        return []


def models_of(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Return the models that a run has logged."""
    condition = f"source_run_id = '{run.info.run_id}'"
    return pages(client.search_logged_models, [run.info.experiment_id], condition)


def versions_of(client: MlflowClient, run: Run) -> list[ModelVersion]:
    """Return the versions of registered models that a run has made."""
    return pages(client.search_model_versions, f"run_id = '{run.info.run_id}'")


def traces_of(client: MlflowClient, run: Run) -> list[Any]:
    """Return the traces of a run, with their spans."""
    condition = f"metadata.`mlflow.sourceRun` = '{run.info.run_id}'"
    return pages(client.search_traces, locations=[run.info.experiment_id], filter_string=condition)


def remove(disk: Disk, family: Sequence[Run]) -> None:
    """Remove runs from the disk, with all that belongs to them.

    Raises:
        DiskError: When their files are not in the store's own folder.
    """
    client = disk.client()
    ids = [run.info.run_id for run in family]
    models = [model for run in family for model in models_of(client, run)]
    places = [disk.files(run.info.artifact_uri) for run in family]
    places += [disk.files(model.artifact_location) for model in models]
    for run in family:
        for version in versions_of(client, run):
            client.delete_model_version(version.name, version.version)
            if not client.search_model_versions(f"name = '{version.name}'"):
                client.delete_registered_model(version.name)
        traces = [trace.info.trace_id for trace in traces_of(client, run)]
        if traces:
            client.delete_traces(run.info.experiment_id, trace_ids=traces)
    for folder in places:
        if folder.parent.is_dir() and disk.artifacts.resolve() in folder.parent.parents:
            shutil.rmtree(folder.parent)
    _mlflow.delete_for_good(disk.uri, ids, [model.model_id for model in models])


def waiting(client: MlflowClient) -> list[list[Run]]:
    """Return the families in a store on disk whose first run has ended."""
    return [family for family in families(client) if has_ended(family[0])]
