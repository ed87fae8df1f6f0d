"""`kedro mlflow modelify`."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click
from click.core import ParameterSource
from kedro.framework.cli.project import run
from kedro.framework.cli.utils import env_option
from kedro.framework.project import pipelines
from kedro.framework.startup import ProjectMetadata
from kedro.pipeline import Pipeline

from ..cli.session import opened


def _params(command: click.Context, _option: click.Parameter, value: str) -> dict[str, Any]:
    """Read `--params` as `kedro run` does."""
    (option,) = (option for option in run.params if option.name == "params")
    read: dict[str, Any] = option.process_value(command, value)
    return read


@click.command()
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
    metadata: ProjectMetadata = command.obj
    arguments = {
        "name": model_name or f"model-{name}",
        "signature": "auto" if infer_signature else None,
        "input_example": "auto" if infer_input_example else None,
        "code_paths": list(code_paths),
        **{option: value for option, value in options.items() if value is not None},
    }
    # Its import is slow, as it is MLflow's.
    modelling = import_module(f"{__package__}.modelify")
    with opened(metadata, env, runtime_params=params) as context:
        run_params = {
            "project_path": str(metadata.project_path),
            "env": context.env,
            "kedro_version": version("kedro"),
            "runtime_params": params,
            "pipeline_name": name,
        }
        info = modelling.modelify(
            context,
            run_params,
            _pipeline_named(name),
            input_name,
            copy_mode,
            arguments,
            _given(command, but=("env", "name", "params")),
        )
    click.echo(f"Logged: {info.model_uri}")


def _pipeline_named(name: str) -> Pipeline:
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
