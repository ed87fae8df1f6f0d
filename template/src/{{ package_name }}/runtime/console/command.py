"""`kedro mlflow runs` and `kedro mlflow doctor`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click
from kedro.framework.cli.utils import env_option
from kedro.framework.startup import ProjectMetadata

from ..cli.session import opened, with_credentials, with_explained_errors
from ..cli.tables import new_console
from ..stores.embedded import prepare
from .doctor import examine, show_findings
from .runs import differences, find_run, read_details, read_latest, run_as_json
from .showing import show_details, show_differences, show_latest
from .store import IMPATIENT, exists


@click.command()
@env_option
@click.option("--filter", "condition", default="", help="A condition in MLflow's search syntax.")
@click.option(
    "--limit",
    type=click.IntRange(1, 50000),
    default=20,
    show_default=True,
    help="How many runs at most.",
)
@click.option("--children", is_flag=True, help="List child runs too.")
@click.option("--metrics", help="Metrics to show, as name,name; with * for several.")
@click.option("--params", help="Parameters to show, likewise.")
@click.option("--json", "as_json", is_flag=True, help="Write everything as JSON.")
@click.argument("run_ids", nargs=-1, metavar="[RUN_ID [RUN_ID]]")
@click.pass_obj
def runs(
    metadata: ProjectMetadata,
    env: str | None,
    condition: str,
    limit: int,
    children: bool,
    metrics: str | None,
    params: str | None,
    as_json: bool,
    run_ids: tuple[str, ...],
) -> None:
    """List the latest runs, or show one with its details, or what differs between two.

    A RUN_ID is one of the list, or at least four characters that it begins with. The table has as
    many metrics as there is room for; a pipeline is named where the run's name is another.
    """
    if len(run_ids) > 2:  # click would end with status 2
        raise click.ClickException(f"RUN_ID: expected one or two ids, got {len(run_ids)}")
    with (
        _only_output_on_stdout(),
        opened(metadata, env) as context,
        with_credentials(context, IMPATIENT) as variables,
        with_explained_errors(context, variables),
    ):
        server, experiment = context.mlflow.server.connection, context.mlflow.tracking.experiment
        if exists(server.tracking_uri):  # then it is made fit, as for a run
            location = experiment.create_experiment_kwargs.artifact_location
            prepare(server.tracking_uri, location, metadata.project_path)
        chosen = [find_run(server, experiment, run_id) for run_id in run_ids]
        if not chosen:
            latest = read_latest(server, experiment, condition, limit, children=children)
        elif len(chosen) == 1:
            details = read_details(server, chosen[0])
    console = new_console()
    if len(chosen) == 2 and as_json:
        _write_json({"runs": [run_as_json(run) for run in chosen], **differences(*chosen)})
    elif len(chosen) == 2:
        show_differences(console, *chosen)
    elif chosen and as_json:
        _write_json(details.as_json())
    elif chosen:
        show_details(console, details)
    elif as_json:
        _write_json([run_as_json(run) for run in latest.runs])
    elif latest.runs:
        show_latest(console, latest.runs, _names(metrics), _names(params) or [])
    else:
        click.echo(latest.why_none)


@click.command()
@env_option
@click.option("--fix", is_flag=True, help="End the runs that dead processes have left RUNNING.")
@click.option("--json", "as_json", is_flag=True, help="Write the checks as JSON.")
@click.pass_obj
def doctor(metadata: ProjectMetadata, env: str | None, fix: bool, as_json: bool) -> None:
    """Check everything that a tracked run needs; exit status 1 when something is wrong.

    To see whether it may write, it makes a run named "kedro mlflow doctor" in the experiment, with
    one small artifact, and deletes both; an experiment that is missing is made, as the first run
    would. The deleted run stays in MLflow's bin until `mlflow gc`. A store that isn't there yet
    isn't made.
    """
    with _only_output_on_stdout():
        findings = examine(metadata.project_path, env, fix=fix)
    if as_json:
        _write_json([{"check": name, **vars(finding)} for name, finding in findings.items()])
    else:
        show_findings(new_console(), findings)
    if any(finding.ok is False for finding in findings.values()):
        raise SystemExit(1)


def _names(option: str | None) -> list[str] | None:
    """Return the names of an option, which are between commas; None where it isn't given."""
    if option is None:
        return None
    return [name.strip() for name in option.split(",") if name.strip()]


@contextmanager
def _only_output_on_stdout() -> Iterator[None]:
    """Send what Kedro, MLflow and hooks log to stderr, where it isn't part of the output."""
    to_stdout = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
    ]
    for handler in to_stdout:
        handler.setStream(sys.stderr)
    try:
        with redirect_stdout(sys.stderr):  # for handlers and prints that look it up each time
            yield
    finally:
        for handler in to_stdout:
            handler.setStream(sys.stdout)


def _write_json(content: Any) -> None:
    # On one line, for `tail -n 1`: without conf/logging.yml Kedro has written to stdout before.
    text = json.dumps(content, ensure_ascii=False)
    # JSON escapes only the control characters below these.
    click.echo(text.translate({code: f"\\u{code:04x}" for code in range(127, 160)}))
