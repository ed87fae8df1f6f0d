"""A project has the extras that its owner asked for; the others say how to get them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import copier
import pytest
import yaml

from ..conftest import EXTRAS, Generate
from ..support import forks
from ..support.versions import NOW, Versions, make_versions
from .conftest import changed_by_hooks, complaints, files, git, ruff

PACKAGE = "src/penguin_study"
RUNTIME = f"{PACKAGE}/runtime"
SERVICE = {f"{PACKAGE}/pipelines/service/{name}.py" for name in ("__init__", "pipeline")}
HOOKS = {"offline": "OfflineHook", "serving": "ServingHook"}
COMMANDS = {"console": ["doctor", "runs"], "offline": ["sync"], "serving": ["modelify"]}

CHOICES: list[tuple[str, ...]] = [(), *((extra,) for extra in EXTRAS), EXTRAS]


@pytest.fixture(scope="module", params=CHOICES, ids=lambda extras: "+".join(extras) or "none")
def extras(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.fixture(scope="module")
def project(
    extras: tuple[str, ...], generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("extras") / "project"
    return generate(folder, project_name="Penguin Study", extras=extras)


def folders(project: Path) -> set[str]:
    """Name the folders of the runtime that are those of extras."""
    return {path.name for path in (project / RUNTIME).iterdir()} & set(EXTRAS)


def hooks(project: Path) -> str:
    settings = (project / PACKAGE / "settings.py").read_text("utf-8")
    (found,) = re.findall(r"^HOOKS = .*$", settings, re.MULTILINE)
    return str(found)


def registered(extras: tuple[str, ...]) -> str:
    """Write the line of settings.py for some extras."""
    names = [
        "MlflowHook",
        *(HOOKS[extra] for extra in EXTRAS if extra in extras and extra in HOOKS),
    ]
    calls = ", ".join(f"{name}()" for name in names)
    return f"HOOKS = ({calls},)" if len(names) == 1 else f"HOOKS = ({calls})"


def in_project(project: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a project's folder, as if the project were installed."""
    env = os.environ | {"PYTHONPATH": "src", "COLUMNS": "300"}
    return forks.run(module, words, project, env)


def test_a_project_has_the_extras_that_it_asked_for_and_their_hooks(
    project: Path, extras: tuple[str, ...]
) -> None:
    assert folders(project) == set(extras)
    assert hooks(project) == registered(extras)
    assert SERVICE & files(project).keys() == (SERVICE if "serving" in extras else set())


@pytest.mark.parametrize(
    "extras",
    [(), EXTRAS, *(pytest.param((extra,), marks=pytest.mark.thorough) for extra in EXTRAS)],
    ids=lambda extras: "+".join(extras) or "none",
    indirect=True,
)
@pytest.mark.xdist_group("mypy")  # which has a cache in one process
def test_linters_and_types_find_nothing_to_change(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "mypy_cache"

    assert ruff(project, "check") == ""
    assert ruff(project, "format", "--diff") == ""
    assert changed_by_hooks(project) == []
    assert complaints(project, "mypy", f"--cache-dir={cache}") == ""


def test_a_command_of_an_extra_is_there_or_says_how_to_get_it(
    project: Path, extras: tuple[str, ...]
) -> None:
    listed = in_project(project, "kedro", "mlflow", "--help").stdout

    for extra, command in [(e, c) for e, commands in COMMANDS.items() for c in commands]:
        assert bool(re.search(rf"^  {command} ", listed, re.MULTILINE)) == (extra in extras)
    missing = next((extra for extra in COMMANDS if extra not in extras), None)
    if missing:
        command = COMMANDS[missing][-1]
        ended = in_project(project, "kedro", "mlflow", command, "--anything")
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-1] == (
            f"Error: `kedro mlflow {command}` comes with the extra `{missing}`: "
            f"`{how_to_add(missing, extras)}`"
        )


def how_to_add(missing: str, extras: tuple[str, ...]) -> str:
    wanted = ", ".join(sorted([*extras, missing]))
    return f"uvx copier update --vcs-ref :current: --defaults --data extras='[{wanted}]'"


@pytest.fixture(scope="module")
def bare(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without extras."""
    folder = tmp_path_factory.mktemp("extras") / "bare"
    return generate(folder, project_name="Penguin Study", example=False)


@pytest.mark.parametrize("name", ["pipeline_ml_factory", "KedroPipelineModel", "ServingHook"])
def test_importing_a_name_of_an_extra_says_how_to_get_it(bare: Path, name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"from penguin_study.runtime import {name}"],
        cwd=bare,
        env=os.environ | {"PYTHONPATH": "src"},
        check=False,
        capture_output=True,
        encoding="utf-8",
    )

    assert ended.stderr.splitlines()[-1].partition(": ")[2] == (
        f"`{name}` comes with the extra `serving`: `{how_to_add('serving', ())}`"
    )


def test_the_offline_pages_say_how_to_get_them(bare: Path) -> None:
    ended = in_project(bare, "kedro", "mlflow", "ui", "--offline")

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(
        f"comes with the extra `offline`: `{how_to_add('offline', ())}`"
    )


def test_a_run_that_would_be_kept_on_disk_says_how_to_get_that_before_it_starts(
    bare: Path,
) -> None:
    (bare / "conf/local/mlflow.yml").write_text("tracking: {on_unreachable: offline}\n")
    try:
        ended = in_project(bare, "kedro", "run")
    finally:
        (bare / "conf/local/mlflow.yml").unlink()

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "Error: conf/local/mlflow.yml:1: tracking.on_unreachable: offline comes with the extra "
        f"`offline`: `{how_to_add('offline', ())}`"
    )
    assert not (bare / "mlflow.db").exists()


def test_a_project_without_extras_runs_and_one_with_all_makes_its_model(
    generate: Generate, tmp_path: Path
) -> None:
    for number, (extras, pipeline) in enumerate([((), "__default__"), (EXTRAS, "service")]):
        project = generate(tmp_path / str(number), project_name="Penguin Study", extras=extras)

        ended = in_project(project, "kedro", "run", f"--pipelines={pipeline}")

        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ("is logged as the model" in " ".join(ended.stderr.split())) == bool(extras)


# -- switched on and off by an update ------------------------------------------------------------


@pytest.fixture(scope="module")
def versions(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(template, tmp_path_factory.mktemp("versions") / "km-template")


@pytest.fixture
def edited(versions: Versions, tmp_path: Path) -> Path:
    """A project without extras whose owner has a hook of their own."""
    project = tmp_path / "project"
    data = {"project_name": "Penguin Study"}
    copier.run_copy(
        str(versions.repository), project, data=data, vcs_ref=NOW, defaults=True, quiet=True
    )
    git(project, "init", "--quiet")
    with (project / PACKAGE / "settings.py").open("a", encoding="utf-8") as file:
        file.write("\n# Mine.\nSESSION_ARGS = 1\n")
    commit(project)
    return project


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--allow-empty", "--message=Mine")


def update(project: Path, version: str = ":current:", **answers: object) -> None:
    """What `copier update --defaults` does."""
    ref = copier.VcsRef.CURRENT if version == ":current:" else version
    copier.run_update(project, data=answers, vcs_ref=ref, defaults=True, overwrite=True, quiet=True)
    assert git(project, "diff", "--name-only", "--diff-filter=U") == ""
    commit(project)


@pytest.mark.parametrize(
    "steps",
    [
        [EXTRAS, ("serving",), ()],
        pytest.param(
            [("console",), ("console", "offline"), EXTRAS, ("serving",), ()],
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_extras_are_switched_on_and_off_again_by_updates(
    edited: Path, steps: list[tuple[str, ...]]
) -> None:
    before = files(edited)

    for extras in steps:
        update(edited, extras=list(extras))

        assert folders(edited) == set(extras)
        assert hooks(edited) == registered(extras)
        assert "SESSION_ARGS = 1" in (edited / PACKAGE / "settings.py").read_text("utf-8")

    after = files(edited)
    tracked = [name for name in before.keys() | after.keys() if not name.startswith(".git/")]
    assert {name for name in tracked if before.get(name) != after.get(name)} == set()


def test_a_project_of_an_earlier_version_keeps_all_extras_and_no_file_of_its_runtime(
    versions: Versions, tmp_path: Path
) -> None:
    if not versions.released:
        pytest.skip("This checkout has no history: its earlier versions can't be had.")
    earlier = [version for version in versions.released if version < "v1"]
    project, new = tmp_path / "project", tmp_path / "new"
    data = {"project_name": "Penguin Study"}
    where = str(versions.repository)
    copier.run_copy(where, project, data=data, vcs_ref=earlier[-1], defaults=True, quiet=True)
    git(project, "init", "--quiet")
    edits = {
        "settings.py": ("# Tracks every run", "# Mine.\n\n# Tracks every run"),
        "cli.py": ('    """Commands of this project."""', '    """My commands."""'),
    }
    for name, (old, mine) in edits.items():
        path = project / PACKAGE / name
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, mine), encoding="utf-8")
    commit(project)

    update(project, NOW)

    all_of_them = {**data, "extras": list(EXTRAS)}
    copier.run_copy(where, new, data=all_of_them, vcs_ref=NOW, defaults=True, quiet=True)
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text("utf-8"))
    assert answers["extras"] == list(EXTRAS)
    assert files(project / RUNTIME) == files(new / RUNTIME)
    assert hooks(project) == registered(EXTRAS)
    for name, (_, mine) in edits.items():
        assert mine in (project / PACKAGE / name).read_text("utf-8")
    ended = in_project(project, "pytest", "-q", "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout + ended.stderr
