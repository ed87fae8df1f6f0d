"""The built site is whole; `nox -s docs` builds it first."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote, urlsplit

import click
import pytest
from pydantic import BaseModel

import runtime
from runtime import extras
from runtime.cli import mlflow as commands
from runtime.config.keys import MlflowConfig

from ..conftest import REPOSITORY

SITE = REPOSITORY / "site" / "html"
PAGES = sorted(file for file in SITE.rglob("*.html") if file.name != "404.html")

if not PAGES:
    pytest.skip("The site isn't built: `nox -s docs` does that.", allow_module_level=True)


class Page(HTMLParser):
    """What a page shows, and what it takes from elsewhere."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = ""
        self.ids: set[str] = set()
        self.headings = 0
        self.assets: list[str] = []
        self.links: list[str] = []
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.headings += tag == "h1"
        self.assets += [given[name] for name in ("src", "srcset", "data") if given.get(name)]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.assets.append(given["href"])
        if tag == "a":
            self.links.append(given.get("href", ""))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(name: str) -> Page:
    return Page(SITE / name)


def keys(group: BaseModel, path: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in group:
        inside = f"{path}.{name}".strip(".")
        found += keys(value, inside) if isinstance(value, BaseModel) else [(path, name)]
    return found


def test_every_page_is_in_the_navigation() -> None:
    # The changelog leads nowhere but by its navigation.
    named = {normpath(urlsplit(link).path) for link in page("changelog.html").links}
    assert {file.relative_to(SITE).as_posix() for file in PAGES} <= named


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(SITE).as_posix())
def test_a_page_has_one_title_and_takes_nothing_from_the_network(file: Path) -> None:
    built = Page(file)

    assert built.headings == 1
    for asset in built.assets:
        assert not urlsplit(asset).netloc, asset
        assert (file.parent / unquote(urlsplit(asset).path)).is_file(), asset
    for link in built.links:
        address = urlsplit(link)
        if not address.scheme and address.path:
            assert (file.parent / unquote(address.path)).exists(), link


def test_styles_take_nothing_from_the_network() -> None:
    for style in SITE.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text("utf-8")), style


def test_the_reference_has_every_public_name() -> None:
    ids = page("reference/python.html").ids
    modules = runtime._MODULES | extras.public_names()
    for name, module in modules.items():
        assert ids & {f"runtime.{name}", f"runtime.{module}.{name}"}, name
    assert set(modules) == set(runtime.__all__)


def test_the_reference_has_every_key_of_mlflow_yml() -> None:
    text = page("reference/mlflow-yml.html").text
    sections = {part.partition("\n")[0]: part for part in re.split(r"\n(?=[a-z_.]+¶)", text)}
    for group, name in keys(MlflowConfig()):
        assert f"\n{name}\n" in sections[f"{group}¶"]


def test_the_reference_has_every_command_with_its_options() -> None:
    text = page("reference/commands.html").text
    group = click.Context(commands)
    for name in commands.list_commands(group):
        command = commands.get_command(group, name)
        assert command
        section = text.split(f"kedro mlflow {name}¶")[1].split("¶")[0]
        for option in command.params:
            if option.param_type_name == "option":
                assert option.opts[-1] in section, (name, option)


def test_the_first_page_shows_commands_of_the_readme() -> None:
    """Those are run, word for word, with whole projects."""
    shown, run = (
        re.findall(r"^```console\n(.*?)^```$", file.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for file in (REPOSITORY / "docs" / "index.md", REPOSITORY / "README.md")
    )
    assert shown
    assert set(shown) <= set(run)
