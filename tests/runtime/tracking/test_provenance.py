"""Tags say where a run comes from, and the command in them repeats it."""

from __future__ import annotations

import os
import shlex
import subprocess
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kedro.framework.cli.project import run as kedro_run
from kedro.runner import ParallelRunner, SequentialRunner

from runtime.tracking import provenance

from ...support.projects import has, needs_kedro


@pytest.mark.parametrize(
    ("run_params", "command"),
    [
        ({}, "kedro run"),
        ({"pipeline_name": None}, "kedro run"),
        ({"pipeline_name": "a"}, "kedro run --pipeline=a"),
        pytest.param(
            {"pipeline_names": ["a", "b"]}, "kedro run --pipelines=a,b", marks=needs_kedro("1.2")
        ),
        ({"pipeline_names": ["__default__"]}, "kedro run"),
        ({"env": "prod", "tags": ("x", "y")}, "kedro run --env=prod --tags=x,y"),
        ({"node_names": ("n 1",)}, "kedro run '--nodes=n 1'"),
        ({"load_versions": {"d": "v:1"}}, "kedro run --load-versions=d:v:1"),
        (
            {"runtime_params": {"a": {"b": 1, "c": "it's"}, "d": None}},
            """kedro run '--params=a.b=1,a.c=it'"'"'s,d=null'""",
        ),
        ({"only_missing_outputs": True}, "kedro run --only-missing-outputs"),
        ({"runner": "my.runners.Runner"}, "kedro run --runner=my.runners.Runner"),
    ],
)
def test_the_command_repeats_the_run(run_params: dict[str, Any], command: str) -> None:
    assert provenance.kedro_command(run_params) == command
    # Kedro's own parser takes it.
    kedro_run.make_context("run", shlex.split(command)[2:])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex("[a-z]{1,3}", fullmatch=True), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.from_regex("[a-z_]{1,5}", fullmatch=True), values, max_size=4))
@example({"a": "1", "b": "x, y", "c": [1, "two", None], "d": {}, "e": "it's 50%", "f": ""})
@example({"a": " blank ", "b": "null", "c": "[", "d": "2026-11-21", "e": "a=b", "f": "ü\n,"})
def test_the_command_gives_the_same_parameters_whatever_they_are(given: dict[str, Any]) -> None:
    # Neither a lone surrogate nor a NUL can be on a command line, nor OmegaConf's references.
    assume(not any(c in repr(given) for c in ("\\ud", "\\x00", "$")))
    command = provenance.kedro_command({"runtime_params": given})

    context = kedro_run.make_context("run", shlex.split(command)[2:])

    assert (context.params["params"] or {}) == given


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "repeated"),
    [
        (Path("data/01_raw"), str(Path("data/01_raw"))),
        (b"egg", "b'egg'"),
        (Colour.RED, "Colour.RED"),
        (date(2026, 11, 28), "2026-11-28"),
        ((1, 2), [1, 2]),
        ({Colour.RED: [Path("a")]}, {"Colour.RED": ["a"]}),
    ],
    ids=str,
)
def test_a_parameter_of_any_type_is_in_the_command(value: Any, repeated: Any) -> None:
    command = provenance.kedro_command({"runtime_params": {"x": value}})

    context = kedro_run.make_context("run", shlex.split(command)[2:])
    assert context.params["params"] == {"x": repeated}


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param(["--runner-params=is_async=True,max_workers=2"], marks=needs_kedro("1.6")),
        ["--async"],
        ["--conf-source=conf/other"],
        ["--conf-source=s3://bucket/conf.tar.gz"],
        [],
    ],
)
def test_options_that_kedro_does_not_pass_on_are_in_the_command(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf/other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    first = kedro_run.make_context("run", list(typed)).params

    options = provenance.command_options(first, tmp_path)

    second = kedro_run.make_context("run", options).params
    if "--async" in typed and has("kedro", "1.6"):  # deprecated in favour of a runner parameter
        first = {**first, "is_async": False, "runner_params": {"is_async": True}}
    assert second == first


def test_a_runner_is_named_as_the_command_line_takes_it() -> None:
    for runner in (SequentialRunner(), ParallelRunner()):
        assert provenance.runner_name({"runner": str(runner)}) == type(runner).__name__
    assert provenance.runner_name({"runner": "None"}) == "SequentialRunner"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_git_tags_name_commit_branch_and_whether_anything_is_uncommitted(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch=work")
    assert provenance.git_tags(tmp_path) == {
        "mlflow.source.git.dirty": "false",
        "mlflow.source.git.branch": "work",
    }

    git(tmp_path, "commit", "--allow-empty", "--message=first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "new").touch()
    assert provenance.git_tags(tmp_path) == {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": "work",
        "mlflow.source.git.dirty": "true",
    }

    git(tmp_path, "checkout", "--detach")
    assert "mlflow.source.git.branch" not in provenance.git_tags(tmp_path)


def test_git_tags_are_set_whatever_the_encoding_of_names(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch=work")
    git(tmp_path, "config", "core.quotepath", "false")
    (tmp_path / ".git/HEAD").write_bytes(b"ref: refs/heads/caf\xe9\n")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).touch()

    assert provenance.git_tags(tmp_path) == {
        "mlflow.source.git.dirty": "true",
        "mlflow.source.git.branch": "caf\N{REPLACEMENT CHARACTER}",
    }


def test_without_git_there_are_no_git_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_tags(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert provenance.git_tags(tmp_path) == {}
