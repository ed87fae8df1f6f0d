"""`kedro mlflow sync`: replay all that is on disk, and show how far that has come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from kedro.framework.cli.utils import env_option
from kedro.framework.startup import ProjectMetadata
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..cli.session import opened
from ..config.loading import read_credentials
from ..config.uris import shown_uri
from ..stores import credentials
from ..stores.errors import is_away, reason_of
from ..stores.project import register_header_provider
from ..tracking.ending import MARKERS, end_orphans
from .disk import Disk, DiskError, disk_of, disks, families
from .replay import OF_REPLAYS, Outcome, files_of_family, remove, replay, waiting

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from ..stores.project import MlflowConfig
    from ..stores.server import Server


@click.command()
@env_option
@click.option("--dry-run", is_flag=True, help="List what would be replayed, and do nothing.")
@click.option("--discard", multiple=True, metavar="RUN", help="Remove a run from the disk instead.")
@click.pass_obj
def sync(
    metadata: ProjectMetadata, env: str | None, dry_run: bool, discard: tuple[str, ...]
) -> None:
    """Replay the runs that are on disk to the server, and remove from the disk what it has.

    It can be interrupted, and started again.
    """
    with opened(metadata, env) as context:
        is_whole = replay_all(context, dry_run=dry_run, discard=discard)
    if not is_whole:
        raise SystemExit(1)


def replay_all(context: KedroContext, *, dry_run: bool, discard: Sequence[str]) -> bool:
    """Replay the runs on disk to the server of a context.

    Args:
        context: The project's.
        dry_run: Only list them.
        discard: Ids of runs on disk to remove instead.

    Returns:
        Whether the server has all that was to be replayed.

    Raises:
        ClickException: When there is no server, it is away, or the disk can't be read.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    server = config.server.connection
    where = shown_uri(server.tracking_uri)
    restore = config.tracking.experiment.restore_if_deleted
    disk = disk_of(server, context.project_path, restore_if_deleted=restore)
    if disk is None:
        raise click.ClickException(f"The runs are in {where}: there is no server to replay to.")
    _tell_of_others(context, disk)
    if not (disk.folder / "mlflow.db").exists():
        click.echo(f"Nothing waits for {where}.")
        return True
    client = disk.client()
    end_orphans(disk.store, context.project_path / MARKERS)
    if dry_run:
        _show_waiting(disk, families(client), where)
        return True
    credentials.export("sync", {**read_credentials(context), **OF_REPLAYS})
    register_header_provider(context)
    try:
        with disk.locked():
            if discard:
                return _discard(disk, client, discard)
            families_on_disk = waiting(client)
            outcomes = _replay(disk, families_on_disk, where) if families_on_disk else []
    finally:
        credentials.take_back("sync")
    if not outcomes:
        click.echo(f"Nothing waits for {where}.")
        return True
    _show_outcomes(outcomes, where)
    return not any(outcome.problem for outcome in outcomes)


def store_on_disk(server: Server, project_path: Path) -> Server:
    """Return the store with the runs that are to be replayed to a server.

    Raises:
        ClickException: When there is none.
    """
    disk = disk_of(server, project_path)
    if disk is None or not (disk.folder / "mlflow.db").exists():
        where = shown_uri(server.tracking_uri)
        raise click.ClickException(f"--offline: no run on disk waits for {where}")
    return disk.store


def _replay(disk: Disk, found: Sequence[Sequence[Run]], where: str) -> list[Outcome]:
    """Replay with a bar on the terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
    )
    outcomes: list[Outcome] = []
    with bar:
        task = bar.add_task(f"To {where}", total=_steps(disk, found))
        try:
            outcomes.extend(replay(disk, found, lambda: bar.advance(task)))
        except Exception as error:
            if not is_away(error):
                raise
            raise click.ClickException(
                f"The MLflow server {where} is away ({reason_of(error)}). What isn't replayed "
                f"stays in {disk.folder}; `kedro mlflow sync` goes on from there."
            ) from error
    return outcomes


def _steps(disk: Disk, found: Sequence[Sequence[Run]]) -> int:
    return sum(len(family) + len(files_of_family(disk, family)) for family in found)


def _discard(disk: Disk, client: MlflowClient, run_ids: Sequence[str]) -> bool:
    """Remove runs from the disk that the user doesn't want any more."""
    found = {family[0].info.run_id: family for family in waiting(client)}
    for run_id in run_ids:
        if run_id not in found:
            known = ", ".join(found) or "none"
            raise click.ClickException(
                f"--discard: expected the id of a run that waits ({known}), got {run_id!r}"
            )
    for run_id in run_ids:
        remove(disk, found[run_id])
        click.echo(f"Removed from {disk.folder}: {run_id}")
    return True


def _tell_of_others(context: KedroContext, disk: Disk) -> None:
    """Say which runs wait for other servers."""
    for other in disks(context.project_path):
        if other.folder != disk.folder:
            place = os.path.relpath(other.folder, context.project_path)
            try:
                number = len(waiting(other.client()))
            except DiskError as error:
                click.echo(error.message, err=True)
                continue
            if number:
                click.echo(f"For another server {number} wait: see {place}, and --env.", err=True)


def _show_waiting(disk: Disk, found: Sequence[Sequence[Run]], where: str) -> None:
    if not found:
        click.echo(f"Nothing waits for {where}.")
        return
    table = _table("run", "id on disk", "started", "status", "runs", "files", title=f"For {where}")
    for family in found:
        first = family[0].info
        started = datetime.fromtimestamp(first.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        files = files_of_family(disk, family)
        size = f"{len(files)} ({decimal(sum(file.stat().st_size for file in files))})"
        table.add_row(first.run_name, first.run_id, started, first.status, str(len(family)), size)
    _print(table)


def _show_outcomes(outcomes: Sequence[Outcome], where: str) -> None:
    table = _table("run", "id on disk", "id on the server", title=f"To {where}")
    for outcome in outcomes:
        run = outcome.run.info
        table.add_row(run.run_name, run.run_id, outcome.id_on_server or "-")
    _print(table)
    for outcome in outcomes:
        if outcome.problem:
            click.echo(f"Not replayed: {outcome.run.info.run_id}: {outcome.problem}", err=True)


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column)
    return table


def _print(table: Table) -> None:
    """Print a table as wide as it is, since a part of an id is of no use."""
    console = Console()
    unlimited = console.options.update(width=10_000)
    width = console.measure(table, options=unlimited).maximum
    Console(width=max(console.width, width)).print(table, crop=False)
