"""Updates bring what is new in the template and lose nothing that its owner has done."""

from __future__ import annotations

import difflib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version as distribution_version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import copier
import pytest
import yaml
from pre_commit_hooks.check_merge_conflict import main as check_merge_conflict

from ..conftest import EXTRAS, REPOSITORY
from ..support import forks
from ..support.versions import KEPT, LEFT, NOW, Versions, append, make_versions
from .conftest import files, git

Files = dict[str, bytes]
Answers = dict[str, Any]

ANSWERS_FILE = ".copier-answers.yml"
# What belongs to the project's owner from the start; docs/updating.md says the same in words.
OWNED = re.compile(
    r"README\.md|conf/logging\.yml|conf/[^/]+/(catalog|parameters)[^/]*\.yml"
    r"|(conf/local|data|notebooks|src/[^/]+/pipelines|tests/pipelines)/.+"
)
# What is there for one choice goes when it is switched off, with whatever was changed in it:
# Copier knows no other way. docs/updating.md shows how to see it.
WITH_A_CHOICE = {
    ".dockerignore",
    ".env.example",
    ".github/workflows/ci.yml",
    ".gitlab-ci.yml",
    "Dockerfile",
    "LICENSE",
    "compose.yml",
    "conf/docker/mlflow.yml",
    "src/penguin_study/runner.py",
}
# So does what a version takes out of the runtime, and the schema, which has moved there.
TEMPLATES_OWN = re.compile(r"src/penguin_study/runtime/.*|conf/base/mlflow\.schema\.json")


@pytest.fixture(scope="session")
def versions(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(template, tmp_path_factory.mktemp("versions") / "km-template")


def copy(versions: Versions, version: str, answers: Answers, folder: Path) -> Path:
    copier.run_copy(
        str(versions.repository),
        folder,
        data={"project_name": "Penguin Study"} | answers,
        vcs_ref=version,
        defaults=True,
        quiet=True,
    )
    return folder


def update(project: Path, version: str | None = None, **answers: Any) -> None:
    """What `copier update --defaults` does; without trust, as everywhere here."""
    copier.run_update(
        project, data=answers, vcs_ref=version, defaults=True, overwrite=True, quiet=True
    )


def commit(project: Path, message: str) -> None:
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--allow-empty", f"--message={message}")


def under_git(project: Path) -> Path:
    git(project, "init", "--quiet")
    commit(project, "Start")
    return project


def content(project: Path) -> Files:
    return {name: text for name, text in files(project).items() if not name.startswith(".git/")}


class Case(NamedTuple):
    """A project of one version and its update to another, with answers that change."""

    old: str
    new: str
    answers: Answers
    changes: Answers


def choose_case(chosen: random.Random, versions: Versions) -> Case:
    # Updates to v0.5.0 from before it failed, for want of an answer; v0.6.0 mended that.
    pairs = [pair for pair in combinations(versions.all, 2) if pair[1] != "v0.5.0"]
    old, new = chosen.choice(pairs)
    choices: dict[str, list[Any]] = {
        "licence": ["none", "MIT", "Apache-2.0"],
        "tracking_backend": ["sqlite", "server", "databricks"],
        "artifact_store": ["local", "s3", "azure"],
        "docker": [False, True],
        "ci": ["none", "github", "gitlab"],
        "scale_out": ["none", "dask"],
        "description": ["The first.", "The second."],
    }
    if "databricks" not in git(versions.repository, "show", f"{old}:copier.yml"):
        choices["tracking_backend"].remove("databricks")
    answers = {name: chosen.choice(of) for name, of in choices.items()}
    answers["example"] = chosen.choice([False, True])
    changes = {name: chosen.choice(of) for name, of in choices.items() if chosen.random() < 0.3}
    return Case(old, new, answers, changes)


def work_on(project: Path, theirs: Files, chosen: random.Random) -> list[bytes]:
    """Do what owners do: edit, delete, rename and add files; gives the lines that are new."""
    lines = [f"# Mine, line {number}.\n".encode() for number in range(200)]
    new_lines = iter(lines)
    for name, text in content(project).items():
        path = project / name
        role = chosen.choice(["edit"] * 5 + ["leave"] * 6 + ["delete", "rename", "make executable"])
        can_go = name in WITH_A_CHOICE or TEMPLATES_OWN.fullmatch(name)
        goes = can_go and name not in theirs
        if name == ANSWERS_FILE or goes or role == "leave":
            continue
        if role == "edit":
            path.write_bytes(edit(text, theirs.get(name, b""), chosen, new_lines))
        elif role == "delete":
            path.unlink()
        elif role == "rename":
            path.rename(path.with_name(f"my new näme of {path.name}"))
        else:
            path.chmod(0o755)
    added = [*sorted(theirs.keys() - content(project).keys())[:1], "src/mine.py", "my pläce/a b"]
    for name in added:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(next(new_lines))
    (project / "binary").write_bytes(chosen.randbytes(200))
    return lines[: lines.index(next(new_lines))]


def edit(text: bytes, theirs: bytes, chosen: random.Random, new_lines: Iterator[bytes]) -> bytes:
    """Replace, insert or delete some lines, where the template changes some or elsewhere."""
    lines = text.splitlines(keepends=True)
    changes = difflib.SequenceMatcher(None, lines, theirs.splitlines(keepends=True), False)
    near = [
        place
        for kind, start, end, _, _ in changes.get_opcodes()
        if kind != "equal"
        for place in range(max(0, start - 1), min(end + 2, len(lines) + 1))
    ]
    anywhere = range(len(lines) + 1)
    places = {chosen.choice(chosen.choice([near, anywhere]) or anywhere) for _ in range(3)}
    for place in sorted(places, reverse=True):
        put = [next(new_lines)] if chosen.random() < 0.8 else []
        lines[place : place + chosen.choice([0, 1])] = put
    return b"".join(lines)


class Merge(NamedTuple):
    """What a project has to be after an update, and the files in which two edits clash."""

    files: Files
    clashes: set[str]


def merge(base: Files, mine: Files, theirs: Files, folder: Path) -> Merge:
    """Say what must come of a project: `base` as generated, `mine` as edited, `theirs` as new.

    What belongs to the owner stays. Of the rest, what only one of the two has changed, added or
    deleted is as that one has it; what the owner has deleted stays deleted; and what both have
    changed is merged, line by line, with markers where they clash.
    """
    merged: Files = {}
    clashes = set()
    for name in base.keys() | mine.keys() | theirs.keys():
        old, own, new = base.get(name), mine.get(name), theirs.get(name)
        if OWNED.fullmatch(name) or (name in KEPT and new is None) or new == old:
            chosen = own
        elif own == old:
            chosen = new
        elif own is None:
            chosen = None
        else:
            assert new is not None, f"The edits of {name} would be lost."
            chosen, clash = merge_lines(own, old or b"", new, folder)
            if clash:
                clashes.add(name)
        if chosen is not None:
            merged[name] = chosen
    return Merge(merged, clashes)


def merge_lines(own: bytes, old: bytes, new: bytes, folder: Path) -> tuple[bytes, bool]:
    sides = {"before updating": own, "last update": old, "after updating": new}
    for label, text in sides.items():
        (folder / label).write_bytes(text)
    labels = [f"-L{label}" for label in sides]
    command = ["git", "merge-file", "--stdout", *labels, *sides]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True)
    assert 0 <= done.returncode < 128, done.stderr
    return done.stdout, done.returncode > 0


def with_what_is_left(versions: Versions, version: str, copied: Files) -> Files:
    """Add what an update brings beside a copy: the lines where a version took a file away."""
    sources = git(versions.repository, "ls-tree", "-r", "--name-only", version).splitlines()
    shipped = {source.replace("{{ package_name }}", "penguin_study") for source in sources}
    left = {name for name in LEFT.keys() - copied.keys() if f"template/{name}" in shipped}
    return copied | {name: LEFT[name] for name in left}


def unmerged(project: Path) -> set[str]:
    names = git(project, "diff", "-z", "--name-only", "--diff-filter=U").split("\0")
    return set(filter(None, names))


def executable(project: Path) -> set[str]:
    return {name for name in content(project) if (project / name).stat().st_mode & 0o111}


@pytest.mark.parametrize(
    "seed",
    [*range(2), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(2, 60))],
)
def test_an_update_merges_what_its_owner_did_with_what_is_new(
    versions: Versions, tmp_path: Path, seed: int
) -> None:
    chosen = random.Random(seed)
    case = choose_case(chosen, versions)
    project = under_git(copy(versions, case.old, case.answers, tmp_path / "project"))
    base = content(project)
    # What was generated without the question has all extras.
    answers = {"extras": list(EXTRAS)} | yaml.safe_load(base[ANSWERS_FILE]) | case.changes
    if "artifact_store" in case.changes:
        answers.pop("artifact_location", None)  # the default of the other store
    theirs = content(copy(versions, case.new, answers, tmp_path / "new"))
    lines = work_on(project, theirs, chosen)
    mine, my_executables = content(project), executable(project)
    commit(project, "Mine")

    update(project, case.new, **case.changes)

    expected = merge(
        without_excluded(versions, case.new, with_what_is_left(versions, case.old, base)),
        mine,
        with_what_is_left(versions, case.new, theirs),
        tmp_path,
    )
    found = content(project)
    assert found.keys() == expected.files.keys(), case
    assert {name for name in found if found[name] != expected.files[name]} == set(), case
    assert [line for line in lines if not any(line in text for text in found.values())] == []
    assert executable(project) == my_executables & found.keys()
    assert unmerged(project) == expected.clashes
    refused = {name for name in found if refuses(project / name)}
    assert refused == expected.clashes


def without_excluded(versions: Versions, new: str, base: Files) -> Files:
    """Return what was generated as Copier sees it in an update: without what is excluded now.

    So `conf/test` stays in a project of an earlier version that needs it no more. It clashes with
    a new one where the same update asks for a server.
    """
    answers = {"tracking_backend": "sqlite", "artifact_store": "local"}
    answers |= yaml.safe_load(base[ANSWERS_FILE])
    is_plain = (answers["tracking_backend"], answers["artifact_store"]) == ("sqlite", "local")
    if not is_plain or "/conf/test{%" not in git(versions.repository, "show", f"{new}:copier.yml"):
        return base
    return {name: text for name, text in base.items() if not name.startswith("conf/test/")}


def refuses(path: Path) -> bool:
    """Tell whether the hook that projects have refuses a file."""
    return bool(check_merge_conflict(["--assume-in-merge", str(path)]))


# -- a clash, other ways to be updated, and what runs afterwards ------------------------------


def test_edits_of_a_file_that_is_moved_clash_where_they_are_but_for_the_runtime(
    versions: Versions, tmp_path: Path
) -> None:
    project = under_git(copy(versions, NOW, {}, tmp_path / "penguins"))
    resolvers = "src/penguin_study/runtime/config/resolvers.py"
    for name in ("conf/README.md", "conf/prod/mlflow.yml", resolvers):
        append(project / name, "# Mine.")
    commit(project, "Mine")

    update(project)

    assert "# Mine." in (project / "conf/README.md").read_text("utf-8")
    assert "Is conf/FOLDERS.md now" in (project / "conf/README.md").read_text("utf-8")
    assert unmerged(project) == {"conf/README.md"}
    # The owner has this one now.
    assert "# Mine." in (project / "conf/prod/mlflow.yml").read_text("utf-8")
    # The runtime is the template's, and git has what was changed in it.
    assert git(project, "diff", "--name-only", "--diff-filter=D") == f"{resolvers}\n"
    assert "# Mine." in git(project, "show", f"HEAD:{resolvers}")


def test_projects_have_the_version_of_the_hook_that_is_tested() -> None:
    config = yaml.safe_load((REPOSITORY / "template/.pre-commit-config.yaml").read_text("utf-8"))
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}

    assert hooks["merge-conflicts"]["entry"] == "check-merge-conflict --assume-in-merge"
    assert hooks["merge-conflicts"]["additional_dependencies"] == [
        f"pre-commit-hooks=={distribution_version('pre-commit-hooks')}"
    ]


@pytest.mark.thorough
def test_a_project_in_a_folder_of_a_repository_is_updated_there(
    versions: Versions, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("Ours.\n")
    project = copy(versions, NOW, {}, tmp_path / "projects/penguins")
    base = content(project)
    answers = yaml.safe_load(base[ANSWERS_FILE])
    theirs = content(copy(versions, versions.artificial[-1], answers, tmp_path / "new"))
    shutil.copytree(tmp_path / "new", tmp_path / "projects/other")
    other = content(tmp_path / "projects/other")
    under_git(tmp_path)
    append(project / "README.md", "Mine.")
    append(project / "src/penguin_study/settings.py", "# Mine.")
    (project / "conf/prod/mlflow.yml").unlink()
    mine = content(project)
    commit(tmp_path, "Mine")

    update(project)

    theirs = with_what_is_left(versions, versions.artificial[-1], theirs)
    (tmp_path / "merged").mkdir()
    assert content(project) == merge(base, mine, theirs, tmp_path / "merged").files
    assert content(tmp_path / "projects/other") == other
    assert (tmp_path / "README.md").read_text() == "Ours.\n"


def test_a_recopy_gives_everything_anew_except_what_is_the_owners(
    versions: Versions, tmp_path: Path
) -> None:
    project = under_git(copy(versions, NOW, {"docker": True}, tmp_path / "penguins"))
    generated = content(project)
    for name in generated.keys() - {ANSWERS_FILE}:
        append(project / name, "# Mine.")
    for name in ("README.md", "Dockerfile"):
        (project / name).unlink()
    mine = generated | content(project)

    copier.run_recopy(project, vcs_ref=NOW, defaults=True, overwrite=True, quiet=True)

    assert content(project) == {
        name: mine[name] if OWNED.fullmatch(name) else generated[name] for name in generated
    }


def pairs() -> list[Any]:
    """Pairs of a version, by its place, and of answers; one of them by default."""
    answers: list[Answers] = [
        {"example": False},
        {"example": True},
        {"example": True, "tracking_backend": "server", "licence": "MIT"},
    ]
    return [
        pytest.param(place, which, marks=[] if place == 0 == number else pytest.mark.thorough)
        for place in range(5)
        for number, which in enumerate(answers)
    ]


@pytest.mark.parametrize(("place", "answers"), pairs())
def test_an_updated_project_passes_its_own_tests(
    versions: Versions, tmp_path: Path, place: int, answers: Answers
) -> None:
    """From every version to the newest of all; without history from this one only."""
    if place >= len(versions.all) - len(versions.artificial):
        pytest.skip("There are not so many versions.")
    project = under_git(copy(versions, versions.all[place], answers, tmp_path / "project"))

    update(project, docker=True, ci="github", scale_out="dask")

    assert unmerged(project) == set()
    answers = yaml.safe_load((project / ANSWERS_FILE).read_text("utf-8"))
    new = content(copy(versions, versions.artificial[-1], answers, tmp_path / "new"))
    found = content(project)
    assert {
        name for name in new if found.get(name) != new[name] and not OWNED.fullmatch(name)
    } == set()
    words = ["-q", "-p", "no:cacheprovider"]
    tested = forks.run("pytest", words, project, os.environ | {"PYTHONPATH": "src"})
    assert tested.returncode == 0, tested.stdout + tested.stderr
