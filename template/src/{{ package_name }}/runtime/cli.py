"""`kedro mlflow …`: the commands that go with tracking."""

from __future__ import annotations

import socket
import subprocess
import sys

import click
from kedro.framework.cli.utils import env_option
from kedro.framework.startup import ProjectMetadata


@click.group(name="mlflow")
def mlflow() -> None:
    """Look at the runs of this project."""


@mlflow.command()
@env_option
@click.option("--host", help="Address to listen on; `ui.host` of mlflow.yml by default.")
@click.option("--port", type=int, help="Port to listen on; `ui.port`, or a free one, by default.")
@click.pass_obj
def ui(metadata: ProjectMetadata, env: str | None, host: str | None, port: int | None) -> None:
    """Open MLflow's pages on the project's runs; Ctrl-C ends them.

    The embedded store is served from here. A tracking server has pages of its own: they are
    opened in the browser.
    """
    from kedro.framework.session import KedroSession

    from .config import MlflowConfig, is_database

    with KedroSession.create(project_path=metadata.project_path, env=env) as session:
        config: MlflowConfig = session.load_context().mlflow  # type: ignore[attr-defined]
    uri = config.server.mlflow_tracking_uri or ""
    if not is_database(uri):
        click.echo(f"The runs are on {uri}")
        click.launch(uri)
        return
    host = host or config.ui.host
    port = port or int(config.ui.port or _free_port(host))
    click.echo(f"MLflow's pages: http://{host}:{port} (Ctrl-C ends them)")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    # One process is enough for one reader, and is there sooner than MLflow's usual four.
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    raise SystemExit(subprocess.call(command))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
