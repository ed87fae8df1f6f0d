"""Moving from kedro-mlflow is a change of import paths: the same run is in the store afterwards."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from .conftest import Shell

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
        catalog.read_text(),
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


def in_store(project: Path) -> list[dict[str, Any]]:
    """Tell what the runs of a project hold, without what no two runs share."""
    client = MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("penguins")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = client.search_logged_models([experiment.experiment_id])
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
                f"{version.name} {version.version}"
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
    (project / "predict.py").write_text(PREDICT)
    store = f"sqlite:///{project.as_posix()}/mlflow.db"
    return shell(".venv/bin/python predict.py", project, MLFLOW_TRACKING_URI=store).splitlines()[-1]


def test_the_example_logs_the_same_with_kedro_mlflow_and_with_the_runtime(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    ours, theirs = tmp_path / "ours" / "penguins", tmp_path / "theirs" / "penguins"
    shell(f"uvx copier copy --defaults {clone} {ours}", tmp_path)
    catalog = ours / "conf/base/catalog.yml"
    catalog.write_text(without(catalog.read_text(), "scores"))  # kedro-mlflow has nothing like it
    (ours / "conf/base/mlflow.schema.json").unlink()
    (ours / "conf/base/mlflow.yml").write_text(
        "server: {mlflow_tracking_uri: 'sqlite:///mlflow.db'}\n"
        "tracking: {params: {dict_params: {flatten: true}}}\n"
    )
    shutil.copytree(ours, theirs)
    to_kedro_mlflow(theirs)
    # It leaves a relative `sqlite:///` to the working directory, and has no default experiment.
    (theirs / "conf/base/mlflow.yml").write_text(
        f"server: {{mlflow_tracking_uri: 'sqlite:///{theirs.as_posix()}/mlflow.db'}}\n"
        "tracking: {experiment: {name: penguins}, params: {dict_params: {flatten: true}}}\n"
    )
    for project, plugin in ((ours, ""), (theirs, "kedro-mlflow==2.0.3")):
        shell("uv venv --quiet", project)
        shell(f"uv pip install --quiet --python .venv --editable . {plugin}", project)
        for options in ("", "--pipelines=inference"):
            shell(f".venv/bin/kedro run {options}", project, DO_NOT_TRACK="1")
        keep_classifier_in_a_folder(project / "conf/base/catalog.yml")
        shell(".venv/bin/kedro run --pipelines=service", project, DO_NOT_TRACK="1")

    assert in_store(ours) == in_store(theirs)
    assert prediction(ours, shell) == prediction(theirs, shell) == "['Adelie', 'Gentoo']"
