"""Read the runs of the project: the latest ones, one with all its details, or two that differ.

Nothing is created or changed here, not even an empty store. MLflow is imported inside functions, so
that importing this module costs nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError
from ..config.uris import shown_uri
from ..stores.errors import ArtifactError, translate_artifact_errors
from ..stores.server import Server, experiment_name
from . import store

if TYPE_CHECKING:
    from mlflow.entities import Run

    from ..config.keys import ExperimentOptions

# How many characters of an id are enough to name a run, and how many a whole one has.
SHORTEST_ID, WHOLE_ID = 4, 32

PARENT = "mlflow.parentRunId"

# The tags of MLflow's own that are shown, and tags of Kedro runs that always differ.
_SHOWN_TAGS = {
    "mlflow.note.content": "note",
    "mlflow.source.git.branch": "git branch",
    "mlflow.source.git.commit": "git commit",
    "mlflow.source.git.dirty": "git dirty",
    "mlflow.user": "user",
}
_HIDDEN_TAGS = {
    "pid",
    "process_start",
    "process_start_ticks",
    "project_path",
    "run_id",
    "save_version",
    "session_id",
}

# How many runs are looked through where the server can't leave out child runs.
_LOOKED_THROUGH = 1000


@dataclass(frozen=True)
class Latest:
    """The latest runs, the newest first, or a sentence that says why there are none."""

    runs: list[Run]
    why_none: str = ""


def read_latest(
    server: Server, options: ExperimentOptions, condition: str, limit: int, *, children: bool
) -> Latest:
    """Return the latest runs of the experiment, with two requests, or three to older servers.

    Args:
        server: Where the runs are.
        options: Which experiment, of mlflow.yml.
        condition: Filter in MLflow's search syntax.
        limit: How many runs at most.
        children: Whether child runs are listed too.

    Raises:
        ConfigError: When MLflow doesn't understand the condition.
    """
    if not store.exists(server.tracking_uri):
        return Latest([], f"No run yet: the first one makes {shown_uri(server.tracking_uri)}.")
    experiment = server.client.get_experiment_by_name(experiment_name(server, options))
    if experiment is None:
        return Latest([], f"No run yet: the first one makes the experiment {options.name!r}.")
    if experiment.lifecycle_stage == "deleted":
        return Latest([], f"The experiment {options.name!r} is deleted, with its runs.")
    runs = _search(server, experiment.experiment_id, condition, limit, children)
    if not runs and condition:
        return Latest([], f"No run of the experiment {options.name!r} is one with {condition}.")
    return Latest(runs, f"No run yet in the experiment {options.name!r}.")


def _search(
    server: Server, experiment_id: str, condition: str, limit: int, children: bool
) -> list[Run]:
    if children:
        return _page(server, experiment_id, condition, limit)
    no_child = f"tags.`{PARENT}` IS NULL"
    try:
        both = f"{condition} and {no_child}" if condition.strip() else no_child
        return _page(server, experiment_id, both, limit)
    except ConfigError:  # the condition is wrong, or MLflow too old for this filter (3.11)
        runs = _page(server, experiment_id, condition, max(_LOOKED_THROUGH, limit))
    return [run for run in runs if PARENT not in run.data.tags][:limit]


def _page(server: Server, experiment_id: str, condition: str, limit: int) -> list[Run]:
    from mlflow.exceptions import MlflowException

    try:
        return list(server.client.search_runs([experiment_id], condition, max_results=limit))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise ConfigError(
            "--filter: expected a condition such as metrics.rmse < 1 and params.depth = '3', got "
            f"{condition!r}: {_first_line(error)}"
        ) from error


def _first_line(error: Any) -> str:
    return str(error.message).strip().partition("\n")[0]


def find_run(server: Server, options: ExperimentOptions, run_id: str) -> Run:
    """Return a run by its id, or by the first characters of it.

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
    if not store.exists(server.tracking_uri):
        raise ConfigError(f"RUN_ID: there is no run {run_id!r}: {where} isn't made yet")
    if len(run_id) >= WHOLE_ID:
        try:
            return server.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(f"RUN_ID: there is no run {run_id!r} on {where}") from error
    experiment = server.client.get_experiment_by_name(experiment_name(server, options))
    runs: list[Run] = []
    if experiment:
        begins = f"attributes.run_id LIKE '{run_id}%'"
        runs = server.client.search_runs([experiment.experiment_id], begins)
        runs = [run for run in runs if run.info.run_id.startswith(run_id)]  # _ is any character
    if len(runs) == 1:
        return runs[0]
    if runs:
        ids = ", ".join(sorted(run.info.run_id for run in runs)[:5])
        raise ConfigError(
            f"RUN_ID: {run_id!r} begins the ids of {len(runs)} runs: write more of one of {ids}"
        )
    raise ConfigError(
        f"RUN_ID: no run of the experiment {options.name!r} on {where} has an id that begins with "
        f"{run_id!r}; one of another experiment is found by its whole id"
    )


def pipeline_of(run: Run) -> str:
    """Return the names of a run's pipelines; nothing for a run that isn't Kedro's."""
    tags = run.data.tags
    names = tags.get("pipeline_names") or tags.get("pipeline_name") or ""
    return names or ("__default__" if "kedro_command" in tags else "")


def duration_of(run: Run, now: float) -> float:
    """Return how many seconds a run took, or has taken so far."""
    end = now * 1000 if run.info.end_time is None else run.info.end_time
    return float(max(end - run.info.start_time, 0)) / 1000


def run_as_json(run: Run) -> dict[str, Any]:
    """Return a run as plain values."""
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
        "metrics": {key: _json_number(value) for key, value in sorted(run.data.metrics.items())},
        "params": dict(sorted(run.data.params.items())),
        "tags": dict(sorted(run.data.tags.items())),
    }


def _iso(milliseconds: int) -> str:
    time = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    return time.isoformat(timespec="milliseconds")


def _json_number(value: float) -> float | str:
    """Return a number; what JSON has no number for as the text that MLflow's own answers have."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def shown_tags(run: Run) -> dict[str, str]:
    """Return the tags that say what has run, or that somebody has set."""
    tags = run.data.tags
    own = {
        name: value
        for name, value in sorted(tags.items())
        if not name.startswith("mlflow.") and name not in _HIDDEN_TAGS
    }
    return own | {shown: tags[name] for name, shown in _SHOWN_TAGS.items() if name in tags}


@dataclass(frozen=True)
class Details:
    """Everything that belongs to one run; `problems` says what couldn't be read, and why."""

    run: Run
    steps: dict[str, int]
    artifacts: list[dict[str, Any]]
    models: list[dict[str, Any]]
    children: list[Run]
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        tags = self.run.data.tags
        return {
            **run_as_json(self.run),
            "steps": self.steps,
            "artifacts": self.artifacts,
            "models": self.models,
            "children": [run_as_json(child) for child in self.children],
            "failed_node": tags.get("kedro_failed_node"),
            "failed_dataset": tags.get("kedro_failed_dataset"),
            "failed_rule": tags.get("kedro_failed_rule"),
            "error": tags.get("kedro_error"),
        }


def read_details(server: Server, run: Run) -> Details:
    """Return a run with everything that belongs to it."""
    of_this = f"tags.`{PARENT}` = '{run.info.run_id}'"
    children = server.client.search_runs([run.info.experiment_id], of_this)
    problems: list[str] = []
    return Details(
        run,
        _steps(server, run),
        _artifacts(server, run, problems),
        _models(server, run, problems),
        sorted(children, key=lambda child: child.info.start_time),
        problems,
    )


def _steps(server: Server, run: Run) -> dict[str, int]:
    """Return the number of steps of each metric, with a request for each that has several."""

    def count(last: Any) -> int:
        if last.step == 0:
            return 1
        history = server.client.get_metric_history(run.info.run_id, last.key)
        return len({point.step for point in history})

    # Of what is public only this has the last point of each metric with its step.
    latest = sorted(run.data.to_proto().metrics, key=lambda metric: metric.key)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip([m.key for m in latest], pool.map(count, latest), strict=True))


def _artifacts(server: Server, run: Run, problems: list[str]) -> list[dict[str, Any]]:
    place = run.info.artifact_uri or ""
    try:
        with translate_artifact_errors(place, server):
            artifacts = server.client.list_artifacts(run.info.run_id)
    except ArtifactError as error:
        problems.append(error.message)
        return []
    return [{"path": a.path, "is_folder": a.is_dir, "size": a.file_size} for a in artifacts]


def _models(server: Server, run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """Return the models that a run has logged, each with the versions it is registered as."""
    from mlflow.exceptions import MlflowException

    run_id = run.info.run_id
    try:
        logged = server.client.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run_id}'"
        )
        versions = server.client.search_model_versions(f"run_id = '{run_id}'") if logged else []
    except MlflowException as error:  # servers that are older, or not MLflow's own, can't tell
        problems.append(f"The models can't be listed: {_first_line(error)}")
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


def differences(first: Run, second: Run) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return what differs between two runs; None stands for what one of them doesn't have."""
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "params": (first.data.params, second.data.params),
        "metrics": (first.data.metrics, second.data.metrics),
        "tags": (shown_tags(first), shown_tags(second)),
    }
    return {
        kind: {
            name: (one.get(name), other.get(name))
            for name in sorted({*one, *other})
            if repr(one.get(name)) != repr(other.get(name))  # two NaN are the same
        }
        for kind, (one, other) in kinds.items()
    }


def common_metrics(runs: Sequence[Run]) -> list[str]:
    """Return the names of metrics: those that most runs have first, of these those that differ.

    What MLflow measures of the machine is left out.
    """
    counts = Counter(key for run in runs for key in run.data.metrics)
    values = {key: {run.data.metrics.get(key) for run in runs} for key in counts}
    ordered = sorted(counts, key=lambda key: (-counts[key], len(values[key]) < 2, key))
    return [key for key in ordered if not key.startswith("system/")]
