"""`kedro mlflow …`: the commands that go with tracking."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from kedro.framework.cli.utils import env_option
from kedro.framework.project import settings
from kedro.framework.startup import ProjectMetadata

from ..config.keys import commented_yaml
from ..config.loading import read_credentials, written_values
from ..config.uris import is_database
from ..extras import EXTRAS, MissingExtraError, load, owner_of_command, present
from ..stores.project import MlflowConfig
from .session import opened

# Describes mlflow.yml for editors.
SCHEMA = Path(__file__).parents[1] / "mlflow.schema.json"


class _Commands(click.Group):
    """The commands of the core, and those of extras, which are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        of_extras = [name for extra in present() for name in EXTRAS[extra].commands]
        return sorted([*super().list_commands(ctx), *of_extras])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        extra = owner_of_command(cmd_name)
        if extra is None:
            return super().get_command(ctx, cmd_name)
        module = _load(extra, EXTRAS[extra].commands[cmd_name], f"`kedro mlflow {cmd_name}`")
        command: click.Command = getattr(module, cmd_name)
        return command


def _load(extra: str, module: str, asked_for: str) -> Any:
    try:
        return load(extra, module, asked_for)
    except MissingExtraError as error:
        raise click.ClickException(str(error)) from error


@click.group(name="mlflow", cls=_Commands)
def mlflow() -> None:
    """Look at the runs of this project."""


@mlflow.command()
@click.option("--env", "-e", default="local", help="Environment to write into; local by default.")
@click.option("--force", "-f", is_flag=True, help="Replace the file when there is one.")
@click.pass_obj
def init(metadata: ProjectMetadata, env: str, force: bool) -> None:
    """Write an mlflow.yml with every key and its comment, saying what holds now."""
    conf = metadata.project_path / settings.CONF_SOURCE
    file = conf / env / "mlflow.yml"
    if not file.parent.is_dir():
        raise click.ClickException(f"{file.parent} is no environment: make the folder first.")
    own = _config_files(file.parent)
    for other in own:
        if other != file:  # Kedro refuses a key that stands in two files of one environment
            raise click.ClickException(f"{other} is there already: rename or remove it first.")
    if file.exists() and not force:
        raise click.ClickException(f"{file} exists already; --force replaces it.")
    base = conf / settings.CONFIG_LOADER_ARGS.get("base_env", "base")
    try:
        values = written_values(dict.fromkeys([*own, *_config_files(base)]))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise click.ClickException(f"Nothing written, a file is no YAML: {reason}") from error
    schema = Path(os.path.relpath(SCHEMA, file.parent)).as_posix()
    file.write_text(commented_yaml(values, schema), encoding="utf-8")
    click.echo(f"Written: {file}")


def _config_files(environment: Path) -> list[Path]:
    """List the files of an environment that Kedro reads as mlflow.yml."""
    patterns = settings.CONFIG_LOADER_ARGS.get("config_patterns", {}).get("mlflow", [])
    found = {file for pattern in patterns for file in environment.glob(pattern)}
    return sorted(file for file in found if file.suffix in (".yml", ".yaml"))


@mlflow.command()
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
    if offline:
        command = _load("offline", "command", "`kedro mlflow ui --offline`")
        server = command.store_on_disk(server, metadata.project_path)
    if not is_database(server.tracking_uri):
        page = re.sub(r"//[^/?#]*@", "//", server.tracking_uri)  # without user and password
        click.echo(f"The runs are on {page}")
        if page.startswith(("http://", "https://")):
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
