"""Projects are generated, installed, run, tested and updated; what they tracked is read back."""

from __future__ import annotations

import json
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ..support.servers import free_port, running
from .conftest import Shell, commit_all, console_commands, environment, git, served


def main_runs(project: Path) -> list[Run]:
    """The runs of a project that are not nested in another, the newest first."""
    client = MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    assert experiment.name == project.name
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def test_the_example_is_tracked_from_raw_data_to_predictions(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "penguins"
    shell(f"uvx copier copy --defaults {clone} {project}", tmp_path)
    git(project, "init", "--quiet", "--initial-branch=main")
    shell("uv sync --quiet", project)
    commit_all(project, "Start")

    shell("uv run kedro run", project)

    (run,) = main_runs(project)
    assert run.info.status == "FINISHED"
    assert run.data.params.keys() == {
        "features",
        "learning_curve.shares",
        "random_state",
        "split.test_size",
        "tuning.folds",
        "tuning.strengths",
    }
    assert run.data.metrics["accuracy"] > 0.9
    assert {f"scores.f1_{species}" for species in ("Adelie", "Chinstrap", "Gentoo")} < set(
        run.data.metrics
    )
    client = MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")
    curve = client.get_metric_history(run.info.run_id, "learning_curve")
    assert len({metric.step for metric in curve}) == 5
    (figure,) = client.list_artifacts(run.info.run_id, "figures")
    assert figure.path == "figures/confusion_matrix.png"
    local = client.download_artifacts(run.info.run_id, figure.path, str(tmp_path))
    assert Path(local).read_bytes().startswith(b"\x89PNG")
    (version,) = client.search_model_versions("name = 'penguins-classifier'")
    assert version.run_id == run.info.run_id
    children = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    assert [child.info.status for child in children] == ["FINISHED"] * 4
    assert run.data.tags["mlflow.source.git.commit"] == git(project, "rev-parse", "HEAD")
    assert run.data.tags["mlflow.source.git.dirty"] == "false"

    # From another folder, into the same store; with a command that a tag of the run gives.
    shell(f"uv run {run.data.tags['kedro_command']}", project / "notebooks")
    assert [run.info.status for run in main_runs(project)] == ["FINISHED"] * 2
    assert sorted(path.name for path in (project / "notebooks").iterdir()) == [".gitkeep"]

    shell("uv run kedro run --pipelines=inference", project)
    (inference, *_) = main_runs(project)
    assert (inference.info.run_name, inference.info.status) == ("inference", "FINISHED")
    assert [a.path for a in client.list_artifacts(inference.info.run_id)] == ["predictions.csv"]

    # A mistake in a node.
    nodes = project / "src/penguins/pipelines/data_processing/nodes.py"
    nodes.write_text(nodes.read_text().replace("return raw.dropna", "return raw.drop_na"))
    shell("uv run kedro run", project, status=1)
    (failed, *_) = main_runs(project)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["kedro_failed_node"] == "clean"
    assert failed.data.tags["mlflow.source.git.dirty"] == "true"
    assert git(project, "status", "--porcelain") == f"M {nodes.relative_to(project)}"


def test_a_new_project_warns_of_nothing_and_logs_one_line_for_each_event(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "penguins"
    shell(f"uvx copier copy --defaults '--data=extras=[console]' {clone} {project}", tmp_path)
    shell("uv sync --quiet", project)

    assert shell("uv run kedro run 2> log", project, COLUMNS="80") == ""
    log = (project / "log").read_text()
    # What Kedro says of itself and of a node with many inputs, and MLflow of its own, is longer.
    kept = [
        line for line in log.splitlines() if not re.search("Using sync|Running node|mlflow", line)
    ]
    assert "INFO     Completed 7 out of 7 tasks" in kept
    assert [
        line for line in kept if not re.match("INFO     |Successfully|Created version", line)
    ] == []
    assert max(len(line) for line in kept) <= 80

    listed = shell("uv run kedro mlflow runs --json 2>> log", project)
    assert [run["status"] for run in json.loads(listed)] == ["FINISHED"]
    log += shell("uv run pytest", project)
    log += shell("echo exit | uv run kedro ipython", project)
    ui = "uv run kedro mlflow ui".split()
    with running(ui, project, env=environment(), end=signal.SIGINT) as lines:
        log += "".join(lines)
    assert re.findall(r".*(?:W(?i:arning)|[Dd]eprecat|warnings? summary).*", log) == []


@pytest.mark.parametrize(
    "answers",
    [
        "example=true ci=github",
        "example=false licence=MIT docker=true ci=gitlab artifact_store=s3",
        pytest.param("example=true tracking_backend=server", marks=pytest.mark.thorough),
        pytest.param("example=true tracking_backend=databricks", marks=pytest.mark.thorough),
    ],
)
def test_a_new_project_passes_its_own_tests_and_checks(
    clone: Path, tmp_path: Path, shell: Shell, answers: str
) -> None:
    project = tmp_path / "my_project"
    data = " ".join(f"--data={answer}" for answer in answers.split())
    shell(f"uvx copier copy --defaults {data} {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    git(project, "add", "--all")

    # What an owner adds: a pipeline as Kedro writes it, a node without types, a package without.
    shell("uv run kedro pipeline create pricing", project)
    nodes = project / "src/my_project/pipelines/pricing/nodes.py"
    nodes.write_text(
        "import plotly\n\n\ndef price(cost, share):\n    return plotly, cost * share\n"
    )
    git(project, "add", "--all")

    shell("uv run pytest", project)
    shell("uv run mypy", project)
    shell("uv run pre-commit run --all-files", project)

    assert git(project, "diff", "--name-only") == ""
    # The first commit, with what checks it.
    shell("uv run pre-commit install", project)
    commit_all(project, "Start")
    assert git(project, "ls-files", "uv.lock") == "uv.lock"
    assert not (project / "mlflow.db").exists()
    # With these three all that CI runs, without a server and without secrets.
    shell(f"uv run kedro run {'--env=test' if (project / 'conf/test').exists() else ''}", project)
    assert [run.info.status for run in main_runs(project)] == ["FINISHED"]
    installed = shell("uv pip list --python=.venv", project)
    assert "kedro-telemetry" not in installed


def test_every_command_of_a_projects_readme_works(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "my_project"
    shell(f"uvx copier copy --defaults '--data=extras=[serving]' {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    commit_all(project, "Start")
    with_pip = [".venv/bin/pip", ".venv/bin/kedro", "python -m venv"]
    commands = console_commands((project / "README.md").read_text())
    assert "uv run kedro run" in commands

    serve, ask = (command for command in commands if ":5001" in command or "=5001" in command)
    for command in commands:
        if command == serve:
            port = free_port()
            with served(serve, project, port):
                assert '"Adelie"' in shell(ask.replace("5001", str(port)), project)
        elif command == ask:
            continue  # asked while it was served
        elif command == "uv run kedro mlflow ui":
            _look_at_the_pages(command, project)
        elif command.endswith("kedro jupyter lab"):
            options = ["--no-browser", "--allow-root"]
            with running(
                [*command.split(), *options],
                project,
                ready="is running at",
                env=environment(),
                end=signal.SIGTERM,
            ):
                pass
        elif command == "uvx copier update --skip-answered":
            commit_all(project, "Lock")
            shell(command, project)
            assert git(project, "status", "--porcelain") == ""
        elif not any(command.startswith(start) for start in with_pip):
            shell(command, project)

    # What is left is for those without uv, in a folder without uv's environment.
    plain = tmp_path / "plain" / "my_project"
    shell(f"uvx copier copy --defaults {clone} {plain}", tmp_path)
    for command in commands:
        if any(command.startswith(start) for start in with_pip):
            shell(command.replace("python -m venv", f"{sys.executable} -m venv"), plain)
    assert [run.info.status for run in main_runs(plain)] == ["FINISHED"]


def _look_at_the_pages(command: str, project: Path) -> None:
    with running(command.split(), project, env=environment(), end=signal.SIGINT) as log:  # Ctrl-C
        (address,) = re.findall(r"pages: (http://\S+)", "".join(log))
        with urllib.request.urlopen(address) as page:
            assert b"MLflow" in page.read()


def test_an_update_brings_what_is_new_and_keeps_what_the_user_did(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "my_project"
    shell(f"uvx copier copy --defaults --data=example=false {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    commit_all(project, "Start")
    theirs = {
        "README.md": "My own words.\n",
        "conf/base/parameters.yml": "greeting: salve\n",
        "src/my_project/pipelines/first/nodes.py": (
            'def first_step(greeting: str) -> str:\n    return f"{greeting}, mundi"\n'
        ),
        "src/my_project/pipelines/second/__init__.py": (
            "from kedro.pipeline import Pipeline\n\n\n"
            "def create_pipeline() -> Pipeline:\n    return Pipeline([])\n"
        ),
        "conf/local/credentials.yml": "mine: {password: t0p}\n",
    }
    for name, text in theirs.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    config = project / "conf/base/mlflow.yml"
    config.write_text(config.read_text().replace("flatten: false", "flatten: true"))
    (project / "conf/prod/mlflow.yml").unlink()
    (project / "notebooks/.gitkeep").unlink()
    commit_all(project, "Mine")

    # The next version of the template changes files of all kinds.
    runtime = clone / "template/src/{{ package_name }}/runtime"
    (runtime / "hooks.py").write_text((runtime / "hooks.py").read_text() + "\n# new\n")
    (runtime / "added.py").write_text('"""New."""\n')
    owned = ["{{ instructions }}.md.jinja", "conf/base/parameters.yml.jinja"]
    for name in [*owned, "conf/local/credentials.yml"]:
        with (clone / "template" / name).open("a") as file:
            file.write("# new\n")
    shipped = clone / "template/conf/base/mlflow.yml.jinja"
    shipped.write_text(shipped.read_text().replace("# How runs are", "# New: how runs are"))
    commit_all(clone, "Second version")
    git(clone, "tag", "v0.2.0")

    shell("uvx copier update --defaults", project)

    assert "_commit: v0.2.0" in (project / ".copier-answers.yml").read_text()
    for name, text in theirs.items():
        assert (project / name).read_text() == text
    assert (project / "src/my_project/runtime/hooks.py").read_text().endswith("# new\n")
    assert (project / "src/my_project/runtime/added.py").exists()
    assert "# New: how runs are" in config.read_text()
    assert "flatten: true" in config.read_text()
    assert not (project / "conf/prod/mlflow.yml").exists()
    assert not (project / "notebooks/.gitkeep").exists()
    assert "<<<<<<<" not in git(project, "diff", "HEAD")
    shell("uv run kedro run", project)
    assert (project / "data/08_reporting/message.txt").read_text() == "salve, mundi"
    assert [run.info.status for run in main_runs(project)] == ["FINISHED"]


def test_a_clash_leaves_markers_that_the_projects_hook_refuses(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "my_project"
    shell(f"uvx copier copy --defaults --data=example=false {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    settings = project / "src/my_project/settings.py"
    settings.write_text(settings.read_text().replace("# Tracks every run", "# My words"))
    commit_all(project, "Mine")
    shipped = clone / "template/src/{{ package_name }}/settings.py.jinja"
    shipped.write_text(shipped.read_text().replace("# Tracks every run", "# Their words"))
    commit_all(clone, "Second version")
    git(clone, "tag", "v0.2.0")

    shell("uvx copier update --defaults", project)

    assert "<<<<<<<" in settings.read_text()
    git(project, "add", "--all")
    refused = shell("uvx pre-commit run merge-conflicts", project, status=1)
    assert "settings.py" in refused


def test_what_uv_adds_does_not_clash_with_what_the_template_changes(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "my_project"
    shell(f"uvx copier copy --defaults {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    shell("uv add --frozen altair numpy xgboost", project)
    shell("uv add --frozen --dev kedro-viz types-requests", project)
    commit_all(project, "Mine")
    # The next version has another bound for each, and one more at the end of each list.
    shipped = clone / "template/pyproject.toml.jinja"
    text = re.sub(r'^  "[\w-]+.*>=', r"\g<0>0.", shipped.read_text(), flags=re.MULTILINE)
    shipped.write_text(text.replace("  # Yours below", '  "rich>=13",\n  # Yours below'))
    commit_all(clone, "Second version")
    git(clone, "tag", "v0.2.0")

    shell("uvx copier update --defaults", project)

    assert git(project, "diff", "--name-only", "--diff-filter=U") == ""
    added = (project / "pyproject.toml").read_text()
    for name in ("altair", "numpy", "xgboost", "kedro-viz", "types-requests", "rich>=13"):
        assert f'"{name}",' in added
    assert '"mlflow>=0.3.9,<4",' in added
    shell("uv remove --frozen altair numpy xgboost", project)  # which reads the file
