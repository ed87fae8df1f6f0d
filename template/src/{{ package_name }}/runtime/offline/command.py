"""`kedro mlflow sync`: replay the runs on disk, with a progress bar and a table of the outcomes."""

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

from ..cli.session import opened, with_credentials
from ..cli.tables import CONTROLS, new_console, new_table, width_of
from ..config.uris import shown_uri
from ..stores.errors import is_away, reason_of
from ..tracking.ending import MARKERS, end_orphans
from .disk import Disk, DiskError, disk_of, disks, ended_families, families
from .replay import Outcome, delete, files_of_family, replay, replaying

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from rich.table import Table

    from ..stores.project import MlflowConfig
    from ..stores.server import Server


@click.command()
@env_option
@click.option("--dry-run", is_flag=True, help="List what would be replayed, and do nothing.")
@click.option("--discard", multiple=True, metavar="RUN", help="Delete a run from the disk instead.")
@click.pass_obj
def sync(
    metadata: ProjectMetadata, env: str | None, dry_run: bool, discard: tuple[str, ...]
) -> None:
    """Replay the runs that are on disk to the server, and delete from the disk what it has.

    It can be interrupted, and started again.
    """
    with opened(metadata, env) as context:
        disk = _disk_of(context)
        _show_other_servers(context.project_path, disk)
        if not disk.file.exists():
            click.echo(f"Nothing waits for {disk.address}.")
            return
        disk.client()  # an error where it can't be read
        end_orphans(disk.store, context.project_path / MARKERS)
        if dry_run:
            _show_families(disk)
        elif discard:
            _discard(disk, discard)
        else:
            with with_credentials(context, {}):
                outcomes = _replay(disk)
            _show_outcomes(disk, outcomes)
            if any(outcome.problem for outcome in outcomes):
                raise SystemExit(1)


def store_on_disk(server: Server, project_path: Path) -> Server:
    """Return the store with the runs that are to be replayed to a server.

    Raises:
        ClickException: When there is none.
    """
    disk = disk_of(server, project_path)
    if disk is None or not disk.file.exists():
        address = shown_uri(server.tracking_uri)
        raise click.ClickException(f"--offline: no run on disk waits for {address}")
    return disk.store


def _disk_of(context: KedroContext) -> Disk:
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    server = config.server.connection
    restore = config.tracking.experiment.restore_if_deleted
    disk = disk_of(server, context.project_path, restore_if_deleted=restore)
    if disk is None:
        address = shown_uri(server.tracking_uri)
        raise click.ClickException(f"The runs are in {address}: there is no server to replay to.")
    return disk


def _address(disk: Disk) -> str:
    return shown_uri(disk.server.tracking_uri)


def _replay(disk: Disk) -> list[Outcome]:
    """Replay with a bar on the terminal.

    Raises:
        ClickException: When the server is away.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
    )
    with replaying(disk), bar:
        on_disk = ended_families(disk.client())
        steps = sum(len(family) + len(files_of_family(disk, family)) for family in on_disk)
        task = bar.add_task(f"To {disk.address}", total=steps)
        try:
            return list(replay(disk, on_disk, lambda: bar.advance(task)))
        except Exception as error:
            if not is_away(error):
                raise
            raise click.ClickException(
                f"The MLflow server {disk.address} is away ({reason_of(error)}). What isn't "
                f"replayed stays in {disk.folder}; `kedro mlflow sync` goes on from there."
            ) from error


def _discard(disk: Disk, run_ids: Sequence[str]) -> None:
    """Delete runs from the disk that the user doesn't want any more."""
    with disk.locked():
        on_disk = {family[0].info.run_id: family for family in ended_families(disk.client())}
        for run_id in run_ids:
            if run_id not in on_disk:
                known = ", ".join(on_disk) or "none"
                raise click.ClickException(
                    f"--discard: expected the id of a run that waits ({known}), got {run_id!r}"
                )
        for run_id in run_ids:
            delete(disk, on_disk[run_id])
            click.echo(f"Deleted from {disk.folder}: {run_id}")


def _show_other_servers(project_path: Path, disk: Disk) -> None:
    for other in disks(project_path):
        if other.folder == disk.folder:
            continue
        try:
            number = len(ended_families(other.client()))
        except DiskError as error:
            click.echo(error.message, err=True)
            continue
        if number:
            folder = os.path.relpath(other.folder, project_path)
            click.echo(f"For another server {number} wait: see {folder}, and --env.", err=True)


def _show_families(disk: Disk) -> None:
    """Show every run on disk, with those that haven't ended."""
    columns = ("run", "id on disk", "started", "status", "runs", "files")
    table = new_table(*columns, title=f"For {disk.address}")
    for family in families(disk.client()):
        first = family[0].info
        started = datetime.fromtimestamp(first.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        files = files_of_family(disk, family)
        size = f"{len(files)} ({decimal(sum(file.stat().st_size for file in files))})"
        table.add_row(first.run_name, first.run_id, started, first.status, str(len(family)), size)
    _print(table, disk)


def _show_outcomes(disk: Disk, outcomes: Sequence[Outcome]) -> None:
    table = new_table("run", "id on disk", "id on the server", title=f"To {disk.address}")
    for outcome in outcomes:
        run = outcome.run.info
        table.add_row(run.run_name, run.run_id, outcome.id_on_server or "-")
    _print(table, disk)
    for outcome in outcomes:
        if outcome.problem:
            problem = f"Not replayed: {outcome.run.info.run_id}: {outcome.problem}"
            click.echo(problem.translate(CONTROLS), err=True)


def _print(table: Table, disk: Disk) -> None:
    """Print a table as wide as it is, since a part of an id is of no use."""
    if not table.row_count:
        click.echo(f"Nothing waits for {disk.address}.")
        return
    console = new_console()
    new_console(max(console.width, width_of(table, console))).print(table, crop=False)
