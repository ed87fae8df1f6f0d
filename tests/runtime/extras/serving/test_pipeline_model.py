"""What travels with a pipeline that is a model, and how it predicts without its project."""

from __future__ import annotations

import copy
import datetime
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import hypothesis
import hypothesis.strategies as st
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from click import ClickException
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.runner import AbstractRunner, ParallelRunner, SequentialRunner, ThreadRunner
from kedro_datasets.json import JSONDataset  # type: ignore[import-untyped]
from kedro_datasets.pickle import PickleDataset  # type: ignore[import-untyped]
from mlflow import MlflowException
from mlflow.models import infer_signature
from mlflow.pyfunc.model import PythonModelContext

from runtime import KedroPipelineModel, pipeline_ml_factory
from runtime.serving.pipeline_ml import PipelineError

from ....support import forks
from ....support.projects import Project, copy_of, for_kedro, needs_kedro
from ....support.s3 import S3
from ....support.servers import counting_proxy, free_port

RUNNERS = ("SequentialRunner", "ThreadRunner", "ParallelRunner")


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what MLflow puts on the import path for a model, and where it looks for runs."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def folder_of(project: Project, name: str = "model") -> Path:
    """Find the files of the model of that name that was logged last."""
    experiments = [e.experiment_id for e in project.client.search_experiments()]
    found = project.client.search_logged_models(experiments, filter_string=f"name = '{name}'")
    return Path(url2pathname(urlsplit(found[0].artifact_location).path))


def without_project(project: Project, model: Path, code: str, **env: str) -> Any:
    """Run code on a model in a fresh process, elsewhere, when the project's folder is gone.

    Gives what the code prints as JSON. It finds the model as `model`.
    """
    copied = project.path.with_name(f"{project.path.name} copied")
    shutil.copytree(model, copied)
    project.path.rename(project.path.with_name("gone"))
    start = "import json, sys, mlflow\nmodel = mlflow.pyfunc.load_model(sys.argv[1])\n"
    ended = subprocess.run(
        [sys.executable, "-c", start + code, str(copied)],
        cwd=project.path.parent,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# Every kind of dataset travels with the model.

DATASETS = '''
"""Datasets of the project's own."""

from pathlib import Path

from kedro.io import AbstractDataset


class Pages(AbstractDataset):
    """A text of which each page is a file in a folder."""

    def __init__(self, filepath):
        self._folder = Path(filepath)

    def load(self):
        return [page.read_text() for page in sorted(self._folder.iterdir())]

    def save(self, data):
        self._folder.mkdir(parents=True)
        for number, page in enumerate(data):
            (self._folder / f"{number}.txt").write_text(page)

    def _describe(self):
        return {}


class Constant(AbstractDataset):
    """What is in no file."""

    def __init__(self, value):
        self._value = value

    def load(self):
        return self._value

    def save(self, data):
        pass

    def _describe(self):
        return {}
'''

# `earlier` logs to a run of its own what `training` finds there.
TRAINING = """
from functools import partial, update_wrapper
from pathlib import Path

import pandas as pd
from kedro.pipeline import Node, Pipeline
from mlflow.pyfunc import PythonModel
from sklearn.linear_model import LinearRegression

from PACKAGE.runtime import pipeline_ml_factory

X = {"x": "saved"}
PARTS = {"a": "A", "b": "B"}
TABLE = pd.DataFrame({"x": [1, 2]})
MADE = MADE_OF_KINDS


def line(slope):
    return LinearRegression().fit([[0.0], [1.0]], [0.0, slope])


class Weighing(PythonModel):
    def load_context(self, context):
        self.weight = float(Path(context.artifacts["weight"]).read_text())

    def predict(self, context, model_input, params=None):
        return [self.weight]


def weighing():
    file = Path("weight.txt").resolve()
    file.write_text("7")
    return Weighing(), {"artifacts": {"weight": str(file)}}


def make(name):
    return eval(MADE[name])


def look(question, *data):
    pass


def told(value):
    if hasattr(value, "predict"):
        return round(float(value.predict([[2.0]])[0]), 6)
    if isinstance(value, pd.DataFrame):
        return {name: value[name].tolist() for name in value}
    if isinstance(value, dict):
        return {name: told(part() if callable(part) else part) for name, part in value.items()}
    return value


def tell(question, **data):
    return pd.DataFrame({"name": list(data), "told": [repr(told(v)) for v in data.values()]})


def join(weights, unit):
    return {**weights, "unit": unit}


def earlier():
    return Pipeline([
        Node(lambda: line(2.0), None, "first_line", name="first"),
        Node(lambda first: line(3.0), "first_line", "second_line", name="second"),
        Node(lambda: {"x": "earlier"}, None, "earlier", name="note"),
        Node(lambda: PARTS, None, "earlier_parts", name="parts"),
    ])


def training():
    nodes = [
        Node(update_wrapper(partial(make, name), make), None, name, name=f"make_{number}")
        for number, name in enumerate(MADE)
        if MADE[name]
    ]
    inner = Pipeline([Node(join, ["weights", "params:unit"], "joined")], namespace="inner")
    return pipeline_ml_factory(
        Pipeline([*nodes, Node(look, ["question", *MADE], None, name="look")]),
        inner + Pipeline([
            Node(tell, {name: name for name in ["question", "inner.joined", *MADE]}, "answer")
        ]),
        "question",
        log_model_kwargs={"pip_requirements": []},
    )
"""


@dataclass(frozen=True)
class Kind:
    """A kind of dataset, what the training saves there, and what the model tells of it."""

    entry: dict[str, Any]
    made: str = "X"  # nothing when it is there before
    told: Any = None


def file(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "json.JSONDataset", "filepath": path, **more}


def parts(path: str, dataset: Any = "text.TextDataset", **more: Any) -> dict[str, Any]:
    kind = {"type": "partitions.PartitionedDataset", "path": path, "dataset": dataset}
    return {**kind, "filename_suffix": ".txt", **more}


def ours(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": f"PACKAGE.runtime.Mlflow{kind}Dataset", **more}


def artifact(dataset: dict[str, Any], **more: Any) -> dict[str, Any]:
    return ours("Artifact", dataset=dataset, **more)


def model(kind: str, **more: Any) -> dict[str, Any]:
    return ours(f"Model{kind}", **{"flavor": "mlflow.sklearn", **more})


def cached(dataset: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "CachedDataset", "dataset": dataset, **more}


QUICK: dict[str, Any] = {"save_args": {"pip_requirements": []}}
WEIGHING = {"flavor": "mlflow.pyfunc", "pyfunc_workflow": "python_model", **QUICK}
VERSIONED_TEXT = {"type": "text.TextDataset", "versioned": True}
S3_TEXT = {"type": "text.TextDataset", "credentials": "s3"}
EARLIER = "${runtime_params:earlier,null}"
X, PARTS = {"x": "saved"}, {"a": "A", "b": "B"}

KINDS = {
    "a file": Kind(file("data/file.json")),
    "a pickle": Kind({"type": "pickle.PickleDataset", "filepath": "data/x.pkl"}, "{1}", {1}),
    "a table": Kind(
        {
            "type": "pandas.CSVDataset",
            "filepath": "data/table.csv",
            "save_args": {"sep": ";", "index": False},
            "load_args": {"sep": ";"},
        },
        "TABLE",
        {"x": [1, 2]},
    ),
    "versions": Kind(file("data/versions.json", versioned=True)),
    "a folder": Kind({"type": "PACKAGE.datasets.Pages", "filepath": "data/pages"}, "['a']", ["a"]),
    "a model": Kind(model("LocalFileSystem", filepath="data/model", **QUICK), "line(5.0)", 10.0),
    "versions of a model": Kind(
        model("LocalFileSystem", filepath="data/models", versioned=True, **QUICK),
        "line(5.0)",
        10.0,
    ),
    "a model with artifacts": Kind(
        model("LocalFileSystem", filepath="data/weighing", **WEIGHING), "weighing()", 7.0
    ),
    "partitions": Kind(parts("data/parts/"), "PARTS", PARTS),
    "versioned partitions": Kind(parts("data/versioned", VERSIONED_TEXT), "PARTS", PARTS),
    "incremental partitions": Kind(
        parts("data/new", type="partitions.IncrementalDataset"), "PARTS", PARTS
    ),
    "memory": Kind(file("memory://data/file.json")),
    "s3": Kind(file("s3://bucket/PACKAGE/file.json", credentials="s3")),
    "versions in s3": Kind(
        file("s3://bucket/PACKAGE/versions.json", credentials="s3", versioned=True)
    ),
    "partitions in s3": Kind(
        parts("s3://bucket/PACKAGE/parts", S3_TEXT, credentials="s3"), "PARTS", PARTS
    ),
    "cached": Kind(cached(file("data/cached.json"))),
    "cached versions": Kind(cached(file("data/cached_versions.json"), versioned=True)),
    "cached artifact": Kind(cached(artifact(file("data/cached_artifact.json")))),
    "artifact": Kind(artifact(file("data/artifact.json"))),
    "versions of an artifact": Kind(artifact(file("data/artifacts.json", versioned=True))),
    "artifact in s3": Kind(artifact(file("s3://bucket/PACKAGE/a.json"), credentials="s3")),
    "log_only": Kind(artifact(file("data/log_only.json", versioned=True), log_only=True)),
    "log_only in s3": Kind(
        artifact(file("s3://bucket/PACKAGE/b.json"), credentials="s3", log_only=True)
    ),
    "log_only partitions": Kind(
        artifact(parts("data/log_only", VERSIONED_TEXT), log_only=True), "PARTS", PARTS
    ),
    "artifact of a run": Kind(
        artifact(file("data/earlier.json"), run_id=EARLIER), "", {"x": "earlier"}
    ),
    "partitions of a run": Kind(
        artifact(parts("data/earlier"), run_id=EARLIER, artifact_path="some"), "", PARTS
    ),
    "tracked model": Kind(model("Tracking", **QUICK), "line(5.0)", 10.0),
    "tracked model with artifacts": Kind(model("Tracking", **WEIGHING), "weighing()", 7.0),
    "model of a run": Kind(
        model("Tracking", save_args={"name": "first_line"}, load_args={"run_id": EARLIER}), "", 4.0
    ),
    "registered model by alias": Kind(
        model("Registry", model_name="PACKAGE", alias="best"), "", 4.0
    ),
    "registered model by version": Kind(
        model("Registry", model_name="PACKAGE", stage_or_version=2, flavor="mlflow.pyfunc"), "", 6.0
    ),
    "metric": Kind(ours("Metric"), "1.5", 1.5),
    "metric history": Kind(ours("MetricHistory"), "[1.5, 2.5]", [1.5, 2.5]),
    "metrics": Kind(ours("Metrics"), "{'a': 1, 'b': 2}", {"a": 1.0, "b": 2.0}),
    "metrics history": Kind(
        ours("MetricsHistory", prefix="of"),
        "{'a': {'step': 1, 'value': 2.0}}",
        {"of.a": {"step": 1, "value": 2.0}},
    ),
    "logged table": Kind(ours("Table"), "TABLE", {"x": [1, 2]}),
    "no file": Kind({"type": "PACKAGE.datasets.Constant", "value": 7}, "0", 7),
    "a query": Kind(
        {
            "type": "pandas.SQLQueryDataset",
            "filepath": "conf/base/query.sql",
            "credentials": "database",
        },
        "",
        {"x": [42]},
    ),
    "made by a factory": Kind({}),  # see `FACTORY`
    "inner.weights": Kind(file("data/inner.json")),
    "transcoded@pandas": Kind(
        {"type": "pandas.CSVDataset", "filepath": "data/t.csv", "save_args": {"index": False}},
        "TABLE",
        {"x": [1, 2]},
    ),
    "transcoded@text": Kind(
        {"type": "text.TextDataset", "filepath": "data/t.csv"}, "", "x\n1\n2\n"
    ),
    "größe/breite: *?": Kind(file("data/size.json")),
    "a b": Kind(file("data/collides.json"), "{'x': 'space'}", {"x": "space"}),
    "a+b": Kind(file("data/other/collides.json"), "{'x': 'plus'}", {"x": "plus"}),
    "a_b": Kind(file("data/third/collides.json"), "{'x': 'line'}", {"x": "line"}),
}
FACTORY = {"made by a {name}": file("data/{name}.json")}

# What the earlier run leaves for the training's.
LEFT = {
    "first_line": model(
        "Tracking",
        save_args={
            "pip_requirements": [],
            "registered_model_name": "PACKAGE",
            "registered_model_alias": "best",
        },
    ),
    "second_line": model(
        "Tracking", save_args={"pip_requirements": [], "registered_model_name": "PACKAGE"}
    ),
    "earlier": artifact(file("data/earlier.json")),
    "earlier_parts": artifact(parts("data/earlier"), artifact_path="some"),
}

REGISTRY = """
from kedro.pipeline import Pipeline

from .pipelines import everything


def register_pipelines():
    return {
        "__default__": Pipeline([]),
        "earlier": everything.earlier(),
        "training": everything.training(),
    }
"""

# Kedro's two runs share a process: starting one takes longer than they do.
RUN_BOTH = """
import sys
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient

bootstrap_project(sys.argv[1])
with KedroSession.create(project_path=sys.argv[1]) as session:
    session.run(pipeline_names=["earlier"])
client = MlflowClient(sys.argv[2])
(run,) = client.search_runs([client.get_experiment_by_name(sys.argv[3]).experiment_id])
params = {"earlier": run.info.run_id}
with KedroSession.create(project_path=sys.argv[1], runtime_params=params) as session:
    session.run(pipeline_names=["training"])
"""

# What a prediction by nodes that are called, and by another runner, tells, opens and connects to.
PREDICT = """
import pandas as pd
from sklearn.linear_model import LinearRegression

WATCHED = {"open", "os.listdir", "os.scandir", "import", "socket.connect", "sqlite3.connect"}
seen, predicting = [], False


def watch(event, values):
    if predicting and event in WATCHED:
        seen.append([event, str(values[0])])


# At its first prediction scikit-learn looks for plug-ins of its own.
LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]).predict([[0.0]])
sys.addaudithook(watch)
question = pd.DataFrame({"x": [1, 2]})
predicting = True
answers = [model.predict(question, params={"runner": name})
           for name in ("SequentialRunner", "ThreadRunner")]
predicting = False
print(json.dumps([*(dict(zip(a["name"], a["told"])) for a in answers), seen]))
"""


@dataclass(frozen=True)
class Everything:
    """A model that has taken every kind of dataset with it, and what it predicted elsewhere."""

    files: dict[str, bytes]
    secrets: list[str]  # what must not be in it
    told: dict[str, str]
    told_by_threads: dict[str, str]
    opened: list[list[str]]
    requests: list[str]


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: Callable[..., Path],
    empty_store: Path,
    s3: S3,
) -> Everything:
    """Train a model on every kind of dataset, and ask it where its project isn't."""
    package = f"everything_{os.getpid()}"
    project = Project(tmp_path_factory.mktemp("everything") / package, package)
    copy_of(pattern(example=False), project.path, package)
    shutil.rmtree(project.path / "src" / package / "pipelines" / "first")
    shutil.copy(empty_store, project.path)
    made = {name: kind.made for name, kind in KINDS.items()}
    project.pipeline(TRAINING.replace("MADE_OF_KINDS", repr(made)), "everything")
    project.write(f"src/{package}/pipeline_registry.py", REGISTRY)
    project.write(f"src/{package}/datasets.py", DATASETS)
    project.parameters({"inner": {"unit": "kg"}})
    entries = {name: kind.entry for name, kind in KINDS.items() if kind.entry}
    question = {"type": "pandas.CSVDataset", "filepath": "data/question.csv"}
    project.catalog(json.dumps({**entries, **LEFT, **FACTORY, "question": question}))
    project.write("data/question.csv", "x\n1\n2\n")
    project.write("conf/base/query.sql", "SELECT 42 AS x")
    keys = {"key": "key-that-stays", "secret": "secret-that-stays"}
    database = f"sqlite:///{project.path.as_posix()}/customers.db"
    credentials = {"s3": {**s3.credentials, **keys}, "database": {"con": database}}
    project.write("conf/local/credentials.yml", json.dumps(credentials))
    words = [for_kedro(RUN_BOTH), str(project.path), project.tracking_uri, package]
    trained = forks.run("-c", words, project.path, os.environ)
    assert trained.returncode == 0, trained.stderr
    folder = folder_of(project)
    found = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
    with counting_proxy(free_port()) as proxy:
        answers = without_project(project, folder, PREDICT, MLFLOW_TRACKING_URI=proxy.uri)
    told, told_by_threads, opened = answers
    secrets = [*keys.values(), s3.endpoint, str(project.path.parent)]
    return Everything(files, secrets, told, told_by_threads, opened, proxy.requests)


@pytest.mark.parametrize("name", KINDS)
def test_a_dataset_of_any_kind_travels_with_the_model(everything: Everything, name: str) -> None:
    expected = repr(X if KINDS[name].told is None else KINDS[name].told)

    assert everything.told[name] == expected
    assert everything.told_by_threads[name] == expected


def test_a_pipeline_in_a_namespace_has_its_parameters(everything: Everything) -> None:
    assert everything.told["inner.joined"] == repr({"x": "saved", "unit": "kg"})


def test_a_prediction_touches_no_disk_and_no_server(everything: Everything) -> None:
    assert everything.opened == []
    assert everything.requests == []


def test_no_credential_and_no_path_of_the_training_is_in_the_model(everything: Everything) -> None:
    traces = [*everything.secrets, tempfile.gettempdir(), sys.prefix]

    found = {
        (name, trace)
        for name, content in everything.files.items()
        for trace in traces
        if trace.encode() in content
    }

    assert found == set()
    # Data is in the artifacts alone, once.
    assert b"saved" in everything.files["artifacts/a_file/file.json"]
    assert b"saved" not in everything.files["python_model.pkl"]
    assert not [name for name in everything.files if "__pycache__" in name]
    assert not [name for name in everything.files if "example" in name]


# A small training, whose model weighs numbers.

SMALL = """
import os
import threading

from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner
from mlflow.models import infer_signature

from PACKAGE.runtime import pipeline_ml_factory

SIGNATURE = infer_signature(params={"factor": 3})


class Announcing(SequentialRunner):
    def __init__(self, word):
        super().__init__()
        self.word = word

    def run(self, *args, **kwargs):
        os.environ["ANNOUNCED"] = self.word
        return super().run(*args, **kwargs)


def make():
    return {"weight": 2}


def scale(new, factor, offset):
    return [factor * x + offset["value"] for x in new]


def weigh(scaled, weights, unit, whole):
    return [f"{x * weights['weight']} {unit} {whole['speed']}" for x in scaled]


def create_pipeline():
    return pipeline_ml_factory(
        Pipeline([MAKE]),
        Pipeline([
            Node(scale, ["new", "params:factor", "params:offset"], "scaled", name="scale"),
            Node(
                weigh, ["scaled", "weights", "params:units.big", "parameters"], "answer",
                name="weigh",
            ),
        ]),
        "new",
        kpm_kwargs=KPM,
        log_model_kwargs={"pip_requirements": [], **LOG},
    )
"""
SMALL_CATALOG = """
new: {type: json.JSONDataset, filepath: data/new.json}
weights: {type: json.JSONDataset, filepath: data/weights.json}
"""
SMALL_PARAMETERS = {"factor": 3, "offset": {"value": 1}, "units": {"big": None}, "speed": "slow"}
MAKE = 'Node(make, None, "weights", name="make")'
# The answer for 1.0.
DEFAULT = ["8.0 None slow"]


def write_small(project: Project, log: str = "{}", kpm: str = "{}", make: str = MAKE) -> None:
    code = SMALL.replace("LOG", log).replace("KPM", kpm).replace("[MAKE]", f"[{make}]")
    project.pipeline(code, "training")
    project.catalog(SMALL_CATALOG)
    project.parameters(SMALL_PARAMETERS)
    project.write("data/new.json", "[1.0, 2.0]")


def train(project: Project, name: str = "model", **how: Any) -> Any:
    """Run the training here, and load its model."""
    project.run(pipeline_names=["training"], **how)
    return mlflow.pyfunc.load_model(str(folder_of(project, name)))


# Which version travels.

LATER = "2999-01-01T00.00.00.000Z"


@pytest.fixture
def versioned(project: Project) -> Project:
    """A project in which another run, that began later, has saved its version already."""
    write_small(project)
    project.catalog(SMALL_CATALOG.replace("weights.json", "weights.json, versioned: true"))
    project.write(f"data/weights.json/{LATER}/weights.json", '{"weight": 100}')
    return project


@pytest.mark.parametrize("runner", [SequentialRunner, ParallelRunner])
def test_the_version_that_the_run_has_saved_travels(
    versioned: Project, runner: type[AbstractRunner]
) -> None:
    assert train(versioned, runner=runner()).predict([1.0]) == DEFAULT


@pytest.mark.parametrize("runner", [SequentialRunner, ParallelRunner])
def test_the_version_that_was_asked_for_travels(
    versioned: Project, runner: type[AbstractRunner]
) -> None:
    write_small(versioned, make='Node(len, "weights", "size")')
    versioned.catalog(SMALL_CATALOG.replace("weights.json", "weights.json, versioned: true"))
    versioned.write("data/weights.json/2020-01-01/weights.json", '{"weight": 10}')

    model = train(versioned, runner=runner(), load_versions={"weights": "2020-01-01"})

    assert model.predict([1.0]) == ["40.0 None slow"]


# Parameters and runners of a prediction.


def test_parameters_travel_and_others_are_for_one_prediction(project: Project) -> None:
    write_small(project)

    model = train(project, params={"offset": {"value": 2}})

    asked: list[tuple[dict[str, Any], str]] = [
        ({}, "10.0 None slow"),
        ({"factor": 5}, "14.0 None slow"),
        ({"offset": {"value": 7}}, "20.0 None slow"),
        ({"parameters": {**SMALL_PARAMETERS, "speed": "fast"}}, "10.0 None fast"),
        ({"factor": 5, "offset": {"value": 0}, "runner": "ThreadRunner"}, "10.0 None slow"),
        ({}, "10.0 None slow"),
    ]
    for predict in (model.predict, partial(model.unwrap_python_model().predict, None)):
        assert [(params, predict([1.0], params=params)[0]) for params, _ in asked] == asked
    assert {p.name for p in model.metadata.signature.params} == {
        "factor",
        "offset",
        "parameters",
        "runner",
    }


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"runner": "os.system"}, "params: runner: expected SequentialRunner or ThreadRunner or "),
        ({"factr": 2}, "params: unknown 'factr', expected 'runner' or 'factor' or 'list'"),
    ],
)
def test_what_is_wrong_in_a_request_is_said(
    tmp_path: Path, params: dict[str, Any], sentence: str
) -> None:
    model = by_hand(tmp_path, [Node(same, ["new", "params:factor", "params:list"], "answer")], ONES)

    with pytest.raises(MlflowException, match=sentence) as refused:
        model.unwrap_python_model().predict(None, 1, params=params)

    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"


# The inference has types of its own: the training takes one of its parameters as a dictionary, and
# one as another type.
TYPED = """
from dataclasses import dataclass

from kedro.pipeline import Node, Pipeline
from pydantic import BaseModel

from PACKAGE.runtime import pipeline_ml_factory


class Scale(BaseModel):
    factor: float


@dataclass
class Shift:
    offset: float


@dataclass
class Unit:
    name: str


def fit(scale: dict, shift: Unit):
    return {"weight": scale["factor"]}


def predict(new, weights, scale: Scale, shift: Shift | None, unit: Unit, everything):
    value = new[0] * weights["weight"] * scale.factor + shift.offset
    kinds = [type(everything[name]).__name__ for name in ("scale", "shift", "plain")]
    return [" ".join([str(value), unit.name, *kinds])]


def training():
    inputs = ["new", "weights", "params:scale", "params:shift", "params:deep.unit", "parameters"]
    return pipeline_ml_factory(
        Pipeline([Node(fit, ["params:scale", "params:other"], "weights")]),
        Pipeline([Node(predict, inputs, "answer")]),
        "new",
        log_model_kwargs={"signature": None, "pip_requirements": []},
    )


def create_pipeline():
    return training()
"""
TYPED_PARAMETERS = {
    "scale": {"factor": 3},
    "shift": {"offset": 1.0},
    "other": {"name": "cm"},
    "deep": {"unit": {"name": "mm"}},
    "plain": {"factor": 1},
}


@pytest.fixture
def typed(project: Project) -> Project:
    """A project whose inference takes typed parameters."""
    project.pipeline(TYPED, "training")
    project.catalog("weights: {type: json.JSONDataset, filepath: data/weights.json}")
    project.parameters(TYPED_PARAMETERS)
    return project


@needs_kedro("1.3")
def test_typed_parameters_are_what_the_nodes_of_the_inference_say(typed: Project) -> None:
    typed.run(pipeline_names=["training"])

    predicted = without_project(
        typed,
        folder_of(typed),
        """
model = model.unwrap_python_model()
print(json.dumps([
    model.predict(None, [2.0], params=params)[0]
    for params in (
        {}, {"scale": {"factor": 5}, "runner": "ThreadRunner"}, {"deep.unit": {"name": "km"}}, {}
    )
]))
""",
    )

    assert predicted == [
        "19.0 mm Scale Shift dict",
        "31.0 mm Scale Shift dict",
        "19.0 km Scale Shift dict",
        "19.0 mm Scale Shift dict",
    ]


@needs_kedro("1.3")
def test_a_parameter_that_does_not_fit_its_type_is_said_before_the_training(typed: Project) -> None:
    with pytest.raises(ClickException, match=r"'shift': .*unexpected .* argument 'of'") as told:
        typed.run(pipeline_names=["training"], params={"shift": {"of": 1.0}})

    assert "\n" not in str(told.value)
    assert typed.all_runs() == []


@needs_kedro("1.3")
def test_a_parameter_of_a_request_that_does_not_fit_its_type_is_said(typed: Project) -> None:
    model = train(typed).unwrap_python_model()

    with pytest.raises(MlflowException, match=r"params: .*'scale'") as refused:
        model.predict(None, [2.0], params={"scale": {"factor": "much"}})

    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"


def same(*inputs: Any) -> list[Any]:
    return list(inputs)


ONES = {"factor": 1, "list": [1, 1]}


def by_hand(
    folder: Path,
    nodes: list[Node],
    params: dict[str, Any] | None = None,
    stored: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Save the model of a pipeline that no project has, and load it again."""
    catalog = DataCatalog(
        {f"params:{name}": MemoryDataset(value) for name, value in (params or {}).items()}
    )
    for name, value in (stored or {}).items():
        catalog[name] = PickleDataset(filepath=(folder / "stored" / name).as_posix())
        catalog.save(name, value)
    model = KedroPipelineModel(Pipeline(nodes), catalog, "new", **options)
    known = {name: value for name, value in model.inference_params.items() if value is not None}
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=model,
        artifacts=model.extract_pipeline_artifacts(folder / "artifacts"),
        signature=infer_signature(params=known),
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(folder / "model"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_runner_predicts_the_same(tmp_path: Path, runner: str) -> None:
    nodes = [
        Node(same, ["new", "params:factor"], "a"),
        Node(same, ["new", "stored", "params:list"], "b"),
        Node(same, ["a", "b", "params:none", "params:nested.deep"], "answer"),
    ]
    params = {**ONES, "none": None, "nested.deep": {"a": {"b": 1}}}
    model = by_hand(tmp_path, nodes, params, {"stored": {"s"}})

    answer = model.predict("asked", params={"runner": runner, "list": [3]})

    assert answer == [["asked", 1], ["asked", {"s"}, [3]], None, {"a": {"b": 1}}]


def test_a_parameter_may_be_called_runner(tmp_path: Path) -> None:
    model = by_hand(tmp_path, [Node(same, ["new", "params:runner"], "answer")], {"runner": "fast"})

    assert model.predict(1) == [1, "fast"]
    assert model.predict(1, params={"runner": "slow"}) == [1, "slow"]


MEETING_OF_THREE = threading.Barrier(3)


def place(new: Any) -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def place_of_meeting(new: Any) -> tuple[int, int]:
    MEETING_OF_THREE.wait(60)  # three nodes run at once, or none does
    return place(new)


def nodes_at_once(function: Callable[[Any], Any]) -> list[Node]:
    """Make a pipeline of three nodes that wait for no other."""
    nodes = [Node(function, "new", str(number), name=str(number)) for number in range(3)]
    return [*nodes, Node(same, ["0", "1", "2"], "answer")]


def test_the_runner_has_its_options_when_the_model_is_loaded(tmp_path: Path) -> None:
    alone = by_hand(tmp_path / "1", nodes_at_once(place), runner=ThreadRunner(max_workers=1))
    three = by_hand(
        tmp_path / "3", nodes_at_once(place_of_meeting), runner=ThreadRunner(max_workers=3)
    )
    processes = by_hand(tmp_path / "p", nodes_at_once(place), runner=ParallelRunner(max_workers=2))

    (used,) = {thread for _, thread in alone.predict(1)}
    assert used != threading.get_ident()
    assert len({thread for _, thread in three.predict(1)}) == 3
    assert os.getpid() not in {process for process, _ in processes.predict(1)}
    runner = {p.name: p.default for p in processes.metadata.signature.params}["runner"]
    assert runner == "ParallelRunner"


def test_a_runner_of_the_project_travels(project: Project) -> None:
    write_small(project, kpm="{'runner': Announcing('hello')}")
    project.run(pipeline_names=["training"])

    answers = without_project(
        project,
        folder_of(project),
        """
import os
answers = [model.predict([1.0]), os.environ.pop("ANNOUNCED")]
answers += [model.predict([1.0], params={"runner": "ThreadRunner"}), os.environ.get("ANNOUNCED")]
print(json.dumps(answers))
""",
    )

    assert answers == [DEFAULT, "hello", DEFAULT, None]


class Forgetful(SequentialRunner):
    def __init__(self, word: str) -> None:
        super().__init__(is_async=word == "async")


def test_a_runner_that_can_not_be_made_again_is_refused() -> None:
    with pytest.raises(PipelineError, match="expected it to keep its argument 'word' as self"):
        KedroPipelineModel(
            Pipeline([Node(same, "new", "answer")]), DataCatalog(), "new", runner=Forgetful("x")
        )


def test_a_model_that_can_not_be_pickled_is_refused_before_the_run(project: Project) -> None:
    write_small(project, kpm="{'runner': Announcing(threading.Lock())}")

    with pytest.raises(ClickException, match="can't be pickled: cannot pickle"):
        project.run(pipeline_names=["training"])

    assert project.all_runs() == []


def test_nodes_that_confirm_what_they_have_processed_predict(tmp_path: Path) -> None:
    nodes = [Node(same, ["new", "stored"], "answer", confirms="stored")]

    model = by_hand(tmp_path, nodes, stored={"stored": 1})

    assert model.predict(0, params={"runner": "ThreadRunner"}) == [0, 1]


# What a node changes in place.


def spoil(new: int, weights: dict[Any, Any]) -> list[int]:
    weights[new] = True
    weights["seen"].append(new)
    return [len(weights), len(weights["seen"])]


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner"])
@pytest.mark.parametrize(
    ("copy_mode", "second"),
    [
        ("assign", [3, 2]),
        ("copy", [2, 2]),
        ("deepcopy", [2, 1]),
        (None, [2, 1]),
        ({"weights": "copy"}, [2, 2]),
        ({"new": "assign"}, [2, 1]),
    ],
)
def test_the_copy_mode_says_what_of_a_change_stays_for_the_next_prediction(
    tmp_path: Path, copy_mode: Any, second: list[int], runner: str
) -> None:
    nodes = [Node(spoil, ["new", "weights"], "answer")]
    model = by_hand(tmp_path, nodes, stored={"weights": {"seen": []}}, copy_mode=copy_mode)

    answers = [model.predict(number, params={"runner": runner}) for number in (1, 2)]

    assert answers == [[2, 1], second]


def append(items: list[int]) -> list[int]:
    items.append(0)
    return items


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner"])
@pytest.mark.parametrize(("copy_mode", "given"), [("assign", [1, 0, 0]), ("deepcopy", [1])])
def test_the_copy_mode_is_that_of_the_input_and_of_what_is_in_between_too(
    tmp_path: Path, copy_mode: str, given: list[int], runner: str
) -> None:
    nodes = [Node(append, "new", "between"), Node(append, "between", "answer")]
    model = by_hand(tmp_path, nodes, copy_mode=copy_mode)
    asked = [1]

    assert model.predict(asked, params={"runner": runner}) == [1, 0, 0]

    assert asked == given


# Several predictions at once.

THREADS, ROUNDS = 8, 10
MEETING = threading.Barrier(THREADS)


def add(new: int, factor: int) -> int:
    MEETING.wait(60)  # every prediction is half done when the first goes on
    return new + factor


def finish(added: int, factor: int, stored: int) -> tuple[int, int]:
    return added * stored, factor


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner"])
def test_threads_predict_at_once_on_one_model(tmp_path: Path, runner: str) -> None:
    nodes = [
        Node(add, ["new", "params:factor"], "added"),
        Node(finish, ["added", "params:factor", "stored"], "answer"),
    ]
    model = by_hand(tmp_path, nodes, ONES, {"stored": 2})

    def ask(thread: int) -> list[Any]:
        params = {"runner": runner, "factor": 1000 * thread}
        return [model.predict(number, params=params) for number in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as threads:
        answers = list(threads.map(ask, range(THREADS)))

    assert answers == [
        [((number + 1000 * thread) * 2, 1000 * thread) for number in range(ROUNDS)]
        for thread in range(THREADS)
    ]


# A prediction in the middle of a Kedro run of the same project.

NOTING = """
from pathlib import Path

from kedro.framework.hooks import hook_impl


class Noting:
    def note(self, what):
        with Path("NOTES").open("a") as notes:
            notes.write(f"{what} ")

    @hook_impl
    def before_pipeline_run(self, pipeline):
        self.note("pipeline")

    @hook_impl
    def before_node_run(self, node):
        self.note(node.name)

    @hook_impl
    def after_dataset_loaded(self, dataset_name):
        self.note(dataset_name)
"""
ASKING = """
import mlflow
from kedro.pipeline import Node, Pipeline


def ask(model):
    before = mlflow.active_run().info.run_id
    model = mlflow.pyfunc.load_model(model)
    answers = [model.predict([1.0], params={"runner": name}) for name in RUNNERS]
    assert mlflow.active_run().info.run_id == before
    return answers


def create_pipeline():
    return Pipeline([Node(ask, "params:model", "answers", name="ask")])
"""


@pytest.mark.parametrize("runner", [SequentialRunner, ParallelRunner])
def test_a_prediction_within_a_kedro_run_calls_no_hook_and_makes_no_run(
    project: Project, tmp_path: Path, runner: type[AbstractRunner]
) -> None:
    write_small(project)
    project.run(pipeline_names=["training"])
    notes = tmp_path / "notes"
    project.write(f"src/{project.package}/noting.py", NOTING.replace("NOTES", notes.as_posix()))
    settings = project.path / "src" / project.package / "settings.py"
    added = f"\nfrom {project.package}.noting import Noting\nHOOKS = (Noting(), *HOOKS)\n"
    settings.write_text(settings.read_text() + added)
    project.pipeline(ASKING.replace("RUNNERS", repr(RUNNERS)), "asking")
    project.parameters({**SMALL_PARAMETERS, "model": str(folder_of(project))})
    project.catalog(f"{SMALL_CATALOG}answers: {{type: json.JSONDataset, filepath: answers.json}}")
    for module in [name for name in sys.modules if name.startswith(project.package)]:
        del sys.modules[module]  # the settings were read already

    project.run(pipeline_names=["asking"], runner=runner())

    assert json.loads((project.path / "answers.json").read_text()) == [DEFAULT] * len(RUNNERS)
    assert notes.read_text().split() == ["pipeline", "params:model", "ask"]
    assert [run.info.run_name for run in project.all_runs()] == ["asking", "training"]


# The files of a model.

WEIGHING_TABLES = """
import pandas as pd
from kedro.pipeline import Node, Pipeline

from PACKAGE.runtime import pipeline_ml_factory


def make():
    return pd.DataFrame({"x": [1.0, 2.0]})


def predict(new, weights):
    return new.assign(weight=weights["x"].sum())


def create_pipeline():
    return pipeline_ml_factory(
        Pipeline([Node(make, None, "new"), Node(make, None, "weights")]),
        Pipeline([Node(predict, ["new", "weights"], "answer")]),
        "new",
        log_model_kwargs={"extra_pip_requirements": ["emoji==1.0"]},
    )
"""
TABLES = """
"{name}": {type: pandas.CSVDataset, filepath: "data/{name}.csv", save_args: {index: false}}
"""


def test_a_model_requires_what_its_project_declares(
    project: Project, started: list[list[str]]
) -> None:
    project.pipeline(WEIGHING_TABLES, "training")
    project.catalog(TABLES)
    described = project.path / "pyproject.toml"
    url = "https://me:secret@packages.example/simple"
    index = f'[[tool.uv.index]]\nurl = "{url}"\n'
    described.write_text(f"{described.read_text()}\n{index}")

    train(project)

    folder = folder_of(project)
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [
        "--extra-index-url https://packages.example/simple",
        *(f"{name}=={version(name)}" for name in ("cloudpickle", "kedro", "kedro-datasets")),
        f"mlflow=={version('mlflow')}",
        "emoji==1.0",
    ]
    conda = yaml.safe_load((folder / "conda.yaml").read_text())
    assert conda["dependencies"][-1] == {"pip": lines}
    assert not list(folder.glob("*example*"))
    assert started == []


def test_the_arguments_of_log_model_have_their_effect(project: Project) -> None:
    package = project.path / "src" / project.package
    project.write("shared/helper.py", "")
    log = {
        "name": "it",
        "pip_requirements": ["kedro>=1", "emoji==1.0"],
        "code_paths": [str(package), str(project.path / "shared")],
        "metadata": {"team": "penguins"},
        "input_example": "auto",
        "registered_model_name": "weights",
        "registered_model_alias": "best",
    }
    write_small(project, repr(log))

    model = train(project, "it")

    folder = folder_of(project, "it")
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert [line for line in requirements if not line.startswith("mlflow")] == log[
        "pip_requirements"
    ]
    assert {path.name for path in (folder / "code").iterdir()} == {project.package, "shared"}
    assert model.metadata.metadata == {"team": "penguins"}
    assert model.input_example == [1.0]
    version = project.client.get_model_version_by_alias("weights", "best")
    assert version.run_id == project.only_run().info.run_id
    assert model.predict([1.0]) == DEFAULT


BESIDE = """
from kedro.pipeline import Node, Pipeline
from steps_PACKAGE.scaling import scale

from PACKAGE.runtime import pipeline_ml_factory


def create_pipeline():
    return pipeline_ml_factory(
        Pipeline([Node(lambda factor: {"weight": factor}, "params:factor", "weights")]),
        Pipeline([Node(scale, ["new", "weights"], "answer")]),
        "new",
        log_model_kwargs={"pip_requirements": []},
    )
"""


def test_modules_beside_the_package_that_nodes_and_datasets_are_from_travel(
    project: Project,
) -> None:
    write_small(project)
    project.pipeline(BESIDE, "training")
    project.write(
        "src/steps_PACKAGE/scaling.py".replace("PACKAGE", project.package),
        "def scale(new, weights):\n    return [x * weights['weight'] for x in new]\n",
    )
    project.write(
        "src/kinds_PACKAGE.py".replace("PACKAGE", project.package),
        "from kedro_datasets.json import JSONDataset\nclass Own(JSONDataset):\n    pass\n",
    )
    own = "weights: {type: kinds_PACKAGE.Own,"
    project.catalog(SMALL_CATALOG.replace("weights: {type: json.JSONDataset,", own))
    project.run(pipeline_names=["training"])

    answer = without_project(project, folder_of(project), "print(json.dumps(model.predict([1.0])))")

    assert answer == [3.0]


def test_a_conda_environment_is_taken_as_it_is(project: Project) -> None:
    environment = {"name": "own", "dependencies": ["python=3.11", {"pip": ["kedro", "emoji"]}]}
    write_small(project, repr({"pip_requirements": None, "conda_env": environment}))

    project.run(pipeline_names=["training"])

    written = yaml.safe_load((folder_of(project) / "conda.yaml").read_text())
    assert written["name"] == "own"
    assert written["dependencies"][-1]["pip"][1:] == ["kedro", "emoji"]


# The signature.


@pytest.mark.parametrize(("given", "known"), [("None", None), ("SIGNATURE", {"factor"})])
def test_a_signature_of_ones_own_is_taken(
    project: Project, given: str, known: set[str] | None
) -> None:
    write_small(project, f"{{'signature': {given}, 'input_example': 'auto'}}")

    model = train(project)

    signature = model.metadata.signature
    assert (signature and {param.name for param in signature.params}) == known
    assert model.predict([1.0]) == DEFAULT


TELLING = """
import datetime

import numpy as np
import pandas as pd
from kedro.pipeline import Node, Pipeline

from PACKAGE.runtime import pipeline_ml_factory


def make():
    return DATA


def tell(new, factor):
    return pd.DataFrame({"kind": [type(new).__name__], "factor": [factor]})


def create_pipeline():
    return pipeline_ml_factory(
        Pipeline([Node(make, None, "new")]),
        Pipeline([Node(tell, ["new", "params:factor"], "answer")]),
        "new",
        log_model_kwargs={"pip_requirements": []},
    )
"""
COLUMN = {"type": "double", "name": "x", "required": True}
TENSOR = {"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": (-1, 2)}}
ANSWER = [
    {"type": "string", "name": "kind", "required": True},
    {"type": "double", "name": "factor", "required": True},
]


@pytest.mark.parametrize(
    ("data", "kind", "inputs"),
    [
        ("pd.DataFrame({'x': [0.5, 1.5]})", "DataFrame", [COLUMN]),
        ("np.array([[0.5, 1.5]])", "ndarray", [TENSOR]),
        ("{'x': np.array([[0.5, 1.5]])}", "dict", [{"name": "x", **TENSOR}]),
        # With a schema MLflow would make tables of these.
        ("[0.5, 1.5]", "list", None),
        ("[{'x': 0.5}]", "list", None),
        ("{'x': 0.5, 'y': ['a']}", "dict", None),
        ("pd.Series([0.5, 1.5])", "Series", None),
        ("'text'", "str", None),
    ],
)
def test_the_signature_tells_what_nodes_are_then_handed(
    project: Project, data: str, kind: str, inputs: list[dict[str, Any]] | None
) -> None:
    project.pipeline(TELLING.replace("DATA", data), "training")
    project.catalog("new: {type: pickle.PickleDataset, filepath: data/new.pkl}")
    project.parameters({"factor": 0.5})

    model = train(project)

    signature = model.metadata.signature
    assert (signature.inputs and signature.inputs.to_dict()) == inputs
    assert signature.outputs.to_dict() == ANSWER
    assert {param.name: param.default for param in signature.params} == {
        "factor": 0.5,
        "runner": "SequentialRunner",
    }
    asked = eval(data, {"pd": pd, "np": np})
    assert model.predict(asked, params={"factor": 2}).to_dict("records") == [
        {"kind": kind, "factor": 2.0}
    ]


def test_data_that_mlflow_can_not_describe_is_warned_of(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.pipeline(TELLING.replace("DATA", "datetime.timedelta(1)"), "training")
    project.catalog("new: {type: pickle.PickleDataset, filepath: data/new.pkl}")
    project.parameters({"factor": 0.5})

    model = train(project)

    assert "The model gets no schema of its" in "".join(capsys.readouterr())
    assert model.metadata.signature.inputs is None
    answer = model.predict(datetime.timedelta(2), params={"factor": 2})
    assert answer.to_dict("records") == [{"kind": "timedelta", "factor": 2.0}]


# By hand, without a project.


def fit(table: list[float]) -> dict[str, float]:
    return {"mean": sum(table) / len(table)}


def compare(new: list[float], line: dict[str, float], unit: str) -> list[str]:
    return [f"{x - line['mean']} {unit}" for x in new]


BY_HAND_TRAINING = Pipeline([Node(fit, "table", "line")])
BY_HAND_INFERENCE = Pipeline([Node(compare, ["new", "line", "params:unit"], "answer")])


@pytest.fixture
def catalog(tmp_path: Path) -> DataCatalog:
    """A catalog in plain Python, after a training."""
    stored = JSONDataset(filepath=(tmp_path / "line.json").as_posix())
    catalog = DataCatalog({"line": stored, "params:unit": MemoryDataset("kg")})
    catalog["table"] = MemoryDataset([1.0, 3.0])
    SequentialRunner().run(BY_HAND_TRAINING, catalog)
    return catalog


@pytest.mark.parametrize(
    "pipeline",
    [BY_HAND_INFERENCE, pipeline_ml_factory(BY_HAND_TRAINING, BY_HAND_INFERENCE, "new")],
    ids=["a pipeline", "that of pipeline_ml_factory"],
)
@pytest.mark.parametrize("prepared", [copy.copy, copy.deepcopy])
def test_a_model_can_be_made_by_hand(
    project: Project,
    catalog: DataCatalog,
    tmp_path: Path,
    pipeline: Pipeline,
    prepared: Callable[[Any], Any],
) -> None:
    model = prepared(KedroPipelineModel(pipeline, catalog, "new"))
    mlflow.set_tracking_uri(project.tracking_uri)
    with mlflow.start_run():
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=model,
            artifacts=model.extract_pipeline_artifacts(tmp_path / "artifacts"),
            signature=infer_signature(params=model.inference_params),
            pip_requirements=[],
        )
    (tmp_path / "line.json").unlink()
    shutil.rmtree(tmp_path / "artifacts")

    loaded = mlflow.pyfunc.load_model(logged.model_uri)

    assert loaded.predict([1.0]) == ["-1.0 kg"]
    assert loaded.predict([1.0], params={"unit": "g"}) == ["-1.0 g"]
    passed_on = pickle.loads(pickle.dumps(loaded.unwrap_python_model()))
    assert passed_on.predict(None, [3.0]) == ["1.0 kg"]


def test_a_model_by_hand_says_what_was_forgotten(catalog: DataCatalog, tmp_path: Path) -> None:
    model = KedroPipelineModel(BY_HAND_INFERENCE, catalog, "new")
    nothing = PythonModelContext({}, {})

    with pytest.raises(PipelineError, match="The model isn't loaded: use"):
        model.predict(None, [1.0])
    with pytest.raises(PipelineError, match="lacks line: log_model needs the artifacts of extract"):
        model.load_context(nothing)
    with pytest.raises(PipelineError, match="lacks line: a model that was pickled has left"):
        pickle.loads(pickle.dumps(model)).extract_pipeline_artifacts(tmp_path / "a")
    model.extract_pipeline_artifacts(tmp_path / "b")
    with pytest.raises(PipelineError, match="lacks line: log_model needs the artifacts of extract"):
        model.load_context(nothing)
    (tmp_path / "line.json").unlink()
    with pytest.raises(
        DatasetError, match="'line' can't be copied into the model: JSONDataset has"
    ):
        model.extract_pipeline_artifacts(tmp_path / "c")


@pytest.mark.parametrize("missing", ["line", "params:unit"])
def test_what_is_not_in_the_catalog_is_named(catalog: DataCatalog, missing: str) -> None:
    without = DataCatalog({name: catalog[name] for name in catalog if name != missing})

    with pytest.raises(PipelineError, match=f"The inference pipeline needs '{missing}'"):
        KedroPipelineModel(BY_HAND_INFERENCE, without, "new")


# Any pipeline.


def mix(*values: int) -> tuple[int, int]:
    """Give two numbers that tell which values came, and in which order."""
    return sum(n * value for n, value in enumerate(values, 1)) % 1009, len(values)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Draw nodes that each take what there is before them; the last takes what is left."""
    there = ["new", "stored", "also stored", "params:p", "params:q.r"]
    nodes = []
    for number in range(draw(st.integers(0, 5))):
        inputs = draw(st.lists(st.sampled_from(there), min_size=1, max_size=4))
        made = [f"{number}.first", f"{number}.second"]
        nodes.append(Node(mix, inputs, made, name=f"node_{number}"))
        there += made
    left = Pipeline(nodes).outputs() | {"new"}
    return Pipeline(
        [*nodes, Node(mix, sorted(left), ["answer", "_"]), Node(same, ["answer", "_"], "all")]
    )


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    pipeline=pipelines(),
    asked=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    stored=st.integers(0, 99),
    copy_mode=st.sampled_from(["assign", "copy", "deepcopy", None]),
    runner=st.sampled_from([SequentialRunner, ThreadRunner]),
)
def test_a_model_predicts_what_the_pipeline_makes_in_kedro(
    tmp_path_factory: pytest.TempPathFactory,
    pipeline: Pipeline,
    asked: list[int],
    stored: int,
    copy_mode: str | None,
    runner: type[AbstractRunner],
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    names = ["stored", "also stored"]
    catalog = DataCatalog(
        {name: JSONDataset(filepath=(folder / f"{name}.json").as_posix()) for name in names}
    )
    for number, name in enumerate(names):
        catalog.save(name, stored + number)
    for name, value in {"params:p": 3, "params:q.r": 5}.items():
        catalog[name] = MemoryDataset(value)
    model = KedroPipelineModel(pipeline, catalog, "new", runner(), copy_mode)
    artifacts = model.extract_pipeline_artifacts(folder / "artifacts")
    loaded = pickle.loads(pickle.dumps(model))
    loaded.load_context(PythonModelContext(artifacts, {}))

    for number in asked:
        catalog["new"] = MemoryDataset(number)
        expected = SequentialRunner().run(pipeline, catalog)["all"].load()
        assert loaded.predict(None, number) == expected
