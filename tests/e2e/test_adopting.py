"""The runtime comes into a project, and leaves it, as `docs/adopting.md` says."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from ..support.guide import INTO, OUT, commands, instead_of, shown, switch_on
from .conftest import Shell, commit_all, git

PIPELINE = """
from kedro.pipeline import Pipeline, node


def weigh(grams, birds):
    return sum(grams) / birds


def create_pipeline(**kwargs):
    return Pipeline([node(weigh, ["params:grams", "params:birds"], "mean_weight")])
"""

COMES = {
    ".copier-answers.yml",
    "conf/base/mlflow.yml",
    "src/penguins/cli.py",
}


def kedro_new(folder: Path, shell: Shell, tools: str = "none") -> Path:
    """Make a project of somebody who has never heard of the template, and has a pipeline."""
    shell(
        f"{sys.executable} -m kedro new --name=Penguins --tools={tools} --example=n --telemetry=no",
        folder,
    )
    project = folder / "penguins"
    pipeline = project / "src/penguins/pipelines/weighing/__init__.py"
    pipeline.parent.mkdir()
    pipeline.write_text(PIPELINE)
    (project / "conf/base/parameters.yml").write_text("grams: [3750.0, 5700.0]\nbirds: 2\n")
    pyproject = project / "pyproject.toml"
    # A run needs neither of them, and they bring a hundred packages.
    pyproject.write_text(re.sub(r' +"(jupyterlab|notebook)\b.*\n', "", pyproject.read_text()))
    with (project / ".gitignore").open("a") as file:
        file.write("uv.lock\n")
    git(project, "init", "--quiet")
    commit_all(project, "Mine")
    return project


def runs_of(project: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("penguins")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def changed(project: Path, since: str = "HEAD") -> set[str]:
    """List the files that differ from a commit, but for the runtime's own."""
    git(project, "add", "--all")
    names = git(project, "diff", "--cached", "--name-only", since).splitlines()
    return {name for name in names if not name.startswith("src/penguins/runtime/")}


def new_version(template: Path) -> None:
    """Make a version of the template in which every file differs."""
    for file in (template / "template").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes() + b"\n")
    commit_all(template, "Second version")
    git(template, "tag", "v0.2.0")


def take_out(project: Path, shell: Shell) -> None:
    """Follow the guide out again, up to what only the project's owner can know."""
    remove, left, _, _ = commands(OUT)
    shell(remove, project)
    settings = "src/penguins/settings.py"
    (project / settings).write_text(shown(OUT, settings))
    replace_datasets(project / "conf/base/catalog.yml")
    shell(f"{left} || true", project)  # as grep does, it fails when it finds nothing


def replace_datasets(catalog: Path) -> None:
    """Give every entry of the catalog the dataset that the guide's table names."""
    entries = yaml.safe_load(catalog.read_text()) or {}
    for name, entry in entries.items():
        if ".runtime." not in entry["type"]:
            continue
        instead = instead_of(OUT)[entry["type"].rpartition(".")[2]]
        if instead == "the dataset in it":
            entries[name] = entry["dataset"]
        else:
            (kind, *_) = re.findall(r"`(\w+\.\w+)`", instead)
            file = "classifier" if "classifier" in name else name
            entries[name] = {"type": kind, "filepath": f"data/08_reporting/{file}"}
    catalog.write_text(yaml.safe_dump(entries))


def runs_without_the_runtime(project: Path, shell: Shell) -> None:
    """Run the last commands of the guide; `kedro mlflow` is gone, and past runs are not."""
    past = [run.info.run_id for run in runs_of(project)]
    *_, remove, run = commands(OUT)
    shell(remove, project)
    assert "completed" in shell(run, project)
    assert "No such command 'mlflow'" in shell("uv run kedro mlflow", project, status=2)
    assert "mlflow" not in shell("uv pip list --python=.venv", project)
    assert [run.info.run_id for run in runs_of(project)] == past


def test_a_kedro_project_takes_the_runtime_in_updates_it_and_takes_it_out(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = kedro_new(tmp_path, shell)
    start = git(project, "rev-parse", "HEAD")
    copy, add, run, update = commands(INTO, clone)

    shell(copy, project)
    assert changed(project) == COMES
    shell(add, project)
    switch_on(project)
    (project / "conf/base/catalog.yml").write_text(
        "mean_weight: {type: penguins.runtime.MlflowMetricDataset}\n"
    )

    shell(run, project)

    (tracked,) = runs_of(project)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params == {"grams": "[3750.0, 5700.0]", "birds": "2"}
    assert tracked.data.metrics == {"mean_weight": 4725.0}
    by_hand = {"conf/base/catalog.yml", "src/penguins/settings.py", ".gitignore"}
    assert changed(project) == COMES | by_hand | {"pyproject.toml"}

    commit_all(project, "Tracked")
    new_version(clone)
    shell(update, project)

    assert changed(project) == COMES
    assert "_commit: v0.2.0" in (project / ".copier-answers.yml").read_text()
    for module in (clone / "template/src/{{ package_name }}/runtime").glob("*.py"):
        assert (project / "src/penguins/runtime" / module.name).read_bytes() == module.read_bytes()

    commit_all(project, "Update")
    take_out(project, shell)
    (project / "data/08_reporting").mkdir(parents=True)
    shell("uv add kedro-datasets", project)
    runs_without_the_runtime(project, shell)

    assert changed(project, start) == by_hand | {"pyproject.toml"}
    assert git(project, "ls-files", "src/penguins/runtime") == ""


@pytest.mark.thorough
def test_a_project_with_commands_and_a_linter_of_its_own_keeps_them(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = kedro_new(tmp_path, shell, tools="lint,test,log,docs,data")
    cli = project / "src/penguins/cli.py"
    cli.write_text(
        "import click\n\n\n@click.group()\ndef cli():\n    pass\n\n\n"
        '@cli.command()\ndef hello():\n    click.echo("Hello!")\n'
    )
    commit_all(project, "My command")
    copy, add, run, _ = commands(INTO, clone)
    (skip,) = re.findall(r"`(--skip=.*)` to Copier's command", INTO)

    shell(f"{copy} {skip}", project)
    shell(add, project)
    switch_on(project)
    with cli.open("a") as file:
        file.write("\n" + shown(INTO, "src/penguins/cli.py"))
    shell(run, project)

    assert "Hello!" in shell("uv run kedro hello", project)
    # Its linter sees its own code alone.
    pyproject = project / "pyproject.toml"
    (exclude,) = re.findall(r"`(extend-exclude = .*)`", INTO)
    text = pyproject.read_text()
    pyproject.write_text(text.replace("[tool.ruff]\n", f"[tool.ruff]\n{exclude}\n"))
    cli.unlink()  # an import below other lines is no example of style
    shell("uv run --extra=dev ruff check src", project)


def without_mlflow_functions(nodes: Path) -> None:
    """Take MLflow's own functions out of the example's nodes."""
    text = nodes.read_text()
    text = re.sub(r"    import mlflow .*\n\n", "", text)
    text = re.sub(r"^( +)with mlflow.start_run.*:$", r"\1if True:", text, flags=re.MULTILINE)
    text = re.sub(r"^( +)mlflow\.log_.*$", r"\1pass", text, flags=re.MULTILINE)
    nodes.write_text(text)


@pytest.mark.thorough
@pytest.mark.parametrize("example", ["true", "false"])
def test_a_generated_project_runs_on_without_the_runtime(
    clone: Path, tmp_path: Path, shell: Shell, example: str
) -> None:
    project = tmp_path / "penguins"
    answers = f"--data=example={example} '--data=extras=[serving]'"
    shell(f"uvx copier copy --defaults {answers} {clone} {project}", tmp_path)
    git(project, "init", "--quiet")
    commit_all(project, "Start")
    shell("uv run kedro run", project)
    (project / "uv.lock").unlink()

    take_out(project, shell)
    (project / "tests/test_run.py").unlink()
    if example == "true":
        shutil.rmtree(project / "src/penguins/pipelines/service")
        without_mlflow_functions(project / "src/penguins/pipelines/training/nodes.py")

    runs_without_the_runtime(project, shell)
    shell("uv run pytest", project, status=0 if example == "true" else 5)  # 5: no tests
    if example == "true":
        shell("uv run kedro run --pipelines=inference", project)
