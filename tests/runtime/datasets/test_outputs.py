"""Outputs become artifacts that MLflow's pages show, without a word in the catalog."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pandas as pd
import pytest

from ...support.projects import Project

WORK = """
import pandas as pd
from kedro.pipeline import Node, Pipeline
from matplotlib.figure import Figure
from PIL import Image

class Odd:
    def __eq__(self, other):
        return isinstance(other, Odd)

class Stuck:
    def __deepcopy__(self, memo):
        return self
    def __reduce__(self):
        raise TypeError("no way to pickle this")

def make():
    table = pd.DataFrame({"n": range(500), "name": [f"row {i}" for i in range(500)]})
    mixed = pd.DataFrame({"x": [1, "two", None]}, dtype=object)
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    return (
        table, mixed, figure, Image.new("RGB", (2, 2)), "a text: ünï", {"a": [1, None]}, Odd(),
        Stuck(), "kept", "remote", 1.5, "other",
    )

NAMES = [
    "table", "mixed", "figure", "image", "text", "json", "odd", "stuck", "file", "remote",
    "metric", "other",
]

def again(table, file):
    return file + " once more"

def create_pipeline():
    return Pipeline([
        Node(make, None, [f"out_{name}" for name in NAMES[:-1]] + ["other"], name="make"),
        Node(again, ["out_table", "out_file"], "space.out_file", name="again"),
    ])
"""

CATALOG = """
out_file: {type: text.TextDataset, filepath: data/02_intermediate/kept.txt, versioned: true}
out_remote:
  type: CachedDataset
  dataset: {type: text.TextDataset, filepath: "memory://bucket/remote.txt"}
out_metric: {type: PACKAGE.runtime.MlflowMetricDataset}
"""


def logged(project: Project, folder: Path) -> dict[str, Path]:
    run_id = project.only_run().info.run_id
    folder.mkdir()
    project.client.download_artifacts(run_id, "", str(folder))
    return {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }


@pytest.fixture
def working(project: Project) -> Project:
    project.pipeline(WORK)
    project.catalog(CATALOG)
    project.mlflow_yml('tracking: {artifacts: {datasets: ["out_*", "*.out_*"]}}')
    return project


def test_each_kind_of_output_is_logged_in_a_format_of_its_own(
    working: Project, tmp_path: Path
) -> None:
    working.run()

    files = logged(working, tmp_path / "artifacts")
    assert files.keys() == {
        "outputs/out_table/out_table.parquet",
        "outputs/out_table/preview.html",
        "outputs/out_mixed/out_mixed.pkl",
        "outputs/out_mixed/preview.html",
        "outputs/out_figure/out_figure.png",
        "outputs/out_image/out_image.png",
        "outputs/out_text/out_text.txt",
        "outputs/out_json/out_json.json",
        "outputs/out_odd/out_odd.pkl",
        "outputs/out_file/kept.txt",
        "outputs/out_remote/remote.txt",
        "outputs/space.out_file/space.out_file.txt",
    }
    table = pd.read_parquet(files["outputs/out_table/out_table.parquet"])
    assert table["n"].tolist() == list(range(500))
    preview = files["outputs/out_table/preview.html"].read_text()
    assert "row 99<" in preview
    assert "row 100<" not in preview
    mixed = pickle.loads(files["outputs/out_mixed/out_mixed.pkl"].read_bytes())
    assert mixed["x"].tolist() == [1, "two", None]
    for image in ("figure", "image"):
        assert files[f"outputs/out_{image}/out_{image}.png"].read_bytes().startswith(b"\x89PNG")
    assert files["outputs/out_text/out_text.txt"].read_text("utf-8") == "a text: ünï"
    assert json.loads(files["outputs/out_json/out_json.json"].read_text()) == {"a": [1, None]}
    assert files["outputs/out_file/kept.txt"].read_text() == "kept"
    assert files["outputs/out_remote/remote.txt"].read_text() == "remote"
    again = files["outputs/space.out_file/space.out_file.txt"]
    assert again.read_text() == "kept once more"
    assert working.only_run().data.metrics == {"out_metric": 1.5}


@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("spawn", marks=pytest.mark.thorough)]
)
def test_workers_log_their_outputs_and_a_disabled_pipeline_none(
    project: Project, tmp_path: Path, start_method: str
) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def make():
            return "made"

        def copy(text):
            return text

        def create_pipeline():
            return Pipeline([Node(make, None, "a")] + [Node(copy, "a", f"b{i}") for i in range(3)])
        """
    )
    project.mlflow_yml("tracking: {artifacts: {datasets: [a, b1, b2]}}")
    project.mlflow_yml(
        "tracking: {artifacts: {datasets: [a]}, disable_tracking: {pipelines: [__default__]}}",
        env="test",
    )

    ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT=start_method)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    project.run(env="test")

    files = logged(project, tmp_path / "artifacts")
    assert files.keys() == {f"outputs/{name}/{name}.txt" for name in ("a", "b1", "b2")}


GENERATOR = """
import mlflow
from kedro.pipeline import Node, Pipeline

def write():
    for i in range(3):
        mlflow.log_metric("written", i, step=i)
        yield f"line {i}\\n"

def nothing():
    return 1

def create_pipeline():
    return Pipeline([Node(write, None, "lines"), Node(nothing, None, "one")])
"""


@pytest.mark.parametrize("runner", ["SequentialRunner", "ThreadRunner", "ParallelRunner"])
def test_what_a_generator_writes_and_logs_is_all_in_the_run(
    project: Project, tmp_path: Path, runner: str
) -> None:
    project.pipeline(GENERATOR)
    project.catalog(
        """
        lines:
          type: text.TextDataset
          filepath: data/02_intermediate/lines.txt
          fs_args: {open_args_save: {mode: a}}
        """
    )
    project.mlflow_yml("tracking: {artifacts: {datasets: [lines]}}")

    ended = project.kedro("run", f"--runner={runner}")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    files = logged(project, tmp_path / "artifacts")
    assert files.keys() == {"outputs/lines/lines.txt"}
    assert files["outputs/lines/lines.txt"].read_text() == "line 0\nline 1\nline 2\n"
    run = project.only_run()
    history = project.client.get_metric_history(run.info.run_id, "written")
    assert [(point.step, point.value) for point in history] == [(0, 0), (1, 1), (2, 2)]
