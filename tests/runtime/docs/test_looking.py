"""What `docs/looking.md` shows is run, and does what the text says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from ...conftest import REPOSITORY
from ...support import forks
from ...support.projects import Project
from ..extras.console.test_doctor import CHECKS
from ..extras.console.test_runs import log

GUIDE = (REPOSITORY / "docs" / "looking.md").read_text("utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_guide_show_runs_and_find_nothing_wrong(
    project: Project, tmp_path: Path
) -> None:
    metrics = {"accuracy": 0.95, "scores.f1": 0.5}
    for state in ("42", "43"):
        log(project, metrics=metrics, params={"random_state": state})
    path = forks.write_commands(tmp_path / "bin", "kedro")

    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'PATH="{path}"\n' + "\n".join(BLOCKS)],
        cwd=project.path,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("scores.f1") == 5  # in four lists, and of the one run
    assert re.search(r"^random_state +42 +43 *$", ended.stdout, re.MULTILINE)
    assert ended.stdout.count("offline runs") == 2


def test_the_guide_names_every_check() -> None:
    (table,) = re.findall(r"^\| check .*?\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE)[1:] == CHECKS
