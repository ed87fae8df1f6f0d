"""MLflow's stores in offline mode: runs are recorded on the disk, all else goes to the server.

MLflow finds them under the URI of a `Recording`. While the server answers, a run or a model is
created there first, so that it has the server's id from its beginning.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from . import endings
from .contact import brisk_registry, brisk_store, is_http
from .failures import reason_of
from .loading import shown_uri
from .recording import (
    EXPERIMENT,
    FIRST_EXPERIMENT,
    FIRST_VERSION,
    ORIGIN,
    SCHEME,
    KedroRun,
    Notes,
    Recording,
    change_id,
    is_recorded_experiment,
    is_remote_database,
    is_there,
    number_version,
)
from .server import prepare

if TYPE_CHECKING:
    from mlflow.entities import RunTag
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.entities.paged_list import PagedList

logger = logging.getLogger(__name__)

# What a server answers when it won't ever take a request: to ask it again later doesn't help.
_REFUSALS = {
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


def is_refusal(error: BaseException) -> bool:
    """Check whether MLflow has read a request and won't do it, rather than being away."""
    from mlflow.exceptions import MlflowException

    return (
        isinstance(error, MlflowException)
        and error.error_code in _REFUSALS
        and "failed with error code" not in error.message
    )


# What stores do with a run that is named by its id.
_OF_A_RUN = {
    "delete_run",
    "delete_tag",
    "log_batch",
    "log_batch_async",
    "log_inputs",
    "log_metric",
    "log_metric_async",
    "log_outputs",
    "log_param",
    "log_param_async",
    "record_logged_model",
    "restore_run",
    "set_tag",
    "set_tag_async",
    "update_run_info",
}

# What they do with a model.
_OF_A_MODEL = {
    "delete_logged_model",
    "delete_logged_model_tag",
    "finalize_logged_model",
    "get_logged_model",
    "log_logged_model_params",
    "set_logged_model_tags",
}

# What they do with an experiment; while the server is away, with the one on the disk.
_OF_AN_EXPERIMENT = {"delete_experiment_tag", "restore_experiment", "set_experiment_tag"}

# What they find on the server, and on the disk while that is away.
_SEARCHES = {"search_experiments", "search_logged_models", "search_runs"}


@lru_cache
def register() -> None:
    """Let MLflow find the recording stores, and the server's artifacts from them."""
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
    from mlflow.tracking._model_registry.utils import _get_store_registry
    from mlflow.tracking._tracking_service.utils import (
        _tracking_store_registry,
        get_tracking_uri,
    )

    def artifacts(
        artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> ArtifactRepository:
        tracking_uri = tracking_uri or get_tracking_uri()
        if tracking_uri.startswith(f"{SCHEME}:"):
            tracking_uri = Recording.of(tracking_uri).tracking_uri
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)

    _artifact_repository_registry.register("mlflow-artifacts", artifacts)
    _tracking_store_registry.register(
        SCHEME, lambda store_uri, **_: RecordingStore(Recording.of(store_uri))
    )
    _get_store_registry().register(
        SCHEME, lambda store_uri, **_: RecordingRegistry(Recording.of(store_uri))
    )


def lose(recording: Recording, error: BaseException) -> None:
    """Note that a server is away, and say so when that is news."""
    reason = reason_of(error)
    if recording.away.note(reason):
        warn(recording)


def warn(recording: Recording) -> None:
    """Say that a server is away, and what is done about it."""
    logger.warning(
        "The MLflow server %s is away: %s. What runs log is recorded in %s, and sent when the "
        "server answers again, or by `kedro mlflow sync`.",
        shown_uri(recording.tracking_uri),
        recording.away.reason,
        recording.folder,
    )


def find_again(recording: Recording) -> None:
    """Note that a server answers, and say so when that is news."""
    if recording.away.forget():
        logger.info("The MLflow server %s answers", shown_uri(recording.tracking_uri))


class _Store:
    """What both stores share: a store on the disk, and one on the server that may be away."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def _try(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Ask the server for something, unless it is away; gives whether it answered, and what.

        Raises:
            MlflowException: When it refuses what it is asked for.
        """
        if self._recording.away:
            return False, None
        try:
            return True, call()
        except Exception as error:  # each kind of store has errors of its own
            if is_refusal(error):
                raise
            lose(self._recording, error)
            return False, None

    def _send_first(self, *ids: str | None) -> bool:
        """Send what is recorded of runs before the server is asked about them."""
        from .sending import send

        found = [self._kedro_run_of(run_id) for run_id in ids if run_id]
        for run in {run.name: run for run in found if run}.values():
            answered, _ = self._try(partial(send, self._recording, run))
            if not answered:
                return False
        return not self._recording.away

    def _kedro_run_of(self, run_id: str) -> KedroRun | None:
        return self._recording.kedro_run_of(run_id)


class RecordingStore(_Store):
    """The runs and models of a project: its own on the disk, the others on the server."""

    @cached_property
    def _remote(self) -> Any:
        from mlflow.tracking._tracking_service.utils import _get_store

        uri = self._recording.tracking_uri
        if is_remote_database(uri):
            prepare(uri, None)
        return _get_store(uri)

    @cached_property
    def _remote_for_creation(self) -> Any:
        """The same for what must not be asked twice: what is created, when no answer comes."""
        uri = self._recording.tracking_uri
        return brisk_store(uri) if is_http(uri) else self._remote

    @property
    def _local(self) -> Any:
        return self._recording.store()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _OF_A_RUN:
            return partial(self._of_a_run, name)
        if name in _OF_A_MODEL:
            return partial(self._of_a_model, name)
        if name in _OF_AN_EXPERIMENT:
            return partial(self._of_an_experiment, name)
        if name in _SEARCHES:
            return partial(self._search, name)
        if name.endswith("async_logging"):
            return getattr(self._local, name)
        return getattr(self._remote, name)

    def _of_a_run(self, name: str, run_id: str, *args: Any, **kwargs: Any) -> Any:
        store = self._local if self._has_run(run_id) else self._remote
        return getattr(store, name)(run_id, *args, **kwargs)

    def _of_a_model(self, name: str, model_id: str, *args: Any, **kwargs: Any) -> Any:
        store = self._local if self._has_model(model_id) else self._remote
        return getattr(store, name)(model_id, *args, **kwargs)

    def _of_an_experiment(self, name: str, experiment_id: str, *args: Any, **kwargs: Any) -> Any:
        if not self._is_recorded(experiment_id):
            call = partial(getattr(self._remote, name), experiment_id, *args, **kwargs)
            answered, answer = self._try(call)
            if answered:
                return answer
        return getattr(self._local, name)(experiment_id, *args, **kwargs)

    def _search(self, name: str, *args: Any, **kwargs: Any) -> Any:
        within = inspect.signature(getattr(self._local, name)).bind(*args, **kwargs).arguments
        if any(map(is_recorded_experiment, within.get("experiment_ids", ()))):
            return getattr(self._local, name)(*args, **kwargs)
        # The runs that this thread is in are there too, as far as they have come.
        self._send_first(*active_runs())
        answered, found = self._try(lambda: getattr(self._remote, name)(*args, **kwargs))
        result: PagedList[Any] = found if answered else getattr(self._local, name)(*args, **kwargs)
        return result

    def _has_run(self, run_id: str) -> bool:
        return self._recording.kedro_run_of(run_id) is not None

    def _has_model(self, model_id: str) -> bool:
        if getattr(_seeing, "as_server", False):
            return False
        return is_there(self._local.get_logged_model, model_id)

    def get_run(self, run_id: str) -> Any:
        """Give a run; one that others log to as well, with what the server has of it."""
        run = self._recording.kedro_run_of(run_id)
        if run is None:
            return self._remote.get_run(run_id)
        mine = self._local.get_run(run_id)
        if not self._is_given(run, run_id):
            return mine
        answered, theirs = self._try(lambda: self._remote.get_run(run_id))
        if answered:
            for kind in ("metrics", "params", "tags"):
                getattr(theirs.data, kind).update(getattr(mine.data, kind))
            theirs.info._artifact_uri = mine.info.artifact_uri
        return theirs if answered else mine

    def get_metric_history(
        self,
        run_id: str,
        metric_key: str,
        max_results: int | None = None,
        page_token: str | None = None,
    ) -> Any:
        """Give the points of a metric; in a run that others log to as well, theirs too."""
        from mlflow.store.entities.paged_list import PagedList

        run = self._recording.kedro_run_of(run_id)
        store = self._local if run else self._remote
        history = store.get_metric_history(run_id, metric_key, max_results, page_token)
        if run is None or page_token or not self._is_given(run, run_id):
            return history
        answered, theirs = self._try(lambda: self._remote.get_metric_history(run_id, metric_key))
        points = {(m.timestamp, m.step, m.value): m for m in [*(theirs or ()), *history]}
        return PagedList(list(points.values()), None) if answered else history

    def _is_given(self, run: KedroRun, run_id: str) -> bool:
        return any(notes.given for notes in run.notes() if notes.run_id == run_id)

    def get_experiment_by_name(self, experiment_name: str) -> Any:
        """Find an experiment, on the disk while the server is away."""
        answered, found = self._try(
            lambda: self._remote_for_creation.get_experiment_by_name(experiment_name)
        )
        return found if answered else self._local.get_experiment_by_name(experiment_name)

    def get_experiment(self, experiment_id: str) -> Any:
        """Give an experiment, from the disk while the server is away."""
        if not self._is_recorded(experiment_id):
            answered, found = self._try(lambda: self._remote.get_experiment(experiment_id))
            if answered:
                return found
        return self._local.get_experiment(experiment_id)

    def create_experiment(
        self, name: str, artifact_location: str | None = None, tags: Iterable[Any] | None = None
    ) -> str:
        """Create an experiment, on the disk while the server is away."""
        from mlflow.entities import ExperimentTag

        tags = list(tags or ())
        answered, found = self._try(
            lambda: self._remote.create_experiment(name, artifact_location, tags)
        )
        if answered:
            return str(found)
        how = json.dumps({"name": name, "artifact_location": artifact_location})
        new = str(FIRST_EXPERIMENT + uuid4().int % FIRST_EXPERIMENT // 2)
        with self._recording.lock():
            if known := self._local.get_experiment_by_name(name):  # by another process
                return str(known.experiment_id)
            return self._record_experiment(new, name, [*tags, ExperimentTag(EXPERIMENT, how)])

    def _record_experiment(self, experiment_id: str, name: str, tags: Iterable[Any] = ()) -> str:
        """Make an experiment on the disk that has a certain id."""
        if known := self._local.get_experiment_by_name(name):
            # Made while the server was away, or one that was deleted on the server since.
            self._local.rename_experiment(known.experiment_id, f"{name} ({known.experiment_id})")
        location = f"{(self._recording.folder / 'artifacts').as_uri()}/{experiment_id}"
        old = self._local.create_experiment(name, location, list(tags))
        change_id(self._recording, "experiment", old, experiment_id)
        return experiment_id

    def _is_recorded(self, experiment_id: str) -> bool:
        """Tell whether an experiment is on the disk only."""
        return is_recorded_experiment(experiment_id)

    def _here(self, experiment_id: str) -> str:
        """See to it that an experiment of the server is on the disk too."""
        if is_there(self._local.get_experiment, experiment_id):
            return experiment_id
        answered, found = self._try(lambda: self._remote.get_experiment(experiment_id))
        name = found.name if answered else f"experiment {experiment_id}"
        with self._recording.lock():
            if not is_there(self._local.get_experiment, experiment_id):
                self._record_experiment(experiment_id, name)
        return experiment_id

    def create_run(
        self,
        experiment_id: str,
        user_id: str,
        start_time: int,
        tags: Iterable[RunTag] | None,
        run_name: str | None,
    ) -> Any:
        """Open a run: on the disk, and on the server first while that answers."""
        from mlflow.entities import RunTag

        origin = uuid4().hex
        tags = [*(tags or ()), RunTag(ORIGIN, origin)]
        parent = next((tag.value for tag in tags if tag.key == "mlflow.parentRunId"), None)
        self._here(experiment_id)
        run = self._local.create_run(experiment_id, user_id, start_time, tags, run_name)
        first, run_name = run.info.run_id, run.info.run_name
        kedro_run = self._kedro_run_for(parent) or self._recording.open_kedro_run(first)
        notes = Notes(first, time.time_ns(), opening=asdict(endings.this_process()))
        kedro_run.write(notes)
        answered = False
        if not self._is_recorded(experiment_id) and self._is_sent(parent):
            create = self._remote_for_creation.create_run
            try:
                answered, remote = self._try(
                    lambda: create(experiment_id, user_id, start_time, tags, run_name)
                )
            except BaseException:
                self._local._hard_delete_run(first)
                kedro_run.remove(notes)
                raise
        if not answered:
            notes.opening = None
            kedro_run.write(notes)
            return run
        run_id = remote.info.run_id
        sent = {tag.key: tag.value for tag in tags}
        known = Notes(run_id, notes.opened, run_id, opening=notes.opening, tags=sent)
        kedro_run.write(known)
        change_id(self._recording, "run", first, run_id)
        kedro_run.remove(notes)
        known.opening = None
        kedro_run.write(known)
        return self._local.get_run(run_id)

    def _kedro_run_for(self, parent: str | None) -> KedroRun | None:
        """Find the Kedro run that a new run belongs to: that of its parent, or of this thread."""
        ids = [parent, *active_runs()]
        return next((run for name in ids if name and (run := self._kedro_run_of(name))), None)

    def _is_sent(self, run_id: str | None) -> bool:
        """Tell whether the server knows a run under this id."""
        run = run_id and self._recording.kedro_run_of(run_id)
        return not run or any(n.remote_id == run_id for n in run.notes() if n.run_id == run_id)

    def take_over(self, run_id: str, experiment_name: str, *, attached: bool) -> Any:
        """Record from now on what is logged to a run that is on the server already.

        Args:
            run_id: Its id there.
            experiment_name: Where it is shown on the disk when the server is away.
            attached: Whether somebody else ends it.
        """
        if self._join(run_id):
            return self.get_run(run_id)
        answered, found = self._try(lambda: self._remote_for_creation.get_run(run_id))
        if answered:
            info = found.info
            where = self._here(info.experiment_id), info.user_id, info.start_time
            name = info.run_name
        else:
            experiment = self.get_experiment_by_name(experiment_name)
            known = experiment.experiment_id if experiment else None
            where = known or self.create_experiment(experiment_name), "", time.time_ns() // 10**6
            name = run_id
        mine = self._local.create_run(*where, [], name)
        kedro_run = self._recording.open_kedro_run(uuid4().hex)
        # MLflow sets this tag on the disk by itself.
        tags = {"mlflow.runName": name}
        kedro_run.write(
            Notes(run_id, time.time_ns(), run_id, given=True, attached=attached, tags=tags)
        )
        change_id(self._recording, "run", mine.info.run_id, run_id)
        return self.get_run(run_id)

    def _join(self, run_id: str) -> bool:
        """Work on a run that other processes of the project work on too, if there is one."""
        run = self._recording.kedro_run_of(run_id)
        if run is None:
            return False
        with run.lock():  # the last of them may be about to remove it
            if self._recording.kedro_run_of(run_id) is None:
                return False
            run.take_part()
        return True

    def create_logged_model(
        self,
        experiment_id: str,
        name: str | None = None,
        source_run_id: str | None = None,
        tags: list[Any] | None = None,
        params: list[Any] | None = None,
        model_type: str | None = None,
    ) -> Any:
        """Create a model: of a run on the disk there, and on the server first while it answers."""
        from mlflow.entities import LoggedModelTag

        run = self._kedro_run_of(source_run_id) if source_run_id else None
        if run is None:
            return self._remote.create_logged_model(
                experiment_id, name, source_run_id, tags, params, model_type
            )
        tags = [*(tags or ()), LoggedModelTag(ORIGIN, uuid4().hex)]
        model = self._local.create_logged_model(
            experiment_id, name, source_run_id, tags, params, model_type
        )
        if self._is_recorded(experiment_id) or not self._is_sent(source_run_id):
            return model
        create = self._remote_for_creation.create_logged_model
        try:
            answered, remote = self._try(
                lambda: create(experiment_id, model.name, source_run_id, tags, params, model_type)
            )
        except BaseException:
            self._local._hard_delete_logged_model(model.model_id)
            raise
        if not answered:
            return model
        change_id(self._recording, "model", model.model_id, remote.model_id)
        return self._local.get_logged_model(remote.model_id)


class RecordingRegistry(_Store):
    """The registered models: those of the server, and on the disk what is made while it's away."""

    @cached_property
    def _remote(self) -> Any:
        from mlflow.tracking._model_registry.utils import _get_store

        return _get_store(self._recording.registry_uri, self._recording.tracking_uri)

    @cached_property
    def _remote_for_creation(self) -> Any:
        uri = self._recording.registry_uri
        return brisk_registry(uri) if is_http(uri) else self._remote

    @property
    def _local(self) -> Any:
        return self._recording.registry()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        from mlflow.exceptions import MlflowException

        here = getattr(self._local, name)
        given = inspect.signature(here).bind(*args, **kwargs).arguments
        if self._is_recorded(given.get("version")):
            return here(*args, **kwargs)
        if (model := given.get("name")) and is_there(self._local.get_registered_model, model):
            self._send_first(*active_runs())
        try:
            answered, answer = self._try(lambda: getattr(self._remote, name)(*args, **kwargs))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                return here(*args, **kwargs)  # made while the server was away, and not sent yet
            except MlflowException:
                raise error from None
        return answer if answered else here(*args, **kwargs)

    def _is_recorded(self, version: Any) -> bool:
        return str(version).isdecimal() and int(version) >= FIRST_VERSION

    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: list[Any] | None = None,
        run_link: str | None = None,
        description: str | None = None,
        local_model_path: str | None = None,
        model_id: str | None = None,
    ) -> Any:
        """Register a version: on the server, after what it is made of, or on the disk."""
        from mlflow.entities.model_registry import ModelVersionTag

        from .sending import source_on_server

        origin = ModelVersionTag(ORIGIN, uuid4().hex)
        tags = [*(tags or ()), origin]
        run = _run_of_source(self._recording, source, run_id, model_id)

        def record(number: int | None) -> int:
            if not is_there(self._local.get_registered_model, name):
                self._local.create_registered_model(name)
            # The run that makes it is the one that it is sent with.
            made = self._local.create_model_version(
                name, source, run_id or run, tags, run_link, description, local_model_path, model_id
            )
            return number_version(self._recording, name, int(made.version), number)

        if run is None or self._send_first(run):
            there = source_on_server(self._recording, source)
            with as_the_server_sees():
                answered, version = self._try(
                    lambda: self._remote_for_creation.create_model_version(
                        name,
                        there,
                        run_id,
                        tags,
                        run_link,
                        description,
                        local_model_path=local_model_path,
                        model_id=model_id,
                    )
                )
            if answered:
                # It may go away before the version has got its alias.
                record(int(version.version))
                return version
        return self._local.get_model_version(name, record(None))


def _run_of_source(
    recording: Recording, source: str, run_id: str | None, model_id: str | None
) -> str | None:
    """Find the run on the disk that has made what is registered, or in which that happens."""
    from .sending import model_of

    if run_id:
        return run_id
    model_id = model_id or model_of(source)
    store = recording.store()
    if model_id and is_there(store.get_logged_model, model_id):
        made_by: str | None = store.get_logged_model(model_id).source_run_id
        return made_by
    return next(reversed(active_runs()), None)


_seeing = threading.local()


@contextmanager
def as_the_server_sees() -> Iterator[None]:
    """Have this thread find models where they are for the server.

    The registry of a database asks the store that `mlflow.…` is pointed at for a model's place.
    """
    _seeing.as_server = True
    try:
        yield
    finally:
        _seeing.as_server = False


def active_runs() -> list[str]:
    """Name the runs that this thread is in, the outermost first."""
    from mlflow.tracking import fluent

    return [run.info.run_id for run in fluent._active_run_stack.get()]
