"""The catalog in `docs/datasets.md` works, under every runner, and names every class."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import runtime

from ...conftest import REPOSITORY
from ...support.projects import Project

GUIDE = (REPOSITORY / "docs" / "datasets.md").read_text("utf-8")
CATALOG = "\n".join(re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE))

WORK = """
import pandas as pd
from kedro.pipeline import Node, Pipeline
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

SAVED = [
    "figure", "versioned_report", "partitions", "only_in_the_run", "accuracy", "loss",
    "learning_curve", "scores", "training", "local_classifier", "confusion",
]

def make(depth):
    figure = Figure()
    figure.subplots().plot([1, 2])
    model = LogisticRegression(C=depth).fit([[0.0], [1.0]], [0, 1])
    table = pd.DataFrame({"n": [1.0, 2.0]})
    return (
        figure, "a report", {"one": "first", "two": "second"}, "a note", 0.9, 0.5,
        {10: 0.4, 20: 0.8}, {"f1": 0.7}, {"loss": [{"step": 0, "value": 0.5}]}, model, table,
    )

def fit(depth):
    model = LogisticRegression(C=depth).fit([[0.0], [1.0]], [0, 1])
    return model, {"input_example": pd.DataFrame({"x": [0.0]}), "pip_requirements": []}

def check(report, partitions, note, accuracy, curve, scores, training, local, confusion, model):
    assert report == "a report"
    assert {name: load() for name, load in partitions.items()} == {"one": "first", "two": "second"}
    assert note == "a note"
    assert (accuracy, curve, scores) == (0.9, {10: 0.4, 20: 0.8}, {"f1": 0.7})
    assert training == {"fit.loss": {"step": 0, "value": 0.5}}
    assert list(confusion["n"]) == [1, 2]
    return [m.predict([[1.0]]).tolist() for m in (local, model)]

def compare(registered, of_run, past_runs, checked):
    assert registered.C == of_run.C == 1
    return [checked, len(past_runs), list(past_runs.columns)]

def create_pipeline():
    return Pipeline([
        Node(make, "params:depth", SAVED),
        Node(fit, "params:depth", "classifier"),
        Node(
            check,
            [
                "versioned_report", "partitions", "only_in_the_run", "accuracy", "learning_curve",
                "scores", "training", "local_classifier", "confusion", "classifier",
            ],
            "checked",
        ),
        Node(
            compare,
            ["registered_classifier", "classifier_of_a_run", "past_runs", "checked"],
            "compared",
        ),
    ])
"""


def test_the_guide_has_an_entry_for_each_class() -> None:
    types = {entry["type"].rpartition(".")[2] for entry in yaml.safe_load(CATALOG).values()}

    assert types == {name for name in runtime.__all__ if name.endswith("Dataset")}


@pytest.mark.parametrize(
    ("runner", "start_method"),
    [
        ("SequentialRunner", "fork"),
        pytest.param("ThreadRunner", "fork", marks=pytest.mark.thorough),
        pytest.param("ParallelRunner", "spawn", marks=pytest.mark.thorough),
    ],
)
def test_the_catalog_of_the_guide_logs_and_loads_everything(
    project: Project, tmp_path: Path, runner: str, start_method: str
) -> None:
    project.pipeline(WORK)
    project.parameters({"depth": 1})
    project.catalog(
        CATALOG.replace("penguins.runtime", "PACKAGE.runtime")
        + "\ncompared: {type: json.JSONDataset, filepath: data/08_reporting/compared.json}\n"
    )

    for past in range(2):
        ended = project.kedro("run", f"--runner={runner}", KEDRO_MP_CONTEXT=start_method)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        compared = (project.path / "data/08_reporting/compared.json").read_text()
        columns = ["run_id", "start_time", "metrics.accuracy", "params.depth"]
        assert yaml.safe_load(compared) == [[[1], [1]], past, columns]

    runs = project.all_runs()
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    (run, _) = runs
    assert run.data.metrics == {
        "accuracy": 0.9,
        "validation_loss": 0.5,
        "learning_curve": 0.8,
        "scores.f1": 0.7,
        "fit.loss": 0.5,
    }
    project.client.download_artifacts(run.info.run_id, "", str(tmp_path))
    files = {
        file.relative_to(tmp_path).as_posix()
        for file in tmp_path.rglob("*")
        if file.is_file() and "working directory" not in file.parts
    }
    assert {file for file in files if not file.startswith(project.package)} == {
        "figures/figure.png",
        "report.txt",
        "partitions/one.txt",
        "partitions/two.txt",
        "note.txt",
        "confusion.json",
    }
    assert not (project.path / "data/08_reporting/note.txt").exists()
    alias = project.client.get_model_version_by_alias("penguins-classifier", "challenger")
    assert (alias.run_id, int(alias.version)) == (run.info.run_id, 2)
