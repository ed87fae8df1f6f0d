"""What `docs/updating.md` shows is run, and does what the text says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import copier
import pytest
import yaml

from ..conftest import REPOSITORY
from ..support.versions import append, replace, tag
from .conftest import git

GUIDE = (REPOSITORY / "docs" / "updating.md").read_text("utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
SCRIPT = REPOSITORY / "docs" / "update_projects.py"
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(command: str, folder: Path, status: int = 0) -> str:
    """Run a command, or a block of them, as typed in a shell; gives what it writes."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=ENV,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout


def block(word: str) -> str:
    """Find the only block with a word in it."""
    found: str
    (found,) = [block for block in BLOCKS if word in block]
    return found


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template in two versions: the second changes the runtime and README.md."""
    folder = tmp_path_factory.mktemp("guide") / "km-template"
    shutil.copytree(template, folder)
    git(folder, "init", "--quiet")
    tag(folder, "v0.1.0")
    append(folder / "template/src/{{ package_name }}/runtime/hooks.py", "# New.")
    append(folder / "template/{{ instructions }}.md.jinja", "New.")
    tag(folder, "v0.2.0")
    return folder


def test_the_commands_for_one_project_update_it_and_switch_docker_on_and_off(
    repository: Path, tmp_path: Path
) -> None:
    project = tmp_path / "penguins"
    copier.run_copy(str(repository), project, vcs_ref="v0.1.0", defaults=True, quiet=True)
    git(project, "init", "--quiet")
    append(project / "README.md", "Mine.")
    commit(project)

    assert "exit status 2" in run(block("check-update"), project)
    said = run(block("Update the template"), project)
    assert " M src/penguins/runtime/hooks.py" in said
    assert " M README.md" not in said
    assert "UU is a clash" in said
    assert (project / "README.md").read_text("utf-8").endswith("Mine.\n")
    assert run(block("check-update"), project) == ""

    run(block("docker=true"), project)
    append(project / "compose.yml", "# Mine.")
    commit(project)
    said = run(block("docker=false"), project)
    assert " D Dockerfile\n" in said
    assert " D compose.yml\n" in said
    assert "-# Mine." in said
    assert not (project / "Dockerfile").exists()
    assert (project / "compose.yml").read_text("utf-8").endswith("# Mine.\n")
    assert git(project, "status", "--porcelain") == ""


def test_the_guide_names_the_owners_files() -> None:
    settings = yaml.safe_load((REPOSITORY / "copier.yml").read_text("utf-8"))
    (row,) = re.findall(r"^\| (.*) \| yours \| never touches", GUIDE, re.MULTILINE)
    owned = re.findall(r"`([^`]+)`", row)

    assert [f"/{pattern}" for pattern in owned] == settings["_skip_if_exists"]
    untouched = [pattern.removesuffix("/**") for pattern in owned]
    condition = "{%% if _copier_operation == 'update' %%}/%s{%% endif %%}"
    assert {condition % pattern for pattern in untouched} <= set(settings["_exclude"])


# -- many projects, of a template that is small enough to make and update many ----------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template in two versions; the second changes a file, takes one away, and refuses a name."""
    folder = tmp_path_factory.mktemp("small") / "small"
    (folder / "template").mkdir(parents=True)
    (folder / "copier.yml").write_text(
        "_subdirectory: template\nname: {type: str, default: '{{ _folder_name }}'}\n"
    )
    answers = folder / "template/{{ _copier_conf.answers_file }}.jinja"
    answers.write_text("{{ _copier_answers | to_nice_yaml -}}\n")
    (folder / "template/lines.txt").write_text("".join(f"{n}\n" for n in range(30)))
    (folder / "template/taken.txt").write_text("taken\n")
    (folder / "template/more.txt").write_text("more\n")
    git(folder, "init", "--quiet")
    tag(folder, "v1.0.0")
    replace(folder / "template/lines.txt", "\n15\n", "\n15 theirs\n")
    (folder / "template/taken.txt").unlink()
    refusing = """another, validator: "{{ 'No.' if name == 'renamed' }}\""""
    replace(folder / "copier.yml", "'{{ _folder_name }}'", refusing)
    tag(folder, "v2.0.0")
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(small: Path, tmp_path: Path) -> Make:
    """Make a project of the small template below `projects`, with lines of its own in files."""

    def make(name: str, **lines: tuple[str, str]) -> Path:
        project = tmp_path / "projects" / name
        copier.run_copy(str(small), project, vcs_ref="v1.0.0", defaults=True, quiet=True)
        for file, (old, new) in lines.items():
            replace(project / f"{file}.txt", old, new)
        if not (project.parent / ".git").exists():
            git(project, "init", "--quiet")
            commit(project)
        return project

    return make


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message=Mine")


def test_the_script_tells_which_projects_need_a_person(make: Make, tmp_path: Path) -> None:
    make("a-updated", lines=("\n25\n", "\n25 mine  \n"))
    make("c-both", lines=("\n15\n", "\n15 mine\n"))
    make("d-taken", taken=("taken", "mine"))
    (make("e-not-committed") / "new.txt").write_text("mine\n")
    replace(make("f-lost") / ".copier-answers.yml", "_commit: v1.0.0", "_commit: v1.5.0")
    commit(tmp_path / "projects/f-lost")
    hook = make("g-hook") / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    hook.chmod(0o755)
    (tmp_path / "projects/h-other").mkdir()
    shutil.copy(SCRIPT, tmp_path)

    table = run(block("python update_projects.py"), tmp_path, status=1)

    rows = [re.split(r" {2,}", line, maxsplit=3) for line in table.splitlines()]
    assert [row[:2] for row in rows] == [
        ["a-updated", "updated"],
        ["c-both", "clash"],
        ["d-taken", "clash"],
        ["e-not-committed", "refused"],
        ["f-lost", "refused"],
        ["g-hook", "clash"],
        ["h-other", "refused"],
    ]
    said = {row[0]: row[-1] for row in rows}
    assert said["a-updated"] == "template-2.0.0"
    assert said["c-both"] == "both changed: lines.txt"
    assert said["d-taken"] == "deleted with edits: taken.txt"
    assert "not committed" in said["e-not-committed"]
    assert "v1.5.0" in said["f-lost"]
    assert said["g-hook"] == "not committed: git: no"
    assert ".copier-answers.yml" in said["h-other"]
    branches = {
        name: git(tmp_path / "projects" / name, "branch", "--show-current").strip()
        for name in said
        if name != "h-other"
    }
    assert {name for name, branch in branches.items() if branch == "template-2.0.0"} == {
        *("a-updated", "c-both", "d-taken", "g-hook")
    }
    updated = tmp_path / "projects/a-updated"
    assert git(updated, "status", "--porcelain") == ""
    lines = (updated / "lines.txt").read_text()
    assert "15 theirs\n" in lines
    assert "25 mine  \n" in lines
    assert git(tmp_path / "projects/f-lost", "status", "--porcelain") == ""


def test_the_script_goes_on_with_what_is_left_and_branches_can_be_pushed(
    make: Make, tmp_path: Path
) -> None:
    project = make("penguins", lines=("\n15\n", "\n15 mine\n"))
    git(tmp_path, "init", "--quiet", "--bare", "origin")
    git(project, "remote", "add", "origin", str(tmp_path / "origin"))
    script = f"python {SCRIPT} --json --copier='{sys.executable} -m copier' projects/*"
    (outcome,) = json.loads(run(script, tmp_path, status=1))
    assert outcome["status"] == "clash"
    (outcome,) = json.loads(run(script, tmp_path, status=1))
    assert outcome["status"] == "refused"

    (project / "lines.txt").write_text("resolved\n")
    commit(project)

    assert json.loads(run(script, tmp_path)) == [
        {"project": "penguins", "status": "nothing new", "version": "2.0.0", "what": ""}
    ]
    run(block("git -C"), tmp_path)
    assert "template-2.0.0" in git(tmp_path / "origin", "branch")


def update_projects(folder: Path, status: int = 0) -> dict[str, tuple[str, str]]:
    """Run the script on all projects; gives the status of each, and what is said of it."""
    script = f"python {SCRIPT} --json --copier='{sys.executable} -m copier' projects/*"
    outcomes = json.loads(run(script, folder, status))
    return {outcome["project"]: (outcome["status"], outcome["what"]) for outcome in outcomes}


def test_the_script_refuses_an_update_that_changes_an_answer(make: Make, tmp_path: Path) -> None:
    project = make("renamed")
    branches = git(project, "branch")

    outcomes = update_projects(tmp_path, status=1)

    assert outcomes == {"renamed": ("refused", "answers would change: name")}
    assert git(project, "branch") == branches
    assert git(project, "status", "--porcelain") == ""
    assert "name: renamed" in (project / ".copier-answers.yml").read_text()


def test_the_script_updates_the_projects_of_a_repository_on_one_branch(
    make: Make, tmp_path: Path
) -> None:
    repository = tmp_path / "projects"
    repository.mkdir()
    git(repository, "init", "--quiet", "--initial-branch=main")
    for name in ("a", "b", "renamed", "x"):
        make(name)
    make("clashing", lines=("\n15\n", "\n15 mine\n"))
    commit(repository)
    updated = ("updated", "template-2.0.0")
    not_committed = ("refused", "there are changes that are not committed")

    assert update_projects(tmp_path, status=1) == {
        "a": updated,
        "b": updated,
        "clashing": ("clash", "both changed: lines.txt"),
        "renamed": not_committed,
        "x": not_committed,
    }
    (repository / "clashing/lines.txt").write_text("resolved\n")
    commit(repository)
    nothing = ("nothing new", "")
    assert update_projects(tmp_path, status=1) == {
        "a": nothing,
        "b": nothing,
        "clashing": nothing,
        "renamed": ("refused", "answers would change: name"),
        "x": updated,
    }
    assert git(repository, "branch", "--show-current").strip() == "template-2.0.0"
    assert len(git(repository, "log", "--format=%s", "main..").splitlines()) == 4
    assert git(repository, "status", "--porcelain") == ""


def test_the_script_leaves_a_project_alone_whose_branch_waits_for_review(
    make: Make, tmp_path: Path
) -> None:
    project = make("penguins")
    git(tmp_path, "clone", "--quiet", str(project), "clone")
    update_projects(tmp_path)
    git(project, "switch", "--quiet", "-")
    git(tmp_path / "clone", "fetch", "--quiet")
    (tmp_path / "clone").rename(tmp_path / "projects/clone")
    waiting = ("waiting", "template-2.0.0 is there already: merge it, then delete it")

    assert update_projects(tmp_path) == {"clone": waiting, "penguins": waiting}


def test_an_update_ends_with_the_statuses_that_the_guide_names(make: Make, small: Path) -> None:
    project = make("penguins", lines=("\n15\n", "\n15 mine\n"))

    run("copier update --quiet --defaults", project, status=0)
    assert "UU lines.txt" in git(project, "status", "--porcelain")
    run("copier update --quiet --defaults", project, status=1)
    run("git reset --hard && git clean -d --force", project)
    run("copier update --quiet --defaults --conflict=rej", project)
    assert "+15 mine" in (project / "lines.txt.rej").read_text()
    assert "15 theirs" in (project / "lines.txt").read_text()
    replace(project / ".copier-answers.yml", str(small), "/not/there")
    run("copier check-update --quiet", project, status=1)


@pytest.mark.thorough
def test_what_the_guide_says_that_copier_does_not_do(make: Make) -> None:
    """Remove the warnings from the guide when this fails."""
    ignoring = make("ignoring")
    git(ignoring, "rm", "--quiet", "--cached", "more.txt")
    (ignoring / ".gitignore").write_text("more.txt\n")
    append(ignoring / "more.txt", "mine")
    commit(ignoring)
    copier.run_update(ignoring, defaults=True, overwrite=True, quiet=True)
    assert not (ignoring / "more.txt").exists()

    strict = make("strict", lines=("\n25\n", "\n25 mine  \n"))
    git(strict, "config", "apply.whitespace", "error")
    copier.run_update(strict, defaults=True, overwrite=True, quiet=True)
    assert "mine" not in (strict / "lines.txt").read_text()
    git(strict, "reset", "--quiet", "--hard")
    run(f"python {SCRIPT} .", strict)
    assert "25 mine  \n" in (strict / "lines.txt").read_text()
