"""Models as datasets: real ones of each kind, in runs, in the registry and in local folders."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from kedro.io import DataCatalog, DatasetError, Version
from kedro.runner import SequentialRunner, ThreadRunner
from mlflow import MlflowClient
from mlflow.pyfunc.model import PythonModel
from mlflow.tracking import fluent
from sklearn.linear_model import LinearRegression

from runtime import (
    MlflowModelLocalFileSystemDataset,
    MlflowModelRegistryDataset,
    MlflowModelTrackingDataset,
)

from ...conftest import REPOSITORY
from ...support.projects import Project, needs_kedro
from ...support.servers import counting_proxy, free_port
from ..test_runners import tracked_on

# No requirements but MLflow.
QUICK: dict[str, Any] = {"pip_requirements": []}

TABLE = pd.DataFrame({"x": [0.0, 1.0, 2.0, 3.0], "z": [1.0, 0.0, 1.0, 0.0]})
TARGET = np.array([0.0, 2.0, 4.0, 6.0])


@dataclass
class Kind:
    """A kind of model: how MLflow is to take it, a model, and what to ask it for."""

    flavor: str
    model: Callable[[Path], Any]
    predict: Callable[[Any], Any] = lambda model: model.predict(TABLE)
    workflow: str | None = None
    save_args: dict[str, Any] = field(default_factory=dict)

    def arguments(self, folder: Path) -> dict[str, Any]:
        save_args = {
            name: value.format(folder=folder) if isinstance(value, str) else value
            for name, value in self.save_args.items()
        }
        return {
            "flavor": self.flavor,
            "pyfunc_workflow": self.workflow,
            "save_args": {**QUICK, **save_args},
        }


class Doubling(PythonModel):
    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:  # noqa: ARG002
        return model_input["x"] * 2


def double(model_input: Any) -> Any:
    return model_input["x"] * 2


def line(slope: float = 2.0) -> LinearRegression:
    return LinearRegression().fit(TABLE[["x"]], TABLE["x"] * slope)


def slope(model: Any) -> float:
    return round(float(model.coef_[0]), 6)


def boosted_by_xgboost(folder: Path) -> Any:
    import xgboost

    return xgboost.XGBRegressor(n_estimators=3).fit(TABLE, TARGET)


def boosted_by_lightgbm(folder: Path) -> Any:
    import lightgbm

    options = {"min_data_in_leaf": 1, "min_data_in_bin": 1, "verbose": -1}
    return lightgbm.train(options, lightgbm.Dataset(TABLE, TARGET), num_boost_round=3)


def fitted_by_statsmodels(folder: Path) -> Any:
    import statsmodels.api  # type: ignore[import-untyped]

    return statsmodels.api.OLS(TARGET, TABLE).fit()


def loader(folder: Path) -> str:
    """Write a module that loads a model from its data; give its name."""
    name = f"loader_{folder.name.translate(str.maketrans('-[]', '___'))}"
    (folder / "slope.txt").write_text("2")
    (folder / f"{name}.py").write_text(
        "from pathlib import Path\n"
        "class Line:\n"
        "    def __init__(self, slope):\n        self.slope = slope\n"
        "    def predict(self, table):\n        return table['x'] * self.slope\n"
        "def _load_pyfunc(path):\n    return Line(float(Path(path).read_text()))\n"
    )
    sys.path.insert(0, str(folder))
    return name


KINDS = {
    "scikit-learn": Kind("mlflow.sklearn", lambda _: LinearRegression().fit(TABLE, TARGET)),
    "xgboost": Kind("mlflow.xgboost", boosted_by_xgboost),
    "lightgbm": Kind("mlflow.lightgbm", boosted_by_lightgbm),
    "statsmodels": Kind("mlflow.statsmodels", fitted_by_statsmodels),
    "a PythonModel": Kind("mlflow.pyfunc", lambda _: Doubling(), workflow="python_model"),
    "a function": Kind("mlflow.pyfunc", lambda _: double, workflow="python_model"),
    "a loader": Kind(
        "mlflow.pyfunc",
        loader,
        workflow="loader_module",
        save_args={"data_path": "{folder}/slope.txt"},
    ),
}

any_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what a test puts on the import path, and MLflow into the environment."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")


@pytest.fixture
def client(tmp_path: Path, empty_store: Path) -> Iterator[MlflowClient]:
    """A client of a store, and a run that is open as in a notebook."""
    shutil.copy(empty_store, tmp_path)
    uri = f"sqlite:///{tmp_path.as_posix()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    location = (tmp_path / "mlartifacts").as_uri()
    mlflow.set_experiment(experiment_id=client.create_experiment("models", location))
    with mlflow.start_run():
        yield client
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # mlflow.set_experiment leaves it there
    fluent._active_experiment_id = None
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def run_id() -> str:
    run = mlflow.active_run()
    assert run
    return str(run.info.run_id)


def tracked(**arguments: Any) -> MlflowModelTrackingDataset:
    save_args = {**QUICK, **arguments.pop("save_args", {})}
    return MlflowModelTrackingDataset("mlflow.sklearn", save_args=save_args, **arguments)


def local(path: Path | str, **arguments: Any) -> MlflowModelLocalFileSystemDataset:
    save_args = {**QUICK, **arguments.pop("save_args", {})}
    return MlflowModelLocalFileSystemDataset(
        str(path), "mlflow.sklearn", save_args=save_args, **arguments
    )


def registered(**arguments: Any) -> MlflowModelRegistryDataset:
    return MlflowModelRegistryDataset("line", flavor="mlflow.sklearn", **arguments)


# A pipeline whose models are loaded in the run that made them, and one that takes one from
# elsewhere. `look` fails where a model isn't the right one.
LINES = """
from kedro.pipeline import Node, Pipeline


def fit(slope):
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit([[0], [1]], [0, slope])


def look(expected, *models):
    seen = [round(float(model.coef_[0])) for model in models]
    assert seen == expected, seen
    return seen


def create_pipeline():
    made = Pipeline([
        Node(fit, "params:three", "first_model", name="first"),
        Node(fit, "params:five", "second_model", name="second"),
    ])
    inner = Pipeline(
        [Node(fit, "params:five", "first_model")],
        namespace="inner", parameters={"params:five"},
    )
    models = ["first_model", "second_model", "inner.first_model"]
    return made + inner + Pipeline([Node(look, ["params:expected", *models], "seen")])
"""
LINES_CATALOG = """
"{name}_model":
  type: PACKAGE.runtime.MlflowModelTrackingDataset
  flavor: mlflow.sklearn
  save_args:
    pip_requirements: []
    registered_model_name: "{name}"
    registered_model_alias: best
"""
SLOPES = {"three": 3, "five": 5, "expected": [3, 5, 5]}

INFERENCE = """
from kedro.pipeline import Node, Pipeline


def fit(slope):
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit([[0], [1]], [0, slope])


def use(model):
    return round(float(model.coef_[0]), 6)


def create_pipeline():
    return Pipeline([NODES])
"""
TRAIN = 'Node(fit, "params:slope", "line")'
USE = 'Node(use, "line", "used")'


def write_pipelines(project: Project, load_args: str = "{}", more: str = "{}") -> None:
    """Write the pipelines `training` and `inference`, which share the catalog entry `line`."""
    project.pipeline(INFERENCE.replace("NODES", f"{TRAIN}, {USE}"), "training")
    project.pipeline(INFERENCE.replace("NODES", USE), "inference")
    project.parameters({"slope": 2})
    project.catalog(
        f"""
        line:
          type: PACKAGE.runtime.MlflowModelTrackingDataset
          flavor: mlflow.sklearn
          load_args: {load_args}
          save_args: {{pip_requirements: [], registered_model_name: line}}
        """
    )


def test_importing_the_datasets_leaves_mlflow_alone() -> None:
    code = """
import sys
from runtime import (
    MlflowModelLocalFileSystemDataset, MlflowModelRegistryDataset, MlflowModelTrackingDataset
)
for dataset in (
    MlflowModelLocalFileSystemDataset("model", "mlflow.sklearn"),
    MlflowModelRegistryDataset("model"),
    MlflowModelTrackingDataset("mlflow.sklearn"),
):
    str(dataset)
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@any_kind
def test_a_model_of_any_kind_is_logged_and_loaded(
    client: MlflowClient, tmp_path: Path, kind: Kind
) -> None:
    model = kind.model(tmp_path)
    dataset = MlflowModelTrackingDataset(**kind.arguments(tmp_path))

    dataset.save(model)

    loaded = dataset.load()
    assert list(kind.predict(loaded)) == pytest.approx(list(TARGET), abs=4)
    if kind.workflow is None:
        assert list(kind.predict(loaded)) == list(kind.predict(model))
    (logged,) = client.search_logged_models([client.get_run(run_id()).info.experiment_id])
    assert logged.source_run_id == run_id()
    assert dataset.model_info
    assert dataset.model_uri == dataset.model_info.model_uri == logged.model_uri


@any_kind
def test_a_model_of_any_kind_is_saved_to_a_local_folder_twice(tmp_path: Path, kind: Kind) -> None:
    model = kind.model(tmp_path)
    folder = tmp_path / "with a space" / "model 1"
    dataset = MlflowModelLocalFileSystemDataset(str(folder), **kind.arguments(tmp_path))
    assert not dataset.exists()

    dataset.save(model)
    dataset.save(model)

    assert dataset.exists()
    assert list(kind.predict(dataset.load())) == pytest.approx(list(TARGET), abs=4)
    assert [path.name for path in folder.parent.iterdir()] == ["model 1"]


# What a model of each kind requires besides MLflow; with what it may have been serialized.
SERIALIZERS = {"cloudpickle", "skops"}
REQUIRED = {
    "scikit-learn": ({"scikit-learn"}, SERIALIZERS),
    "xgboost": ({"xgboost"}, set()),
    "lightgbm": ({"lightgbm"}, SERIALIZERS),
    "statsmodels": ({"statsmodels"}, set()),
    "a PythonModel": ({"cloudpickle"}, set()),
    "a function": ({"cloudpickle"}, set()),
    "a loader": ({"cloudpickle"}, set()),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_requires_what_its_flavor_does_without_a_search(
    client: MlflowClient,
    tmp_path: Path,
    started: list[list[str]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for lock in ("uv.lock", "pyproject.toml"):
        Path(lock).touch()
    arguments, model = KINDS[name].arguments(tmp_path), KINDS[name].model(tmp_path)
    save_args = {**arguments.pop("save_args"), "pip_requirements": None}
    save_args["extra_pip_requirements"] = ["emoji==1.0"]
    dataset = MlflowModelTrackingDataset(**arguments, save_args=save_args)

    dataset.save(model)
    MlflowModelLocalFileSystemDataset("local", **arguments, save_args=save_args).save(model)

    place = client.get_logged_model(dataset.model_uri.rpartition("/")[2]).artifact_location
    always, serializers = REQUIRED[name]
    for folder in (Path(place.removeprefix("file://")), Path("local")):
        lines = (folder / "requirements.txt").read_text().splitlines()
        pinned = dict(line.split("==") for line in lines)
        assert {*always, "emoji", "mlflow"} <= set(pinned)
        assert set(pinned) <= {*always, *serializers, "emoji", "mlflow"}
        installed = {"emoji": "1.0", "xgboost": metadata.version("xgboost-cpu")}
        assert pinned == {n: installed.get(n) or metadata.version(n) for n in pinned}
        assert not (folder / "uv.lock").exists()
    assert started == []


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner])
def test_models_are_loaded_in_the_run_that_made_them(project: Project, runner: Any) -> None:
    project.pipeline(LINES)
    project.catalog(LINES_CATALOG)
    project.parameters(SLOPES)

    for _ in range(2):
        assert project.run(runner=runner())["seen"].load() == [3, 5, 5]

    runs = project.all_runs()
    models = project.client.search_logged_models([runs[0].info.experiment_id])
    assert sorted((model.source_run_id, model.name) for model in models) == sorted(
        (run.info.run_id, name)
        for run in runs
        for name in ("first_model", "second_model", "inner_first_model")
    )
    assert mlflow.get_active_model_id() is None


@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("spawn", marks=pytest.mark.thorough)]
)
def test_worker_processes_find_the_models_of_their_run_on_a_server(
    new_project: Callable[..., Project], request: pytest.FixtureRequest, start_method: str
) -> None:
    project = tracked_on("server", new_project, request)
    project.pipeline(LINES)
    project.catalog(LINES_CATALOG)
    project.parameters(SLOPES)

    ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=start_method)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    mlflow.set_tracking_uri(project.tracking_uri)
    for name, value in (("first", 3), ("second", 5), ("inner.first", 5)):
        best = MlflowModelRegistryDataset(name, alias="best", flavor="mlflow.sklearn")
        assert best.exists()
        assert slope(best.load()) == value


def test_the_model_saved_last_is_loaded_whoever_saved_it(client: MlflowClient) -> None:
    dataset, twin = tracked(save_args={"name": "line"}), tracked(save_args={"name": "line"})
    assert not dataset.exists()

    dataset.save(line(2))
    dataset.save(line(3))
    tracked(save_args={"name": "other"}).save(line(4))

    assert slope(dataset.load()) == 3
    # Another process of the run knows only the run and the name.
    assert twin.exists()
    assert slope(twin.load()) == 3
    assert twin.model_uri == dataset.model_uri


def test_a_model_whose_saving_failed_is_not_loaded(client: MlflowClient) -> None:
    dataset, twin = tracked(), tracked()
    dataset.save(line(2))

    with pytest.raises(DatasetError, match="can't save a LinearRegression as 'model': TypeError"):
        dataset.save((line(3), {"no_such_argument": 1}))
    with pytest.raises(DatasetError, match=r"mlflow\.xgboost can't save a str as 'model'"):
        MlflowModelTrackingDataset("mlflow.xgboost", save_args=QUICK).save("no model")

    assert slope(twin.load()) == 2


def test_a_bound_dataset_forgets_what_it_saved_in_an_earlier_run(project: Project) -> None:
    write_pipelines(project)
    project.run(pipeline_names=["training"])
    with pytest.raises(DatasetError, match=r"The run \w+ has no model 'line'"):
        project.run(pipeline_names=["inference"])


def test_an_artifact_path_of_earlier_mlflow_is_the_name(client: MlflowClient) -> None:
    dataset = tracked(save_args={"artifact_path": "old"})
    dataset.save(line())
    assert client.get_logged_model(dataset.model_uri.rpartition("/")[2]).name == "old"
    assert tracked(save_args={"name": "old"}).model_uri == dataset.model_uri


def test_a_node_may_return_an_input_example_that_gives_the_signature(
    client: MlflowClient, tmp_path: Path
) -> None:
    example = TABLE[["x"]].head(2)

    dataset = tracked(save_args={"signature": "auto"})
    dataset.save((line(), {"input_example": example}))

    info = dataset.model_info
    assert info
    assert info.signature.inputs.input_names() == ["x"]
    assert info.signature.outputs
    pyfunc = mlflow.pyfunc.load_model(dataset.model_uri)
    pd.testing.assert_frame_equal(pyfunc.input_example, example)
    assert slope(dataset.load()) == 2

    there = local(tmp_path / "model")
    there.save((line(), {"input_example": example, "metadata": {"made": "here"}}))
    described = mlflow.models.get_model_info(str(tmp_path / "model"))
    assert described.signature.inputs.input_names() == ["x"]
    assert described.metadata == {"made": "here"}


def test_an_input_example_stands_in_the_catalog(project: Project) -> None:
    project.pipeline(INFERENCE.replace("NODES", TRAIN))
    project.parameters({"slope": 2})
    project.catalog(
        """
        line:
          type: PACKAGE.runtime.MlflowModelTrackingDataset
          flavor: mlflow.sklearn
          save_args:
            pip_requirements: []
            signature: auto
            input_example: [{width: 0.5}, {width: 1.5}]
        """
    )

    project.run()

    (model,) = project.client.search_logged_models([project.only_run().info.experiment_id])
    info = mlflow.models.get_model_info(model.model_uri)
    assert [(spec.name, spec.type.name) for spec in info.signature.inputs] == [("width", "double")]
    assert info.signature.outputs
    assert mlflow.pyfunc.load_model(model.model_uri).predict([{"width": 2.0}]) == pytest.approx([4])


def test_a_signature_that_cannot_be_inferred_is_an_error(
    client: MlflowClient, tmp_path: Path
) -> None:
    for dataset in (
        tracked(save_args={"signature": "auto"}),
        local(tmp_path / "model", save_args={"signature": "auto"}),
    ):
        with pytest.raises(DatasetError, match="`signature: auto` needs an input example"):
            dataset.save(line())
    assert client.search_logged_models([client.get_run(run_id()).info.experiment_id]) == []


# The same signature as MLflow writes it, and in YAML.
SIGNATURES: dict[str, dict[str, Any]] = {
    "JSON": {"inputs": '[{"name": "x", "type": "double"}]', "outputs": '[{"type": "double"}]'},
    "YAML": {"inputs": [{"name": "x", "type": "double"}], "outputs": [{"type": "double"}]},
}


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_signature_may_be_written_in_the_catalog(
    client: MlflowClient, tmp_path: Path, signature: dict[str, Any]
) -> None:
    expected = mlflow.models.ModelSignature.from_dict(SIGNATURES["JSON"])
    dataset = tracked(save_args={"signature": signature})
    there = local(tmp_path / "model", save_args={"signature": signature})

    for each in (dataset, there):
        each.save(line())

    described = mlflow.models.get_model_info(str(tmp_path / "model"))
    assert dataset.model_info
    assert (dataset.model_info.signature, described.signature) == (expected, expected)


@pytest.mark.parametrize(
    ("signature", "sentence"),
    [
        ("yes", "or a mapping of inputs, outputs, params as in MLmodel, got 'yes'"),
        ({"input": "[]"}, "or a mapping of inputs, outputs, params as in MLmodel, got {'input'"),
        ({}, "as in MLmodel, got {}"),
        (
            {"inputs": [{"name": "x", "type": "doubel"}]},
            "'doubel'}]}: MlflowException: ",
        ),
        ({"inputs": "x, y"}, "got {'inputs': 'x, y'}: JSONDecodeError"),
        ({"inputs": {"x": "double"}}, "got {'inputs': {'x': 'double'}}: "),
    ],
)
def test_a_signature_that_is_none_is_refused_when_the_dataset_is_made(
    signature: Any, sentence: str
) -> None:
    for make in (tracked, partial(local, "model")):
        with pytest.raises(DatasetError, match=re.escape(sentence)) as refused:
            make(save_args={"signature": signature})
        assert str(refused.value).startswith("`save_args.signature` is `auto`, or")
        assert "\n" not in str(refused.value)


def test_a_model_is_registered_with_an_alias_and_loaded_from_the_registry(
    client: MlflowClient,
) -> None:
    arguments = {"registered_model_name": "line", "await_registration_for": 10}
    assert not registered().exists()
    tracked(save_args={**arguments, "registered_model_alias": "best"}).save(line(2))
    tracked(save_args=arguments).save(line(3))
    client.transition_model_version_stage("line", "1", "Production")

    assert slope(registered().load()) == 3
    assert slope(registered(alias="best").load()) == 2
    assert slope(registered(stage_or_version=1).load()) == 2
    assert slope(registered(stage_or_version="2").load()) == 3
    assert slope(registered(stage_or_version="production").load()) == 2
    # The default flavor gives a model that knows where it comes from.
    assert MlflowModelRegistryDataset("line").load().metadata.run_id == run_id()

    tracked(save_args={**arguments, "registered_model_alias": "best"}).save(line(4))
    assert slope(registered(alias="best").load()) == 4

    present: list[dict[str, Any]] = [
        {},
        {"alias": "best"},
        {"stage_or_version": 3},
        {"stage_or_version": "production"},
    ]
    absent: list[dict[str, Any]] = [
        {"alias": "worst"},
        {"stage_or_version": 4},
        {"stage_or_version": "staging"},
    ]
    assert [registered(**which).exists() for which in present] == [True] * 4
    assert [registered(**which).exists() for which in absent] == [False] * 3


def test_the_registry_may_be_another_than_the_tracking_store(
    project: Project, empty_store: Path
) -> None:
    shutil.copy(empty_store, project.path / "registry.db")
    project.mlflow_yml("server: {mlflow_registry_uri: 'sqlite:///registry.db'}")
    project.pipeline(INFERENCE.replace("NODES", f"{TRAIN}, {USE}"), "training")
    project.pipeline(INFERENCE.replace("NODES", USE).replace('"line"', '"best"'), "inference")
    project.parameters({"slope": 2})
    project.catalog(
        """
        line:
          type: PACKAGE.runtime.MlflowModelTrackingDataset
          flavor: mlflow.sklearn
          save_args:
            pip_requirements: []
            registered_model_name: line
            registered_model_alias: best
        best:
          type: PACKAGE.runtime.MlflowModelRegistryDataset
          model_name: line
          alias: best
          flavor: mlflow.sklearn
        """
    )

    project.run(pipeline_names=["training"])
    assert project.run(pipeline_names=["inference"])["used"].load() == 2

    registry = MlflowClient(
        project.tracking_uri, f"sqlite:///{project.path.as_posix()}/registry.db"
    )
    assert str(registry.get_model_version_by_alias("line", "best").version) == "1"
    store = MlflowClient(project.tracking_uri, project.tracking_uri)
    assert store.search_registered_models() == []


def test_a_model_is_picked_at_run_time_by_its_run(project: Project) -> None:
    write_pipelines(project, load_args='{run_id: "${runtime_params:model_run_id, null}"}')
    for value in (2, 3):
        # Without the parameter the model is that of the run itself.
        assert project.run(pipeline_names=["training"], params={"slope": value})["used"].load() == (
            value
        )
    first = project.all_runs()[-1].info.run_id

    used = project.run(pipeline_names=["inference"], params={"model_run_id": first})

    assert used["used"].load() == 2
    with pytest.raises(DatasetError, match="There is no run 'gone' on "):
        project.run(pipeline_names=["inference"], params={"model_run_id": "gone"})
    with pytest.raises(DatasetError, match=f"{first}.* is for loading only"):
        project.run(pipeline_names=["training"], params={"model_run_id": first})


def test_a_model_of_a_run_of_mlflow_2_is_picked_by_its_run(
    client: MlflowClient, tmp_path: Path
) -> None:
    old = client.create_run("0").info.run_id
    local(tmp_path / "model").save(line(3))
    file = tmp_path / "model" / "MLmodel"
    described = yaml.safe_load(file.read_text())
    for key in ("model_id", "prompts", "is_signature_from_type_hint"):
        described.pop(key, None)
    path = "models/a line"
    of_old = {"artifact_path": path, "run_id": old, "mlflow_version": "2.22.0"}
    file.write_text(yaml.safe_dump({**described, **of_old}))
    client.log_artifacts(old, str(tmp_path / "model"), path)

    dataset = tracked(load_args={"run_id": old}, save_args={"artifact_path": path})

    assert dataset.exists()
    assert slope(dataset.load()) == 3
    (tmp_path / "copy").mkdir()
    assert (tmp_path / "copy" / dataset.copy_to(tmp_path / "copy")["filepath"] / "MLmodel").exists()
    absent = tracked(load_args={"run_id": old}, save_args={"artifact_path": "models"})
    assert not absent.exists()
    with pytest.raises(DatasetError, match=f"The run {old} has no model 'models'"):
        absent.load()


def test_a_model_is_picked_at_run_time_by_its_uri(project: Project, tmp_path: Path) -> None:
    write_pipelines(project, load_args='{model_uri: "${runtime_params:model_uri, null}"}')
    project.run(pipeline_names=["training"])
    run = project.only_run()
    (model,) = project.client.search_logged_models([run.info.experiment_id])
    project.client.set_registered_model_alias("line", "best", "1")
    local(tmp_path / "model").save(line(4))

    for uri, value in {
        model.model_uri: 2,  # models:/m-…
        f"runs:/{run.info.run_id}/line": 2,
        "models:/line@best": 2,
        "models:/line/1": 2,
        "models:/line/latest": 2,
        str(tmp_path / "model"): 4,
    }.items():
        used = project.run(pipeline_names=["inference"], params={"model_uri": uri})
        assert used["used"].load() == value, uri

    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [inference]}}")
    number = len(project.all_runs())
    used = project.run(pipeline_names=["inference"], params={"model_uri": "models:/line@best"})
    assert used["used"].load() == 2
    assert len(project.all_runs()) == number


@pytest.mark.parametrize(
    ("uri", "exists"),
    [
        ("models:/line/1", True),
        ("models:/line/9", False),
        ("models:/line@gone", False),
        ("models:/gone/latest", False),
        ("models:/m-0123456789", False),
        ("runs:/{run}/model", True),
        ("runs:/{run}/gone", False),
        ("runs:/gone/model", False),
        ("no/such/folder", False),
    ],
)
def test_a_uri_that_leads_nowhere_is_told_in_a_sentence(
    client: MlflowClient, uri: str, exists: bool
) -> None:
    tracked(save_args={"registered_model_name": "line"}).save(line())
    uri = uri.format(run=run_id())
    dataset = tracked(load_args={"model_uri": uri})

    assert dataset.model_uri == uri
    assert dataset.exists() is exists
    if not exists:
        with pytest.raises(
            DatasetError, match=f"mlflow.sklearn can't load {re.escape(uri)}: "
        ) as e:
            dataset.load()
        assert "\n" not in str(e.value)


def test_a_model_of_another_flavor_is_told_in_a_sentence(client: MlflowClient) -> None:
    tracked().save(line())
    wrong = MlflowModelTrackingDataset("mlflow.xgboost")
    with pytest.raises(DatasetError, match=r"^mlflow.xgboost can't load models:/m-\w+: .*xgboost"):
        wrong.load()


def test_a_disabled_pipeline_hands_its_model_on_and_logs_nothing(project: Project) -> None:
    project.pipeline(LINES)
    project.catalog(LINES_CATALOG)
    project.parameters(SLOPES)
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [__default__]}}")

    assert project.run()["seen"].load() == [3, 5, 5]

    assert project.all_runs() == []
    assert project.client.search_logged_models(["0"]) == []


def test_threads_that_save_at_once_each_get_their_run(client: MlflowClient) -> None:
    mlflow.end_run()
    together = threading.Barrier(4)
    environ_get = os._Environ.get

    def save(number: int) -> tuple[str, str, float]:
        with mlflow.start_run():
            dataset = tracked()
            together.wait(60)
            example = TABLE[["x"]].head(1)
            dataset.save((line(number), {"input_example": example}))
            assert dataset.model_info
            return run_id(), dataset.model_info.run_id, slope(dataset.load())

    with ThreadPoolExecutor(4) as threads:
        saved = list(threads.map(save, range(1, 5)))

    assert [mine for mine, _, _ in saved] == [of_model for _, of_model, _ in saved]
    assert len({mine for mine, _, _ in saved}) == 4
    assert [value for _, _, value in saved] == [1, 2, 3, 4]
    assert os._Environ.get is environ_get


def test_metrics_are_linked_with_a_model_only_when_they_were_there(client: MlflowClient) -> None:
    mlflow.log_metric("before", 1)
    dataset = tracked()
    dataset.save(line())
    dataset.load()
    mlflow.log_metric("after", 2)

    logged = client.get_logged_model(dataset.model_uri.rpartition("/")[2])
    assert [metric.key for metric in logged.metrics or []] == ["before"]
    assert mlflow.get_active_model_id() is None


def test_a_local_model_touches_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with counting_proxy(free_port()) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        dataset = local("relative/model", log_args={"name": "ignored"})

        dataset.save((line(), {"input_example": TABLE[["x"]]}))

        assert slope(dataset.load()) == 2
        assert server.requests == []
    assert Path("relative/model/MLmodel").is_file()


def test_a_local_model_stays_when_saving_another_fails(tmp_path: Path) -> None:
    dataset = local(tmp_path / "model")
    with pytest.raises(DatasetError, match=r"There is no model at .*model\. Save one first"):
        dataset.load()
    dataset.save(line(2))

    with pytest.raises(DatasetError, match="can't save a LinearRegression"):
        dataset.save((line(3), {"registered_model_name": "line"}))

    assert slope(dataset.load()) == 2
    assert [path.name for path in tmp_path.glob("*model*")] == ["model"]


def test_a_local_model_replaces_nothing_but_a_model(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    local(folder).save(line())  # an empty folder is no loss
    (folder / "MLmodel").rename(folder / "notes.txt")
    file.write_text("notes")

    for path in (folder, file):
        with pytest.raises(DatasetError, match=f"{path} isn't replaced"):
            local(path).save(line())
    assert (folder / "notes.txt").exists()


@needs_kedro("1.3")  # list_versions
def test_a_local_model_has_versions(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for number in (2, 3):
        local(path, version=Version(None, f"v{number}")).save(line(number))

    latest = local(path, version=Version(None, None))
    assert latest.list_versions(full_path=False) == ["v3", "v2"]
    assert slope(latest.load()) == 3
    assert slope(local(path, version=Version("v2", None)).load()) == 2
    assert not local(path, version=Version("v1", None)).exists()
    with pytest.raises(DatasetError, match="must not exist if versioning is enabled"):
        local(path, version=Version(None, "v2")).save(line())
    with pytest.raises(DatasetError, match="can't save"):
        local(path, version=Version(None, "v4")).save((line(), {"wrong": 1}))
    assert sorted(file.name for file in path.iterdir()) == ["v2", "v3"]

    local(path, version=Version(None, "v5")).save(line(5))
    assert slope(latest.load()) == 3
    latest.release()
    assert slope(latest.load()) == 5


def test_a_project_saves_models_to_its_own_folder_with_versions(project: Project) -> None:
    project.pipeline(INFERENCE.replace("NODES", f"{TRAIN}, {USE}"), "training")
    project.pipeline(INFERENCE.replace("NODES", USE), "inference")
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [training]}}")
    project.parameters({"slope": 2})
    project.catalog(
        """
        line:
          type: PACKAGE.runtime.MlflowModelLocalFileSystemDataset
          filepath: data/06_models/line
          flavor: mlflow.sklearn
          versioned: true
          save_args: {pip_requirements: []}
        """
    )
    for value in (2, 3):
        project.run(pipeline_names=["training"], params={"slope": value})
    first, second = sorted(path.name for path in (project.path / "data/06_models/line").iterdir())
    assert project.all_runs() == []

    assert project.run(pipeline_names=["inference"])["used"].load() == 3
    for version, value in ((first, 2), (second, 3)):
        used = project.run(pipeline_names=["inference"], load_versions={"line": version})
        assert used["used"].load() == value


@pytest.mark.parametrize("path", ["s3://bucket/model", "memory://model", "https://host/model"])
def test_a_local_model_is_on_a_local_disk(path: str) -> None:
    with pytest.raises(DatasetError, match=f"is a local folder, got '{path}'"):
        local(path)


@pytest.mark.parametrize("flavor", ["mlflow.skleran", "sklearn", "no.such", "", None, ".sklearn"])
def test_a_flavor_that_is_none_is_refused(flavor: Any) -> None:
    for make in (
        MlflowModelTrackingDataset,
        lambda flavor: MlflowModelLocalFileSystemDataset("model", flavor),
        lambda flavor: MlflowModelRegistryDataset("line", flavor=flavor),
    ):
        with pytest.raises(DatasetError, match=f"`flavor` is a module such .* got {flavor!r}"):
            make(flavor)


@pytest.mark.parametrize("workflow", [None, "python_modell"])
def test_a_pyfunc_model_needs_its_workflow(workflow: str | None) -> None:
    with pytest.raises(DatasetError, match=f"or `loader_module`, got {workflow!r}"):
        MlflowModelTrackingDataset("mlflow.pyfunc", workflow)


def test_a_flavor_that_cannot_work_says_why(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match=r"mlflow.paddle can't .*paddle"):
        MlflowModelTrackingDataset("mlflow.paddle").save(line())
    with pytest.raises(DatasetError, match=r"got 'mlflow\.data', which has no `log_model`"):
        MlflowModelTrackingDataset("mlflow.data").save(line())


def test_wrong_arguments_are_refused(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match="exclude each other, got 'best' and 1"):
        registered(stage_or_version=1, alias="best")
    with pytest.raises(DatasetError, match="only loads"):
        registered().save(1)
    with pytest.raises(DatasetError, match="'best' alone"):
        tracked(save_args={"registered_model_alias": "best"})
    with pytest.raises(DatasetError, match="got 'models:/line/1' and 'abc'"):
        tracked(load_args={"model_uri": "models:/line/1", "run_id": "abc"})
    with pytest.raises(DatasetError, match=r"\(models:/line/1\) is for loading only"):
        tracked(load_args={"model_uri": "models:/line/1"}).save(line())
    with pytest.raises(DatasetError, match="has no model 'model'"):
        tracked().load()
    mlflow.end_run()
    for use in (tracked().load, lambda: tracked().save(line())):
        with pytest.raises(DatasetError, match="has no run to use"):
            use()
    assert not tracked().exists()


@pytest.mark.parametrize(
    ("save_args", "sentence"),
    [
        ({"name": "a/b"}, "`save_args.name` is a text without / : . % and quotes, got 'a/b'."),
        (
            {"artifact_path": "a.b"},
            "`save_args.artifact_path` is a text without / : . %",
        ),
        ({"name": ""}, "`save_args.name` is a text without / : . % and quotes, got ''."),
        ({"name": 5}, "got 5."),
        (
            {"name": "a", "artifact_path": "b"},
            "exclude each other, got 'a' and 'b'.",
        ),
        ({"registered_model_name": ""}, "_model_name` is a text without / and :, got ''."),
        ({"registered_model_name": "a:b"}, "registered_model_name` is a text without / and :, got"),
        ({"registered_model_name": "a", "registered_model_alias": "v3"}, "such as `v3`, got 'v3'."),
        ({"registered_model_name": "a", "registered_model_alias": "a b"}, "has letters, digits, _"),
    ],
)
def test_names_that_mlflow_refuses_are_refused_when_the_dataset_is_made(
    client: MlflowClient, save_args: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        tracked(save_args=save_args)
    if "registered_model_alias" not in save_args:  # nodes don't give any
        with pytest.raises(DatasetError, match=re.escape(sentence)):
            tracked().save((line(), save_args))


def test_names_of_null_are_the_defaults(client: MlflowClient) -> None:
    nothing = {"name": None, "artifact_path": None, "registered_model_name": None}
    dataset = tracked(save_args={**nothing, "registered_model_alias": None, "signature": None})
    dataset.bind(None, None, "a line")

    dataset.save(line())

    assert client.get_logged_model(dataset.model_uri.rpartition("/")[2]).name == "a line"


@pytest.mark.parametrize("arguments", [{"model_name": "a/b"}, {"model_name": "a", "alias": "b/c"}])
def test_names_that_no_registered_model_has_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"got '(a/b|b/c)'\."):
        MlflowModelRegistryDataset(**arguments)


def test_a_model_that_cannot_be_saved_is_named_in_the_error(client: MlflowClient) -> None:
    with pytest.raises(DatasetError, match="can't save a lock as 'old': "):
        tracked(save_args={"artifact_path": "old"}).save(threading.Lock())


DATASETS: dict[str, Callable[[], Any]] = {
    "tracking": lambda: tracked(
        load_args={"run_id": "abc"},
        save_args={"registered_model_name": "a", "registered_model_alias": "b"},
        metadata={"a": 1},
    ),
    "registry": lambda: registered(metadata={"a": 1}),
    "local": lambda: local("model", metadata={"a": 1}, version=Version("then", "now")),
}


@pytest.mark.parametrize("make", DATASETS.values(), ids=DATASETS.keys())
def test_a_dataset_pickles_deep_copies_and_describes_itself(make: Callable[[], Any]) -> None:
    dataset = make()
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert str(twin) == str(dataset)
        assert twin.metadata == {"a": 1}
        assert twin._init_config() == dataset._init_config()
    assert not re.search("metadata|=None|={}| at 0x", str(dataset))
    assert "mlflow.sklearn" in str(dataset)
    config, *_ = DataCatalog({"model": dataset}).to_config()
    rebuilt = DataCatalog.from_config(config)["model"]
    assert str(rebuilt).partition("version=")[0] == str(dataset).partition("version=")[0]


def test_a_dataset_pickles_after_it_has_saved(client: MlflowClient) -> None:
    dataset = tracked()
    dataset.save(line())
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert twin.model_uri == dataset.model_uri
        assert slope(twin.load()) == 2
    assert dataset.model_uri in str(dataset)
