"""`kedro mlflow ui`: MLflow's pages on the runs of a project."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from kedro.framework.cli.utils import env_option
from kedro.framework.startup import ProjectMetadata

from ..config.loading import read_credentials
from ..config.uris import is_database, is_http, without_login
from ..extras import load
from ..stores import credentials
from ..stores.embedded import prepare
from .session import opened, with_explained_errors

if TYPE_CHECKING:
    from ..stores.project import MlflowConfig


@click.command()
@env_option
@click.option("--host", help="Address to listen on; `ui.host` of mlflow.yml by default.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Port to listen on; `ui.port`, or a free one, by default.",
)
@click.option("--offline", is_flag=True, help="Show the runs that are on disk, to be replayed.")
@click.pass_obj
def ui(
    metadata: ProjectMetadata, env: str | None, host: str | None, port: int | None, offline: bool
) -> None:
    """Open MLflow's pages on the project's runs; Ctrl-C ends them.

    The embedded store is served from here. A tracking server has pages of its own: they are
    opened in the browser.
    """
    with opened(metadata, env) as context:
        config: MlflowConfig = context.mlflow
        variables = read_credentials(context)
        server = config.server.connection
        location = config.tracking.experiment.create_experiment_kwargs.artifact_location
        if offline:
            sync = load("offline", "command", "`kedro mlflow ui --offline`")
            server = sync.store_on_disk(server, metadata.project_path)
        else:
            with credentials.exporting(variables), with_explained_errors(context, variables):
                prepare(server.tracking_uri, location, metadata.project_path)
    if not is_database(server.tracking_uri):
        page = without_login(server.tracking_uri)
        click.echo(f"The runs are on {page}")
        if is_http(page):
            click.launch(page)
        return
    host = host or config.ui.host
    port = _port(host, port or config.ui.port)
    # Not as arguments, which everybody on the machine can read.
    variables["MLFLOW_BACKEND_STORE_URI"] = server.tracking_uri
    if is_database(server.registry_uri):
        variables["MLFLOW_REGISTRY_STORE_URI"] = server.registry_uri
    # MLflow starts eight more processes for the jobs of a team's server: not unless asked to.
    jobs = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
    variables.setdefault(jobs, os.environ.get(jobs, "false"))
    # It starts with a warning of Starlette on MLflow 3.17's own code.
    ignored = "ignore:starlette.middleware.wsgi is deprecated"
    variables["PYTHONWARNINGS"] = ",".join(
        filter(None, [os.environ.get("PYTHONWARNINGS"), ignored])
    )
    click.echo(f"MLflow's pages: http://{host}:{port} (Ctrl-C ends them)")
    # One process is enough for one reader, and is there sooner than MLflow's usual four.
    options = ["--host", host, "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "ui", *options]
    raise SystemExit(_serve(command, metadata.project_path, variables))


def _serve(command: list[str], folder: Path, variables: Mapping[str, str]) -> int:
    """Run a server until it ends; a signal that ends this process ends all of the server's.

    Gives the server's exit status, or 0 after a signal.
    """
    # In a session of its own it doesn't hear Ctrl-C too, and one signal reaches all of it.
    server = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **variables}, start_new_session=True
    )
    ended_by_signal = False

    def end(*_: object) -> None:
        nonlocal ended_by_signal
        ended_by_signal = True
        if sys.platform == "win32":
            server.terminate()
        else:
            os.killpg(server.pid, signal.SIGTERM)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    status = server.wait()
    return 0 if ended_by_signal else status


def _port(host: str, wanted: int | None) -> int:
    """Check that a port can be listened on, or find one that can.

    Raises:
        ClickException: When the port is taken, or the host is not this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted or 0))
        except OSError as error:
            raise click.ClickException(
                f"Can't listen on {host}:{wanted or ''} ({error.strerror}). Choose another with "
                "--host and --port, or leave the port out for a free one."
            ) from error
        port: int = probe.getsockname()[1]
        return port
