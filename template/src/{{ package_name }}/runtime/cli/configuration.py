"""`kedro mlflow init`: an `mlflow.yml` with every key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml
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
        values = _written_values(dict.fromkeys([*own, *_config_files(base)]))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise click.ClickException(f"Nothing written, a file is no YAML: {reason}") from error
    schema = Path(os.path.relpath(SCHEMA, file.parent)).as_posix()
    file.write_text(commented_yaml(values, schema), encoding="utf-8")
    click.echo(f"Written: {file}")


def _config_files(environment: Path) -> list[Path]:
    """Return the files of an environment that Kedro reads as mlflow.yml."""
    patterns = settings.CONFIG_LOADER_ARGS.get("config_patterns", {}).get("mlflow", [])
    files = {file for pattern in patterns for file in environment.glob(pattern)}
    return sorted(file for file in files if file.suffix in (".yml", ".yaml"))


def _written_values(files: Iterable[Path]) -> dict[str, str]:
    """Return what files say of each key, as JSON; the first file goes first."""
    values: dict[str, str] = {}
    for file in files:
        entries = yaml.safe_load(file.read_text("utf-8")) if file.exists() else None
        for key, value in _keys(entries if isinstance(entries, dict) else {}):
            values.setdefault(key, json.dumps(value, ensure_ascii=False, default=str))
    return values


def _keys(entries: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Return each dotted key with its value, groups too."""
    for name, value in entries.items():
        yield f"{path}{name}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{name}.")
