"""Projects run with every Python, and with the oldest and the newest of what they need."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import EXTRAS, REPOSITORY, Generate
from ..support import compatibility
from ..support.compatibility import MATRIX, OLDEST, PACKAGES, PAGE, Versions
from ..support.servers import free_port, running
from .conftest import Shell, commit_all, environment, git

READER = REPOSITORY / "tests" / "support" / "stored.py"

Run = Callable[..., str]


@pytest.fixture
def with_versions(
    shell: Shell, record_property: Callable[[str, object], None]
) -> Callable[[Versions, Path], Run]:
    """Install a project with given versions; gives what runs a command in it, as its user would."""

    def install(case: Versions, project: Path) -> Run:
        record_property("python", case.python)
        record_property("resolution", case.resolution)
        _find(case.python)

        def run(command: str, **how: Any) -> str:
            return shell(f"uv run {command}", project, **case.env, **how)

        shell("uv sync --quiet", project, **case.env)
        assert run("python --version").startswith(f"Python {case.python}.")
        return run

    return install


def _find(python: str) -> None:
    """Skip the test where uv neither finds a Python nor can fetch it."""
    words = ["uv", "python", "find", compatibility.interpreter(python)]
    if subprocess.run(words, env=environment(), capture_output=True, check=False).returncode:
        fetched = subprocess.run(
            ["uv", "python", "install", python], env=environment(), capture_output=True, check=False
        )
        if fetched.returncode:
            pytest.skip(f"not run: no Python {python}")


def pipelines(run: Run) -> str:
    """Name the option of `kedro run` that chooses pipelines."""
    return "--pipelines" if "--pipelines" in run("kedro run --help") else "--pipeline"


def stored(run: Run, uri: str, *models: str) -> Any:
    """Read a store with the project's own MLflow."""
    return json.loads(run(f"python {READER} {uri} {' '.join(models)}").splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if case == OLDEST else pytest.mark.thorough)
        for case in MATRIX
    ],
)
def test_the_example_works_with(
    case: Versions,
    generate: Generate,
    with_versions: Callable[[Versions, Path], Run],
    shell: Shell,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    everything = pytestconfig.getoption("--all")
    runners = ["ParallelRunner", *(["ThreadRunner", "SequentialRunner"] if everything else [])]
    project = generate(tmp_path / "penguins", project_name="penguins", extras=EXTRAS)
    run = with_versions(case, project)
    for package in json.loads(shell("uv pip list --quiet --format=json --python=.venv", project)):
        if package["name"] in PACKAGES:
            record_property(package["name"], package["version"])

    for runner in runners:
        run(f"kedro run --runner={runner}")
    option = pipelines(run)
    run(f"kedro run {option}=inference")
    run(f"kedro run {option}=service")
    found = stored(run, f"sqlite:///{project}/mlflow.db", "penguins-classifier", "penguins-service")

    main = [tracked for tracked in found["runs"] if not tracked["parent"]]
    assert [(tracked["name"], tracked["runner"], tracked["status"]) for tracked in main] == [
        ("service", "SequentialRunner", "FINISHED"),
        ("inference", "SequentialRunner", "FINISHED"),
        *(("__default__", runner, "FINISHED") for runner in reversed(runners)),
    ]
    for tracked in main:
        if tracked["name"] == "inference":
            assert tracked["files"] == ["predictions.csv"]
            continue
        assert tracked["params"]["split.test_size"] == "0.25"
        assert tracked["metrics"]["accuracy"] > 0.9
        assert tracked["steps"] == 5
        assert "figures/confusion_matrix.png" in tracked["files"]
    trained = len(runners) + 1
    tuning = [tracked["status"] for tracked in found["runs"] if tracked["parent"]]
    assert tuning == ["FINISHED"] * 4 * trained
    assert found["versions"] == {"penguins-classifier": trained, "penguins-service": 1}
    assert set(found["predicted"].values()) == {"Adelie"}

    checks = run("kedro mlflow doctor")
    assert "✗" not in checks
    assert "written, read and deleted" in checks
    listed = json.loads(run("kedro mlflow runs --json").splitlines()[-1])
    assert [entry["name"] for entry in listed] == [tracked["name"] for tracked in main]
    if everything:
        assert " passed" in run("pytest")


@pytest.mark.thorough
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_a_run_without_its_server_is_sent_later_with(
    case: Versions,
    generate: Generate,
    with_versions: Callable[[Versions, Path], Run],
    tmp_path: Path,
) -> None:
    project = generate(
        tmp_path / "greeting",
        project_name="greeting",
        example=False,
        scale_out="dask",
        extras=EXTRAS,
    )
    run = with_versions(case, project)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    (project / "conf/local/mlflow.yml").write_text(
        f"server:\n  mlflow_tracking_uri: {uri}\ntracking:\n  on_unreachable: offline\n"
    )

    run("kedro run")
    run("kedro run --runner=greeting.runner.DaskRunner")
    assert "connection refused" in run("kedro mlflow runs", status=1)
    waiting = run("kedro mlflow sync --dry-run")
    assert len(re.findall("__default__", waiting)) == 2

    server = f"uv run mlflow server --host=127.0.0.1 --port={port} --workers=1"
    server += " --backend-store-uri=sqlite:///served.db --artifacts-destination=served"
    with running(server.split(), project, env={**environment(), **case.env}, end=signal.SIGINT):
        assert f"To {uri}" in run("kedro mlflow sync")
        assert "Nothing waits" in run("kedro mlflow sync --dry-run")
        assert "✗" not in run("kedro mlflow doctor")
        run("kedro run --runner=ThreadRunner")
        found = stored(run, uri)
    assert [(tracked["runner"], tracked["status"]) for tracked in found["runs"]] == [
        ("ThreadRunner", "FINISHED"),
        ("greeting.runner.DaskRunner", "FINISHED"),
        ("SequentialRunner", "FINISHED"),
    ]
    for tracked in found["runs"]:
        assert tracked["files"] == ["message.txt"]
        assert tracked["params"] == {"greeting": "hello"}
    assert " passed" in run("pytest")


def oldest_copier(repository: Path) -> str:
    questions = (repository / "copier.yml").read_text("utf-8")
    (version,) = re.findall(r'^_min_copier_version: "(.*)"', questions, re.M)
    return str(version)


def test_the_oldest_copier_generates_and_updates(clone: Path, tmp_path: Path, shell: Shell) -> None:
    (oldest,) = re.findall(
        r'^_min_copier_version: "(.*)"', (clone / "copier.yml").read_text(), re.M
    )
    copier = (
        f"uvx --from copier=={oldest} --python {compatibility.interpreter(OLDEST.python)} copier"
    )
    project = tmp_path / "my_project"
    extras = "'--data=extras=[offline, serving, console]'"
    shell(f"{copier} copy --defaults {extras} {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    commit_all(project, "Start")
    with (clone / "template/src/{{ package_name }}/settings.py.jinja").open("a") as settings:
        settings.write("# new\n")
    commit_all(clone, "Second version")
    git(clone, "tag", "v0.2.0")

    shell(f"{copier} update --defaults", project)

    changed = git(project, "diff", "--name-only").split()
    assert changed == [".copier-answers.yml", "src/my_project/settings.py"]


def floors(file: str) -> dict[str, str]:
    """Give the lowest version of each package that a pyproject.toml admits."""
    text = (REPOSITORY / file).read_text("utf-8")
    return dict(re.findall(r'"([\w-]+)(?:\[.*?\]|\{\{.*?\}\})?>=([\d.]+)', text))


def test_the_page_names_the_floors_of_the_template() -> None:
    told = dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", PAGE.read_text("utf-8"), re.M))
    template = floors("template/pyproject.toml.jinja")
    here = floors("pyproject.toml")
    project = (REPOSITORY / "template/pyproject.toml.jinja").read_text("utf-8")
    (python,) = re.findall(r'^requires-python = ">=(.*)"', project, re.M)
    tools = {"ipython", "jupyterlab", "mypy", "notebook", "pre-commit", "pytest", "ruff"}

    needed = {name: lowest for name, lowest in template.items() if name not in tools}
    assert told == {**needed, "copier": oldest_copier(REPOSITORY), "python": python}
    assert python == OLDEST.python
    # What is tested in this repository has the same.
    assert {name: here[name] for name in told.keys() & here.keys()}.items() <= told.items()


def test_rows_of_what_is_tested_anew_replace_the_old_ones(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase name="a"><properties><property name="python" value="3.10"/>
        <property name="resolution" value="highest"/><property name="kedro" value="1.7.0"/>
        </properties></testcase>
        <testcase name="b"><properties><property name="python" value="3.10"/>
        <property name="resolution" value="highest"/></properties><failure/></testcase>
        <testcase name="c"/>
        </testsuite></testsuites>"""
    )
    empty = f"Before.\n\n{compatibility.BEGIN}{compatibility.END}\nAfter.\n"
    (row,) = compatibility.tested(report)

    once = compatibility.with_rows(empty, [row])
    twice = compatibility.with_rows(once, [{**row, "python": "3.9"}, {**row, "result": "passed"}])

    assert (row["kedro"], row["result"]) == ("1.7.0", "**failed**")
    assert once.startswith("Before.\n")
    assert once.endswith("\nAfter.\n")
    assert [entry["result"] for entry in compatibility.written(once)] == ["**failed**"]
    assert [entry["result"] for entry in compatibility.written(twice)] == ["passed"]
