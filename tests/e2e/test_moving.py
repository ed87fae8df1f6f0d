"""Moving from kedro-mlflow as `docs/adopting.md` says: the same runs are in the store."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ..support.guide import MOVING, commands, pairs, switch_on
from .conftest import Shell, commit_all, git

PEERS_MODULES = {
    "MlflowArtifactDataset": "artifacts",
    "MlflowMetricDataset": "metrics",
    "MlflowMetricHistoryDataset": "metrics",
    "MlflowMetricsHistoryDataset": "metrics",
    "MlflowModelRegistryDataset": "models",
    "MlflowModelTrackingDataset": "models",
}


def to_kedro_mlflow(project: Path) -> None:
    """Make of a generated project what its users of today have: the plugin, and its paths."""
    catalog = project / "conf/base/catalog.yml"
    text = re.sub(
        r"\w+\.runtime\.(\w+)",
        lambda found: f"kedro_mlflow.io.{PEERS_MODULES[found[1]]}.{found[1]}",
        without(catalog.read_text(), "scores"),  # kedro-mlflow has nothing like it
    )
    catalog.write_text(text)
    package = project / "src" / "penguins"
    service = package / "pipelines" / "service" / "pipeline.py"
    service.write_text(
        service.read_text().replace("...runtime import", "kedro_mlflow.pipeline import")
    )
    shutil.rmtree(package / "runtime")
    (package / "cli.py").unlink()
    (package / "settings.py").write_text(
        'CONFIG_LOADER_ARGS = {"base_env": "base", "default_run_env": "local"}\n'
    )
    (project / ".copier-answers.yml").unlink()
    # It leaves a relative `sqlite:///` to the working directory, and has no default experiment.
    (project / "conf/base/mlflow.yml").write_text(
        f"server: {{mlflow_tracking_uri: 'sqlite:///{project.as_posix()}/mlflow.db'}}\n"
        "tracking: {experiment: {name: penguins}, params: {dict_params: {flatten: true}}}\n"
    )
    pyproject = project / "pyproject.toml"
    pyproject.write_text(
        re.sub(r'"mlflow>=.*"', '"kedro-mlflow==2.0.3"', pyproject.read_text(), count=1)
    )


def without(catalog: str, entry: str) -> str:
    return re.sub(rf"^{entry}:\n(  .*\n)+", "", catalog, flags=re.MULTILINE)


def keep_classifier_in_a_folder(catalog: Path) -> None:
    """Change the catalog as kedro-mlflow needs it: it can't pack a model that is in a run."""
    text = catalog.read_text()
    (tracking,) = re.findall(r"^  type: (.*)\.MlflowModelTrackingDataset$", text, re.MULTILINE)
    catalog.write_text(
        without(text, "classifier")
        + f"""
classifier:
  type: {tracking}.MlflowModelLocalFileSystemDataset
  filepath: data/06_models/classifier
  flavor: mlflow.sklearn
"""
    )


def files(client: MlflowClient, run: Run, folder: str = "") -> set[str]:
    found = set()
    for file in client.list_artifacts(run.info.run_id, folder):
        found |= files(client, run, file.path) if file.is_dir else {file.path}
    return found


def store(project: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")


def runs_of(project: Path) -> list[Run]:
    client = store(project)
    experiment = client.get_experiment_by_name("penguins")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def contents(project: Path, runs: Collection[Run]) -> list[dict[str, Any]]:
    """Tell what runs of a project hold, without what no two runs share."""
    client = store(project)
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = client.search_logged_models(list({run.info.experiment_id for run in runs}))
    found = [
        {
            "name": run.info.run_name,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "status": run.info.status,
            "params": run.data.params,
            "metrics": {
                key: sorted(
                    (point.step, point.value)
                    for point in client.get_metric_history(run.info.run_id, key)
                )
                for key in run.data.metrics
            },
            "files": files(client, run),
            "models": sorted(
                version.name
                for version in client.search_model_versions(f"run_id = '{run.info.run_id}'")
            ),
            "logged models": sum(m.source_run_id == run.info.run_id for m in models),
        }
        for run in runs
    ]
    return sorted(
        found, key=lambda run: (run["parent"] is not None, run["name"], str(run["params"]))
    )


PREDICT = """
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/penguins-service/latest")
measured = {"bill_length_mm": [39.1, 50.0], "flipper_length_mm": [181.0, 230.0]}
table = pandas.DataFrame({**measured, "body_mass_g": [3750.0, 5700.0]})
print(list(model.predict(table)["predicted"]))
"""


def prediction(project: Path, shell: Shell) -> str:
    """Predict with the model that `pipeline_ml_factory` had logged."""
    return shell(f"uv run python -c '{PREDICT}'", project, **address(project)).splitlines()[-1]


def address(project: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{project.as_posix()}/mlflow.db"}


def run_all(project: Path, shell: Shell) -> None:
    """Run the pipelines of the example, and the one that `pipeline_ml_factory` makes."""
    for options in ("", "--pipelines=inference"):
        shell(f"uv run kedro run {options}", project)
    catalog = project / "conf/base/catalog.yml"
    as_it_was = catalog.read_text()
    keep_classifier_in_a_folder(catalog)
    shell("uv run kedro run --pipelines=service", project)
    catalog.write_text(as_it_was)


def test_the_example_logs_the_same_with_kedro_mlflow_and_after_moving_as_the_guide_says(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "penguins"
    shell(f"uvx copier copy --defaults '--data=extras=[serving]' {clone} {project}", tmp_path)
    to_kedro_mlflow(project)
    git(project, "init", "--quiet")
    commit_all(project, "With kedro-mlflow")
    run_all(project, shell)
    past = runs_of(project)
    predicted = prediction(project, shell)
    remove, copy, add, change_paths, _ = commands(MOVING, clone)
    (error,) = re.findall(r"^```text\n(Error: .*)\n```$", MOVING, re.MULTILINE)

    shell(copy, project)
    switch_on(project)
    settings = project / "src/penguins/settings.py"
    text = settings.read_text().replace("MlflowHook, random", "MlflowHook, ServingHook, random")
    settings.write_text(text.replace("(MlflowHook(),)", "(MlflowHook(), ServingHook())"))
    shell(change_paths, project)
    assert error in shell("uv run kedro run", project, status=1)
    assert len(runs_of(project)) == len(past)
    shell(remove, project)
    shell(add, project)
    run_all(project, shell)

    # In the same store and experiment.
    ids = {run.info.run_id for run in past}
    new = [run for run in runs_of(project) if run.info.run_id not in ids]
    assert len(new) == len(past)
    assert contents(project, new) == contents(project, past)
    assert prediction(project, shell) == predicted == "['Adelie', 'Gentoo']"
    # What only a pickle says: the first model is one of kedro-mlflow.
    first = PREDICT.replace("latest", "1")
    refused = shell(f"uv run python -c '{first}'", project, status=1, **address(project))
    assert "No module named 'kedro_mlflow'" in refused


def test_every_path_of_the_guides_table_is_changed_by_its_command(
    tmp_path: Path, shell: Shell
) -> None:
    table = pairs(MOVING, starting="kedro_mlflow.") | pairs(MOVING, starting="from kedro_mlflow.")
    (tmp_path / "src").mkdir()
    (tmp_path / "conf").mkdir()
    paths = tmp_path / "conf" / "catalog.yml"
    paths.write_text("\n".join(table))
    (command,) = [command for command in commands(MOVING) if command.startswith("perl")]

    shell(command, tmp_path)

    assert set(PEERS_MODULES) < {path.rpartition(".")[2] for path in table}
    assert paths.read_text().splitlines() == list(table.values())


LOG = """
import mlflow

mlflow.set_tracking_uri("mlruns")
mlflow.set_experiment("penguins")
with mlflow.start_run(run_name="past"):
    mlflow.log_metric("accuracy", 0.9)
    mlflow.log_text("all of it", "report.txt")
"""


@pytest.mark.thorough
def test_runs_in_a_folder_become_past_runs_of_the_project_with_their_files(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "penguins"
    shell(f"uvx copier copy --defaults --data=example=false {clone} {project}", tmp_path)
    shell(f"{sys.executable} -c '{LOG}'", project, MLFLOW_ALLOW_FILE_STORE="true")
    (migrate,) = [command for command in commands(MOVING) if "migrate" in command]

    shell(migrate.replace("uv run", f"{sys.executable} -m"), project)
    shell(f"{sys.executable} -m kedro run", project)

    new, past = runs_of(project)
    assert (past.info.run_name, past.data.metrics) == ("past", {"accuracy": 0.9})
    for run, file in ((past, "report.txt"), (new, "message.txt")):
        assert files(store(project), run) == {file}
        assert (project / "mlruns") in Path(run.info.artifact_uri.removeprefix("file://")).parents
