"""`docs/serving.md` from training to predictions over HTTP, in Python and on another machine."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ..conftest import REPOSITORY
from ..support.servers import free_port
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
    shell(f"uvx copier copy --defaults '--data=extras=[serving]' {clone} {project}", tmp_path)
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
    predict_alone(folders, tmp_path / "elsewhere", project, shell)


def predict_alone(models: dict[str, Path], elsewhere: Path, project: Path, shell: Shell) -> None:
    """Check that models need nothing but themselves and their requirements, which are the same."""
    for name, model in models.items():
        # Loading it has left bytecode there, which isn't of the model.
        shutil.copytree(model, elsewhere / name, ignore=shutil.ignore_patterns("__pycache__"))
        files = [file for file in (elsewhere / name).rglob("*") if file.is_file()]
        assert [file for file in files if str(project) in file.read_text("latin-1")] == []
        (elsewhere / f"{name}.py").write_text(
            PREDICT.replace("models:/penguins-service/latest", name)
            + f"\nimport penguins\nassert {name!r} in penguins.__path__[0]\n"
            "assert list(predictions['predicted']) == ['Adelie']\n"
        )
    (requirements,) = {(elsewhere / name / "requirements.txt").read_text() for name in models}
    assert re.findall(r"^[\w-]+", requirements, re.M) == [
        *("cloudpickle", "kedro", "kedro-datasets", "mlflow", "scikit-learn")
    ]
    (elsewhere / "requirements.txt").write_text(requirements)
    shell("uv venv --quiet", elsewhere)
    shell("uv pip install --quiet --python .venv --requirement requirements.txt", elsewhere)
    away = project.rename(project.with_name("away"))
    try:
        for name in models:
            shell(f".venv/bin/python {name}.py", elsewhere)
    finally:
        away.rename(project)


# A project with libraries of its own, which are members of its workspace.

LIBRARY = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"
dependencies = [{dependencies}]

[tool.hatch.build.targets.wheel]
packages = ["src/{module}"]

[tool.uv.sources]
units-of-mass = {{ workspace = true }}
"""
WORKSPACE = """
[tool.uv.sources]
weighing = { workspace = true }

[tool.uv.workspace]
members = ["libs/*"]

[[tool.uv.index]]
name = "team"
url = "INDEX"
explicit = true
"""
PIPELINE = """
import numpy as np
import pandas as pd
from kedro.pipeline import Node, Pipeline

from ...runtime import pipeline_ml_factory

TABLE = pd.DataFrame({"x": [0.0, 1.0, 2.0, 3.0]})


def fit():
    import lightgbm
    import xgboost
    from sklearn.linear_model import LinearRegression
    from statsmodels.api import OLS

    line, target = LinearRegression().fit(TABLE, 2 * TABLE["x"]), 2 * TABLE["x"]
    return [
        line,
        line,
        xgboost.XGBRegressor(n_estimators=3).fit(TABLE, target),
        lightgbm.LGBMRegressor(min_child_samples=1, verbose=-1).fit(TABLE, target),
        OLS(target, TABLE).fit(),
        lambda model_input: model_input["x"] * 2,
    ]


def weights():
    return {"each": 2.0}


def weigh(table, weights):
    from weighing import told

    return [told(x * weights["each"]) for x in table["x"]]


def create_pipeline():
    models = ["sklearn", "local", "xgboost", "lightgbm", "statsmodels", "function"]
    return pipeline_ml_factory(
        Pipeline([
            Node(fit, None, models),
            Node(weights, None, "weights"),
            Node(lambda: TABLE, None, "table", name="table"),
        ]),
        Pipeline([Node(weigh, ["table", "weights"], "told")]),
        "table",
        log_model_kwargs={"name": "pipeline"},
    )
"""
CATALOG = """
"{name}":
  type: shop.runtime.MlflowModelTrackingDataset
  flavor: mlflow.{name}
local:
  type: shop.runtime.MlflowModelLocalFileSystemDataset
  filepath: data/local
  flavor: mlflow.sklearn
function:
  type: shop.runtime.MlflowModelTrackingDataset
  flavor: mlflow.pyfunc
  pyfunc_workflow: python_model
weights: {type: json.JSONDataset, filepath: data/weights.json}
table: {type: pandas.CSVDataset, filepath: data/table.csv, save_args: {index: false}}
"""


@pytest.fixture
def shop(clone: Path, tmp_path: Path, shell: Shell) -> Path:
    """A project whose pipeline makes models of several kinds, one of them of a pipeline."""
    project = tmp_path / "shop"
    answers = "--data=example=false '--data=extras=[serving]'"
    shell(f"uvx copier copy --defaults {answers} {clone} {project}", tmp_path)
    file = project / "pyproject.toml"
    index = "https://me:secret@pypi.org/simple"
    declared = "weighing scikit-learn xgboost-cpu lightgbm statsmodels".split()
    lines = "".join(f'  "{name}",\n' for name in declared)
    text = file.read_text().replace("dependencies = [\n", f"dependencies = [\n{lines}", 1)
    file.write_text(text + WORKSPACE.replace("INDEX", index))
    write_library(project, "weighing", "weighing", '"units-of-mass", "humanize"', TELLING)
    write_library(project, "units-of-mass", "mass", "", 'UNIT = "kg"\n')
    folder = project / "src/shop/pipelines/models"
    folder.mkdir()
    (folder / "pipeline.py").write_text(PIPELINE)
    (folder / "__init__.py").write_text("from .pipeline import create_pipeline as create_pipeline")
    (project / "conf/base/catalog.yml").write_text(CATALOG)
    shell("uv sync --quiet", project)
    shell("uv run kedro run --pipelines=models", project)
    return project


TELLING = """
from humanize import intcomma
from mass import UNIT


def told(mass):
    return f"{intcomma(1000 * mass)} {UNIT}"
"""


def write_library(project: Path, name: str, module: str, dependencies: str, code: str) -> None:
    folder = project / "libs" / name / "src" / module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(code)
    described = LIBRARY.format(name=name, module=module, dependencies=dependencies)
    (project / "libs" / name / "pyproject.toml").write_text(described)


def models_of(project: Path) -> dict[str, Path]:
    """Find the folder of each model that the project's last run has made."""
    client = MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("shop")
    assert experiment
    (run, *_) = client.search_runs([experiment.experiment_id])
    logged = client.search_logged_models([experiment.experiment_id])
    found = {
        str(model.name): Path(model.artifact_location.removeprefix("file://"))
        for model in logged
        if model.source_run_id == run.info.run_id
    }
    return {**found, "local": project / "data/local"}


def requirements_of(project: Path) -> dict[str, list[str]]:
    models = models_of(project).items()
    return {name: (path / "requirements.txt").read_text().split("\n") for name, path in models}


def fresh(expected: dict[str, str], project: Path, shell: Shell) -> None:
    """Check what models predict where there are their requirements, and their project isn't."""
    models, elsewhere = models_of(project), project.with_name("fresh")
    for name in expected:
        shutil.copytree(
            models[name], elsewhere / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    project.rename(project.with_name("gone"))
    for name, check in expected.items():
        (elsewhere / "predict.py").write_text(
            "import mlflow, pandas as pd\n"
            f"model = mlflow.pyfunc.load_model('{name}')\n"
            "answer = list(model.predict(pd.DataFrame({'x': [2.0]})))\n"
            f"assert {check}, answer\n"
        )
        shell("uv venv --quiet --clear", elsewhere)
        shell(f"uv pip install --quiet --python .venv -r {name}/requirements.txt", elsewhere)
        shell(".venv/bin/python predict.py", elsewhere)


def test_a_pipeline_with_a_library_of_the_workspace_predicts_with_its_requirements_alone(
    shop: Path, shell: Shell
) -> None:
    required = requirements_of(shop)

    names = {model: names_in(lines) for model, lines in required.items()}
    assert names == {
        "sklearn": {"mlflow", "scikit-learn", "cloudpickle", "skops"},
        "local": {"mlflow", "scikit-learn", "cloudpickle", "skops"},
        "xgboost": {"mlflow", "xgboost"},
        "lightgbm": {"mlflow", "lightgbm", "cloudpickle", "skops"},
        "statsmodels": {"mlflow", "statsmodels"},
        "function": {"mlflow", "cloudpickle"},
        "pipeline": {
            *("mlflow", "kedro", "kedro-datasets", "cloudpickle", "humanize"),
            *("scikit-learn", "xgboost-cpu", "lightgbm", "statsmodels"),
        },
    }
    assert "--extra-index-url https://pypi.org/simple" in required["pipeline"]
    models = models_of(shop)
    files = {path.name for model in models.values() for path in model.iterdir()}
    assert not files & {"uv.lock", "pyproject.toml"}
    assert code_of(shop) == {"shop", "weighing", "mass"}
    fresh({"pipeline": "answer == ['4,000.0 kg']"}, shop, shell)


@pytest.mark.thorough
def test_models_require_the_same_with_uv_with_pip_and_in_a_wheel(
    shop: Path, tmp_path: Path, shell: Shell
) -> None:
    required = requirements_of(shop)
    away = tmp_path / "wheel"
    shutil.copytree(shop / "conf", away / "conf")
    limits = f"--no-hashes --no-emit-workspace --output-file={away}/limits.txt"
    shell(f"uv export --quiet {limits}", shop)
    shell(f"uv build --quiet --all-packages --wheel --out-dir={away}", shop)

    (shop / "uv.lock").unlink()
    shell(".venv/bin/kedro run --pipelines=models", shop, PATH="/usr/bin:/bin")

    assert requirements_of(shop) == required
    code = code_of(shop)
    shutil.rmtree(shop)
    shell("uv venv --quiet --seed", away)
    shell(".venv/bin/python -m pip install --quiet --constraint limits.txt *.whl", away)
    shell(".venv/bin/shop --conf-source=conf --pipelines=models", away, PATH="/usr/bin:/bin")
    # A wheel doesn't name the package indexes of its project.
    assert requirements_of(away) == {
        model: [line for line in lines if not line.startswith("-")]
        for model, lines in required.items()
    }
    assert code_of(away) == code


@pytest.mark.thorough
def test_models_of_each_kind_predict_with_their_requirements_alone(
    shop: Path, shell: Shell
) -> None:
    kinds = ["sklearn", "local", "xgboost", "lightgbm", "statsmodels"]
    fresh(dict.fromkeys(kinds, "0 < answer[0] < 6"), shop, shell)


def names_in(lines: list[str]) -> set[str]:
    return {line.partition("==")[0] for line in lines if not line.startswith("-")}


def code_of(project: Path) -> set[str]:
    return {path.name for path in (models_of(project)["pipeline"] / "code").iterdir()}
