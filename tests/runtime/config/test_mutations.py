"""However `mlflow.yml` is broken: a run is tracked as usual, or mistakes are told, no more.

The file is the default one, with up to three random changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click import ClickException
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlflow.entities import Run, ViewType

from runtime.config.keys import commented_yaml

from ...support.projects import ONE_NODE, Project
from .test_keys import clean_mlflow, one_project

DEFAULT = commented_yaml({"tracking.experiment.name": "penguins"})

# No address of a server and no other store among them: a run goes to the project's store or
# nowhere.
VALUES = [
    "null",
    "~",
    "",
    "true",
    "no",
    "0",
    "-1",
    "7",
    "1.5",
    ".nan",
    "-.inf",
    "1e400",
    "9999999999999999999999",
    "0x1F",
    "2024-02-30",
    "2024-01-01",
    "text",
    "'two words'",
    '""',
    "' '",
    "'fail'",
    "tag",
    "é中😀",
    '"\\u202e\\u0000"',
    '"a\\nb"',
    "x" * 600,
    "[]",
    "[a, b]",
    "[1, null, [2]]",
    "[work, {a: b}]",
    "{}",
    "{a: b}",
    "{1: 2}",
    "{null: null}",
    "{a: {b: [c]}}",
    "{'a/b:c*': d}",
    "&anchor value",
    "*nowhere",
    "!tag value",
    "!!python/object:os.system x",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "|",
    ">-",
    "'unfinished",
    "{unfinished",
    "[a, b",
    "@at",
    "`tick",
    "a: b",
    "- a",
    "file:///nowhere",
    "nowhere.Provider",
    "C:\\nowhere",
    "ftp://127.0.0.1/runs",
    "${runtime_params:nothing}",
    "${runtime_params:nothing, null}",
    "${runtime_params:nothing, 7}",
    "'${runtime_params:nothing, [a, {b: c}]}'",
    "'${runtime_params:nothing, ${runtime_params:something, text}}'",
    "${runtime_params:given}",
    "${oc.env:KM_TEST_VALUE}",
    "${oc.env:KM_TEST_NOTHING}",
    "${oc.env:KM_TEST_NOTHING, text}",
    "${km.random_name:}",
    "${km.random_name:1}",
    "${km.nothing:}",
    "${globals:nothing}",
    "${globals:nothing, 1}",
    "${nothing}",
    "${nothing.at.all}",
    "${server}",
    "${tracking.run}",
    "${tracking.run.name}",
    "${tracking.redact}",
    "${tracking.redact[0]}",
    "${ui.port}",
    "${.name}",
    "${..}",
    "${",
    "${}",
    "$${text}",
    "'${a'",
    "'${oc.env:}'",
    "'text ${tracking.experiment.name}'",
    "???",
]
NAMES = ["nmae", "name", "server", "tags", "7", "null", "true", "é", "'a b'", "''", "[a]", "${x}"]
NAMES += ["<<", "? complex", "- item", "_private", "type", "a.b", "!!int x"]
ODD = ["\t", "\r", "\0", "\x1b", "\ufeff", "\u2028", "\u202e", "\u00a0", "😀", "\ud7ff", "{", "}"]
ODD += ["[", ":", "-", "'", '"', "#", "&", "*", "!", "|", "%", "@", "`", "\n---\n", "\n...\n", "\\"]

# Values most often: they reach furthest.
KINDS = ["value"] * 5 + ["name", "delete", "double"] * 2 + ["indent", "odd", "cut"]

_ENTRY = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>.*)")


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = DEFAULT
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(KINDS))
        lines = text.splitlines()
        entries = [number for number, line in enumerate(lines) if _ENTRY.fullmatch(line)]
        if kind in ("odd", "cut") or not entries:
            at = draw(st.integers(0, len(text)))
            text = text[:at] + (draw(st.sampled_from(ODD)) + text[at:] if kind == "odd" else "")
            continue
        at = draw(st.sampled_from(entries))
        found = _ENTRY.fullmatch(lines[at])
        assert found
        if kind == "value":
            lines[at] = f"{found['indent']}{found['name']}: {draw(st.sampled_from(VALUES))}"
        elif kind == "name":
            lines[at] = f"{found['indent']}{draw(st.sampled_from(NAMES))}:{found['value']}"
        elif kind == "delete":
            del lines[at]
        elif kind == "double":
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
        else:
            indent = draw(st.sampled_from(["", " ", "   ", "\t", "  " * 6]))
            lines[at] = indent + lines[at].lstrip()
        text = "\n".join(lines) + "\n"
    return text


@pytest.fixture(scope="module")
def lab(
    tmp_path_factory: pytest.TempPathFactory, generate: Callable[..., Path], empty_store: Path
) -> Iterator[Project]:
    with (
        one_project(tmp_path_factory.mktemp("mutations"), generate, empty_store) as project,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("KM_TEST_VALUE", "from the environment")
        patch.delenv("KM_TEST_NOTHING", raising=False)
        project.pipeline(ONE_NODE)
        project.parameters({"x": 1})
        yield project


def stored(project: Project) -> tuple[set[str], dict[str, Run]]:
    client = project.client
    experiments = {e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)}
    runs = client.search_runs(list(experiments), run_view_type=ViewType.ALL)
    return experiments, {run.info.run_id: run for run in runs}


# Without shrinking: an example is short as it is, and a failure ends as soon as a success.
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
MANY = settings(FEW, max_examples=30)


@FEW
@given(text=mutated(), env=st.sampled_from(["base", "local"]))
def test_a_broken_mlflow_yml_is_told_or_the_run_is_tracked(
    lab: Project, text: str, env: str
) -> None:
    check(lab, text, env)


@pytest.mark.thorough
@MANY
@given(text=mutated(), env=st.sampled_from(["base", "local"]))
def test_any_broken_mlflow_yml_is_told_or_the_run_is_tracked(
    lab: Project, text: str, env: str
) -> None:
    check(lab, text, env)


def check(project: Project, text: str, env: str) -> None:
    for folder in ("base", "local"):
        # Not by `Project.mlflow_yml`, which would mend the indentation and the ends of lines.
        file = project.path / "conf" / folder / "mlflow.yml"
        file.write_bytes((text if folder == env else DEFAULT).encode())
    experiments, runs = stored(project)

    told: ClickException | None = None
    with clean_mlflow():
        try:
            project.run(pipeline_names=["work"], params={"given": "a given text"})
        except ClickException as error:
            told = error
    experiments_after, runs_after = stored(project)
    new = [run for run_id, run in runs_after.items() if run_id not in runs]

    if told is None:
        assert [run.info.status for run in new] == ["FINISHED"]
        assert len(experiments_after - experiments) <= 1
    else:
        assert type(told).__name__ == "ConfigError"
        assert new == []
        assert experiments_after == experiments
        lines = told.message.splitlines()
        assert lines
        for line in lines:
            assert re.match(
                r"(conf/(base|local)/mlflow\.yml(:\d+)?|[a-z_]+(\.[a-z_]+)*): .*\S", line
            )


# Each of these once ended a run with a traceback; random changes meet them too seldom.
@pytest.mark.parametrize(
    "text",
    [
        "7: {}",
        "true: {}",
        "null: {}",
        "[a]: {}",
        "!!int x: {}",
        "ui: {port: !!int x}",
        "ui: {host: !tag text}",
        "ui: {port: 1}\nui: {}",
        "tracking: {redact: {a: b}}",
        f"tracking: {{experiment: {{name: {'x' * 600}}}}}",
        "tracking: {run: {id: two words}}",
        "tracking: {run: {id: -.inf}}",
    ],
)
def test_what_yaml_or_mlflow_refuses_is_told(lab: Project, text: str) -> None:
    runs = stored(lab)[1]

    check(lab, text, "local")

    assert stored(lab)[1].keys() == runs.keys()
