"""Check what a tracked run needs, each thing after those that it needs itself."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from kedro.framework.session import KedroSession
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import credentials, endings, failures, tracking
from .loading import (
    ConfigError,
    is_database,
    is_http,
    mistake,
    read_credentials,
    register_header_provider,
    shown_uri,
    sqlite_file,
)
from .offline.disk import disks
from .offline.replay import waiting
from .runs import Schema, advice_on, local_path, schema_of, secrets_of
from .server import Server, SettingError, checked, experiment_id
from .showing import count, lasting

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )
    from requests import Response

    from .config import ExperimentOptions, MlflowConfig

# What holds for requests where the user has not said so. The first one of all, which shows
# whether a server is there, waits less and is not repeated.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "4",
    "AWS_MAX_ATTEMPTS": "2",
    # Of the run that is made, and is gone when somebody looks.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
FIRST_PATIENCE = {"timeout": 4, "max_retries": 0}

# How far apart the clocks of two machines may be, in seconds, before times mislead.
_APART = 60

# What marks the run that is made to see whether one can be, and its artifact.
NAME, MARK, FILE = "kedro mlflow doctor", "kedro_mlflow_doctor", "doctor.txt"


@dataclass(frozen=True)
class Finding:
    """What a check has found: right, wrong, or not made (`ok` is None)."""

    check: str
    ok: bool | None
    found: str = ""
    advice: str = ""


class _FaultError(ConfigError):
    """Something that a check finds to be wrong, and what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(advice)
        self.found = found


class _SkippedError(ConfigError):
    """There is no need for a check, or nothing to make it with."""


@dataclass
class _Patient:
    """The project, and what the checks so far have found out for those that follow."""

    project_path: Path
    env: str | None
    fix: bool
    until_the_end: ExitStack
    context: Any = None
    variables: Mapping[str, str] = field(default_factory=dict)
    answer: Response | None = None  # to GET /version
    asked: float = 0.0  # when that was, in seconds since 1970
    took: float = 0.0  # how long that took, in seconds
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


class _Check(NamedTuple):
    """A check, those that have to go well before it, and what is told when it fails."""

    name: str
    needs: tuple[str, ...]
    look: Callable[[_Patient], str]
    failing: str


def examine(project_path: Path, env: str | None, *, fix: bool = False) -> list[Finding]:
    """Make every check that can be made.

    Args:
        project_path: The project's folder.
        env: Kedro environment.
        fix: End the runs that dead processes have left RUNNING.
    """
    findings: dict[str, Finding] = {}
    blocked: set[str] = set()
    with ExitStack() as stack:
        patient = _Patient(project_path, env, fix, stack)
        try:
            for check in _CHECKS:
                if blocked & set(check.needs):
                    findings[check.name] = Finding(check.name, None)
                else:
                    findings[check.name] = _made(check, patient)
                if findings[check.name].ok is False or blocked & set(check.needs):
                    blocked.add(check.name)
        finally:
            problem = _made(_CLEARING, patient)
    if problem.ok is False:
        findings[_WRITING] = problem
    return list(findings.values())


def _made(check: _Check, patient: _Patient) -> Finding:
    """Make a check; whatever goes wrong is what it was made to find."""
    try:
        with _told(patient):
            return Finding(check.name, True, check.look(patient))
    except _SkippedError as skipped:
        return Finding(check.name, None, skipped.message)
    except _FaultError as fault:
        return Finding(check.name, False, fault.found, fault.message)
    except ConfigError as error:
        return Finding(check.name, False, check.failing, error.message)
    except Exception as error:  # of a kind that isn't known
        said = shown_uri(f"{type(error).__name__}: {error}").strip().partition("\n")[0]
        if patient.context is not None:
            with suppress(Exception):  # the credentials may be what can't be read
                said = secrets_of(patient.context).hide_in(said)
        return Finding(check.name, False, check.failing, f"{said} (see the logs)")


@contextmanager
def _told(patient: _Patient) -> Iterator[None]:
    """Turn what a server refuses into the sentence that a run would end with."""
    if patient.context is None:
        yield
        return
    try:
        with failures.translate_server_errors(patient.server, patient.variables):
            yield
    except SettingError as error:
        said = secrets_of(patient.context).hide_in(str(error))
        raise mistake(patient.context, error.key, said) from error


def _configuration(patient: _Patient) -> str:
    stack = patient.until_the_end
    session = stack.enter_context(
        KedroSession.create(project_path=patient.project_path, env=patient.env)
    )
    context: Any = session.load_context()  # type: ignore[attr-defined]
    context.mlflow  # noqa: B018 - is read when it is asked for
    patient.context = context
    return f"environment {context.env or 'local'}, runs on {patient.address}"


def _credentials(patient: _Patient) -> str:
    context, options = patient.context, patient.config.server
    patient.variables = read_credentials(context)
    provider = register_header_provider(context)
    unset = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    opening = uuid4().hex
    credentials.export(opening, {**unset, **patient.variables})
    patient.until_the_end.callback(credentials.take_back, opening)
    told = []
    if options.credentials:
        told.append(f"{options.credentials}: {', '.join(patient.variables) or 'nothing'}")
    if provider:
        _ask_for_headers(patient, provider)
        told.append(f"headers of {options.request_header_provider.type}")
    return "; ".join(told) or "none asked for"


def _ask_for_headers(patient: _Patient, provider: RequestHeaderProvider) -> None:
    """Ask the provider for headers; MLflow would only log its error, and send none."""
    try:
        if provider.in_context():
            provider.request_headers()
    except Exception as error:  # it is the user's code
        kind = patient.config.server.request_header_provider.type
        what = f"type {kind!r} gives no headers: {type(error).__name__}: {error}"
        said = secrets_of(patient.context).hide_in(what)
        raise mistake(patient.context, ("server", "request_header_provider"), said) from error


def _server(patient: _Patient) -> str:
    uri = patient.server.tracking_uri
    if is_database(uri):
        patient.schema = schema_of(uri)
        if patient.schema is None or patient.schema.found is None:
            return _to_be_made(patient)
    elif uri.startswith("file:"):
        if not Path(local_path(uri)).is_dir():
            return _to_be_made(patient)
    elif is_http(uri):
        _ask_for_version(patient)
    patient.has_store = True
    took = f" answered in {patient.took * 1000:.0f} ms" if patient.answer is not None else ""
    return f"{patient.address}{took}"


def _to_be_made(patient: _Patient) -> str:
    """Say that the first run makes the store, if it can."""
    uri = patient.server.tracking_uri
    file = sqlite_file(uri) or (Path(local_path(uri)) if uri.startswith("file:") else None)
    if file is None or file.exists():
        return f"{patient.address} has no tables yet: the first run makes them"
    folder = next(parent for parent in file.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise _FaultError(
            f"{patient.address} isn't there and can't be made",
            f"make the folder {folder} writable for this user, or name another in "
            "server.mlflow_tracking_uri",
        )
    return f"{patient.address} isn't there yet: the first run makes it"


def _ask_for_version(patient: _Patient) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    chosen = {name for name in PATIENCE if credentials.original(name)} | {*patient.variables}
    patience = {
        option: value
        for option, value in FIRST_PATIENCE.items()
        if f"MLFLOW_HTTP_REQUEST_{option.upper()}" not in chosen
    }
    creds = get_default_host_creds(patient.server.tracking_uri)
    begun = time.time()
    answer = http_request(creds, "/version", "GET", raise_on_status=False, **patience)
    if answer.status_code != 404:  # other servers that speak MLflow's API don't tell a version
        checked(answer, "/version")
    patient.answer, patient.took = answer, time.time() - begun
    patient.asked = begun + patient.took / 2


def _version(patient: _Patient) -> str:
    from packaging.version import InvalidVersion, Version

    ours = Version(version("mlflow"))
    if patient.answer is None:
        raise _SkippedError("no server in between")
    try:
        theirs = Version(patient.answer.text.strip())
    except InvalidVersion:
        raise _SkippedError("the server doesn't tell its version") from None
    found = f"MLflow {theirs} there, {ours} here"
    if theirs.major < ours.major:
        raise _FaultError(found, f"update the server to MLflow {ours.major}.0 or newer")
    if theirs.major > ours.major:
        raise _FaultError(found, f"update mlflow in this project to {theirs.major}.0 or newer")
    return found


def _clock(patient: _Patient) -> str:
    if patient.answer is None:
        raise _SkippedError("no server in between")
    # A proxy may have added its own: the first one is the server's, or the nearest to it.
    date = re.search(r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT", patient.answer.headers.get("Date", ""))
    if date is None:
        raise _SkippedError("the server doesn't tell its time")
    theirs = parsedate_to_datetime(date[0])
    ours = datetime.fromtimestamp(patient.asked, timezone.utc)
    apart = (theirs - ours).total_seconds()
    found = f"{abs(apart):.0f} s apart"
    if abs(apart) > _APART:
        which = "ahead of" if apart > 0 else "behind"
        raise _FaultError(
            found,
            f"the server's clock is {lasting(abs(apart))} {which} this machine's: have both set by "
            "NTP, or ages and durations of runs are wrong",
        )
    return found


def _schema(patient: _Patient) -> str:
    if patient.schema is None or patient.schema.found is None:
        raise _SkippedError("not made yet" if not patient.has_store else "the server's")
    if patient.schema.found != patient.schema.wanted:
        advice = advice_on(patient.schema, patient.server.tracking_uri)
        raise _FaultError(f"{patient.schema.found}, not {patient.schema.wanted}", advice)
    return patient.schema.found


def _experiment(patient: _Patient) -> str:
    name = patient.options.name or "Default"
    if not patient.has_store:
        raise _SkippedError(f"{name!r}: made by the first run")
    found = patient.experiment = patient.server.client.get_experiment_by_name(name)
    if found is None:
        return f"{name!r} isn't there yet"
    if found.lifecycle_stage != "deleted":
        return f"{name!r}, artifacts in {shown_uri(found.artifact_location)}"
    if patient.options.restore_if_deleted:
        return f"{name!r} is deleted: the next run restores it"
    what = f"the experiment {name!r} is deleted; expected true, or another name, got False"
    raise SettingError(("tracking", "experiment", "restore_if_deleted"), what)


def _writing(patient: _Patient) -> str:
    if not patient.has_store:
        raise _SkippedError("made by the first run")
    if patient.experiment and patient.experiment.lifecycle_stage == "deleted":
        raise _SkippedError("the experiment is deleted")
    client = patient.server.client
    tags = {
        MARK: "made to see whether runs can be, and to be deleted at once",
        "project_path": str(patient.project_path),
        **endings.this_process().tags(),
    }
    experiment = experiment_id(patient.server, patient.options)
    patient.run = client.create_run(experiment, tags=tags, run_name=NAME)
    client.set_terminated(patient.run.info.run_id, "FINISHED")
    made = "" if patient.experiment else f"made the experiment {patient.options.name!r}, "
    return f"{made}made a run and deleted it"


def _artifacts(patient: _Patient) -> str:
    if patient.run is None:
        raise _SkippedError("made by the first run" if not patient.has_store else "")
    run_id, place = patient.run.info.run_id, patient.run.info.artifact_uri or ""
    client, content = patient.server.client, f"{NAME} {uuid4().hex}\n"
    missing = _missing_folders(place)
    try:
        with (
            failures.translate_artifact_errors(place, patient.server),
            tempfile.TemporaryDirectory() as folder,
        ):
            client.log_text(run_id, content, FILE)
            read = Path(client.download_artifacts(run_id, FILE, folder)).read_text("utf-8")
    except OSError as error:
        raise _FaultError(
            shown_uri(place),
            f"Artifacts can't be stored in {place}: {error.strerror or error}. See to the folder, "
            "or name another place in tracking.experiment.create_experiment_kwargs for a new "
            "experiment.",
        ) from error
    if read != content:
        what = f"what is read back from {place} is not what was written: see to the storage"
        raise _FaultError("written, and another content read", what)
    taken_away = _take_away(patient, place)
    with suppress(OSError):  # somebody else's files are in it by now
        for made in missing:
            made.rmdir()
    return taken_away


def _missing_folders(place: str) -> list[Path]:
    """List the folders that a place on this machine needs and doesn't have, the innermost first."""
    if not place.startswith(("file:", "/")):
        return []
    folder = Path(local_path(place))
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _take_away(patient: _Patient, place: str) -> str:
    """Delete the artifact; a store that can't, or doesn't allow it, will do for runs as well."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(place, patient.server.tracking_uri).delete_artifacts(FILE)
    except Exception as error:  # each kind of storage has errors of its own
        told = failures.artifact_sentence(error, place, patient.server)
        why = (told or f"{type(error).__name__}: {error}").strip().partition("\n")[0]
        return f"written and read; {FILE} stays in {place}, which can't delete ({why})"
    return "written, read and deleted"


def _clear(patient: _Patient) -> str:
    """Delete the run that was made; MLflow keeps it in its bin until `mlflow gc`."""
    if patient.run is None:
        return ""
    run_id = patient.run.info.run_id
    try:
        patient.server.client.delete_run(run_id)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        what = f"delete the run {run_id} ({NAME}) by hand: {said}"
        raise _FaultError("made a run, which can't be deleted", what) from error
    return ""


def _open_runs(patient: _Patient) -> str:
    if not patient.has_store:
        raise _SkippedError("no run yet")
    left = list(_left_open(patient))
    if not left:
        return "none"
    ids = ", ".join(run.info.run_id for run, _ in left)
    if not patient.fix:
        what = f"`{_command(patient, 'doctor')} --fix` ends them as KILLED"
        raise _FaultError(f"{count(len(left), 'run')} of processes that are gone: {ids}", what)
    for run, process in left:
        tracking.end_killed(patient.server, run, process)
        endings.unmark(patient.project_path / tracking.MARKERS, run.info.run_id)
    return f"ended {count(len(left), 'run')} of processes that are gone: {ids}"


def _left_open(patient: _Patient) -> Iterator[tuple[Run, endings.Process]]:
    """Find the runs of this project that are RUNNING and whose process on this host is gone.

    A note in the project's folder knows of its run more than the run's tags do: tags don't tell
    containers with one host name apart.
    """
    from mlflow.exceptions import MlflowException

    client, markers = patient.server.client, patient.project_path / tracking.MARKERS
    for marker in endings.orphans(markers, patient.address):
        try:
            run = client.get_run(marker.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if run.info.status == "RUNNING":
            yield run, marker.process
    if patient.experiment is None:
        return
    here = endings.this_process()
    running = f"attributes.status = 'RUNNING' and tags.host = '{here.host}'"
    for run in client.search_runs([patient.experiment.experiment_id], running):
        process = _process_of(run.data.tags, here)
        is_ours = run.data.tags.get("project_path") == str(patient.project_path)
        is_noted = (markers / f"{run.info.run_id}.json").exists()
        if is_ours and not is_noted and process and process.is_gone():
            yield run, process


def _process_of(tags: Mapping[str, str], here: endings.Process) -> endings.Process | None:
    """Read back what `Process.tags` has written of a process on this host."""
    try:
        start = datetime.fromisoformat(tags["process_start"]).timestamp()
        return endings.Process(here.host, int(tags["pid"]), start, here.namespace)
    except (KeyError, ValueError):  # somebody else's tags
        return None


def _recorded(patient: _Patient) -> str:
    found = [waiting(disk.client()) for disk in disks(patient.project_path)]
    ids = [family[0].info.run_id for families in found for family in families]
    if not ids:
        return "none"
    waits = f"{count(len(ids), 'run')} on disk in this project: {', '.join(ids[:5])}"
    more = ", …" if len(ids) > 5 else ""
    raise _FaultError(waits + more, f"`{_command(patient, 'sync')}` replays them")


def _command(patient: _Patient, name: str) -> str:
    return f"kedro mlflow {name}" + (f" --env={patient.env}" if patient.env else "")


_WRITING = "writing runs"
_CHECKS = (
    _Check("configuration", (), _configuration, "not valid"),
    _Check("credentials", ("configuration",), _credentials, "not usable"),
    _Check("server", ("credentials",), _server, "not usable"),
    _Check("version", ("server",), _version, "not known"),
    _Check("clock", ("server",), _clock, "not known"),
    _Check("database schema", ("server",), _schema, "not known"),
    _Check("experiment", ("database schema",), _experiment, "not usable"),
    _Check(_WRITING, ("experiment",), _writing, "not possible"),
    _Check("artifacts", (_WRITING,), _artifacts, "not usable"),
    _Check("open runs", ("experiment",), _open_runs, "not known"),
    _Check("offline runs", (), _recorded, "not known"),
)
_CLEARING = _Check(_WRITING, (), _clear, "not possible")


def show(out: Console, findings: Sequence[Finding]) -> None:
    """Write the findings as a table, each with what to do where something is wrong."""
    can = "utf" in out.encoding.lower()
    marks = {
        True: Text("✓" if can else "ok", style="green"),
        False: Text("✗" if can else "no", style="bold red"),
        None: Text("-", style="dim"),
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = "dim" if finding.ok is None else ""
        text = Text(finding.found, style=style)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="yellow")
        table.add_row(marks[finding.ok], Text(finding.check, style=style), text)
    out.print(table)
