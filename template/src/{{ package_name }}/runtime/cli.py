"""`kedro mlflow …`: the commands that go with tracking."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from kedro.framework.cli.utils import env_option
from kedro.framework.startup import ProjectMetadata

if TYPE_CHECKING:
    from kedro.pipeline import Pipeline


@click.group(name="mlflow")
def mlflow() -> None:
    """Look at the runs of this project."""


@mlflow.command()
@click.option("--env", "-e", default="local", help="Environment to write into; local by default.")
@click.option("--force", "-f", is_flag=True, help="Replace the file when there is one.")
@click.pass_obj
def init(metadata: ProjectMetadata, env: str, force: bool) -> None:
    """Write an mlflow.yml with every key and its comment, saying what holds now."""
    import yaml
    from kedro.framework.project import settings

    from .config import commented_yaml
    from .loading import written_values

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
    schema = Path(os.path.relpath(base / "mlflow.schema.json", file.parent)).as_posix()
    file.write_text(commented_yaml(values, schema), encoding="utf-8")
    click.echo(f"Written: {file}")


def _config_files(environment: Path) -> list[Path]:
    """List the files of an environment that Kedro reads as mlflow.yml."""
    from kedro.framework.project import settings

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
    from kedro.framework.session import KedroSession

    from .config import MlflowConfig
    from .loading import is_database, read_credentials
    from .offline.command import store_on_disk

    with KedroSession.create(project_path=metadata.project_path, env=env) as session:
        context: Any = session.load_context()  # type: ignore[attr-defined]
        config: MlflowConfig = context.mlflow
        variables = read_credentials(context)
    server = config.server.connection
    if offline:
        server = store_on_disk(server, metadata.project_path)
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


def _params(command: click.Context, _option: click.Parameter, value: str) -> dict[str, Any]:
    """Read `--params` as `kedro run` does."""
    from kedro.framework.cli.project import run

    (option,) = (option for option in run.params if option.name == "params")
    read: dict[str, Any] = option.process_value(command, value)
    return read


@mlflow.command()
@env_option
@click.option("--pipeline", "-p", "name", required=True, help="Pipeline to make a model of.")
@click.option(
    "--input-name", "-i", required=True, help="Its input that is given for each prediction."
)
@click.option("--params", default="", callback=_params, help="As for `kedro run`.")
@click.option(
    "--infer-signature", is_flag=True, help="Infer the signature from the data of the input."
)
@click.option(
    "--infer-input-example", is_flag=True, help="Log a row of the input's data as the example."
)
@click.option(
    "--copy-mode",
    type=click.Choice(["assign", "copy", "deepcopy"]),
    default="assign",
    help="How data is handed to nodes when the model predicts; assign by default.",
)
@click.option("--model-name", help="Name of the model; model-<pipeline> by default.")
@click.option("--registered-model-name", help="Register it as a version of this model.")
@click.option(
    "--await-registration-for", type=int, help="Seconds to wait until the version is ready."
)
@click.option("--code-paths", multiple=True, help="More code for the model, beside the package.")
@click.option("--pip-requirements", help="File of requirements, instead of inferred ones.")
@click.option("--extra-pip-requirements", help="File of requirements, beside inferred ones.")
@click.option("--conda-env", help="File of a conda environment, instead of requirements.")
@click.pass_context
def modelify(
    command: click.Context,
    /,
    env: str | None,
    name: str,
    input_name: str,
    params: dict[str, Any],
    infer_signature: bool,
    infer_input_example: bool,
    copy_mode: str,
    model_name: str | None,
    code_paths: tuple[str, ...],
    **options: Any,
) -> None:
    """Log a pipeline as a model that can be served, with the data that is there now."""
    from kedro.framework.session import KedroSession

    from .binding import modelify

    metadata: ProjectMetadata = command.obj
    arguments = {
        "name": model_name or f"model-{name}",
        "signature": "auto" if infer_signature else None,
        "input_example": "auto" if infer_input_example else None,
        "code_paths": list(code_paths),
        **{option: value for option, value in options.items() if value is not None},
    }
    with KedroSession.create(
        project_path=metadata.project_path, env=env, runtime_params=params
    ) as session:
        context: Any = session.load_context()  # type: ignore[attr-defined]
        run_params = {
            "project_path": str(metadata.project_path),
            "env": context.env,
            "kedro_version": version("kedro"),
            "runtime_params": params,
            "pipeline_name": name,
        }
        info = modelify(
            context,
            run_params,
            _pipeline_named(name),
            input_name,
            copy_mode,
            arguments,
            _given(command, but=("env", "name", "params")),
        )
    click.echo(f"Logged: {info.model_uri}")


@mlflow.command(name="sync")
@env_option
@click.option("--dry-run", is_flag=True, help="List what would be replayed, and do nothing.")
@click.option("--discard", multiple=True, metavar="RUN", help="Remove a run from the disk instead.")
@click.pass_obj
def _sync(
    metadata: ProjectMetadata, env: str | None, dry_run: bool, discard: tuple[str, ...]
) -> None:
    """Replay the runs that are on disk to the server, and remove from the disk what it has.

    It can be interrupted, and started again.
    """
    from .offline.command import sync

    with _opened(metadata, env) as context:
        is_whole = sync(context, dry_run=dry_run, discard=discard)
    if not is_whole:
        raise SystemExit(1)


@mlflow.command()
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
    """List the latest runs, or show one whole, or what differs between two.

    A RUN_ID is one of the list, or at least four characters that it begins with. The table has as
    many metrics as there is room for; a pipeline is named where the run's name is another.
    """
    from .runs import described, differences, find, latest, reached, whole
    from .showing import console, show_differences, show_latest, show_whole

    if len(run_ids) > 2:  # click would end with status 2
        raise click.ClickException(f"RUN_ID: expected one or two ids, got {len(run_ids)}")
    seen: Any
    with _stdout_for_output(), _opened(metadata, env) as context, reached(context) as (server, _):
        experiment = context.mlflow.tracking.experiment
        found = [find(server, experiment, run_id) for run_id in run_ids]
        if len(found) == 1:
            seen = whole(server, found[0])
        elif not found:
            seen = latest(server, experiment, condition=condition, limit=limit, children=children)
    if as_json and len(found) == 2:
        _write_json({"runs": [described(run) for run in found], **differences(*found)})
    elif as_json:
        _write_json(seen.described() if found else [described(run) for run in seen.runs])
    elif len(found) == 2:
        show_differences(console(), *found)
    elif found:
        show_whole(console(), seen)
    elif seen.runs:
        show_latest(console(), seen.runs, _names(metrics), _names(params) or [])
    else:
        click.echo(seen.why_none)


def _names(written: str | None) -> list[str] | None:
    """Read names between commas; None when nothing was written."""
    if written is None:
        return None
    return [name.strip() for name in written.split(",") if name.strip()]


@mlflow.command()
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
    from .doctor import examine, show
    from .showing import console

    with _stdout_for_output():
        findings = examine(metadata.project_path, env, fix=fix)
    if as_json:
        _write_json([vars(finding) for finding in findings])
    else:
        show(console(), findings)
    if any(finding.ok is False for finding in findings):
        raise SystemExit(1)


@contextmanager
def _opened(metadata: ProjectMetadata, env: str | None) -> Iterator[Any]:
    """Give the project's context."""
    from kedro.framework.session import KedroSession

    with KedroSession.create(project_path=metadata.project_path, env=env) as session:
        yield session.load_context()  # type: ignore[attr-defined]


@contextmanager
def _stdout_for_output() -> Iterator[None]:
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
    # On one line, for `tail -n 1`: Kedro writes to stdout by itself before any command.
    click.echo(json.dumps(content, ensure_ascii=False))


def _pipeline_named(name: str) -> Pipeline:
    from kedro.framework.project import pipelines

    known = sorted(pipelines.keys())
    if name not in known:
        raise click.ClickException(f"--pipeline: expected one of {', '.join(known)}, got {name!r}")
    pipeline: Pipeline = pipelines[name]
    return pipeline


def _given(command: click.Context, but: Collection[str]) -> list[str]:
    """Write the options that a command was given, but for some."""
    words = []
    for option in command.command.params:
        value = command.params[str(option.name)]
        source = command.get_parameter_source(str(option.name))
        if option.name not in but and source is not ParameterSource.DEFAULT:
            values = value if isinstance(value, tuple) else [value]
            words += [option.opts[0] if v is True else f"{option.opts[0]}={v}" for v in values]
    return words


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
