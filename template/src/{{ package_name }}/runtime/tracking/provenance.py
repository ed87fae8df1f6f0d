"""Where a run comes from, as its tags: the command that repeats it, git, user. No MLflow here."""

from __future__ import annotations

import getpass
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from kedro.utils import is_kedro_project
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.hiding import Secrets
from ..config.loading import package_name

# Names the version of the template that the runtime is of.
VERSION = Path(__file__).parents[1] / "VERSION"

# `run_params` entries that are lists, with the option of `kedro run` that gives each.
_LIST_OPTIONS = {
    "node_names": "--nodes",
    "from_nodes": "--from-nodes",
    "to_nodes": "--to-nodes",
    "from_inputs": "--from-inputs",
    "to_outputs": "--to-outputs",
    "tags": "--tags",
    "namespaces": "--namespaces",
}

_INSTANCE = re.compile(r"<(?P<type>[\w.]+) object at 0x[0-9a-fA-F]+>")


def pipeline_names(run_params: Mapping[str, Any]) -> list[str]:
    """Return the pipelines of a run; Kedro 1.0 and 1.1 pass one name, later versions a list."""
    names = run_params.get("pipeline_names") or run_params.get("pipeline_name")
    if not names:
        return ["__default__"]
    return [names] if isinstance(names, str) else list(names)


def runner_name(run_params: Mapping[str, Any]) -> str:
    """Return the runner as `kedro run --runner` takes it; Kedro passes the `str()` of it."""
    name = str(run_params.get("runner"))
    if name == "None":
        return "SequentialRunner"
    if instance := _INSTANCE.fullmatch(name):
        name = instance["type"]
    # Kedro's own runners go by their class name, any other by its import path.
    return name.rpartition(".")[2] if name.startswith("kedro.runner.") else name


def kedro_command(
    run_params: Mapping[str, Any],
    options: Sequence[str] = (),
    command: Sequence[str] = ("kedro", "run"),
) -> str:
    """Return the `kedro run …` that repeats a run from the project's folder, for a POSIX shell.

    `options` come after those of `run_params`. Instead of `kedro run` there may be another command.
    """
    words = list(command)
    if env := run_params.get("env"):
        words.append(f"--env={env}")
    if (names := pipeline_names(run_params)) != ["__default__"]:
        # Kedro 1.0 and 1.1 take one pipeline, under another option.
        option = "--pipelines" if "pipeline_names" in run_params else "--pipeline"
        words.append(f"{option}={','.join(names)}")
    for entry, option in _LIST_OPTIONS.items():
        if values := run_params.get(entry):
            words.append(f"{option}={','.join(values)}")
    if versions := run_params.get("load_versions"):
        words.append("--load-versions=" + ",".join(f"{k}:{v}" for k, v in versions.items()))
    if params := run_params.get("runtime_params") or run_params.get("extra_params"):
        words.append("--params=" + ",".join(_param(k, v) for k, v in params.items()))
    if (runner := runner_name(run_params)) != "SequentialRunner":
        words.append(f"--runner={runner}")
    if run_params.get("only_missing_outputs"):
        words.append("--only-missing-outputs")
    return shlex.join([*words, *options])


def _param(name: str, value: Any) -> str:
    """Return a parameter as `kedro run --params` reads it: as YAML, between commas."""
    value = _plain(value)
    plain = ",".join(f"{k}={v}" for k, v in _leaves({name: value}))
    if _read_params(plain) == {name: value}:
        return plain
    # Blocks and quoted scalars instead of anything with a comma.
    text = yaml.safe_dump(value, default_style='"', width=sys.maxsize, allow_unicode=True)
    quoted = f"{name}={text.strip()}".replace(",", "\\x2c")
    return quoted if _read_params(quoted) == {name: value} else plain


def _plain(value: Any) -> Any:
    """Return a value with a text in place of all that JSON has not, such as a `Path` or an enum."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)


def _read_params(text: str) -> Any:
    """Return what `--params` says, read as Kedro does (kedro.framework.cli.utils)."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(items))
    except (OmegaConfBaseException, yaml.YAMLError):
        return None


def _leaves(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def typed_options() -> dict[str, Any]:
    """Return the options of the `kedro run` that this is; none when a script runs a session."""
    command = _run_command()
    return command.params if command else {}


def _run_command() -> click.Context | None:
    """Return the `kedro run`, or `python -m <package>`, that this is."""
    command = click.get_current_context(silent=True)
    is_run = command and command.command.name == "run" and "conf_source" in command.params
    return command if is_run else None


def in_typed_order(run_params: dict[str, Any]) -> dict[str, Any]:
    """Return `run_params` with the pipelines in the order in which they were typed.

    Kedro passes them in any order, another one each time.
    """
    typed = list(dict.fromkeys(typed_options().get("pipelines") or ()))
    if typed and set(typed) == set(run_params.get("pipeline_names") or ()):
        return {**run_params, "pipeline_names": typed}
    return run_params


def command_options(given: Mapping[str, Any], project_path: Path) -> list[str]:
    """Return the options of `kedro run` that Kedro doesn't pass on in `run_params`.

    Takes the parameters of the click command: `conf_source`, `is_async`, `runner_params`.
    """
    options = []
    if conf_source := given.get("conf_source"):
        if "://" not in conf_source:
            path = Path(conf_source).resolve()
            inside = path.is_relative_to(project_path)
            conf_source = path.relative_to(project_path) if inside else path
        options.append(f"--conf-source={conf_source}")
    runner_params = dict(given.get("runner_params") or {})
    if given.get("is_async"):
        if "runner_params" in given:
            runner_params["is_async"] = True
        else:  # Kedro before runner parameters
            options.append("--async")
    if runner_params:
        words = ",".join(_param(name, value) for name, value in runner_params.items())
        options.append(f"--runner-params={words}")
    return options


def run_tags(
    run_params: Mapping[str, Any],
    project_path: Path,
    secrets: Secrets,
    command: Sequence[str] = ("run",),
    options: Sequence[str] = (),
) -> dict[str, str]:
    """Return the tags of a run: one for each non-empty entry of `run_params`, and its provenance.

    Args:
        run_params: What Kedro passes to hooks.
        project_path: The project's folder.
        secrets: What is hidden.
        command: The words after `kedro` of the command that repeats the run.
        options: What that command has besides what was typed for `kedro run`.
    """
    options = [*command_options(typed_options(), project_path), *options]
    shown = secrets.hide(run_params)
    words = ["kedro", *command]
    if (typed := _run_command()) and typed.parent is None:  # as a package, Kedro's command is alone
        words = ["python", "-m", package_name()]
    tags = {
        "km_template_version": VERSION.read_text("utf-8").strip(),
        **{key: _as_text(value) for key, value in shown.items() if value},
        "runner": runner_name(shown),
        "kedro_command": kedro_command(shown, [secrets.hide_in(o) for o in options], words),
        **source_tags(project_path, package_name()),
    }
    # Names of folders and users are bytes: what is no text in them can't be stored.
    return {key: text.encode(errors="replace").decode() for key, text in tags.items()}


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return json.dumps(_plain(value))
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(str, value))
    return str(value)


def source_tags(project_path: Path, package_name: str) -> dict[str, str]:
    """Return tags for the project and its user, under the names that MLflow's pages read."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.name": package_name,
        "mlflow.source.type": "LOCAL",
        # A packaged project may be run from within anybody's repository.
        **(git_tags(project_path) if is_kedro_project(project_path) else {}),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    # A container may run as a user id without a name, and Windows has no such database.
    except (OSError, KeyError, ImportError):
        return "unknown"


def git_tags(project_path: Path) -> dict[str, str]:
    """Return commit, branch and whether anything is uncommitted, with one call of git.

    Gives nothing where the project is not in a git repository, or git is not installed.
    """
    try:
        status = subprocess.run(
            ["git", "status", "--porcelain=v2", "--branch"],
            cwd=project_path,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of files and branches are bytes, in any encoding
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    headers = {
        key: value
        for key, _, value in (line[2:].partition(" ") for line in status if line[0] == "#")
    }
    tags = {"mlflow.source.git.dirty": str(len(headers) < len(status)).lower()}
    if (commit := headers.get("branch.oid", "(initial)")) != "(initial)":
        tags["mlflow.source.git.commit"] = commit
    if (branch := headers.get("branch.head", "(detached)")) != "(detached)":
        tags["mlflow.source.git.branch"] = branch
    return tags
