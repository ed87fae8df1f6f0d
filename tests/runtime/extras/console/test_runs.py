"""`kedro mlflow runs`: the latest runs, one whole, what differs between two."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from ....support import forks
from ....support.commands import Command, mlflow_command
from ....support.projects import ONE_NODE, Project, has
from ....support.servers import CountingProxy, counting_proxy, free_port
from ...tracking.test_endings import FAILING

__all__ = ["mlflow_command"]

_seconds = count()


def log(
    project: Project,
    name: str = "train",
    *,
    metrics: dict[str, float] | None = None,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    status: str = "FINISHED",
    ago: float | None = None,
    lasted: float = 5,
) -> str:
    """Make a run in the project's experiment; without `ago` it is newer than those before it."""
    client = project.client
    experiment = client.get_experiment_by_name(project.package)
    experiment_id = (
        experiment.experiment_id if experiment else client.create_experiment(project.package)
    )
    start = int(time.time() * 1000 - (ago or 3000 - next(_seconds)) * 1000)
    run_id = client.create_run(experiment_id, start, run_name=name).info.run_id
    client.log_batch(
        run_id,
        [Metric(key, value, start, 0) for key, value in (metrics or {}).items()],
        [Param(key, value) for key, value in (params or {}).items()],
        [RunTag(key, value) for key, value in (tags or {}).items()],
    )
    if status != "RUNNING":
        client.set_terminated(run_id, status, int(start + lasted * 1000))
    return str(run_id)


def test_control_characters_of_a_store_do_not_reach_the_terminal(
    project: Project, mlflow_command: Command
) -> None:
    clear, clipboard = "\x1b[2J", "\x1b]52;c;cm0gLXJm\x07\x9b"
    run_id = log(
        project,
        f"night{clear}",
        params={"x": f"1{clipboard}"},
        tags={"kedro_error": f"bad{clear}", "mine": f"2{clipboard}"},
    )

    for words in (["runs", "--params=x"], ["runs", run_id], ["runs", "--json"]):
        listed = mlflow_command(project, *words)

        assert listed.status == 0, listed.err
        assert "night" in "".join(listed.lines)
        assert not set("\x1b\x07\x9b") & set("".join(listed.lines))


def test_the_latest_runs_are_listed_with_what_they_measured(
    project: Project, mlflow_command: Command
) -> None:
    log(project, "old", status="FAILED", ago=3 * 86400 + 60, lasted=2 * 3600 + 61)
    parent = log(project, "middle", metrics={"rmse": 0.123456, "epochs": 3}, ago=185, lasted=75)
    log(project, "child", tags={"mlflow.parentRunId": parent}, ago=180)
    newest = log(
        project,
        "night [bold]",
        metrics={"rmse": math.nan, "system/cpu": 1},
        tags={"pipeline_names": "train,report", "kedro_command": "kedro run"},
        status="RUNNING",
        ago=42,
    )

    listed = mlflow_command(project, "runs")

    assert listed.status == 0, listed.err
    head, *rows = (re.split(r"  +", line) for line in listed.lines)
    assert head == ["id", "name", "status", "age", "duration", "pipeline", "rmse", "epochs"]
    names, ages = [row[1] for row in rows], [row[3] for row in rows]
    assert names == ["night [bold]", "middle", "old"]
    assert rows[0][0] == newest[:8]
    assert [row[2] for row in rows] == ["RUNNING", "FINISHED", "FAILED"]
    assert re.fullmatch(r"4\d s ago", ages[0])
    assert ages[1:] == ["3 min ago", "3 days ago"]
    assert rows[0][4].endswith(" s so far")
    assert [rows[1][4], rows[2][4]] == ["1 min 15 s", "2 h 01 min"]
    assert rows[0][5:] == ["train,report", "nan", "-"]
    assert rows[1][5:] == ["0.12346", "3"]
    everything = mlflow_command(project, "runs", "--children")
    assert any("  child  " in line for line in everything.lines)
    limited = mlflow_command(project, "runs", "--limit=1")
    assert len(limited.lines) == 2


def test_the_run_of_a_pipeline_is_listed_without_saying_its_name_twice(
    project: Project, mlflow_command: Command
) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.run()

    head, row = mlflow_command(project, "runs").lines

    assert head.split() == ["id", "name", "status", "age", "duration"]
    assert row.split()[1:3] == ["__default__", "FINISHED"]
    assert mlflow_command(project, "runs", "--json").json[0]["pipeline"] == "__default__"


def test_the_table_has_the_most_common_metrics_that_there_is_room_for(
    project: Project, mlflow_command: Command
) -> None:
    shared = {f"metric_{letter}": 1.0 for letter in "cba"}
    log(project, metrics={**shared, "alone": 1})
    log(project, metrics={**shared, "metric_c": 2})

    narrow = mlflow_command(project, "runs", columns=75)
    wide = mlflow_command(project, "runs")

    assert wide.lines[0].split()[5:] == ["metric_c", "metric_a", "metric_b", "alone"]
    assert len(wide.lines) == 3
    assert narrow.lines[0].split()[5:] == ["metric_c", "metric_a"]
    assert all(len(line) <= 75 for line in narrow.lines)
    assert narrow.lines[3:] == ["Not shown: 2 metrics (metric_b, alone); --metrics chooses."]


def test_metrics_and_parameters_are_chosen_by_name_and_by_pattern(
    project: Project, mlflow_command: Command
) -> None:
    log(project, metrics={"f1.a": 1, "f1.b": 2, "loss": 3}, params={"depth": "4", "kind": "a\nb"})
    log(project, params={"depth": "x" * 100})

    listed = mlflow_command(project, "runs", "--metrics=loss, f1.*,away", "--params=depth,k*")

    head, second, first = listed.lines
    assert head.split()[5:] == ["loss", "f1.a", "f1.b", "away", "depth", "kind"]
    assert first.split()[-7:] == ["3", "1", "2", "-", "4", "a", "b"]
    assert second.split()[-6:] == ["-", "-", "-", "-", f"{'x' * 39}…", "-"]


def test_a_filter_of_mlflow_chooses_runs(project: Project, mlflow_command: Command) -> None:
    log(project, "good", metrics={"rmse": 1}, params={"depth": "3"})
    log(project, "bad", metrics={"rmse": 9}, params={"depth": "3"})

    condition = "metrics.rmse < 5 and params.depth = '3'"
    found = mlflow_command(project, "runs", "--filter", condition, "--json")
    none = mlflow_command(project, "runs", "--filter", "metrics.rmse > 9")

    assert [run["name"] for run in found.json] == ["good"]
    what = f"No run of the experiment {project.package!r} is one with metrics.rmse > 9."
    assert (none.status, none.lines) == (0, [what])


@pytest.mark.parametrize("condition", ["rmse < 5", "metrics.rmse >> 5", "metrics.rmse < 5 or x"])
def test_a_filter_that_mlflow_does_not_understand_is_told(
    project: Project, mlflow_command: Command, condition: str
) -> None:
    log(project)

    sentence = mlflow_command(project, "runs", "--filter", condition).refusal

    assert sentence.startswith(
        "--filter: expected a condition such as metrics.rmse < 1 and params.depth = '3', got "
        f"{condition!r}: "
    )


def test_json_holds_everything_of_the_runs_as_it_is(
    project: Project, mlflow_command: Command
) -> None:
    metrics = {"rmse": 0.1 + 0.2, "broken": math.nan, "epochs": 3.0}
    tags = {"pipeline_name": "train", "note": "ünïcode\nlines"}
    ended = log(project, metrics=metrics, params={"depth": "3"}, tags=tags)
    running = log(project, status="RUNNING")

    first, second = mlflow_command(project, "runs", "--json").json

    assert first["run_id"] == running
    assert (first["end_time"], first["duration"]) == (None, None)
    run = project.client.get_run(ended)
    assert second == {
        "run_id": ended,
        "name": "train",
        "status": "FINISHED",
        "experiment_id": run.info.experiment_id,
        "parent_id": None,
        "pipeline": "train",
        "start_time": second["start_time"],
        "end_time": second["end_time"],
        "duration": 5.0,
        "artifact_uri": run.info.artifact_uri,
        "metrics": {"broken": "NaN", "epochs": 3.0, "rmse": 0.1 + 0.2},
        "params": {"depth": "3"},
        "tags": {**tags, "mlflow.runName": "train"},
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", second["start_time"])


# Without it Kedro itself writes a line to stdout before it looks for the command.
QUIET_LOGGING = """
version: 1
handlers: {console: {class: logging.StreamHandler, stream: "ext://sys.stderr"}}
root: {handlers: [console]}
loggers: {}
"""


def test_a_command_writes_nothing_but_json_to_stdout(project: Project) -> None:
    log(project)
    project.write(
        f"src/{project.package}/talking.py",
        """
        import logging
        from kedro.framework.hooks import hook_impl

        class Talking:
            @hook_impl
            def after_context_created(self):
                print("printed")
                logging.getLogger("kedro").error("logged")
        """,
    )
    settings = project.path / "src" / project.package / "settings.py"
    settings.write_text(
        f"{settings.read_text()}\nfrom {project.package}.talking import Talking\n"
        "HOOKS = (*HOOKS, Talking())\n"
    )

    plain = project.kedro("mlflow", "runs", "--json")
    project.write("conf/logging.yml", QUIET_LOGGING)
    quiet = project.kedro("mlflow", "runs", "--json")

    assert plain.returncode == quiet.returncode == 0, plain.stderr + quiet.stderr
    assert quiet.stdout.splitlines() == plain.stdout.splitlines()[-1:]
    assert len(json.loads(quiet.stdout)) == 1
    for ended in (plain, quiet):
        assert "printed" in ended.stderr
        assert "logged" in ended.stderr
        assert "logged" not in ended.stdout


def test_a_table_has_colours_on_a_terminal_only(project: Project) -> None:
    log(project, status="FAILED")
    project.write("conf/logging.yml", QUIET_LOGGING)
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = ("kedro", ["mlflow", "runs"], project.path, environment)

    piped = forks.run(*command)
    assert forks.start(*command, stdout=end).wait() == piped.returncode == 0
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)

    assert "\x1b[31mFAILED" in shown
    assert "FAILED" in piped.stdout
    assert "\x1b" not in piped.stdout


WHOLE = """
import mlflow
from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LinearRegression

def train(depth):
    for step in range(3):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.log_metric("rmse", 0.5)
    with mlflow.start_run(nested=True, run_name="inner"):
        mlflow.log_metric("part", 0.25)
    mlflow.log_text("a text", "notes/a.txt")
    mlflow.log_text("1234", "b.txt")
    mlflow.set_tag("species", "gentoo")
    return LinearRegression().fit([[0], [1]], [1, 3])

def create_pipeline():
    return Pipeline([Node(train, "params:depth", "line", name="train")])
"""
LINE = """
line:
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args: {registered_model_name: PACKAGE, pip_requirements: []}
"""


def sections(lines: list[str]) -> dict[str, list[list[str]]]:
    """Split what is shown of a run at its titles, into lines of words."""
    found: dict[str, list[list[str]]] = {"": []}
    title = ""
    for line in lines:
        if re.fullmatch(r"[A-Z][a-z ]+", line):
            title = line
            found[title] = []
        elif line:
            found[title].append(re.split(r"  +", line))
    return found


def test_one_run_is_shown_whole(project: Project, mlflow_command: Command) -> None:
    project.pipeline(WHOLE)
    project.catalog(LINE)
    project.parameters({"depth": 7})
    project.run()
    (run,) = (r for r in project.all_runs() if "mlflow.parentRunId" not in r.data.tags)

    shown = mlflow_command(project, "runs", run.info.run_id[:8])
    written = mlflow_command(project, "runs", run.info.run_id, "--json").json

    assert shown.status == 0, shown.err
    found = sections(shown.lines)
    assert dict(found[""])["run"] == run.info.run_id
    assert dict(found[""])["status"] == "FINISHED"
    assert found["Parameters"] == [["depth", "7"]]
    assert found["Metrics"][1:] == [["loss", "0.33333", "3"], ["rmse", "0.5", "1"]]
    (model,) = found["Models"]
    assert model[0] == "line"
    assert model[1].endswith(f", registered as {project.package} v1")
    assert sorted(found["Artifacts"]) == [["b.txt", "4 bytes"], ["notes/"]]
    (child,) = found["Child runs"]
    assert child[1:3] == ["FINISHED", "inner"]
    assert child[-1] == "part=0.25"
    tags = dict(found["Tags"])
    assert (tags["species"], tags["kedro_command"]) == ("gentoo", "kedro run")
    assert not {"pid", "process_start", "run_id", "project_path"} & tags.keys()
    assert written["steps"] == {"loss": 3, "rmse": 1}
    assert written["metrics"] == run.data.metrics
    assert [c["name"] for c in written["children"]] == ["inner"]
    assert written["children"][0]["parent_id"] == run.info.run_id
    assert {a["path"]: a["is_folder"] for a in written["artifacts"]} == {
        "b.txt": False,
        "notes": True,
    }
    assert written["models"][0]["registered"] == [{"name": project.package, "version": "1"}]
    assert (written["error"], written["failed_node"]) == (None, None)


def test_a_run_that_failed_is_shown_with_its_error(
    project: Project, mlflow_command: Command
) -> None:
    project.pipeline(FAILING.replace("ERROR", 'ValueError("no penguins")'))
    with pytest.raises(ValueError, match="no penguins"):
        project.run()
    run_id = project.only_run().info.run_id

    head = dict(sections(mlflow_command(project, "runs", run_id).lines)[""])
    written = mlflow_command(project, "runs", run_id, "--json").json

    assert (head["status"], head["failed in"]) == ("FAILED", "hatch")
    assert head["error"] == "ValueError: no penguins"
    assert (written["failed_node"], written["error"]) == ("hatch", "ValueError: no penguins")


def test_what_differs_between_two_runs_is_shown(project: Project, mlflow_command: Command) -> None:
    same = {"mlflow.source.git.branch": "main", "pid": "1"}
    one = log(
        project,
        metrics={"rmse": 0.5, "loss": math.nan, "gone": 1},
        params={"depth": "3", "width": "1"},
        tags={**same, "mlflow.source.git.commit": "abc"},
    )
    other = log(
        project,
        metrics={"rmse": 0.25, "loss": math.nan},
        params={"depth": "4", "width": "1"},
        tags={**same, "mlflow.source.git.commit": "def", "pid": "2", "species": "gentoo"},
    )

    shown = mlflow_command(project, "runs", one[:10], other)
    written = mlflow_command(project, "runs", one, other, "--json").json

    found = sections(shown.lines)
    assert found[""][0] == ["", one[:8], other[:8]]
    assert found["Parameters"] == [["depth", "3", "4"]]
    assert found["Metrics"] == [["gone", "1", "-"], ["rmse", "0.5", "0.25"]]
    assert found["Tags"] == [["git commit", "abc", "def"], ["species", "-", "gentoo"]]
    assert [run["run_id"] for run in written["runs"]] == [one, other]
    assert written["params"] == {"depth": ["3", "4"]}
    assert written["metrics"] == {"gone": [1.0, None], "rmse": [0.5, 0.25]}
    assert written["tags"] == {"git commit": ["abc", "def"], "species": [None, "gentoo"]}


def test_two_runs_in_which_nothing_differs_are_told_to_be_alike(
    project: Project, mlflow_command: Command
) -> None:
    one, other = (log(project, metrics={"rmse": 1}, params={"x": "1"}) for _ in range(2))

    assert mlflow_command(project, "runs", one, other).lines[-1] == (
        "No parameter, metric or tag differs."
    )


def test_ids_that_name_no_run_are_told(project: Project, mlflow_command: Command) -> None:
    client = project.client
    log(project)
    elsewhere = client.create_run(client.create_experiment("other")).info.run_id
    absent = "0123456789abcdef0123456789abcdef"
    where = f"on {project.tracking_uri}"
    words = {
        ("abc",): "expected the id of a run, or at least 4 characters that it begins with, got "
        "'abc'",
        ("ab'cd",): "expected the id of a run, or at least 4 characters that it begins with, got "
        '"ab\'cd"',
        (absent,): f"there is no run {absent!r} {where}",
        (elsewhere[:8],): f"no run of the experiment {project.package!r} {where} has an id that "
        f"begins with {elsewhere[:8]!r}; one of another experiment is found by its whole id",
        ("____",): f"no run of the experiment {project.package!r} {where} has an id that begins "
        "with '____'; one of another experiment is found by its whole id",
        (absent, absent, absent): "expected one or two ids, got 3",
    }
    for ids, sentence in words.items():
        assert mlflow_command(project, "runs", *ids).refusal == f"RUN_ID: {sentence}"
    assert mlflow_command(project, "runs", elsewhere, "--json").json["run_id"] == elsewhere


def test_an_id_that_two_runs_begin_with_is_told(project: Project, mlflow_command: Command) -> None:
    runs = {log(project) for _ in range(2)}
    # Ids are random: these are made to begin alike.
    with sqlite3.connect(project.path / "mlflow.db") as store:
        for number, run_id in enumerate(sorted(runs)):
            store.execute("PRAGMA foreign_keys = OFF")
            for table in ("runs", "tags"):
                store.execute(
                    f"UPDATE {table} SET run_uuid = ? WHERE run_uuid = ?",
                    (f"abcd{number}{run_id[5:]}", run_id),
                )

    sentence = mlflow_command(project, "runs", "abcd").refusal

    assert sentence.startswith("RUN_ID: 'abcd' begins the ids of 2 runs: write more of one of abcd")
    assert mlflow_command(project, "runs", "abcd1").status == 0


def everything(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, but for bytecode."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_without_runs_there_is_a_sentence_and_nothing_is_made(
    new_project: Callable[..., Project],
    empty_store: Path,
    mlflow_command: Command,
    tmp_path: Path,
) -> None:
    project = new_project()
    name = project.package

    def told() -> str:
        before = everything(tmp_path)
        ended = mlflow_command(project, "runs")
        listed = mlflow_command(project, "runs", "--json")
        assert (ended.status, listed.status, listed.out) == (0, 0, "[]\n")
        assert everything(tmp_path) == before
        (sentence,) = ended.lines
        return sentence

    assert told() == f"No run yet: the first one makes {project.tracking_uri}."
    (project.path / "mlflow.db").touch()
    assert told() == f"No run yet: the first one makes {project.tracking_uri}."
    shutil.copy(empty_store, project.path)
    mlflow_command(project, "runs")  # a store that was copied is made this project's
    assert told() == f"No run yet: the first one makes the experiment {name!r}."
    experiment = project.client.create_experiment(name)
    assert told() == f"No run yet in the experiment {name!r}."
    project.client.delete_experiment(experiment)
    assert told() == f"The experiment {name!r} is deleted, with its runs."


@pytest.fixture(scope="module")
def crowded(server: CountingProxy) -> tuple[int, str]:
    """The port of a server, and an experiment on it with 300 runs, half of them child runs."""
    name = f"crowd of {os.getpid()}"
    client = MlflowClient(server.uri)
    experiment = client.create_experiment(name)
    for number in range(150):
        parent = client.create_run(experiment, 2 * number + 1, run_name=f"run {number}")
        tags = {"mlflow.parentRunId": parent.info.run_id}
        client.create_run(experiment, 2 * number + 2, tags, "child")
    return int(server.uri.rpartition(":")[2]), name


def on_server(project: Project, proxy: CountingProxy, experiment: str) -> None:
    options = {
        "server": {"mlflow_tracking_uri": proxy.uri},
        "tracking": {"experiment": {"name": experiment}},
    }
    project.mlflow_yml(yaml.safe_dump(options))


@pytest.mark.parametrize("options", [[], ["--children"], ["--limit=150"], ["--filter=metrics.x<1"]])
def test_listing_runs_makes_two_requests_however_many_there_are(
    project: Project, mlflow_command: Command, crowded: tuple[int, str], options: list[str]
) -> None:
    port, experiment = crowded
    with counting_proxy(port) as proxy:
        on_server(project, proxy, experiment)

        listed = mlflow_command(project, "runs", "--json", *options).json

    older = not has("mlflow", "3.11") and "--children" not in options  # can't leave children out
    assert len(proxy.requests) == (3 if older else 2), proxy.requests
    expected = {"": 20, "--children": 20, "--limit=150": 150, "--filter=metrics.x<1": 0}
    assert len(listed) == expected["".join(options)]
    if options != ["--children"]:
        assert all(run["parent_id"] is None for run in listed)


def test_a_server_that_cannot_leave_out_child_runs_is_asked_a_third_time(
    project: Project, mlflow_command: Command, crowded: tuple[int, str]
) -> None:
    port, experiment = crowded
    searches = count()

    def refuse(path: str, _: Any) -> tuple[int, str] | None:
        if path.endswith("/runs/search") and next(searches) == 0:
            told = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid comparator 'IS'"}
            return 400, json.dumps(told)
        return None

    with counting_proxy(port, refuse) as proxy:
        on_server(project, proxy, experiment)

        listed = mlflow_command(project, "runs", "--json").json

    assert [run["name"] for run in listed] == [f"run {n}" for n in range(149, 129, -1)]
    assert len(proxy.requests) == 3, proxy.requests


def test_a_server_that_is_away_is_told_without_its_password(
    project: Project, mlflow_command: Command
) -> None:
    port = free_port()
    project.mlflow_yml(f"server: {{mlflow_tracking_uri: 'http://ada:t0ps3cr3t@127.0.0.1:{port}'}}")

    ended = mlflow_command(project, "runs")

    assert ended.refusal == (
        f"conf/local/mlflow.yml:1: server.mlflow_tracking_uri: "
        f"http://***@127.0.0.1:{port} can't be reached (connection refused): start the server, or "
        "correct the address (http or https, host, port)"
    )
    assert "t0ps3cr3t" not in ended.err
