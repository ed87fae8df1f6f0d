"""Which versions projects are tested with, and the table of them in `docs/compatibility.md`.

`python -m tests.support.compatibility REPORT` writes the table anew from pytest's report in
JUnit's format; rows of what was not tested this time stay.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from ..conftest import REPOSITORY

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# What uv calls them: the lowest versions that pyproject.toml admits, and the newest there are.
RESOLUTIONS = ("lowest-direct", "highest")
PACKAGES = ("kedro", "kedro-datasets", "mlflow", "scikit-learn", "pandas", "sqlalchemy")

PAGE = REPOSITORY / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by nox -s versions -->\n", "<!-- end -->\n"
COLUMNS = ("python", "resolution", *PACKAGES, "result", "date")


@dataclass(frozen=True)
class Versions:
    """A Python, and how versions of packages are chosen for it."""

    python: str
    resolution: str

    @property
    def env(self) -> dict[str, str]:
        """What makes uv take them, in every command."""
        return {
            "UV_PYTHON": interpreter(self.python),
            "UV_RESOLUTION": self.resolution,
            "PYTHONPYCACHEPREFIX": "",  # in one folder, two versions could be taken for one
        }

    def __str__(self) -> str:
        return f"{self.python}-{self.resolution}"


MATRIX = [Versions(python, resolution) for python in PYTHONS for resolution in RESOLUTIONS]
# The one that is tested each time; the newest on the Python at hand are what all other tests use.
OLDEST = MATRIX[0]


def interpreter(python: str) -> str:
    """Name a Python for uv: pyenv's, whose shims answer for one only, else what uv finds."""
    found = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))
    return str(found[-1]) if found else python


Row = dict[str, str]


def tested(report: Path) -> list[Row]:
    """Give a row for each Python and resolution in a report: it passed when all its tests did."""
    rows: dict[tuple[str, str], Row] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "resolution" not in found:
            continue
        row = rows.setdefault((found["python"], found["resolution"]), {"result": "passed"})
        row |= {**found, "date": date.today().isoformat()}
        if case.find("failure") is not None or case.find("error") is not None:
            row["result"] = "**failed**"
        elif (skipped := case.find("skipped")) is not None:
            row["result"] = skipped.attrib["message"]
    return list(rows.values())


def written(page: str) -> list[Row]:
    """Give the rows that are in the page."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    lines = re.findall(r"^\| (\d.*) \|$", table, re.MULTILINE)
    return [dict(zip(COLUMNS, line.split(" | "), strict=True)) for line in lines]


def with_rows(page: str, new: list[Row]) -> str:
    """Give the page with new rows, each in the place of the one for the same versions."""
    rows = {(row["python"], row["resolution"]): row for row in written(page) + new}
    order = [(case.python, case.resolution) for case in MATRIX]
    lines = [[rows[key].get(name) or "-" for name in COLUMNS] for key in order if key in rows]
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *lines]
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "".join(f"| {' | '.join(line)} |\n" for line in table) + end + after


def main(report: str) -> None:
    page = PAGE.read_text("utf-8")
    PAGE.write_text(with_rows(page, tested(Path(report))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
