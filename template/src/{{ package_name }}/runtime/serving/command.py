"""`kedro mlflow modelify`."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from typing import Any

import click
from click.core import ParameterSource
from kedro.framework.cli.project import run
from kedro.framework.cli.utils import env_option
from kedro.framework.project import pipelines
from kedro.framework.startup import ProjectMetadata

from ..binding import bind, end, fail, open_run, secrets_of_run
from ..cli.session import opened
from ..config.loading import package_name
from .hook import import_packing


def _params(command: click.Context, _option: click.Parameter, value: str) -> dict[str, Any]:
    """Read `--params` as `kedro run` does."""
    (option,) = (option for option in run.params if option.name == "params")
    params: dict[str, Any] = option.process_value(command, value)
    return params


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
    if name not in pipelines:
        known = ", ".join(sorted(pipelines))
        raise click.ClickException(f"--pipeline: expected one of {known}, got {name!r}")
    packing = import_packing()
    with opened(metadata, env, runtime_params=params) as context:
        catalog = context.catalog
        model = packing.KedroPipelineModel(
            pipelines[name], catalog, input_name, copy_mode=copy_mode
        )
        secrets = secrets_of_run(context, model.pipeline, catalog)
        packing.check(model, catalog, secrets, arguments)
        run_params = {
            "project_path": str(metadata.project_path),
            "env": context.env,
            "kedro_version": version("kedro"),
            "runtime_params": params,
            "pipeline_name": name,
        }
        given = _given_options(command, leave_out=("env", "name", "params"))
        run = open_run(context, run_params, model.pipeline, catalog, ("mlflow", "modelify"), given)
        bind(context, model.pipeline, catalog, run)
        try:
            info = packing.log(run, model, catalog, package_name(), arguments)
        except BaseException as error:
            fail(catalog, error)
            raise
        end(catalog, "FINISHED")
    click.echo(f"Logged: {info.model_uri}")


def _given_options(command: click.Context, leave_out: Collection[str]) -> list[str]:
    """Return the options that a command was given, as they are typed."""
    words = []
    for option in command.command.params:
        value = command.params[str(option.name)]
        source = command.get_parameter_source(str(option.name))
        if option.name not in leave_out and source is not ParameterSource.DEFAULT:
            values = value if isinstance(value, tuple) else [value]
            words += [option.opts[0] if v is True else f"{option.opts[0]}={v}" for v in values]
    return words
