"""What `docs/adopting.md` tells its readers to do, for the tests that do it."""

from __future__ import annotations

import re
from pathlib import Path

from ..conftest import REPOSITORY
from ..e2e.conftest import console_commands

GUIDE = (REPOSITORY / "docs" / "adopting.md").read_text("utf-8")
SECTIONS = {
    text.partition("\n")[0]: text for text in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]
}
INTO, MOVING, OUT = SECTIONS.values()


def commands(section: str, template: Path | None = None) -> list[str]:
    """List the commands of a section, with the folder of a template in place of its address."""
    found = console_commands(section)
    return [command.replace("gh:org/km-template", str(template)) for command in found]


def shown(section: str, file: str) -> str:
    """Give what a section says that a file contains, or gets at its end."""
    block = re.compile(
        rf"^<!-- {re.escape(file)} -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE
    )
    (text,) = block.findall(section)
    return str(text)


def pairs(section: str, starting: str) -> dict[str, str]:
    """Read the rows of a section's tables that say which code becomes which, by its beginning."""
    rows = re.findall(r"^\| `([^|`]*)` \| `([^|`]*)` \|$", section, re.MULTILINE)
    return {left: right for left, right in rows if left.startswith(starting)}


def instead_of(section: str) -> dict[str, str]:
    """Read what a section's table puts in the place of each dataset."""
    rows = re.findall(r"^\| (`Mlflow[^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    return {name: right for left, right in rows for name in re.findall(r"`(\w+)`", left)}


def switch_on(project: Path) -> None:
    """Change by hand what the guide says is changed by hand."""
    settings = "src/penguins/settings.py"
    (project / settings).write_text(shown(INTO, settings))
    with (project / ".gitignore").open("a") as file:
        file.write(shown(INTO, ".gitignore"))
