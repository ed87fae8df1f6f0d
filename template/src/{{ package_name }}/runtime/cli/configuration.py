"""`kedro mlflow init`: an `mlflow.yml` with every key."""

from __future__ import annotations

import os
from pathlib import Path

import click
from kedro.framework.project import settings
from kedro.framework.startup import ProjectMetadata

from ..config.keys import commented_yaml

# Describes mlflow.yml for editors.
SCHEMA = Path(__file__).parents[1] / "mlflow.schema.json"


@click.command()
@click.option("--env", "-e", default="local", help="Environment to write into; local by default.")
@click.option("--force", "-f", is_flag=True, help="Replace the file when there is one.")
@click.pass_obj
def init(metadata: ProjectMetadata, env: str, force: bool) -> None:
    """Write an mlflow.yml with every key, its default and its comment, all commented out."""
    file = metadata.project_path / settings.CONF_SOURCE / env / "mlflow.yml"
    if not file.parent.is_dir():
        raise click.ClickException(f"{file.parent} is no environment: make the folder first.")
    if file.exists() and not force:
        raise click.ClickException(f"{file} exists already; --force replaces it.")
    schema = Path(os.path.relpath(SCHEMA, file.parent)).as_posix()
    lines = commented_yaml(schema=schema).splitlines()
    # A key that is written here holds, whatever the other files of the project say.
    marked = (f"# {line}" if line and not line.startswith("#") else line for line in lines)
    file.write_text("\n".join(marked) + "\n", encoding="utf-8")
    click.echo(f"Written: {file}. Uncomment the keys to set, and the groups that they are in.")
