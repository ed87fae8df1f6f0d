"""`kedro mlflow sync`: send all recorded runs of a project, and show how far it has come."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from . import credentials
from .failures import reason_of, translate_server_errors
from .loading import mistake, read_credentials, register_header_provider, shown_uri
from .offline import find_again
from .recording import FOLDER, KedroRun, Recording, recording, remove, tidy
from .sending import METRICS, contact, send_locked
from .server import SettingError
from .showing import count

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext

    from .config import MlflowConfig

logger = logging.getLogger(__name__)


def sync(context: KedroContext, *, dry_run: bool, prune: bool) -> bool:
    """Send what waits on the disk for the server of a context; tells whether the server has all.

    Args:
        context: The project's.
        dry_run: Only list what waits.
        prune: Remove what the server has.

    Raises:
        ClickException: When the server is away, or there is none.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    server = config.server.connection
    where = shown_uri(server.tracking_uri)
    found = recording(server.tracking_uri, server.registry_uri, context.project_path)
    if found is None:
        raise click.ClickException(f"The runs are in {where}: there is no server to send them to.")
    console = Console(stderr=True)
    _tell_of_others(context, found, console)
    waiting = [run for run in found.kedro_runs() if not run.is_sent and not run.is_in_progress]
    for run in waiting:
        tidy(found, run)
    waiting = [run for run in waiting if run.notes()]
    if dry_run:
        _show([outline(found, run) for run in waiting], where)
        return True
    all_sent = _send(context, found, waiting, console) if waiting else True
    if not waiting:
        click.echo(f"Nothing waits for {where}.")
    if prune:
        moved = [run for run in found.kedro_runs() if run.is_sent]
        for run in moved:
            with run.lock():
                remove(found, run)
        click.echo(f"Removed from the disk: {count(len(moved), 'run')}.")
    return all_sent


def _send(
    context: KedroContext, found: Recording, waiting: Sequence[KedroRun], console: Console
) -> bool:
    """Send runs, each with a bar; tells whether the server took everything."""
    variables = read_credentials(context)
    register_header_provider(context)
    # Only sends what a run has printed already.
    credentials.export("sync", {**variables, "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"})
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    try:
        with translate_server_errors(config.server.connection, variables):
            contact(found)
    except SettingError as error:
        raise mistake(context, error.key, str(error)) from error
    find_again(found)
    replace(config.server.connection, folder=str(found.folder)).use()
    refused: list[str] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
    )
    with bar:
        for run in waiting:
            close(found, run)
            about = outline(found, run)
            task = bar.add_task(f"{about.name} ({run.name[:8]})", total=about.steps)
            try:
                with run.lock():  # another sync may be sending it; then nothing is left to do
                    send_locked(found, run, partial(bar.advance, task), is_last=True)
            except Exception as error:  # each kind of store has errors of its own
                raise click.ClickException(
                    f"The run {run.name} is not sent whole: {reason_of(error)}. What was sent is "
                    "noted: `kedro mlflow sync` goes on from there."
                ) from error
            bar.update(task, completed=about.steps)
            run.note_sent()
            refused += [sentence for notes in run.notes() for sentence in notes.refused]
    where = shown_uri(found.tracking_uri)
    click.echo(f"Sent to {where}: {count(len(waiting), 'run')}.")
    for sentence in refused:
        click.echo(f"Refused by the server: {sentence}", err=True)
    return not refused


def _tell_of_others(context: KedroContext, found: Recording, console: Console) -> None:
    """Say which runs wait for other servers."""
    for folder in sorted((context.project_path / FOLDER).glob("*/runs")):
        if folder.parent != found.folder:
            runs = Recording(folder.parent, "", "").kedro_runs()
            number = sum(not run.is_sent for run in runs)
            if number:
                place = os.path.relpath(folder.parent, context.project_path)
                console.print(
                    f"For another server wait {count(number, 'run')}: see {place}, and --env."
                )


def _show(waiting: Sequence[Outline], where: str) -> None:
    """List what waits."""
    if not waiting:
        click.echo(f"Nothing waits for {where}.")
        return
    table = Table("run", "started", "status", "what it holds", title=f"To be sent to {where}")
    for about in waiting:
        started = datetime.fromtimestamp(about.started).strftime("%Y-%m-%d %H:%M")
        table.add_row(about.name, started, about.status, about.contents)
    Console().print(table)


@dataclass(frozen=True)
class Outline:
    """What is on the disk of a Kedro run: how many of each, and the size of the files in bytes."""

    name: str
    started: float  # seconds since 1970
    status: str
    runs: int
    params: int
    points: int
    models: int
    files: int
    size: int

    @property
    def contents(self) -> str:
        """What there is, in words."""
        counted = [
            count(self.runs, "run"),
            count(self.params, "parameter"),
            count(self.points, "point"),
            count(self.models, "model"),
            count(self.files, "file"),
        ]
        return f"{', '.join(counted)} ({decimal(self.size)})"

    @property
    def steps(self) -> int:
        """About how many requests it takes to send it."""
        return 3 * self.runs + self.points // METRICS + self.files + 3 * self.models


def outline(recording: Recording, run: KedroRun) -> Outline:
    """Count what there is of a Kedro run."""
    store = recording.store()
    runs = [store.get_run(notes.run_id) for notes in run.notes()]
    ids = [found.info.run_id for found in runs]
    models = [store.get_logged_model(name) for name in _models_of(recording, ids)]
    places = [found.info.artifact_uri or "" for found in runs]
    places += [model.artifact_location for model in models]
    files = [
        file for place in places for file in recording.files(place).rglob("*") if file.is_file()
    ]
    return Outline(
        runs[0].info.run_name,
        runs[0].info.start_time / 1000,
        runs[0].info.status,
        len(runs),
        sum(len(found.data.params) for found in runs),
        _count(recording, "metrics", "run_uuid", ids),
        len(models),
        len(files),
        sum(file.stat().st_size for file in files),
    )


def _count(recording: Recording, table: str, column: str, ids: Sequence[str]) -> int:
    from sqlalchemy import bindparam, text

    statement = text(f"SELECT count(*) FROM {table} WHERE {column} IN :ids")
    with recording.store().engine.connect() as connection:
        values = statement.bindparams(bindparam("ids", ids, expanding=True))
        return int(connection.execute(values).scalar_one())


def _models_of(recording: Recording, ids: Sequence[str]) -> list[str]:
    from sqlalchemy import bindparam, text

    statement = text("SELECT model_id FROM logged_models WHERE source_run_id IN :ids")
    with recording.store().engine.connect() as connection:
        values = statement.bindparams(bindparam("ids", ids, expanding=True))
        return [row.model_id for row in connection.execute(values)]


def close(recording: Recording, run: KedroRun) -> None:
    """End the runs on the disk whose process is gone, as after `kill -9`."""
    from mlflow.entities import RunStatus, RunTag

    store = recording.store()
    here = next(iter(run.processes()), None)
    who = f"the process {here.pid} on {here.host}" if here else "its process"
    for notes in run.notes():
        if store.get_run(notes.run_id).info.status == "RUNNING" and not notes.attached:
            reason = f"{who} ended without a word"
            store.set_tag(notes.run_id, RunTag("kedro_error", reason))
            now = time.time_ns() // 10**6
            store.update_run_info(notes.run_id, RunStatus.KILLED, now, None)
            logger.warning("The run %s was still open: %s", notes.run_id, reason)
    for file in run.folder.glob("*.process"):
        file.unlink()
