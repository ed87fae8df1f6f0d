"""`docs/serving.md` from training to predictions over HTTP, in Python and on another machine."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from ..conftest import REPOSITORY
from ..runtime.servers import free_port
from .conftest import Shell, console_commands, served

GUIDE = (REPOSITORY / "docs" / "serving.md").read_text("utf-8")
TRAIN, SERVE, ASK, MODELIFY = console_commands(GUIDE)
TIE, PREDICT, BY_HAND = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)

MEASURED = {"bill_length_mm": 39.1, "flipper_length_mm": 181.0, "body_mass_g": 3750.0}


def post(address: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Ask for a prediction; gives the status and what was answered."""
    request = urllib.request.Request(
        f"{address}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_guide_leads_from_training_to_predictions_anywhere(
    clone: Path, tmp_path: Path, shell: Shell
) -> None:
    project = tmp_path / "penguins"
    store = f"sqlite:///{project.as_posix()}/mlflow.db"
    shell(f"uvx copier copy --defaults {clone} {project}", tmp_path)
    shell("uv sync --quiet", project)
    code = (project / "src/penguins/pipelines/service/pipeline.py").read_text()
    for line in TIE.splitlines():
        if not line.lstrip().startswith(("def ", "log_model_kwargs")):
            assert line in code

    shell(TRAIN, project)

    client = MlflowClient(store)
    (version,) = client.search_model_versions("name = 'penguins-service'")
    run = client.get_run(str(version.run_id))
    assert (run.info.run_name, run.info.status) == ("service", "FINISHED")
    assert run.data.metrics["accuracy"] > 0.9
    port = free_port()
    with served(SERVE, project, port) as address:
        answer = json.loads(shell(ASK.replace("5001", str(port)), project).splitlines()[-1])
        assert answer == {"predictions": [{**MEASURED, "predicted": "Adelie"}]}
        records = [MEASURED] * 3
        status, answer = post(
            address, {"dataframe_records": records, "params": {"runner": "ThreadRunner"}}
        )
        assert (status, len(answer["predictions"])) == (200, 3)
        refused: dict[str, dict[str, Any]] = {
            "body_mass_g": {"dataframe_records": [{"bill_length_mm": 1.0}]},
            "bill_length_mm": {"dataframe_records": [{**MEASURED, "bill_length_mm": "long"}]},
            "runner": {"dataframe_records": records, "params": {"runner": "os.system"}},
        }
        for name, body in refused.items():
            status, answer = post(address, body)
            assert status == 400
            assert name in answer["message"]

    (project / "predict.py").write_text(
        f"{PREDICT}\nassert list(predictions['predicted']) == ['Adelie']\n"
    )
    shell("uv run python predict.py", project, MLFLOW_TRACKING_URI=store)
    (project / "by_hand.py").write_text(
        f"{BY_HAND}\nloaded = mlflow.pyfunc.load_model(logged.model_uri)\n"
        "table = catalog.load('masses')\n"
        "assert 0 < len(loaded.predict(table)) < len(table)\n"
    )
    shell("uv run python by_hand.py", project, MLFLOW_TRACKING_URI=store)

    shell("uv run kedro run --pipelines=training", project)  # registers the classifier once more
    shell(MODELIFY, project)
    (run, *_) = client.search_runs([run.info.experiment_id])
    assert (run.info.run_name, run.info.status) == ("inference", "FINISHED")
    shell(f"uv run {run.data.tags['kedro_command']}", project)
    versions = client.search_model_versions("name = 'penguins-now'")
    assert sorted(int(version.version) for version in versions) == [1, 2]

    models = {
        name: client.get_model_version_download_uri(name, "1")
        for name in ("penguins-service", "penguins-now")
    }
    folders = {name: Path(uri.removeprefix("file://")) for name, uri in models.items()}
    for name, folder in folders.items():
        predicts_alone(folder, tmp_path / f"elsewhere-{name}", project, shell)


def predicts_alone(model: Path, elsewhere: Path, project: Path, shell: Shell) -> None:
    """Check that a model needs nothing but itself and its requirements."""
    # Loading it has left bytecode there, which isn't of the model.
    shutil.copytree(model, elsewhere / "model", ignore=shutil.ignore_patterns("__pycache__"))
    files = [file for file in (elsewhere / "model").rglob("*") if file.is_file()]
    assert [file for file in files if str(project) in file.read_text("latin-1")] == []
    requirements = (elsewhere / "model/requirements.txt").read_text()
    assert {"kedro", "mlflow", "scikit-learn"} < set(re.findall(r"^[\w-]+", requirements, re.M))
    for development in ("ipython", "mypy", "pre-commit", "pytest", "penguins", "matplotlib"):
        assert development not in requirements.lower()
    (elsewhere / "predict.py").write_text(
        PREDICT.replace("models:/penguins-service/latest", "model")
        + "\nimport penguins\nassert 'model' in penguins.__path__[0]\n"
        "assert list(predictions['predicted']) == ['Adelie']\n"
    )
    shell("uv venv --quiet", elsewhere)
    shell("uv pip install --quiet --python .venv --requirement model/requirements.txt", elsewhere)
    away = project.rename(project.with_name("away"))
    try:
        shell(".venv/bin/python predict.py", elsewhere)
    finally:
        away.rename(project)
