"""Check what a tracked run needs, each thing after the one that it needs itself."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from kedro.framework.session import KedroSession
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..binding import secrets_of
from ..cli.session import with_credentials, with_explained_errors
from ..config.errors import ConfigError, SettingError
from ..config.loading import mistake
from ..config.uris import is_database, is_http, local_path, shown_uri, sqlite_file
from ..extras import load, present
from ..stores.errors import artifact_sentence, translate_artifact_errors
from ..stores.moving import follow, origin_of
from ..stores.project import register_header_provider
from ..stores.schema import Schema, can_migrate, check_schema, read_schema
from ..stores.server import Server, checked, experiment_id, experiment_name, first_answer
from ..tracking.ending import MARKERS, duration_in_words, end_killed
from ..tracking.process import Process, orphans, this_process, unmark
from .showing import count
from .store import IMPATIENT

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from requests import Response

    from ..config.keys import ExperimentOptions
    from ..stores.project import MlflowConfig

# The first request shows within so many seconds whether a server is there.
FIRST_ANSWER_TIMEOUT = 4

# How far apart the clocks of two machines may be, in seconds, before times mislead.
CLOCK_TOLERANCE = 60

# What marks the run that is made to see whether one can be, and its artifact.
NAME, MARK, FILE = "kedro mlflow doctor", "kedro_mlflow_doctor", "doctor.txt"

CONFIGURATION, CREDENTIALS, SERVER = "configuration", "credentials", "server"
SCHEMA, FILES = "database schema", "place of files"
EXPERIMENT, WRITING = "experiment", "writing runs"


@dataclass(frozen=True)
class Finding:
    """What a check has found: right, wrong with an advice, or not checked (`ok` is None)."""

    ok: bool | None
    found: str = ""
    advice: str = ""


@dataclass
class _Setup:
    """The project, and what the checks so far have read of it for those that follow."""

    project_path: Path
    env: str | None
    fix: bool
    until_the_end: ExitStack
    context: Any = None
    variables: Mapping[str, str] = field(default_factory=dict)
    answer: Response | None = None  # to GET /version
    asked_at: float = 0.0  # in seconds since 1970
    answered_at: float = 0.0
    schema: Schema | None = None
    has_store: bool = False
    experiment: Experiment | None = None
    run: Run | None = None

    @property
    def config(self) -> MlflowConfig:
        config: MlflowConfig = self.context.mlflow
        return config

    @property
    def server(self) -> Server:
        return self.config.server.connection

    @property
    def options(self) -> ExperimentOptions:
        return self.config.tracking.experiment

    @property
    def address(self) -> str:
        return shown_uri(self.server.tracking_uri)

    def command(self, name: str) -> str:
        return f"kedro mlflow {name}" + (f" --env={self.env}" if self.env else "")


class _Check(NamedTuple):
    """A check, what is said when it fails with an error, and the check that it needs."""

    name: str
    function: Callable[[_Setup], Finding]
    failing: str
    needs: str | None = None


def examine(project_path: Path, env: str | None, *, fix: bool = False) -> dict[str, Finding]:
    """Make every check that can be made, and return what each has found.

    Args:
        project_path: The project's folder.
        env: Kedro environment.
        fix: End the runs that dead processes have left RUNNING.
    """
    findings: dict[str, Finding] = {}
    blocking: set[str] = set()
    with ExitStack() as stack:
        setup = _Setup(project_path, env, fix, stack)
        try:
            for check in _CHECKS:
                is_blocked = check.needs in blocking
                finding = Finding(None) if is_blocked else _finding(check, setup)
                findings[check.name] = finding
                if is_blocked or finding.ok is False:
                    blocking.add(check.name)
        finally:
            deletion = _finding(_DELETION, setup)
        if deletion.ok is False:
            findings[WRITING] = deletion
    return findings


def _finding(check: _Check, setup: _Setup) -> Finding:
    """Make a check; whatever goes wrong is what it was made to find."""
    context = setup.context
    try:
        with with_explained_errors(context, setup.variables) if context else nullcontext():
            return check.function(setup)
    except ConfigError as error:
        return Finding(False, check.failing, error.message)
    except Exception as error:  # of a kind that isn't known
        reason = _reason(error)
        with suppress(Exception):  # the credentials may be what can't be read
            reason = secrets_of(context).hide_in(reason)
        return Finding(False, check.failing, f"{reason} (see the logs)")


def _reason(error: Exception) -> str:
    return shown_uri(f"{type(error).__name__}: {error}").strip().partition("\n")[0]


def _configuration(setup: _Setup) -> Finding:
    session: Any = KedroSession.create(project_path=setup.project_path, env=setup.env)
    context = setup.until_the_end.enter_context(session).load_context()
    context.mlflow  # noqa: B018 - is read when it is asked for
    setup.context = context
    return Finding(True, f"environment {context.env or 'local'}, runs on {setup.address}")


def _credentials(setup: _Setup) -> Finding:
    options = setup.config.server
    setup.variables = setup.until_the_end.enter_context(with_credentials(setup.context, IMPATIENT))
    parts = []
    if options.credentials:
        parts.append(f"{options.credentials}: {', '.join(setup.variables) or 'nothing'}")
    if provider := register_header_provider(setup.context):
        kind = options.request_header_provider.type
        try:  # MLflow would only log its error, and send no headers
            if provider.in_context():
                provider.request_headers()
        except Exception as error:  # it is the user's code
            reason = f"type {kind!r} gives no headers: {type(error).__name__}: {error}"
            reason = secrets_of(setup.context).hide_in(reason)
            key = ("server", "request_header_provider")
            raise mistake(setup.context, key, reason) from error
        parts.append(f"headers of {kind}")
    return Finding(True, "; ".join(parts) or "none asked for")


def _server(setup: _Setup) -> Finding:
    uri, took = setup.server.tracking_uri, ""
    if is_http(uri):
        setup.answer = _ask_for_version(setup)
        took = f" answered in {(setup.answered_at - setup.asked_at) * 1000:.0f} ms"
    elif is_database(uri):
        setup.schema = read_schema(uri)
        if setup.schema.version is None:
            return _missing_store(setup, sqlite_file(uri))
    elif uri.startswith("file:") and not local_path(uri).is_dir():
        return _missing_store(setup, local_path(uri))
    setup.has_store = True
    return Finding(True, f"{setup.address}{took}")


def _missing_store(setup: _Setup, path: Path | None) -> Finding:
    """Check whether the first run can create the store."""
    if path is None or path.exists():
        return Finding(True, f"{setup.address} has no tables yet: the first run makes them")
    folder = next(parent for parent in path.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return Finding(
            False,
            f"{setup.address} isn't there and can't be made",
            f"make the folder {folder} writable for this user, or name another in "
            "server.mlflow_tracking_uri",
        )
    return Finding(True, f"{setup.address} isn't there yet: the first run makes it")


def _ask_for_version(setup: _Setup) -> Response:
    setup.asked_at = time.time()
    answer = first_answer(setup.server.tracking_uri, "/version", FIRST_ANSWER_TIMEOUT)
    setup.answered_at = time.time()
    if answer.status_code != 404:  # other servers that speak MLflow's API don't tell a version
        checked(answer, "/version")
    return answer


def _version(setup: _Setup) -> Finding:
    from packaging.version import InvalidVersion, Version

    if setup.answer is None:
        return Finding(None, "no server in between")
    here = Version(version("mlflow"))
    try:
        there = Version(setup.answer.text.strip())
    except InvalidVersion:
        return Finding(None, "the server doesn't tell its version")
    found = f"MLflow {there} there, {here} here"
    if there.major < here.major:
        return Finding(False, found, f"update the server to MLflow {here.major}.0 or newer")
    if there.major > here.major:
        return Finding(False, found, f"update mlflow in this project to {there.major}.0 or newer")
    return Finding(True, found)


def _clock(setup: _Setup) -> Finding:
    if setup.answer is None:
        return Finding(None, "no server in between")
    # A proxy may have added its own: the first one is the server's, or the nearest to it.
    date = re.search(r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT", setup.answer.headers.get("Date", ""))
    if date is None:
        return Finding(None, "the server doesn't tell its time")
    asked_at = (setup.asked_at + setup.answered_at) / 2
    ahead = parsedate_to_datetime(date[0]).timestamp() - asked_at
    found = f"{abs(ahead):.0f} s apart"
    if abs(ahead) <= CLOCK_TOLERANCE:
        return Finding(True, found)
    difference = f"{duration_in_words(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
    return Finding(
        False,
        found,
        f"the server's clock is {difference} this machine's: have both set by NTP, or ages and "
        "durations of runs are wrong",
    )


def _schema(setup: _Setup) -> Finding:
    schema = setup.schema
    if schema is None or schema.version is None:
        return Finding(None, "the server's" if setup.has_store else "not made yet")
    if schema.fits:
        return Finding(True, schema.version)
    uri = setup.server.tracking_uri
    if setup.fix:
        check_schema(uri, schema, setup.project_path)
        return Finding(True, f"{schema.wanted}, migrated from {schema.version}")
    advice = schema.advice
    if can_migrate(uri, schema, setup.project_path):
        advice = f"the next run migrates them, or `{setup.command('doctor')} --fix`"
    return Finding(False, f"{schema.version}, not {schema.wanted}", advice)


def _files(setup: _Setup) -> Finding:
    uri, location = setup.server.tracking_uri, setup.options.create_experiment_kwargs
    file, place = sqlite_file(uri), location.artifact_location
    if file is None or place is None or not setup.has_store:
        return Finding(None, "not a file" if setup.has_store else "not made yet")
    origin = origin_of(uri, file, place)
    if origin is None:
        return Finding(True, f"the files are where {file.name} says")
    found = f"{file.name} was in {origin}, where it looks for the files of its runs"
    if setup.fix:
        follow(uri, file, place)
        return Finding(True, f"{found}: changed to {file.parent}")
    return Finding(False, found, f"the next run mends that, or `{setup.command('doctor')} --fix`")


def _experiment(setup: _Setup) -> Finding:
    name = experiment_name(setup.server, setup.options)
    if not setup.has_store:
        return Finding(None, f"{name!r}: made by the first run")
    experiment = setup.experiment = setup.server.client.get_experiment_by_name(name)
    if experiment is None:
        return Finding(True, f"{name!r} isn't there yet")
    if experiment.lifecycle_stage != "deleted":
        return Finding(True, f"{name!r}, artifacts in {shown_uri(experiment.artifact_location)}")
    if setup.options.restore_if_deleted:
        return Finding(True, f"{name!r} is deleted: the next run restores it")
    what = f"the experiment {name!r} is deleted; expected true, or another name, got False"
    raise SettingError(("tracking", "experiment", "restore_if_deleted"), what)


def _writing(setup: _Setup) -> Finding:
    if not setup.has_store:
        return Finding(None, "made by the first run")
    if setup.experiment and setup.experiment.lifecycle_stage == "deleted":
        return Finding(None, "the experiment is deleted")
    client = setup.server.client
    tags = {
        MARK: "made to see whether runs can be, and to be deleted at once",
        "project_path": str(setup.project_path),
        **this_process().tags(),
    }
    experiment = experiment_id(setup.server, setup.options)
    setup.run = client.create_run(experiment, tags=tags, run_name=NAME)
    client.set_terminated(setup.run.info.run_id, "FINISHED")
    made = "" if setup.experiment else f"made the experiment {setup.options.name!r}, "
    return Finding(True, f"{made}made a run and deleted it")


def _artifacts(setup: _Setup) -> Finding:
    if setup.run is None:
        return Finding(None, "" if setup.has_store else "made by the first run")
    client, run_id = setup.server.client, setup.run.info.run_id
    place, content = setup.run.info.artifact_uri or "", f"{NAME} {uuid4().hex}\n"
    new_folders: list[Path] = []
    if place.startswith(("file:", "/")):
        folder = local_path(place)
        new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with translate_artifact_errors(place, setup.server), TemporaryDirectory() as temporary:
            client.log_text(run_id, content, FILE)
            read = Path(client.download_artifacts(run_id, FILE, temporary)).read_text("utf-8")
    except OSError as error:
        return Finding(
            False,
            shown_uri(place),
            f"Artifacts can't be stored in {place}: {error.strerror or error}. See to the folder, "
            "or name another place in tracking.experiment.create_experiment_kwargs for a new "
            "experiment.",
        )
    if read != content:
        what = f"what is read back from {place} is not what was written: see to the storage"
        return Finding(False, "written, and another content read", what)
    found = _delete_artifact(setup, place)
    with suppress(OSError):  # somebody else's files are in it by now
        for folder in new_folders:
            folder.rmdir()
    return Finding(True, found)


def _delete_artifact(setup: _Setup, place: str) -> str:
    """Delete the artifact; a store that can't, or doesn't allow it, will do for runs as well."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(place, setup.server.tracking_uri).delete_artifacts(FILE)
    except Exception as error:  # each kind of storage has errors of its own
        reason = artifact_sentence(error, place, setup.server) or _reason(error)
        return f"written and read; {FILE} stays in {place}, which can't delete ({reason})"
    return "written, read and deleted"


def _delete_run(setup: _Setup) -> Finding:
    """Delete the run that was made; MLflow keeps it in its bin until `mlflow gc`."""
    if setup.run is not None:
        run_id = setup.run.info.run_id
        try:
            setup.server.client.delete_run(run_id)
        except Exception as error:  # each kind of store has errors of its own
            advice = f"delete the run {run_id} ({NAME}) by hand: {_reason(error)}"
            return Finding(False, "made a run, which can't be deleted", advice)
    return Finding(True)


def _open_runs(setup: _Setup) -> Finding:
    if not setup.has_store:
        return Finding(None, "no run yet")
    open_runs = list(_runs_left_open(setup))
    if not open_runs:
        return Finding(True, "none")
    ids = ", ".join(run.info.run_id for run, _ in open_runs)
    found = f"{count(len(open_runs), 'run')} of processes that are gone: {ids}"
    if not setup.fix:
        return Finding(False, found, f"`{setup.command('doctor')} --fix` ends them as KILLED")
    for run, process in open_runs:
        end_killed(setup.server, run, process)
        unmark(setup.project_path / MARKERS, run.info.run_id)
    return Finding(True, f"ended {found}")


def _runs_left_open(setup: _Setup) -> Iterator[tuple[Run, Process]]:
    """Yield the runs of this project that are RUNNING and whose process on this host is gone.

    A marker in the project's folder says more of its run than the run's tags do: tags don't tell
    containers with one host name apart.
    """
    from mlflow.exceptions import MlflowException

    client, markers = setup.server.client, setup.project_path / MARKERS
    for marker in orphans(markers, setup.address):
        try:
            run = client.get_run(marker.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if run.info.status == "RUNNING":
            yield run, marker.process
    if setup.experiment is None:
        return
    here = this_process()
    running = f"attributes.status = 'RUNNING' and tags.host = '{here.host}'"
    for run in client.search_runs([setup.experiment.experiment_id], running):
        process = _process_of(run.data.tags, here)
        is_of_project = run.data.tags.get("project_path") == str(setup.project_path)
        is_marked = (markers / f"{run.info.run_id}.json").exists()
        if is_of_project and not is_marked and process and process.is_gone():
            yield run, process


def _process_of(tags: Mapping[str, str], here: Process) -> Process | None:
    """Return the process on this host that `Process.tags` has described in tags."""
    try:
        start = datetime.fromisoformat(tags["process_start"]).timestamp()
        ticks = tags.get("process_start_ticks", "")
        return Process(here.host, int(tags["pid"]), start, here.namespace, ticks)
    except (KeyError, ValueError):  # somebody else's tags
        return None


def _offline_runs(setup: _Setup) -> Finding:
    ids = load("offline", "disk", "offline runs").runs_to_replay(setup.project_path)
    if not ids:
        return Finding(True, "none")
    some = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
    found = f"{count(len(ids), 'run')} on disk in this project: {some}"
    return Finding(False, found, f"`{setup.command('sync')}` replays them")


_CHECKS = [
    _Check(CONFIGURATION, _configuration, "not valid"),
    _Check(CREDENTIALS, _credentials, "not usable", needs=CONFIGURATION),
    _Check(SERVER, _server, "not usable", needs=CREDENTIALS),
    _Check("version", _version, "not known", needs=SERVER),
    _Check("clock", _clock, "not known", needs=SERVER),
    _Check(SCHEMA, _schema, "not known", needs=SERVER),
    _Check(FILES, _files, "not known", needs=SCHEMA),
    _Check(EXPERIMENT, _experiment, "not usable", needs=FILES),
    _Check(WRITING, _writing, "not possible", needs=EXPERIMENT),
    _Check("artifacts", _artifacts, "not usable", needs=WRITING),
    _Check("open runs", _open_runs, "not known", needs=EXPERIMENT),
]
if "offline" in present():
    _CHECKS.append(_Check("offline runs", _offline_runs, "not known"))
_DELETION = _Check(WRITING, _delete_run, "not possible")


def show_findings(console: Console, findings: Mapping[str, Finding]) -> None:
    """Write the findings as a table, each with what to do where something is wrong."""
    is_utf = "utf" in console.encoding.lower()
    marks = {
        True: Text("✓" if is_utf else "ok", style="green"),
        False: Text("✗" if is_utf else "no", style="bold red"),
        None: Text("-", style="dim"),
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in findings.items():
        style = "dim" if finding.ok is None else ""
        text = Text(finding.found, style=style)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="yellow")
        table.add_row(marks[finding.ok], Text(name, style=style), text)
    console.print(table)
