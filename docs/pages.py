"""Gather the pages of the documentation: `python -m docs.pages` fills site/pages anew.

Pages are written to be read in the repository, too. What differs on the site is done here: links
to what lies outside of this folder, the names of examples' files, and the pages of the reference,
which are made from the runtime.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

import runtime
from runtime.cli import mlflow as commands
from runtime.config.keys import MlflowConfig

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
PAGES = REPOSITORY / "site" / "pages"

# Pages from elsewhere in the repository.
ELSEWHERE = {
    REPOSITORY / "CHANGELOG.md": "changelog.md",
    REPOSITORY / "benchmarks" / "RESULTS.md": "results.md",
    REPOSITORY / "benchmarks" / "SCALE.md": "growth.md",
}

# A fenced block or a piece of code, which stay as they are, or a link.
LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`|(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)
CONSOLE = re.compile(r"^```console$", re.MULTILINE)
NAMED_EXAMPLE = re.compile(r"^<!-- (\S+) -->\n```(\w+)$", re.MULTILINE)


def gather() -> None:
    """Write all pages, with their pictures, in place of those that are there."""
    shutil.rmtree(PAGES, ignore_errors=True)
    places = {file: file.relative_to(DOCS).as_posix() for file in sources()}
    for file, place in {**ELSEWHERE, **places}.items():
        target = PAGES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text = on_the_site(file, file.read_text("utf-8"), {**ELSEWHERE, **places})
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copy(file, target)
    (PAGES / "reference").mkdir()
    for name, text in reference().items():
        (PAGES / "reference" / name).write_text(text, encoding="utf-8")


def sources() -> list[Path]:
    """List the files of this folder: pages, and what they show or link to."""
    found = (file for file in DOCS.rglob("*") if file.is_file())
    return sorted(file for file in found if file != Path(__file__) and file.suffix != ".pyc")


def on_the_site(file: Path, text: str, places: dict[Path, str]) -> str:
    """Change a page's text to what it has to be on the site.

    Args:
        file: Where the page is in the repository.
        text: What it says there.
        places: Where each file of the site is on it.

    Raises:
        FileNotFoundError: When a link leads to a file that the repository doesn't have.
    """

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        wanted = (file.parent / path).resolve()
        if wanted in places:
            path = os.path.relpath(places[wanted], Path(places[file]).parent).replace(os.sep, "/")
            return f"{match['text']}({path}{hash_}{anchor})"
        if not wanted.exists():
            raise FileNotFoundError(f"{file.relative_to(REPOSITORY)}: {target} doesn't exist")
        return match["text"].strip("[]")  # a file of the repository that is no page

    text = NAMED_EXAMPLE.sub(r'```\2 title="\1"', text)
    text = CONSOLE.sub("```bash", text)  # a console's lines without a prompt would be output
    return LINK.sub(link, text)


def reference() -> dict[str, str]:
    """Give the text of each page of the reference."""
    return {
        "mlflow-yml.md": "\n".join(keys()),
        "commands.md": "\n".join(command_lines()),
        "python.md": "\n".join(names()),
    }


def keys() -> Iterator[str]:
    """Describe each key of `mlflow.yml`, from its model."""
    yield "# Keys of `mlflow.yml`\n"
    yield "The [guide](../configuration.md) goes through them with examples. Any value may also be"
    yield "an interpolation, `${…}`."
    models = MlflowConfig.model_json_schema()["$defs"]
    for name, group in MlflowConfig():
        yield from keys_of(models, group, name)


def keys_of(models: dict[str, Any], group: BaseModel, path: str) -> Iterator[str]:
    """Describe the keys of a group, then those of the groups in it."""
    model = models[type(group).__name__]
    values = {name: value for name, value in group if not isinstance(value, BaseModel)}
    yield f"\n## `{path}`\n\n{plain(model['description'])}\n"
    if values:
        yield "| key | value | default | meaning |\n|---|---|---|---|"
    for name, default in values.items():
        field = model["properties"][name]
        value = any_of(kinds(field))
        about = plain(field["description"])
        yield f"| `{name}` | {value} | `{json.dumps(default)}` | {about} |"
    for name, value in group:
        if isinstance(value, BaseModel):
            yield from keys_of(models, value, f"{path}.{name}")


def kinds(field: dict[str, Any]) -> list[str]:
    """List in words what a value may be."""
    if "anyOf" in field:
        return [kind for each in field["anyOf"] for kind in kinds(each)]
    if "enum" in field:
        return [f"`{each}`" for each in field["enum"]]
    if field["type"] == "array":
        return [f"list of {any_of(kinds(field['items']))}"]
    if field["type"] == "object" and isinstance(field["additionalProperties"], dict):
        return [f"names, each with {any_of(kinds(field['additionalProperties']))}"]
    return {
        "boolean": ["`true`", "`false`"],
        "integer": ["number"],
        "null": ["`null`"],
        "object": ["dictionary"],
        "string": ["text"],
    }[field["type"]]


def any_of(kinds: list[str]) -> str:
    """Join what a value may be."""
    *others, last = kinds
    return f"{', '.join(others)} or {last}" if others else last


def command_lines() -> Iterator[str]:
    """Describe each command of `kedro mlflow`, from click."""
    yield "# `kedro mlflow`\n"
    yield "Each works in any folder of a project, and lists its options with `--help`."
    group = click.Context(commands)
    for name in commands.list_commands(group):
        command = commands.get_command(group, name)
        assert command, "it is listed"
        context = click.Context(command, info_name=f"kedro mlflow {name}")
        yield f"\n## `kedro mlflow {name}`\n\n{plain(cleandoc(command.help or ''))}\n"
        yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}"
        yield "```\n\n| option | meaning |\n|---|---|"
        for option in command.params:
            if isinstance(option, click.Option) and (record := option.get_help_record(context)):
                yield f"| `{record[0]}` | {plain(record[1])} |"


def plain(text: str) -> str:
    """Escape what Markdown would take for more than text, but for pieces of code."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_\[\]|])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "`".join(parts)


def names() -> Iterator[str]:
    """Ask mkdocstrings for each public name of the runtime."""
    yield "# Python\n"
    yield "The public names of `<package>.runtime`.\n"
    datasets = [name for name in runtime.__all__ if name.endswith("Dataset")]
    models = [name for name in runtime.__all__ if "ipeline" in name]
    groups = {
        "Datasets": datasets,
        "Pipelines as models": models,
        "For settings and configuration": [
            name for name in runtime.__all__ if name not in {*datasets, *models}
        ],
    }
    for title, group in groups.items():
        yield f"\n## {title}\n"
        for name in group:
            yield f"::: runtime.{name}"
            if name == "MlflowHook":  # Kedro calls its methods, and nobody else
                yield "    options: {members: false}"
            yield ""


if __name__ == "__main__":
    gather()
