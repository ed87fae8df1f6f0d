"""What libraries log by themselves lands in the Kedro run, or under it, under every runner."""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.util import find_spec

import mlflow
import pytest
from kedro.framework.startup import bootstrap_project
from kedro.runner import ParallelRunner
from mlflow.entities import Run
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS, autologging_is_disabled

from ...support.projects import Project, needs_kedro

# The search logs to the Kedro run itself; the others each to a child that their node opens.
PIPELINE = """
import mlflow
import numpy as np
from kedro.pipeline import Node, Pipeline

X = np.arange(80.0).reshape(40, 2)
Y = (X[:, 0] > 30).astype(int)

def search():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    GridSearchCV(LogisticRegression(), {"C": [0.5, 1.0, 2.0]}, cv=2).fit(X, Y)
    return True

def boost():
    import xgboost

    with mlflow.start_run(nested=True, run_name="xgboost"):
        xgboost.train({"max_depth": 2}, xgboost.DMatrix(X, Y), num_boost_round=3,
                      evals=[(xgboost.DMatrix(X, Y), "train")])
    return True

def boost_light():
    import lightgbm

    data = lightgbm.Dataset(X, Y, free_raw_data=False)
    with mlflow.start_run(nested=True, run_name="lightgbm"):
        lightgbm.train({"max_depth": 3, "verbose": -1}, data, num_boost_round=4, valid_sets=[data])
    return True

def regress():
    import statsmodels.api

    with mlflow.start_run(nested=True, run_name="statsmodels"):
        statsmodels.api.OLS(X[:, 0], X[:, 1:]).fit()
    return True

def create_pipeline():
    return Pipeline([Node(f, None, f"{f.__name__}_is_done", name=f.__name__)
                     for f in (search, boost, boost_light, regress)])
"""

# MLflow follows one fit at a time in a process, so that in threads they must not overlap.
IN_TURN = f"""{PIPELINE.partition("def create_pipeline")[0]}
def after(function):
    return lambda earlier: function()

def create_pipeline():
    functions = [search, boost, boost_light, regress]
    first = Node(lambda: 0, None, "done_0", name="first")
    return Pipeline([first, *(
        Node(after(f), f"done_{{i}}", f"done_{{i + 1}}", name=f.__name__)
        for i, f in enumerate(functions)
    )])
"""

AUTOLOG = """
tracking:
  autolog:
    sklearn: {log_models: false, max_tuning_runs: 2}
    xgboost: {log_models: false}
    lightgbm: {log_models: false}
    statsmodels: {log_models: false}
"""


def check_what_was_logged(project: Project) -> None:
    """Check for one Kedro run with all that the four libraries log, and no run beside it."""
    runs = project.all_runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    (main,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not main]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {main.info.run_id}
    assert {run.info.experiment_id for run in children} == {main.info.experiment_id}

    assert (
        main.data.params.items() >= {"cv": "2", "best_C": best_of(main), "n_jobs": "None"}.items()
    )
    assert "best_cv_score" in main.data.metrics
    assert "training_accuracy_score" in main.data.metrics
    named = {run.info.run_name: run for run in children}
    tried = [run for name, run in named.items() if name not in LIBRARIES]
    assert len(tried) == 2  # max_tuning_runs
    assert all("mean_test_score" in run.data.metrics for run in tried)
    for library, (params, metric, points) in LIBRARIES.items():
        run = named[library]
        assert run.data.params.items() >= params.items()
        assert len(project.client.get_metric_history(run.info.run_id, metric)) == points
    assert len(children) == 2 + len(LIBRARIES)


def best_of(run: Run) -> str:
    assert run.data.params["best_C"] in ("0.5", "1.0", "2.0")
    return run.data.params["best_C"]


# Parameters, a metric, and how many points it has.
LIBRARIES: dict[str, tuple[dict[str, str], str, int]] = {
    "xgboost": ({"max_depth": "2", "num_boost_round": "3"}, "train-rmse", 3),
    "lightgbm": ({"max_depth": "3", "num_boost_round": "4"}, "training-l2", 4),
    "statsmodels": ({"method": "pinv"}, "rsquared", 1),
}


THOROUGH = pytest.mark.thorough


# Each in a new process, which has imported none of them: OpenMP, which they use, doesn't survive a
# fork in a process that has used it before.
@pytest.mark.parametrize(
    ("words", "start_method", "pipeline"),
    [
        pytest.param("--runner=SequentialRunner", "fork", PIPELINE, marks=THOROUGH),
        pytest.param("--runner=SequentialRunner --async", "fork", PIPELINE, marks=THOROUGH),
        pytest.param("--runner=ThreadRunner", "fork", IN_TURN, marks=THOROUGH),
        pytest.param("--runner=ParallelRunner", "fork", PIPELINE, marks=THOROUGH),
        ("--runner=ParallelRunner --async", "fork", PIPELINE),
        pytest.param("--runner=ParallelRunner", "spawn", PIPELINE, marks=THOROUGH),
        pytest.param("--runner=ParallelRunner", "forkserver", PIPELINE, marks=THOROUGH),
    ],
)
def test_four_libraries_log_to_one_run_under_every_runner(
    project: Project, words: str, start_method: str, pipeline: str
) -> None:
    project.pipeline(pipeline)
    project.mlflow_yml(AUTOLOG)

    ended = project.kedro_anew("run", *words.split(), KEDRO_MP_CONTEXT=start_method)

    assert ended.returncode == 0, ended.stderr
    check_what_was_logged(project)


def test_a_worker_that_was_forked_has_threads_of_its_own_for_what_it_logs(
    project: Project,
) -> None:
    project.pipeline(FIT)
    project.mlflow_yml("tracking: {autolog: {sklearn: {log_models: false}}}")
    project.run()  # after which MLflow has threads in this process

    project.run(runner=ParallelRunner(max_workers=1))

    assert [run.data.params["C"] for run in project.all_runs()] == ["3.0", "3.0"]


FIT = """
from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LogisticRegression

def fit():
    LogisticRegression(C=3.0).fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
    return True

def create_pipeline():
    return Pipeline([Node(fit, None, "is_done")])
"""


def is_on(flavor: str) -> bool:
    return not autologging_is_disabled(flavor)


def test_a_model_is_logged_to_the_run_as_the_flavors_default_is(project: Project) -> None:
    project.pipeline(FIT)
    project.mlflow_yml("tracking: {autolog: {sklearn: true, xgboost: false}}")

    project.run()

    run = project.only_run()
    assert run.data.params["C"] == "3.0"
    (model,) = project.client.search_logged_models([run.info.experiment_id])
    assert model.source_run_id == run.info.run_id
    assert str(model.status) == "READY"


def test_a_warning_says_that_fits_in_threads_must_not_overlap(project: Project) -> None:
    project.pipeline(FIT)
    project.mlflow_yml("tracking: {autolog: {sklearn: {log_models: false}}}")

    ended = project.kedro("run", "--runner=ThreadRunner")

    assert ended.returncode == 0, ended.stderr
    assert "MLflow's autologging follows one fit at a time" in " ".join(ended.stderr.split())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_on_before_and_after_a_run(project: Project, fails: bool) -> None:
    project.pipeline(
        FIT if not fails else FIT.replace("LogisticRegression(C=3.0)", "1 / LogisticRegression()")
    )
    project.mlflow_yml("tracking: {autolog: {sklearn: {log_models: false}}}")
    assert not is_on("sklearn")

    if fails:
        with pytest.raises(TypeError):
            project.run()
    else:
        project.run()

    assert not is_on("sklearn")
    assert project.only_run().info.status == ("FAILED" if fails else "FINISHED")


MEETING = """
import threading

from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LogisticRegression
from PACKAGE import meeting

def fit(weight):
    if weight == 2.0:  # goes on when the other run has ended
        assert meeting.other_has_ended.wait(60)
    LogisticRegression(C=weight).fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
    return True

def begin(weight):
    if weight == 2.0:
        meeting.both_have_begun.set()
    else:  # its run is on by now, and ends first
        assert meeting.both_have_begun.wait(60)
    return weight

def create_pipeline():
    return Pipeline([Node(begin, "params:weight", "w"), Node(fit, "w", "is_done")])
"""


@needs_kedro("1.4")
def test_a_run_that_ends_leaves_it_on_for_one_that_overlaps(project: Project) -> None:
    from kedro.framework.session import KedroServiceSession

    project.pipeline(MEETING)
    project.write(
        f"src/{project.package}/meeting.py",
        """
        from threading import Event

        both_have_begun, other_has_ended = Event(), Event()
        """,
    )
    project.parameters({"weight": 0.0})
    project.mlflow_yml("tracking: {autolog: {sklearn: {log_models: false}}}")
    bootstrap_project(project.path)
    session = KedroServiceSession.create(project_path=project.path)
    with session:
        threads = {}
        for weight in (1.0, 2.0):
            threads[weight] = threading.Thread(
                target=session.run, kwargs={"runtime_params": {"weight": weight}}
            )
            threads[weight].start()
        threads[1.0].join(120)
        import_module(f"{project.package}.meeting").other_has_ended.set()
        threads[2.0].join(120)

    assert sorted(run.data.params["C"] for run in project.all_runs()) == ["1.0", "2.0"]
    assert not is_on("sklearn")


@pytest.mark.parametrize(
    ("autolog", "sentence"),
    [
        ("{sklern: true}", "tracking.autolog.sklern: MLflow has no flavor 'sklern', did you mean "),
        (
            "{artifacts: true}",
            "tracking.autolog.artifacts: MLflow's flavor 'artifacts' has no auto",
        ),
        ("{paddle: true}", "tracking.autolog.paddle: its library can't be imported: No module "),
        (
            "{sklearn: {log_model: false}}",
            "tracking.autolog.sklearn: unknown option 'log_model', expected one of log_input_exam",
        ),
        ("{sklearn: 3}", "tracking.autolog.sklearn: expected true, false or options, got 3"),
        ("[sklearn]", "tracking.autolog: expected "),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_makes_no_run(
    project: Project, autolog: str, sentence: str
) -> None:
    project.pipeline(FIT)
    project.mlflow_yml(f"tracking:\n  autolog: {autolog}")

    ended = project.kedro("run")

    assert ended.returncode == 1
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith(f"Error: conf/local/mlflow.yml:2: {sentence}")
    assert "Traceback" not in ended.stdout + ended.stderr
    assert project.all_runs() == []


LIGHTNING = """
import torch
from kedro.pipeline import Node, Pipeline
from lightning.pytorch import LightningModule, Trainer

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit():
    x = torch.arange(4.0).reshape(4, 1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 2 * x))
    Trainer(max_epochs=3, logger=False, enable_checkpointing=False, accelerator="cpu").fit(
        Line(), data
    )
    return True

def create_pipeline():
    return Pipeline([Node(fit, None, "is_done")])
"""


@pytest.mark.skipif(
    find_spec("lightning") is None, reason="PyTorch Lightning is too large to be installed for it"
)
def test_pytorch_lightning_logs_to_the_run(project: Project) -> None:
    project.pipeline(LIGHTNING)
    project.mlflow_yml("tracking: {autolog: {pytorch: {log_models: false}}}")

    project.run()

    run = project.only_run()
    assert run.data.params["epochs"] == "3"
    assert len(project.client.get_metric_history(run.info.run_id, "loss")) == 3


def test_what_the_user_switched_on_stays_where_mlflow_yml_does_not_name_it(
    project: Project,
) -> None:
    project.pipeline(FIT)
    mlflow.sklearn.autolog(log_models=False)
    before = dict(AUTOLOGGING_INTEGRATIONS["sklearn"])
    try:
        project.run()
        assert is_on("sklearn")
        assert AUTOLOGGING_INTEGRATIONS["sklearn"] == before
    finally:
        mlflow.sklearn.autolog(disable=True)
        AUTOLOGGING_INTEGRATIONS["sklearn"].clear()


def test_a_flavor_of_mlflow_yml_keeps_nobody_from_switching_all_on_afterwards(
    project: Project,
) -> None:
    project.pipeline(FIT)
    project.mlflow_yml("tracking: {autolog: {sklearn: {log_models: false}}}")
    project.run()

    mlflow.autolog(log_models=False, silent=True)
    try:
        assert is_on("sklearn")
    finally:
        mlflow.autolog(disable=True)


def test_a_library_comes_without_its_flavor_where_nothing_is_on(project: Project) -> None:
    project.pipeline(
        """
        import sys
        from kedro.pipeline import Node, Pipeline

        def fit():
            import sklearn
            return "mlflow.sklearn" in sys.modules

        def create_pipeline():
            return Pipeline([Node(fit, None, "brought")])
        """
    )
    project.catalog("brought: {type: json.JSONDataset, filepath: brought.json}")

    ended = project.kedro_anew("run")

    assert ended.returncode == 0, ended.stderr
    assert (project.path / "brought.json").read_text() == "false"
