"""Projects of a given size, made from the template as it is in this checkout."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import copier
import yaml
from copier.errors import DirtyLocalWarning

from .cases import VARIANTS, Case, Prediction, Variant
from .environments import process_variables

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "measured"
PIPELINE_FILE = f"src/{PACKAGE}/pipelines/first/pipeline.py"

PLAIN_SETTINGS = '''"""Settings of a project that tracks nothing by itself."""

CONFIG_LOADER_ARGS = {"base_env": "base", "default_run_env": "local"}
'''

PIPELINE = '''"""The pipeline of a case."""

from kedro.pipeline import Node, Pipeline

NODES, PARAMETERS, LEAVES, METRICS, STEPS, ARTIFACTS = {sizes}

METRIC_NAMES = [f"metric_{{i}}" for i in range(METRICS)]
HISTORY_NAMES = ["history"] if STEPS else []
ARTIFACT_NAMES = [f"artifact_{{i}}" for i in range(ARTIFACTS)]


def first(*parameters):
    metrics = [i / 10 for i in range(METRICS)]
    histories = [[1 / (step + 1) for step in range(STEPS)] for _ in HISTORY_NAMES]
    artifacts = ["penguins, " * 100_000 for _ in range(ARTIFACTS)]
    return [len(parameters), *metrics, *histories, *artifacts]


def other(*parameters):
    return len(parameters)


def create_pipeline():
    inputs = [[f"params:node_{{i}}_{{j}}" for j in range(PARAMETERS)] for i in range(NODES)]
    if LEAVES:
        inputs[0].append("params:tree")
    outputs = ["done_0", *METRIC_NAMES, *HISTORY_NAMES, *ARTIFACT_NAMES]
    return Pipeline(
        [
            Node(first, inputs[0], outputs, name="node_0"),
            *(Node(other, inputs[i], f"done_{{i}}", name=f"node_{{i}}") for i in range(1, NODES)),
        ]
    )
'''

INFERENCE = '''"""A training, and the inference pipeline of a case."""

import numpy as np
from kedro.pipeline import Node, Pipeline

{factory}

NODES, PARAMETERS, ARTIFACT = {sizes}

# What makes 10 MB in a file.
NUMBERS = {{"array": 1_250_000, "list": 500_000, None: 1}}[ARTIFACT]


def train(rows):
    numbers = np.arange(len(rows), NUMBERS + len(rows)) / 7
    return numbers.tolist() if ARTIFACT == "list" else numbers


def step(data, *parameters):
    return np.asarray(data) + sum(parameters)


def last_step(data, artifact, *parameters):
    return np.asarray(data) + artifact[-1] + sum(parameters)


def create_inference():
    inputs = [["rows"], *([f"data_{{i}}"] for i in range(NODES - 1))]
    outputs = [*(f"data_{{i}}" for i in range(NODES - 1)), "predicted"]
    functions = [step] * NODES
    if ARTIFACT:
        functions[-1] = last_step
        inputs[-1].append("artifact")
    for i in range(PARAMETERS):
        inputs[i % NODES].append(f"params:parameter_{{i}}")
    return Pipeline(
        [Node(functions[i], inputs[i], outputs[i], name=f"node_{{i}}") for i in range(NODES)]
    )


def create_pipeline():
    training = Pipeline([Node(train, "rows", "artifact", name="train")])
    return pipeline_ml_factory(training, create_inference(), input_name="rows")
'''

# With plain Kedro there is a training, and nothing is made of the inference pipeline.
FACTORIES: Mapping[Variant, str] = {
    "plain": "pipeline_ml_factory = lambda training, inference, input_name: training",
    "peer": "from kedro_mlflow.pipeline import pipeline_ml_factory",
    "ours": f"from {PACKAGE}.runtime import pipeline_ml_factory",
}

ARTIFACT_DATASETS = {
    "array": {"type": "pickle.PickleDataset", "filepath": "data/06_models/artifact.pkl"},
    "list": {"type": "json.JSONDataset", "filepath": "data/06_models/artifact.json"},
}

ROWS = "x,y,z\n1.5,2.5,3.5\n4.5,5.5,6.5\n7.5,8.5,9.5\n"


@dataclass(frozen=True)
class Project:
    """One variant of a project on disk, and the environment that it runs in."""

    variant: Variant
    path: Path
    environment: Path
    tracking_uri: str

    @property
    def experiment(self) -> str:
        """The experiment that its runs belong to; each variant has its own."""
        return f"benchmark-{self.variant}"

    def write(self, file: str, text: str) -> None:
        """Write a file of the project."""
        (self.path / file).write_text(text, encoding="utf-8")

    def write_yaml(self, file: str, content: Any) -> None:
        """Write a configuration file of the project."""
        self.write(file, yaml.safe_dump(content))

    def kedro(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `kedro …` in a process of its own."""
        return self._run("kedro", *words, **variables)

    def python(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `python …` in a process of its own."""
        return self._run("python", *words, **variables)

    def _run(self, command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.environment / "bin" / command), *words],
            cwd=self.path,
            env={**process_variables(), **variables},
            capture_output=True,
            text=True,
            check=False,
        )


def generate(folder: Path) -> None:
    """Generate the project that all others are copies of, as a git repository like any project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirtyLocalWarning)  # what isn't committed is measured too
        copier.run_copy(
            str(REPOSITORY),
            folder,
            data={"example": False, "package_name": PACKAGE, "extras": ["serving"]},
            defaults=True,
            vcs_ref="HEAD",
            quiet=True,
        )
    me = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*me, "commit", "--quiet", "-m", "Generated"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


def make_projects(
    generated: Path,
    folder: Path,
    case: Case | Prediction,
    environments: Mapping[Variant, Path],
    server: str | None = None,
) -> dict[Variant, Project]:
    """Make the three variants of the project of a case, on a server or on SQLite files."""
    projects = {}
    for variant in VARIANTS:
        path = folder / variant
        tracking_uri = server or f"sqlite:///{(path / 'mlflow.db').as_posix()}"
        project = Project(variant, path, environments[variant], tracking_uri)
        shutil.copytree(generated, project.path)
        if isinstance(case, Case):
            _fill(project, case)
        else:
            _fill_for_prediction(project, case)
        if variant != "ours":
            _take_runtime_out(project)
        if variant != "plain":
            project.write_yaml("conf/local/mlflow.yml", _mlflow_yml(project, case))
        projects[variant] = project
    return projects


def _fill(project: Project, case: Case) -> None:
    project.write(PIPELINE_FILE, PIPELINE.format(sizes=astuple(case)[3:]))
    project.write_yaml("conf/base/catalog.yml", _catalog(project.variant, case))
    parameters: dict[str, Any] = {
        f"node_{i}_{j}": i + j / 100 for i in range(case.nodes) for j in range(case.parameters)
    }
    if case.leaves:
        parameters["tree"] = _tree(case.leaves)
    project.write_yaml("conf/base/parameters.yml", parameters)


def _fill_for_prediction(project: Project, case: Prediction) -> None:
    factory, sizes = FACTORIES[project.variant], astuple(case)[1:]
    project.write(PIPELINE_FILE, INFERENCE.format(factory=factory, sizes=sizes))
    project.write("data/01_raw/rows.csv", ROWS)
    catalog = {"rows": {"type": "pandas.CSVDataset", "filepath": "data/01_raw/rows.csv"}}
    if case.artifact:
        catalog["artifact"] = ARTIFACT_DATASETS[case.artifact]
    project.write_yaml("conf/base/catalog.yml", catalog)
    parameters = {f"parameter_{i}": i / 100 for i in range(case.parameters)}
    project.write_yaml("conf/base/parameters.yml", parameters)


def _take_runtime_out(project: Project) -> None:
    package = project.path / "src" / PACKAGE
    shutil.rmtree(package / "runtime")
    (package / "cli.py").unlink()
    for file in project.path.glob("conf/*/mlflow*"):
        file.unlink()
    project.write(f"src/{PACKAGE}/settings.py", PLAIN_SETTINGS)


def _mlflow_yml(project: Project, case: Case | Prediction) -> dict[str, Any]:
    """Give the same configuration to kedro-mlflow and to the runtime."""
    return {
        "server": {"mlflow_tracking_uri": project.tracking_uri},
        "tracking": {
            "experiment": {"name": project.experiment},
            "params": {"dict_params": {"flatten": isinstance(case, Case) and case.leaves > 0}},
        },
    }


def _catalog(variant: Variant, case: Case) -> dict[str, Any]:
    """Give the datasets: with plain Kedro metrics are kept in JSON files."""
    metrics, artifacts = {
        "plain": ("", ""),
        "peer": ("kedro_mlflow.io.metrics.", "kedro_mlflow.io.artifacts."),
        "ours": (f"{PACKAGE}.runtime.", f"{PACKAGE}.runtime."),
    }[variant]

    def metric(name: str, kind: str) -> dict[str, Any]:
        if variant == "plain":
            return {"type": "json.JSONDataset", "filepath": f"data/08_reporting/{name}.json"}
        return {"type": f"{metrics}{kind}"}

    def artifact(name: str) -> dict[str, Any]:
        file = {"type": "text.TextDataset", "filepath": f"data/08_reporting/{name}.txt"}
        if variant == "plain":
            return file
        return {"type": f"{artifacts}MlflowArtifactDataset", "dataset": file}

    names = [f"metric_{i}" for i in range(case.metrics)]
    catalog = {name: metric(name, "MlflowMetricDataset") for name in names}
    if case.steps:
        catalog["history"] = metric("history", "MlflowMetricHistoryDataset")
    names = [f"artifact_{i}" for i in range(case.artifacts)]
    return catalog | {name: artifact(name) for name in names}


def _tree(leaves: int) -> Any:
    return 0.1 if leaves == 1 else {f"branch_{i}": _tree(leaves // 10) for i in range(10)}
