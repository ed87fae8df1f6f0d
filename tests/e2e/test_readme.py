"""Every command in the README works, word for word."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from .conftest import Shell, commit_all, console_commands, git

# What a test can't run inside of itself: `nox` is what CI runs, and it runs this.
RUN_ELSEWHERE = {"nox"}
# Tested, with its pages, on a generated project.
ENDS_WITH_CTRL_C = {"uv run kedro mlflow ui"}


def test_every_command_of_the_readme_works(clone: Path, tmp_path: Path, shell: Shell) -> None:
    markdown = (clone / "README.md").read_text()
    commands = console_commands(markdown)
    assert {"nox", "nox -s demo", "uvx copier update --skip-answered"} < set(commands)
    # A machine with nothing but Python, git and pip.
    shell(f"{sys.executable} -m venv {tmp_path}/machine", tmp_path)
    path = f"{tmp_path}/machine/bin{os.pathsep}{os.environ['PATH']}"
    folder = clone
    project = 0
    output = {}

    for command in commands:
        if command in RUN_ELSEWHERE | ENDS_WITH_CTRL_C:
            continue
        if '"$PWD"' in command:
            shell(command.replace(" copy ", " copy --defaults "), clone, PATH=path)
            answers = (tmp_path / "myproj" / ".copier-answers.yml").read_text()
            assert f"_src_path: {clone}\n" in answers
            continue
        if " copy " in command:
            project += 1
            folder = tmp_path / f"session{project}"
            folder.mkdir()
            command = command.replace("gh:org/km-template", f"--defaults {clone}")
        if command.startswith("cd "):
            folder = folder / command.removeprefix("cd ")
            continue
        if command == "uvx copier update --skip-answered":
            folder = tmp_path / "session1" / "myproj"
            git(folder, "init", "--quiet")
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--message=Start")
        output[command] = shell(command, folder, PATH=path)

    table = output["nox -s demo"]
    for word in ("FINISHED", "accuracy", "confusion_matrix.png", "penguins-classifier 1"):
        assert word in table
    assert "kedro mlflow ui" in table
    (demo,) = re.findall(r"--directory (\S+)", table)
    git(Path(demo), "init", "--quiet")
    commit_all(Path(demo), "Start")
    assert "Unknown" not in shell("uvx copier update --defaults --vcs-ref=HEAD", Path(demo))
    assert git(Path(demo), "status", "--porcelain") == ""


def test_the_demo_takes_a_folder_and_refuses_one_that_is_not_empty(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    refused = shell(f"nox -f {clone}/noxfile.py -s demo -- full", tmp_path, status=1)

    assert "full is not empty" in refused
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
