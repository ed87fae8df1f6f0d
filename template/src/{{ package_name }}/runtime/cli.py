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
@click.option("--env", "-e", default="local", help="Environment to write into; local by default.")
@click.option("--force", "-f", is_flag=True, help="Replace the file when there is one.")
@click.pass_obj
def init(metadata: ProjectMetadata, env: str, force: bool) -> None:
    """Write an mlflow.yml with every key and its comment, saying what holds now."""
    from kedro.framework.project import settings

    from .config import commented_yaml
    from .loading import written_values

    conf = metadata.project_path / settings.CONF_SOURCE
    file = conf / env / "mlflow.yml"
    if not file.parent.is_dir():
        raise click.ClickException(f"{file.parent} is no environment: make the folder first.")
    if file.exists() and not force:
        raise click.ClickException(f"{file} exists already; --force replaces it.")
    base = settings.CONFIG_LOADER_ARGS.get("base_env", "base")
    schema = "mlflow.schema.json" if env == base else f"../{base}/mlflow.schema.json"
    values = written_values([file, conf / base / "mlflow.yml"])
    file.write_text(commented_yaml(values, schema), encoding="utf-8")
    click.echo(f"Written: {file}")


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

    from .config import MlflowConfig
    from .loading import is_database

    with KedroSession.create(project_path=metadata.project_path, env=env) as session:
        config: MlflowConfig = session.load_context().mlflow  # type: ignore[attr-defined]
    uri = config.server.mlflow_tracking_uri or ""
    if not is_database(uri):
        click.echo(f"The runs are on {uri}")
        click.launch(uri)
        return
    host = host or config.ui.host
    port = _port(host, port or config.ui.port)
    click.echo(f"MLflow's pages: http://{host}:{port} (Ctrl-C ends them)")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    # One process is enough for one reader, and is there sooner than MLflow's usual four.
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    raise SystemExit(subprocess.call(command))


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
