"""Time `copier copy` and `copier update` as whole processes."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import copy_template
from tests.support.versions import NOW, make_versions

EVERYTHING = ("docker=true", "ci=github", "scale_out=dask", "licence=MIT")
# What a command has in place of these words.
TEMPLATE, NEXT, PROJECT = "TEMPLATE", "NEXT", "measured"


@dataclass(frozen=True)
class Copying:
    """A command that makes the project `measured`, or updates it.

    Args:
        name: As the table shows it.
        words: What follows `python -m`.
    """

    name: str
    words: tuple[str, ...]

    @property
    def updates(self) -> bool:
        """Whether there has to be a project before it."""
        return "update" in self.words


COPY = ("copier", "copy", "--quiet", "--defaults", f"--vcs-ref={NOW}", TEMPLATE, PROJECT)
UPDATE = ("copier", "update", "--quiet", "--defaults", PROJECT)

COPYING = (
    Copying(
        "`kedro new` without tools and example",
        ("kedro", "new", f"--name={PROJECT}", "--tools=none", "--example=n"),
    ),
    Copying("`copier copy` without the example", (*COPY, "--data=example=false")),
    Copying("`copier copy`", COPY),
    Copying(
        "`copier copy` with Docker, CI and Dask",
        (*COPY, *(f"--data={answer}" for answer in EVERYTHING)),
    ),
    Copying("`copier update` with nothing new", (*UPDATE, f"--vcs-ref={NOW}")),
    Copying("`copier update` to the next version", (*UPDATE, f"--vcs-ref={NEXT}")),
)


@dataclass(frozen=True)
class MeasuredCopy:
    """What a command took, and how many files the project had after it."""

    what: Copying
    files: int
    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """Give the median wall time."""
        return statistics.median(self.seconds)


def measure_copies(
    copying: Sequence[Copying], folder: Path, repetitions: int
) -> list[MeasuredCopy]:
    """Measure commands in turn, after a first round that isn't counted."""
    if not copying:
        return []
    folder.mkdir()
    versions = make_versions(copy_template(folder / "template"), folder / "repository")
    stands_for = {
        TEMPLATE: str(versions.repository),
        f"--vcs-ref={NEXT}": f"--vcs-ref={versions.artificial[0]}",
    }
    generated = _generate(folder / "generated", stands_for)
    files: dict[Copying, int] = {}
    seconds: dict[Copying, list[float]] = {what: [] for what in copying}
    for repetition in range(repetitions + 1):
        for what in copying:
            print(f"{what.name} …", file=sys.stderr, flush=True)
            place = folder / "place"
            place.mkdir()
            if what.updates:
                shutil.copytree(generated, place / PROJECT)
            start = time.perf_counter()
            _run(place, sys.executable, "-m", *(stands_for.get(word, word) for word in what.words))
            taken = time.perf_counter() - start
            if repetition:
                seconds[what].append(taken)
            files[what] = _count_files(place / PROJECT)
            shutil.rmtree(place)
    return [MeasuredCopy(what, files[what], taken) for what, taken in seconds.items()]


def _generate(place: Path, stands_for: dict[str, str]) -> Path:
    """Generate a project, and keep it in git."""
    place.mkdir()
    _run(place, sys.executable, "-m", *(stands_for.get(word, word) for word in COPY))
    project = place / PROJECT
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=Start"]):
        _run(project, "git", *words)
    return project


def _count_files(project: Path) -> int:
    found = (path.relative_to(project) for path in project.rglob("*") if path.is_file())
    return sum(path.parts[0] != ".git" for path in found)


def _run(folder: Path, *words: str) -> None:
    somebody = {
        f"GIT_{role}_{what}": "somebody@example.org"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **somebody, "DO_NOT_TRACK": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr}")
