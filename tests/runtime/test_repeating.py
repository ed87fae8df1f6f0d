"""A run tells, in a real project and shell, where it comes from and how to repeat it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from ..support import forks
from ..support.projects import Project, for_kedro, has, needs_kedro
from .tracking.test_provenance import git

TWO_PIPELINES = """
from kedro.pipeline import Node, Pipeline

def make(x, parameters):
    return str(x)

def copy(text):
    return text

def create_pipeline():
    return Pipeline(
        [
            Node(make, ["params:x", "parameters"], "NAME_a", name="NAME_make", tags="early"),
            Node(copy, "NAME_a", "NAME_b", name="NAME_copy"),
            Node(copy, "NAME_b", "NAME_c", name="NAME_copy_again", tags=["late", "early"]),
        ],
        namespace="space",
        prefix_datasets_with_namespace=False,
        parameters={"params:x", "parameters"},
    )
"""
TEXTS = """
"{name}_a": {type: text.TextDataset, filepath: "data/02_intermediate/{name}_a.txt"}
"{name}_b": {type: text.TextDataset, filepath: "data/03_primary/{name}_b.txt", versioned: true}
"""


@pytest.fixture
def two(project: Project) -> Project:
    """A project with two pipelines, one of which has a versioned dataset."""
    for name in ("one", "two"):
        project.pipeline(TWO_PIPELINES.replace("NAME", name), name=name)
    project.catalog(TEXTS)
    project.parameters({"x": 1, "y": {"z": "it's"}})
    project.write("conf/prod/.gitkeep", "")
    return project


TAGS = {
    "pipelines": "pipeline_names" if has("kedro", "1.2") else "pipeline_name",
    "env": "env",
    "nodes": "node_names",
    "from-nodes": "from_nodes",
    "to-nodes": "to_nodes",
    "from-inputs": "from_inputs",
    "to-outputs": "to_outputs",
    "namespaces": "namespaces",
    "tags": "tags",
}

# What differs between a run and the one that repeats it.
OF_ONE_RUN = {"run_id", "session_id", "pid", "process_start", "process_start_ticks"}


def words_of(command: str) -> list[str]:
    """Let a shell split a command; gives the words after `kedro`."""
    printed = subprocess.run(
        f"printf '%s\\0' {command}", shell=True, capture_output=True, text=True, check=True
    )
    return printed.stdout.split("\0")[1:-1]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["--pipelines=two,one", "--env=prod", "--runner=ThreadRunner"], marks=needs_kedro("1.2")
        ),
        [
            "--pipelines=one",
            "--nodes=space.one_make,space.one_copy",
            """--params=x=2,y.z=it's "50%" $HOME,w=[1],v=null""",
        ],
        pytest.param(
            ["--from-nodes=space.one_copy", "--to-nodes=space.one_copy", "--async"],
            marks=pytest.mark.thorough,
        ),
        ["--from-inputs=params:x", "--to-outputs=one_b,two_b", "--namespaces=space"],
        pytest.param(
            ["--tags=late", "--only-missing-outputs", "--runner=ParallelRunner"],
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["--tags=early", "--runner-params=max_workers=2", "--runner=kedro.runner.ThreadRunner"],
            marks=[needs_kedro("1.6"), pytest.mark.thorough],
        ),
        [
            "--conf-source=conf",
            "--load-versions=one_b:VERSION",
            "--from-nodes=space.one_copy_again",
        ],
    ],
    ids=lambda words: words[0],
)
def test_the_command_in_the_tags_repeats_the_run(two: Project, words: list[str]) -> None:
    if any("copy" in word or "--tags" in word for word in words):
        two.run()  # makes what the others start from
    versions = sorted((two.path / "data/03_primary/one_b.txt").glob("*"))
    words = [word.replace("VERSION", versions[-1].name if versions else "") for word in words]
    first = two.kedro("run", *words)
    assert first.returncode == 0, first.stdout + first.stderr
    run = two.all_runs()[0]

    again = two.kedro(*words_of(run.data.tags["kedro_command"]))

    assert again.returncode == 0, run.data.tags["kedro_command"] + again.stdout + again.stderr
    repeated = two.all_runs()[0]
    assert repeated.info.run_id != run.info.run_id
    assert repeated.data.params == run.data.params
    tags = {k: v for k, v in run.data.tags.items() if k not in OF_ONE_RUN}
    runner = next((w for w in words if w.startswith("--runner=")), "SequentialRunner")
    assert tags["runner"] == re.split(r"[.=]", runner)[-1]
    assert ("only_missing_outputs" in tags) == ("--only-missing-outputs" in words)
    assert ("load_versions" in tags) == any("load-versions" in word for word in words)
    assert tags == {k: v for k, v in repeated.data.tags.items() if k not in OF_ONE_RUN}
    for word in words:  # each option is in a tag of its own as well
        option, _, value = word[2:].partition("=")
        if tag := TAGS.get(option):
            assert tags[tag] == value


@needs_kedro("1.2")
def test_only_what_runs_is_recorded_where_outputs_are_there_already(two: Project) -> None:
    code = TWO_PIPELINES.replace("NAME", "two").replace("params:x", "params:w")
    two.pipeline(code.replace('"parameters"', '"params:v"'), name="two")
    two.parameters({"x": 1, "w": 2, "v": 3})
    two.catalog(TEXTS + '"{name}_c": {type: text.TextDataset, filepath: "data/{name}_c.txt"}\n')

    two.run(pipeline_names=["two"])
    two.run(pipeline_names=["one", "two"], only_missing_outputs=True)
    two.run(pipeline_names=["one", "two"], only_missing_outputs=True)

    third, second, first = two.all_runs()
    assert {run.info.status for run in (first, second, third)} == {"FINISHED"}
    assert [sorted(run.data.params) for run in (first, second, third)] == [
        ["v", "w"],
        ["parameters", "x"],
        [],
    ]


def test_secrets_are_nowhere_in_the_store(two: Project) -> None:
    two.write("conf/local/credentials.yml", "store: {user: ada1815, password: by-value-0}")
    two.parameters({"x": "by-value-0", "y": {"password": "by-name-0", "user": "ada1815"}})
    two.pipeline(
        TWO_PIPELINES.replace("NAME", "one").replace(
            "return text", "raise ValueError(f'no way in with by-value-0')"
        ),
        name="one",
    )

    two.kedro("run", "--pipelines=one", "--params=api_token=by-name-1,url=http://u:by-value-0@host")

    run = two.only_run()
    assert run.info.status == "FAILED"
    assert run.data.params["x"] == "***"
    assert run.data.tags["kedro_error"] == "ValueError: no way in with ***"
    assert 'api_token="***"' in run.data.tags["kedro_command"]
    assert "url=http://***@host" in run.data.tags["kedro_command"]
    for file in [two.path / "mlflow.db", *(two.path / "mlartifacts").rglob("traceback.txt")]:
        content = file.read_bytes()
        assert b"by-value-0" not in content
        assert b"by-name-" not in content


def test_values_above_the_limits_fail_no_run(two: Project) -> None:
    two.mlflow_yml("tracking: {params: {long_params_strategy: tag}}")
    two.parameters({"x": "long" * 2500, "y": {f"k{i}": i for i in range(2000)}})

    two.run(params={"note": "ünï" * 5000})

    run = two.only_run()
    assert run.info.status == "FINISHED"
    assert run.data.params == {}
    cut = {key for key, value in run.data.tags.items() if value.endswith("…")}
    assert cut == {"x", "parameters", "runtime_params", "kedro_command"}
    assert run.data.tags["x"].startswith("longlong")


def test_values_of_every_kind_are_parameters(two: Project) -> None:
    values = {
        "none": None,
        "nan": float("nan"),
        "list": [1, "two", None],
        "empty": {},
        1: {2: "integer keys"},
        "a$": "dollar",
        "a%": "percent",
        "größe": "ß😀",
        "k" * 300: "long name",
        "/top//": "slashes",
    }
    two.parameters({"x": values, "y": None})
    two.mlflow_yml("tracking: {params: {dict_params: {flatten: true, sep: /}}}")

    two.run(node_names=["space.one_make"])

    params = two.only_run().data.params
    long = next(name for name in params if name.startswith("x/kkk"))
    assert len(long) == 250
    assert {k: v for k, v in params.items() if k.startswith("x")} == {
        "x/none": "None",
        "x/nan": "nan",
        "x/list": "[1, 'two', None]",
        "x/empty": "{}",
        "x/1/2": "integer keys",
        "x/a_": "dollar",
        "x/a__2": "percent",
        "x/größe": "ß😀",
        long: "long name",
        "x__top__": "slashes",
    }


class Colour(Enum):
    RED = "red"


def test_parameters_of_a_script_may_have_any_type(two: Project) -> None:
    given = {"x": Path("data"), "y": {"bytes": b"egg", "enum": Colour.RED, Colour.RED: [Path("a")]}}

    two.run(params=given, node_names=["space.one_make"])

    run = two.only_run()
    assert run.info.status == "FINISHED"
    assert run.data.params["x"] == "data"
    assert json.loads(run.data.tags["runtime_params"]) == {
        "x": "data",
        "y": {"bytes": "b'egg'", "enum": "Colour.RED", "Colour.RED": ["a"]},
    }
    assert "--params=x=data," in run.data.tags["kedro_command"]


def test_a_user_whose_name_is_no_text_has_runs(
    two: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", os.fsdecode(b"caf\xe9"))

    two.run(node_names=["space.one_make"])

    assert two.only_run().data.tags["mlflow.user"] == "caf?"


def test_git_is_asked_at_most_twice_and_only_about_the_project(
    two: Project, tmp_path: Path
) -> None:
    real = shutil.which("git")
    calls = tmp_path / "calls"
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$PWD" "$@" >> {calls}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    git(two.path, "init", "--initial-branch=work")
    git(two.path, "add", ".")
    git(two.path, "commit", "--message=first")
    path = os.pathsep.join([str(fake.parent), os.environ["PATH"]])

    two.mlflow_yml("tracking: {disable_tracking: {pipelines: [__default__]}}", env="prod")
    assert two.kedro("run", "--env=prod", PATH=path).returncode == 0
    untracked = calls.read_text().splitlines()  # Kedro's own
    assert two.kedro("run", PATH=path).returncode == 0
    asked = calls.read_text().splitlines()[2 * len(untracked) :]

    assert len(asked) <= 2
    assert all(call.startswith(f"{two.path} ") for call in asked)
    tags = two.only_run().data.tags
    assert tags["mlflow.source.git.commit"] == git(two.path, "rev-parse", "HEAD")
    assert tags["mlflow.source.git.branch"] == "work"
    assert tags["mlflow.source.git.dirty"] == "true"  # the runs' own outputs


def test_the_command_in_the_tags_repeats_the_run_of_a_package(two: Project) -> None:
    words = ["--nodes=space.one_make", "--params=x=2", "--async"]
    env = {**os.environ, "PYTHONPATH": str(two.path / "src")}
    subprocess.run([sys.executable, "-m", two.package, *words], cwd=two.path, env=env, check=True)
    tags = two.only_run().data.tags

    python, *again = shlex.split(tags["kedro_command"])
    subprocess.run([sys.executable, *again], cwd=two.path, env=env, check=True)

    assert [python, *again[:2]] == ["python", "-m", two.package]
    assert "async" in again[-1]
    repeated = two.all_runs()[0].data.tags
    assert repeated["run_id"] != tags["run_id"]
    assert {k: v for k, v in tags.items() if k not in OF_ONE_RUN} == {
        k: v for k, v in repeated.items() if k not in OF_ONE_RUN
    }


def test_a_packaged_project_takes_nothing_from_the_repository_it_is_run_in(
    two: Project, tmp_path: Path
) -> None:
    git(tmp_path, "init")
    code = f"""
from pathlib import Path
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
configure_project({two.package!r})
with KedroSession.create(conf_source={str(two.path / "conf")!r}) as session:
    session.{for_kedro('run(pipeline_names=["one"])')}
"""
    (tmp_path / "data").symlink_to(two.path / "data")

    env = {"PYTHONPATH": str(two.path / "src"), "MLFLOW_TRACKING_URI": two.tracking_uri}
    ended = forks.run("-c", [code], tmp_path, os.environ | env)

    assert ended.returncode == 0, ended.stderr
    tags = two.only_run().data.tags
    assert not [key for key in tags if key.startswith("mlflow.source.git")]
    assert tags["mlflow.source.name"] == two.package


def test_what_a_node_logged_reaches_the_server_while_the_next_one_works(project: Project) -> None:
    project.pipeline(
        f"""
        import time
        from kedro.pipeline import Node, Pipeline
        from mlflow import MlflowClient

        def first():
            return 0.5, "go on"

        def second(go_on):
            client = MlflowClient({project.tracking_uri!r})
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
                if run.data.metrics:
                    return run.info.status
            raise TimeoutError("no metric has reached the server")

        def create_pipeline():
            return Pipeline([Node(first, None, ["m", "x"]), Node(second, "x", "status")])
        """
    )
    project.catalog("m: {type: PACKAGE.runtime.MlflowMetricDataset}")

    assert project.run()["status"].load() == "RUNNING"
