"""A training pipeline knows its inference: it is checked, kept, and logged when the run ends."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlflow
import pandas as pd
import pytest
from kedro.pipeline import Node, Pipeline
from kedro.runner import AbstractRunner, ParallelRunner, SequentialRunner, ThreadRunner
from mlflow.entities import Run

from runtime import pipeline_ml_factory
from runtime.serving.pipeline_ml import PipelineError, PipelineML

from ....support.projects import Project


def same(*inputs: Any) -> Any:
    return inputs[0]


def chunks(x: Any) -> Any:
    yield x


TRAINING = Pipeline(
    [
        Node(same, "raw", "table", name="clean", tags="data"),
        Node(same, ["table", "params:depth"], "model", name="fit"),
        Node(same, ["model", "table"], "score", name="score", tags="check"),
    ]
)
INFERENCE = Pipeline(
    [
        Node(same, ["new", "params:unit"], "scaled", name="scale"),
        Node(same, ["model", "scaled"], "predictions", name="predict"),
    ]
)


def made(**other: Any) -> PipelineML:
    arguments = {"training": TRAINING, "inference": INFERENCE, "input_name": "new", **other}
    return pipeline_ml_factory(**arguments)


def test_the_factory_gives_a_pipeline_that_knows_both_parts() -> None:
    pipeline = made(log_model_kwargs={"registered_model_name": "penguins"})

    assert isinstance(pipeline, Pipeline)
    assert pipeline.training.nodes == pipeline.nodes == TRAINING.nodes
    assert type(pipeline.training) is Pipeline
    assert pipeline.inference is INFERENCE
    assert pipeline.input_name == "new"
    assert pipeline.log_model_kwargs == {
        "name": "model",
        "signature": "auto",
        "registered_model_name": "penguins",
    }


def test_the_earlier_word_for_the_models_name_is_taken() -> None:
    assert made(log_model_kwargs={"artifact_path": "it"}).log_model_kwargs["name"] == "it"


def test_an_input_of_the_training_and_a_transcoded_name_are_no_free_inputs() -> None:
    inference = Pipeline([Node(same, ["new", "raw", "table@pandas"], "predictions")])

    assert made(inference=inference).missing == set()


def inference_with(*nodes: Node) -> dict[str, Any]:
    return {"inference": Pipeline([*INFERENCE.nodes, *nodes])}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (inference_with(Node(same, "new", "b")), "has 2 outputs, 'b', 'predictions'"),
        ({"inference": Pipeline([])}, "has 0 outputs"),
        (
            {"input_name": "news"},
            "one of 'model', 'new', 'params:unit', got 'news'",
        ),
        (inference_with(Node(same, ["predictions", "encoder"], "p")), "needs 'encoder', which"),
        (inference_with(Node(chunks, "predictions", "p", name="stream")), "'stream' of the infer"),
        (
            {"inference": Pipeline([Node(same, "new", "p@csv"), Node(same, "p@pandas", "q")])},
            "saves 'p' and loads it as 'p@pandas'",
        ),
        ({"kpm_kwargs": {"copymode": "copy"}}, "unexpected 'copymode', expected copy_mode or run"),
        ({"log_model_kwargs": {"artifacts": {}, "python_model": 1}}, "'artifacts', 'python_model'"),
        ({"log_model_kwargs": {"name": "a", "artifact_path": "b"}}, "got 'a' and 'b'"),
        ({"log_model_kwargs": {"registered_model_alias": "best"}}, "got 'best' alone"),
    ],
)
def test_what_can_not_be_a_model_is_said_when_the_pipeline_is_made(
    arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PipelineError) as refused:
        made(**arguments)

    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (lambda p: p.filter(tags=["data"]), ["clean"]),
        (lambda p: p.filter(from_nodes=["fit"], node_names=["fit", "score"]), ["fit", "score"]),
        (lambda p: p.filter(), ["clean", "fit", "score"]),
        (lambda p: p.tag("x"), ["clean", "fit", "score"]),
        (lambda p: p.from_nodes("fit"), ["fit", "score"]),
        (lambda p: p.to_nodes("fit"), ["clean", "fit"]),
        (lambda p: p.from_inputs("table"), ["fit", "score"]),
        (lambda p: p.to_outputs("table"), ["clean"]),
        (lambda p: p.only_nodes("fit"), ["fit"]),
        (lambda p: p.only_nodes_with_tags("check"), ["score"]),
        (lambda p: p + Pipeline([]), ["clean", "fit", "score"]),
        (lambda p: Pipeline([]) + p, ["clean", "fit", "score"]),
        (lambda p: sum([p]), ["clean", "fit", "score"]),
        (lambda p: p & Pipeline(p.nodes[:1]), ["clean"]),
    ],
)
def test_a_filter_keeps_the_inference(
    operation: Callable[[Pipeline], Pipeline], names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = made(kpm_kwargs={"copy_mode": "copy"}, log_model_kwargs={"name": "it"})

    filtered = operation(pipeline)

    assert isinstance(filtered, PipelineML)
    assert [node.name for node in filtered.nodes] == names
    assert filtered.inference is INFERENCE
    assert filtered.input_name == "new"
    assert filtered.kpm_kwargs == {"copy_mode": "copy"}
    assert filtered.log_model_kwargs == pipeline.log_model_kwargs
    assert caplog.records == []


def test_tags_reach_the_nodes_of_the_training() -> None:
    assert all("x" in node.tags for node in made().tag("x").nodes)


OTHER = Pipeline([Node(same, "score", "report", name="report")])


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (lambda p: p + OTHER, ["clean", "fit", "score", "report"]),
        (lambda p: OTHER + p, ["clean", "fit", "score", "report"]),
        (lambda p: p | OTHER, ["clean", "fit", "score", "report"]),
        (lambda p: OTHER | p, ["clean", "fit", "score", "report"]),
        (lambda p: sum([OTHER, p]), ["clean", "fit", "score", "report"]),
        (lambda p: p - Pipeline(p.nodes[2:]), ["clean", "fit"]),
    ],
)
def test_a_sum_with_another_is_a_plain_pipeline_and_says_so(
    operation: Callable[[Pipeline], Pipeline], names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = operation(made())

    assert type(result) is Pipeline
    assert [node.name for node in result.nodes] == names
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "No model is made" in record.message


def test_what_is_no_pipeline_can_not_be_added() -> None:
    with pytest.raises(TypeError):
        made() + 1


PIPELINE = """
from pathlib import Path
import pandas as pd
from kedro.pipeline import Node, Pipeline
from PACKAGE.runtime import pipeline_ml_factory

def prepare():
    Path("MARKER").touch()
    return pd.DataFrame({"x": [1.0, 3.0]})

def fit(table, depth):
    return {"weight": depth * len(table)}

def check(model):
    return model["weight"]

def predict(model, table, offset):
    return (table["x"] * model["weight"] + offset).tolist()

def create_pipeline():
    return pipeline_ml_factory(
        training=Pipeline([
            Node(prepare, None, "table", name="prepare"),
            Node(fit, ["table", "params:depth"], "model", name="fit"),
            Node(check, "model", "score", name="check"),
        ]),
        inference=Pipeline([
            Node(predict, ["model", "table", "params:offset"], "predictions", name="predict"),
        ]),
        input_name="table",
        log_model_kwargs={"pip_requirements": [], **LOG},
    )
"""

CATALOG = """
table: {type: pandas.CSVDataset, filepath: data/table.csv}
model: {type: json.JSONDataset, filepath: data/model.json}
"""


@pytest.fixture
def trained(project: Project) -> Callable[..., Project]:
    """Write a project with such a pipeline."""

    def write(catalog: str = CATALOG, **log_model_kwargs: Any) -> Project:
        marker = (project.path / "has run").as_posix()
        project.pipeline(
            PIPELINE.replace("MARKER", marker).replace("LOG", repr(log_model_kwargs)), "training"
        )
        project.catalog(catalog)
        project.parameters({"depth": 2, "offset": 10.0})
        return project

    return write


def model_of(project: Project, run: Run) -> Any:
    """Load the one model that was logged to a run."""
    (model,) = project.client.search_logged_models([run.info.experiment_id])
    assert model.source_run_id == run.info.run_id
    mlflow.set_tracking_uri(project.tracking_uri)
    return mlflow.pyfunc.load_model(f"models:/{model.model_id}")


def has_run(project: Project) -> bool:
    return (project.path / "has run").exists()


@pytest.mark.parametrize("runner", [SequentialRunner, ThreadRunner, ParallelRunner])
def test_the_model_is_logged_when_the_run_ends_whichever_runner_ran_it(
    trained: Callable[..., Project], runner: type[AbstractRunner]
) -> None:
    project = trained(name="it", registered_model_name="penguins", registered_model_alias="best")

    project.run(pipeline_names=["training"], runner=runner())

    run = project.only_run()
    assert run.info.status == "FINISHED"
    model = model_of(project, run)
    assert model.predict(pd.DataFrame({"x": [1.0]}), params={"offset": 0.5}) == [4.5]
    version = project.client.get_model_version_by_alias("penguins", "best")
    assert version.run_id == run.info.run_id
    (params,) = [model.metadata.signature.params.to_dict()]
    assert {p["name"]: p["default"] for p in params} == {
        "offset": 10.0,
        "runner": "SequentialRunner",
    }


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_model_is_logged_when_workers_were_not_forked(
    trained: Callable[..., Project], method: str
) -> None:
    project = trained()
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        project.run(pipeline_names=["training"], runner=ParallelRunner())
    finally:
        multiprocessing.set_start_method(before, force=True)

    assert model_of(project, project.only_run()).predict(pd.DataFrame({"x": [0.0]})) == [10.0]


def test_the_model_is_logged_to_a_run_that_is_open(trained: Callable[..., Project]) -> None:
    project = trained()
    mlflow.set_tracking_uri(project.tracking_uri)
    with mlflow.start_run() as run:
        project.run(pipeline_names=["training"])
        assert project.client.get_run(run.info.run_id).info.status == "RUNNING"

    model_of(project, project.only_run())


def test_where_nothing_is_tracked_nothing_is_checked_and_logged(
    trained: Callable[..., Project],
) -> None:
    project = trained("table: {type: MemoryDataset}")
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [training]}}")

    project.run(pipeline_names=["training"])

    assert has_run(project)
    assert project.all_runs() == []
    assert project.client.search_logged_models(["0"]) == []


def test_a_part_of_the_training_that_lacks_what_is_needed_logs_no_model(
    trained: Callable[..., Project],
) -> None:
    project = trained()

    ended = project.kedro("run", "--pipelines=training", "--nodes=prepare")

    assert ended.returncode == 0, ended.stderr

    run = project.only_run()
    assert run.info.status == "FINISHED"
    assert project.client.search_logged_models([run.info.experiment_id]) == []
    assert "No model will be logged: model isn't in the part that runs" in ended.stderr


def test_a_part_of_the_training_that_has_what_is_needed_logs_the_model(
    trained: Callable[..., Project],
) -> None:
    project = trained()
    project.run(pipeline_names=["training"], node_names=["prepare"])

    project.run(pipeline_names=["training"], from_nodes=["fit"])

    run, _ = project.all_runs()
    assert model_of(project, run).predict(pd.DataFrame({"x": [1.0]})) == [14.0]


WITHOUT_MODEL = "table: {type: pandas.CSVDataset, filepath: data/table.csv}"
WITHOUT_TABLE = "model: {type: json.JSONDataset, filepath: data/model.json}"


@pytest.mark.parametrize(
    ("catalog", "log", "sentence"),
    [
        (WITHOUT_MODEL, {}, "needs 'model', which is only in memory: give it an entry in catalog"),
        (
            f"{WITHOUT_MODEL}\nmodel: {{type: MemoryDataset}}",
            {},
            "needs 'model', which is only in memory",
        ),
        (WITHOUT_TABLE, {}, "'table' is only in memory, so that the model's signature can't be"),
        (
            WITHOUT_TABLE,
            {"signature": None, "input_example": "auto"},
            "'table' is only in memory, so that the model's input_example can't be",
        ),
        (CATALOG, {"signature": "automatic"}, "signature: expected auto, a ModelSignature or None"),
        (CATALOG, {"registered_name": "penguins"}, "has no argument 'registered_name'"),
        (CATALOG, {"name": "a/b"}, "`name` is a text without / : . % and quotes, got 'a/b'"),
        (CATALOG, {"registered_model_name": "a/b"}, "_model_name` is a text without / and :, got"),
    ],
)
def test_what_can_not_be_packed_is_said_before_the_first_node_runs(
    trained: Callable[..., Project], catalog: str, log: dict[str, Any], sentence: str
) -> None:
    project = trained(catalog, **log)

    ended = project.kedro("run", "--pipelines=training")

    assert ended.returncode == 1
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in error
    assert "Traceback" not in ended.stderr + ended.stdout
    assert not has_run(project)
    assert project.all_runs() == []


@pytest.mark.parametrize(
    ("parameters", "credentials"),
    [
        ({"depth": 2, "offset": {"api_token": 1}}, ""),
        ({"depth": 2, "offset": ["s3cr3t-value"]}, "server: {password: s3cr3t-value}"),
    ],
)
def test_a_secret_among_the_parameters_is_refused(
    trained: Callable[..., Project], parameters: dict[str, Any], credentials: str
) -> None:
    project = trained()
    project.parameters(parameters)
    project.write("conf/local/credentials.yml", credentials)

    with pytest.raises(
        click.ClickException, match="'params:offset' has a value that is or looks like"
    ):
        project.run(pipeline_names=["training"])

    assert project.all_runs() == []


def test_a_secret_bound_to_a_node_is_refused(trained: Callable[..., Project]) -> None:
    project = trained()
    bound = 'Node(partial(predict, key="s3cr3t-value")'
    code = PIPELINE.replace("Node(predict", bound).replace("offset):", 'offset, key=""):')
    code = code.replace("from pathlib", "from functools import partial\nfrom pathlib", 1)
    project.pipeline(code.replace("MARKER", "has run").replace("LOG", "{}"), "training")
    project.write("conf/local/credentials.yml", "server: {password: s3cr3t-value}")

    with pytest.raises(click.ClickException, match="holds a secret, such as"):
        project.run(pipeline_names=["training"])

    assert project.all_runs() == []


def test_files_of_secrets_beside_the_code_are_not_in_the_model(
    trained: Callable[..., Project],
) -> None:
    project = trained()
    for file in (".env", "secrets/api", "server.pem", "pipelines/.netrc", "secrets.py"):
        project.write(f"src/{project.package}/{file}", "")

    project.run(pipeline_names=["training"])

    model = model_of(project, project.only_run())
    folder = mlflow.artifacts.download_artifacts(f"models:/{model.metadata.model_id}")
    names = {file.name for file in Path(folder).rglob("*")}
    assert "secrets.py" in names
    assert not {".env", "api", "server.pem", ".netrc"} & names


def test_a_mistake_in_the_pipeline_is_one_sentence_too(trained: Callable[..., Project]) -> None:
    project = trained(artifacts={})

    ended = project.kedro("run", "--pipelines=training")

    assert ended.returncode == 1
    assert "Error: log_model_kwargs: unexpected 'artifacts'" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout


def test_a_model_that_can_not_be_logged_fails_the_run(trained: Callable[..., Project]) -> None:
    project = trained(code_paths=["nowhere"])

    with pytest.raises(mlflow.MlflowException, match="nowhere"):
        project.run(pipeline_names=["training"])

    run = project.only_run()
    assert run.info.status == "FAILED"
    assert "nowhere" in run.data.tags["kedro_error"]


def test_commands_that_run_nothing_do_not_import_mlflow_for_it(
    trained: Callable[..., Project],
) -> None:
    project = trained()

    described = project.kedro_anew("registry", "describe", "training", PYTHONPROFILEIMPORTTIME="1")

    assert "fit" in described.stdout
    modules = {line.rpartition("|")[2].strip() for line in described.stderr.splitlines()}
    assert "kedro.pipeline" in modules
    assert "mlflow" not in modules


INFERENCE_ALONE = """
from kedro.pipeline import Node, Pipeline

def predict(model, table, offset):
    return (table["x"] * model["weight"] + offset).tolist()

def create_pipeline():
    return Pipeline([
        Node(predict, ["model", "table", "params:offset"], "predictions", name="predict"),
    ])
"""


def test_modelify_logs_a_pipeline_that_is_there_already(
    trained: Callable[..., Project],
) -> None:
    project = trained()
    project.pipeline(INFERENCE_ALONE, "inference")
    project.mlflow_yml("tracking: {disable_tracking: {pipelines: [training, inference]}}")
    project.run(pipeline_names=["training"])
    project.write("none.txt", "kedro\n")

    ended = project.kedro(
        "mlflow",
        "modelify",
        "--pipeline=inference",
        "-itable",
        "--infer-signature",
        "--infer-input-example",
        "--copy-mode=deepcopy",
        "--model-name=it",
        "--pip-requirements=none.txt",
        "--registered-model-name=penguins",
        "--params=offset=20,api_token=abcdef",
    )

    assert ended.returncode == 0, ended.stderr
    run = project.only_run()
    assert (run.info.run_name, run.info.status) == ("inference", "FINISHED")
    assert run.data.params == {"offset": "20"}
    assert run.data.tags["kedro_command"] == (
        "kedro mlflow modelify --pipeline=inference '--params=offset=20,api_token=\"***\"' "
        "--input-name=table --infer-signature --infer-input-example --copy-mode=deepcopy "
        "--model-name=it --registered-model-name=penguins --pip-requirements=none.txt"
    )
    model = model_of(project, run)
    assert f"Logged: models:/{model.metadata.model_id}" in ended.stdout
    assert model.predict(pd.DataFrame({"x": [1.0]})) == [24]
    assert model.input_example.to_dict("list") == {"x": [1.0]}
    assert project.client.get_logged_model(model.metadata.model_id).name == "it"
    assert project.client.get_model_version("penguins", "1").run_id == run.info.run_id


def test_modelify_takes_the_inference_of_a_training(trained: Callable[..., Project]) -> None:
    project = trained()
    project.run(pipeline_names=["training"], node_names=["prepare", "fit"])

    ended = project.kedro(
        "mlflow", "modelify", "-p", "training", "-i", "table", "--pip-requirements", "none.txt"
    )

    assert ended.returncode == 1  # there is no such file
    run = project.all_runs()[0]
    assert run.info.status == "FAILED"
    project.write("none.txt", "kedro\n")
    ended = project.kedro(
        "mlflow", "modelify", "-p", "training", "-i", "table", "--pip-requirements", "none.txt"
    )
    assert ended.returncode == 0, ended.stderr
    assert "model-training" in [
        model.name for model in project.client.search_logged_models([run.info.experiment_id])
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("-p inferense -i table", "--pipeline: expected one of __default__, inference, training"),
        ("-p inference -i tables", "one of 'model', 'params:offset', 'table', got 'tables'"),
        ("-p inference -i table --copy-mode=steal", "'steal' is not one of"),
        ("-p inference -i model --infer-signature", "'model' is only in memory"),
    ],
)
def test_what_modelify_can_not_do_is_one_sentence(
    trained: Callable[..., Project], words: str, sentence: str
) -> None:
    project = trained("table: {type: pandas.CSVDataset, filepath: data/table.csv}")
    project.pipeline(INFERENCE_ALONE, "inference")

    ended = project.kedro("mlflow", "modelify", *words.split())

    assert ended.returncode in (1, 2)
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert project.all_runs() == []
