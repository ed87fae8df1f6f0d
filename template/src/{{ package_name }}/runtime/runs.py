"""Look at the runs of the project: the latest ones, one whole, or what differs between two.

Nothing is made or changed here, not even an empty store. MLflow is imported inside functions, so
that importing this module costs nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from . import credentials, failures, params
from .loading import (
    ConfigError,
    all_credentials,
    is_database,
    mistake,
    read_credentials,
    register_header_provider,
    shown_uri,
    sqlite_file,
)
from .server import ADDRESS, Server, SettingError

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory
    from kedro.framework.context import KedroContext
    from mlflow.entities import Run

    from .config import ExperimentOptions, MlflowConfig

# Somebody sits and waits: MLflow by itself asks a server that is away for four minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "5",
}

# How many characters of an id are enough to name a run, and how many a whole one has.
SHORTEST_ID, WHOLE_ID = 4, 32

PARENT = "mlflow.parentRunId"

# Tags of MLflow's own that say something of a run. Those with other names all do, but for what
# differs from run to run by its nature.
_TELLING = {
    "mlflow.note.content": "note",
    "mlflow.source.git.branch": "git branch",
    "mlflow.source.git.commit": "git commit",
    "mlflow.source.git.dirty": "git dirty",
    "mlflow.user": "user",
}
_BY_NATURE = {"pid", "process_start", "project_path", "run_id", "save_version", "session_id"}

# How many runs are looked through where the server can't leave out child runs.
_LOOKED_THROUGH = 1000


@contextmanager
def reached(
    context: KedroContext, patience: Mapping[str, str] = PATIENCE
) -> Iterator[tuple[Server, Mapping[str, str]]]:
    """Give the project's server, with its credentials in the environment for so long.

    Args:
        context: The project's.
        patience: Environment variables for what the user has not set.

    Gives the server, and the variables that `server.credentials` names.

    Raises:
        ConfigError: For what the configuration or the server shows to be wrong.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    variables = read_credentials(context)
    register_header_provider(context)
    impatient = {name: value for name, value in patience.items() if name not in os.environ}
    opening, server = uuid4().hex, config.server.connection
    credentials.export(opening, {**impatient, **variables})
    try:
        with failures.translate_server_errors(server, variables):
            yield server, variables
    except SettingError as error:
        raise mistake(context, error.key, secrets_of(context).hide_in(str(error))) from error
    finally:
        credentials.take_back(opening)


def secrets_of(context: KedroContext) -> params.Secrets:
    """Collect what must not be printed."""
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    hidden = frozenset(params.secret_values(all_credentials(context)))
    return params.Secrets(tuple(config.tracking.redact), hidden)


@dataclass(frozen=True)
class Schema:
    """The version of the tables that a database has, None without any, and the one wanted."""

    found: str | None
    wanted: str

    @property
    def is_newer(self) -> bool:
        """Whether a newer MLflow than the one installed has made the tables."""
        known = {script.revision for script in _migrations().walk_revisions()}
        return self.found is not None and self.found not in known


def schema_of(uri: str) -> Schema | None:
    """Read the version of a database's tables; None for a SQLite file that isn't there.

    MLflow's own stores make or change tables as soon as they are opened, which this doesn't.
    """
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    file = sqlite_file(uri)
    if file and not file.exists():
        return None
    with create_engine(uri, poolclass=NullPool).connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return Schema(found, str(_migrations().get_current_head()))


def _migrations() -> ScriptDirectory:
    """Return the changes of tables that the MLflow that is installed knows."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    return ScriptDirectory(str(Path(str(db_migrations.__file__)).parent))


def is_made(server: Server) -> bool:
    """Tell whether there is a store with tables, or a server to ask.

    Raises:
        SettingError: When the tables are not those of the MLflow that is installed.
    """
    if server.tracking_uri.startswith("file:"):
        return Path(local_path(server.tracking_uri)).is_dir()
    if not is_database(server.tracking_uri):
        return True
    schema = schema_of(server.tracking_uri)
    if schema is None or schema.found is None:
        return False
    if schema.found != schema.wanted:
        raise SettingError(ADDRESS, advice_on(schema, server.tracking_uri))
    return True


def local_path(uri: str) -> str:
    """Give the path of a `file:` URI."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return str(local_file_uri_to_path(uri))


def advice_on(schema: Schema, uri: str) -> str:
    """Say how a database and the MLflow that is installed come together again."""
    where = shown_uri(uri)
    if schema.is_newer:
        return f"the tables of {where} are those of a newer MLflow: update mlflow in this project"
    return (
        f"the tables of {where} are those of an older MLflow: back the database up, then run "
        f"`mlflow db upgrade {where}`"
    )


@dataclass(frozen=True)
class Listing:
    """The runs that were found, the newest first, or a sentence that says why there are none."""

    runs: list[Run]
    why_none: str = ""


def latest(
    server: Server,
    options: ExperimentOptions,
    *,
    condition: str = "",
    limit: int = 20,
    children: bool = False,
) -> Listing:
    """Find the latest runs of the experiment, with two requests, or three to older servers.

    Args:
        server: Where the runs are.
        options: Which experiment, of mlflow.yml.
        condition: Filter in MLflow's search syntax.
        limit: How many runs at most.
        children: List child runs too.

    Raises:
        ConfigError: When MLflow doesn't understand the condition.
    """
    if not is_made(server):
        return Listing([], f"No run yet: the first one makes {shown_uri(server.tracking_uri)}.")
    experiment = server.client.get_experiment_by_name(options.name or "Default")
    if experiment is None:
        return Listing([], f"No run yet: the first one makes the experiment {options.name!r}.")
    if experiment.lifecycle_stage == "deleted":
        return Listing([], f"The experiment {options.name!r} is deleted, with its runs.")
    found = _search(server, experiment.experiment_id, condition, limit, children)
    if not found and condition:
        return Listing([], f"No run of the experiment {options.name!r} is one with {condition}.")
    return Listing(found, f"No run yet in the experiment {options.name!r}.")


def _search(
    server: Server, experiment_id: str, condition: str, limit: int, children: bool
) -> list[Run]:
    if children:
        return _page(server, experiment_id, condition, limit)
    childless = f"tags.`{PARENT}` IS NULL"
    try:
        both = f"{condition} and {childless}" if condition.strip() else childless
        return _page(server, experiment_id, both, limit)
    except ConfigError:  # the condition is wrong, or MLflow too old for this filter
        found = _page(server, experiment_id, condition, max(_LOOKED_THROUGH, limit))
    return [run for run in found if PARENT not in run.data.tags][:limit]


def _page(server: Server, experiment_id: str, condition: str, limit: int) -> list[Run]:
    from mlflow.exceptions import MlflowException

    try:
        return list(server.client.search_runs([experiment_id], condition, max_results=limit))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        said = _first_line(error.message)
        raise ConfigError(
            "--filter: expected a condition such as metrics.rmse < 1 and params.depth = '3', got "
            f"{condition!r}: {said}"
        ) from error


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def find(server: Server, options: ExperimentOptions, run_id: str) -> Run:
    """Find a run by its id, or by the first characters of it.

    Raises:
        ConfigError: When there is none, or more than one.
    """
    from mlflow.exceptions import MlflowException

    where = shown_uri(server.tracking_uri)
    if not re.fullmatch(r"[\w-]+", run_id) or len(run_id) < SHORTEST_ID:
        raise ConfigError(
            f"RUN_ID: expected the id of a run, or at least {SHORTEST_ID} characters that it "
            f"begins with, got {run_id!r}"
        )
    if not is_made(server):
        raise ConfigError(f"RUN_ID: there is no run {run_id!r}: {where} isn't made yet")
    if len(run_id) >= WHOLE_ID:
        try:
            return server.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(f"RUN_ID: there is no run {run_id!r} on {where}") from error
    experiment = server.client.get_experiment_by_name(options.name or "Default")
    found: list[Run] = []
    if experiment:
        begins = f"attributes.run_id LIKE '{run_id}%'"
        found = server.client.search_runs([experiment.experiment_id], begins)
        found = [run for run in found if run.info.run_id.startswith(run_id)]  # _ is any character
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(sorted(run.info.run_id for run in found)[:5])
        raise ConfigError(
            f"RUN_ID: {run_id!r} begins the ids of {len(found)} runs: write more of one of {ids}"
        )
    raise ConfigError(
        f"RUN_ID: no run of the experiment {options.name!r} on {where} has an id that begins with "
        f"{run_id!r}; one of another experiment is found by its whole id"
    )


def pipeline_of(run: Run) -> str:
    """Name the pipelines of a run; nothing for a run that Kedro didn't make."""
    tags = run.data.tags
    names = tags.get("pipeline_names") or tags.get("pipeline_name") or ""
    return names or ("__default__" if "kedro_command" in tags else "")


def duration_of(run: Run, now: float) -> float:
    """Tell how many seconds a run took, or has taken so far."""
    end = now * 1000 if run.info.end_time is None else run.info.end_time
    return float(max(end - run.info.start_time, 0)) / 1000


def described(run: Run) -> dict[str, Any]:
    """Write a run as plain values, for JSON."""
    info, ended = run.info, run.info.end_time is not None
    return {
        "run_id": info.run_id,
        "name": info.run_name,
        "status": info.status,
        "experiment_id": info.experiment_id,
        "parent_id": run.data.tags.get(PARENT),
        "pipeline": pipeline_of(run) or None,
        "start_time": _iso(info.start_time),
        "end_time": _iso(info.end_time) if ended else None,
        "duration": duration_of(run, 0) if ended else None,
        "artifact_uri": info.artifact_uri,
        "metrics": {key: _as_json(value) for key, value in sorted(run.data.metrics.items())},
        "params": dict(sorted(run.data.params.items())),
        "tags": dict(sorted(run.data.tags.items())),
    }


def _iso(milliseconds: int) -> str:
    time = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    return time.isoformat(timespec="milliseconds")


def _as_json(value: float) -> float | str:
    """Write what JSON has no number for as MLflow's own answers do."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def telling_tags(run: Run) -> dict[str, str]:
    """Choose the tags that say how the run was made, or that somebody has set."""
    tags = run.data.tags
    own = {
        name: value
        for name, value in tags.items()
        if not name.startswith("mlflow.") and name not in _BY_NATURE
    }
    return dict(sorted(own.items())) | {
        shown: tags[name] for name, shown in _TELLING.items() if name in tags
    }


@dataclass(frozen=True)
class Whole:
    """All there is to see of one run; `lacks` says what couldn't be asked for, and why."""

    run: Run
    steps: dict[str, int]
    artifacts: list[dict[str, Any]]
    models: list[dict[str, Any]]
    children: list[Run]
    lacks: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """Write it as plain values, for JSON."""
        tags = self.run.data.tags
        return {
            **described(self.run),
            "steps": self.steps,
            "artifacts": self.artifacts,
            "models": self.models,
            "children": [described(child) for child in self.children],
            "failed_node": tags.get("kedro_failed_node"),
            "error": tags.get("kedro_error"),
        }


def whole(server: Server, run: Run) -> Whole:
    """Ask for everything that belongs to a run."""
    client, run_id = server.client, run.info.run_id
    lacks: list[str] = []
    children = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
    return Whole(
        run,
        _steps(server, run),
        _artifacts(server, run, lacks),
        _models(server, run, lacks),
        sorted(children, key=lambda child: child.info.start_time),
        lacks,
    )


def _steps(server: Server, run: Run) -> dict[str, int]:
    """Count the steps of each metric; MLflow has to be asked for each that has more than one."""

    def count(last: Any) -> int:
        if last.step == 0:
            return 1
        history = server.client.get_metric_history(run.info.run_id, last.key)
        return len({point.step for point in history})

    # Of what is public only this has the last point of each metric with its step.
    latest = sorted(run.data.to_proto().metrics, key=lambda metric: metric.key)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip([m.key for m in latest], pool.map(count, latest), strict=True))


def _artifacts(server: Server, run: Run, lacks: list[str]) -> list[dict[str, Any]]:
    place = run.info.artifact_uri or ""
    try:
        with failures.translate_artifact_errors(place, server):
            listed = server.client.list_artifacts(run.info.run_id)
    except failures.ArtifactError as error:
        lacks.append(error.message)
        return []
    return [{"path": a.path, "is_folder": a.is_dir, "size": a.file_size} for a in listed]


def _models(server: Server, run: Run, lacks: list[str]) -> list[dict[str, Any]]:
    """List the models that a run has logged, each with the versions it is registered as."""
    from mlflow.exceptions import MlflowException

    run_id = run.info.run_id
    try:
        logged = server.client.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run_id}'"
        )
        versions = server.client.search_model_versions(f"run_id = '{run_id}'") if logged else []
    except MlflowException as error:  # servers that are older, or not MLflow's own, can't tell
        lacks.append(f"The models can't be listed: {_first_line(error.message)}")
        return []
    return [
        {
            "name": model.name,
            "model_id": model.model_id,
            "registered": [
                {"name": version.name, "version": str(version.version)}
                for version in versions
                if model.model_id in str(version.source)
                or model.model_id == getattr(version, "model_id", None)
            ],
        }
        for model in logged
    ]


Pair = tuple[Any, Any]


def differences(first: Run, second: Run) -> dict[str, dict[str, Pair]]:
    """Tell what differs between two runs; None stands for what one of them doesn't have."""
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "params": (first.data.params, second.data.params),
        "metrics": (first.data.metrics, second.data.metrics),
        "tags": (telling_tags(first), telling_tags(second)),
    }
    return {
        kind: {
            name: (one.get(name), other.get(name))
            for name in sorted({*one, *other})
            if not _same(one.get(name), other.get(name))
        }
        for kind, (one, other) in kinds.items()
    }


def _same(one: Any, other: Any) -> bool:
    return bool(one == other or (one != one and other != other))  # two NaN are the same


def common_metrics(runs: Sequence[Run]) -> list[str]:
    """Name the metrics of some runs: those that most of them have first, then those that differ.

    What MLflow measures of the machine is left out.
    """
    counts = Counter(key for run in runs for key in run.data.metrics)
    values = {key: {run.data.metrics.get(key) for run in runs} for key in counts}
    ordered = sorted(counts, key=lambda key: (-counts[key], len(values[key]) < 2, key))
    return [key for key in ordered if not key.startswith("system/")]
