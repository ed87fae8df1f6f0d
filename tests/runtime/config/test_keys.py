"""Each key of `mlflow.yml` does what it says wherever it is set, and a wrong value is told.

An effect is read where a user meets it: in the MLflow store, in the environment of a node, in the
requests that a server got, or in what a command printed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import mlflow
import pytest
import yaml
from click import ClickException
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import fluent
from mlflow.tracking.request_header.registry import (
    _request_header_provider_registry as header_providers,
)
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from runtime.config.keys import MlflowConfig

from ...conftest import EXTRAS
from ...support.projects import ONE_NODE, Project, has, let_pipelines_overlap
from ...support.servers import CountingProxy

PIPELINES = {
    "work": ONE_NODE,
    "deep": ONE_NODE.replace("params:x", "params:deep").replace("2 * x", "1"),
    "long": ONE_NODE.replace("params:x", "params:long").replace("2 * x", "1"),
    "api": ONE_NODE.replace("params:x", "params:api").replace("2 * x", "1"),
    "variable": """
        import os
        from kedro.pipeline import Node, Pipeline

        def read():
            return str(os.environ.get("KM_TEST_SECRET"))

        def create_pipeline():
            return Pipeline([Node(read, None, "seen")])
        """,
    "register": """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def register(name):
            mlflow.MlflowClient().create_registered_model(name)
            return name

        def create_pipeline():
            return Pipeline([Node(register, "params:model_name", "registered")])
        """,
    "write": """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def write():
            mlflow.log_text("hello", "note.txt")
            return 1

        def create_pipeline():
            return Pipeline([Node(write, None, "written")])
        """,
    "fit": """
        from kedro.pipeline import Node, Pipeline

        def fit():
            from sklearn.linear_model import LinearRegression
            return float(LinearRegression().fit([[0], [1]], [1, 3]).coef_[0])

        def create_pipeline():
            return Pipeline([Node(fit, None, "slope")])
        """,
    "outer": """
        from pathlib import Path
        from kedro.framework.session import KedroSession
        from kedro.pipeline import Node, Pipeline

        def outer(how):
            path = Path(__file__).parents[4]
            with KedroSession.create(
                project_path=path, env=how["env"], runtime_params=how["params"]
            ) as session:
                session.run(pipeline_names=["work"])
            return 1

        def create_pipeline():
            return Pipeline([Node(outer, "params:inner", "done")])
        """,
}

HEADERS = """
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

class First(RequestHeaderProvider):
    def __init__(self, word="plain", kedro_context=None):
        self.word = word
        self.project = kedro_context.project_path.name if kedro_context else "no context"

    def in_context(self):
        return True

    def request_headers(self):
        return {"X-Seen": f"{type(self).__name__}, {self.word}, {self.project}"}

class Second(First):
    pass
"""

PARAMETERS = {
    "x": 1,
    "deep": {"a": {"b": 1}, "c": 2},
    "long": "abcdefg" * 1000,
    "api": {"token": "t0p", "pin": "1234"},
    "model_name": "model",
    "inner": {"env": None, "params": None},
}


@contextmanager
def one_project(
    folder: Path, generate: Callable[..., Path], empty_store: Path
) -> Iterator[Project]:
    """Make a project for all tests of a module; afterwards this process is as it was."""
    package = f"project_{os.getpid()}_{folder.name}"
    project = Project(
        generate(folder / package, package_name=package, example=False, extras=EXTRAS), package
    )
    shutil.rmtree(project.path / "src" / package / "pipelines" / "first")
    shutil.copy(empty_store, project.path)
    if not has("kedro", "1.5"):
        let_pipelines_overlap(project.path, package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        yield project
    for module in list(sys.modules):
        if module.partition(".")[0] == package:
            del sys.modules[module]


@contextmanager
def clean_mlflow() -> Iterator[None]:
    """Take back what runs change in MLflow for the whole process."""
    providers = list(header_providers._registry)
    try:
        yield
    finally:
        header_providers._registry[:] = providers
        fluent._active_run_stack.set([])
        fluent._active_experiment_id = None
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, generate: Callable[..., Path], empty_store: Path
) -> Iterator[Project]:
    """The one project of this module: its tests differ in `conf/` and in their experiment."""
    with one_project(tmp_path_factory.mktemp("keys"), generate, empty_store) as project:
        for name, code in PIPELINES.items():
            project.pipeline(code, name)
        project.parameters(PARAMETERS)
        project.write("conf/base/credentials.yml", "one: {KM_TEST_SECRET: t0p-1}")
        project.write("conf/local/credentials.yml", "two: {KM_TEST_SECRET: t0p-2}")
        project.write("conf/prod/credentials.yml", "two: {KM_TEST_SECRET: t0p-2}")
        project.write(f"src/{project.package}/headers.py", HEADERS)
        (project.path / "conf/base/mlflow.yml").rename(project.path / "generated.yml")
        yield project


@dataclass
class Scene:
    """One test's part of the shared project: its configuration, its experiment, its run."""

    project: Project
    folder: Path
    busy_port: int
    proxy: Callable[[], CountingProxy]
    experiment: str = field(default_factory=lambda: f"experiment-{uuid4().hex}")
    env: str | None = None
    params: dict[str, Any] | None = None
    words: dict[str, str] = field(default_factory=dict)
    began: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def filled(self, text: str) -> str:
        """Put this test's own values into a text of the table."""
        own = {"TMP": self.folder.as_posix(), "PACKAGE": self.project.package, **self.words}
        return re.sub("|".join(own), lambda word: own[word.group()], text)

    def base(self, values: dict[str, str]) -> None:
        """Write conf/base/mlflow.yml: the generated one with some other values."""
        whole = yaml.safe_load((self.project.path / "generated.yml").read_text("utf-8"))
        for key, text in values.items():
            *groups, name = key.split(".")
            group = whole
            for part in groups:
                group = group[part]
            group[name] = yaml.safe_load(self.filled(text))
        self.project.mlflow_yml(yaml.safe_dump(whole), env="base")

    def environment(self, env: str, key: str, text: str) -> str:
        """Write one key into an environment's mlflow.yml; gives file and line of it."""
        names = key.split(".")
        lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(names)]
        self.project.mlflow_yml("\n".join(lines) + f" {self.filled(text)}\n", env=env)
        return f"conf/{env}/mlflow.yml:{len(lines)}"

    def given(self, text: str) -> None:
        """Run with `--params=value=…`, read as the command line reads it."""
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={self.filled(text)}"]))
        assert isinstance(read, dict)
        self.params = {str(name): value for name, value in read.items()}

    def run(self, pipeline: str) -> Any:
        return self.project.run(env=self.env, params=self.params, pipeline_names=[pipeline])

    def runs(self, store: str = "") -> list[Run]:
        """The runs that were made since the test began, in the project's store or another."""
        client = MlflowClient(store or self.project.tracking_uri)
        experiments = client.search_experiments(view_type=ViewType.ALL)
        return list(
            client.search_runs(
                [experiment.experiment_id for experiment in experiments],
                f"attributes.start_time >= {self.began}",
                run_view_type=ViewType.ALL,
            )
        )

    def new_run(self, pipeline: str) -> Run:
        self.run(pipeline)
        (run,) = self.runs()
        return run

    def own_experiment(self) -> Experiment:
        found: Experiment | None = self.project.client.get_experiment_by_name(self.experiment)
        assert found
        return found

    def count(self) -> tuple[int, int]:
        """Number the experiments, and the runs that were made since the test began."""
        client = self.project.client
        return len(client.search_experiments(view_type=ViewType.ALL)), len(self.runs())

    def ui(self) -> str:
        """Say where `kedro mlflow ui` fails to listen."""
        ended = self.command("ui")
        assert ended.exit_code == 1
        found = re.fullmatch(r"Error: Can't listen on (\S+?) \(.*\n", ended.output)
        assert found, ended.output
        return found[1]

    def command(self, *words: str) -> Any:
        """Run `kedro mlflow …` in this process."""
        metadata = bootstrap_project(self.project.path)
        group = importlib.import_module(f"{self.project.package}.runtime.cli").mlflow
        env = [f"--env={self.env}"] if self.env else []
        return CliRunner().invoke(group, [*words, *env], obj=metadata)


@pytest.fixture
def scene(
    shared: Project,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scene]:
    monkeypatch.delenv("KM_TEST_SECRET", raising=False)
    for file in shared.path.glob("conf/*/mlflow.yml"):
        file.unlink()
    with socket.socket() as busy, clean_mlflow():
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        scene = Scene(
            shared,
            tmp_path,
            busy_port=busy.getsockname()[1],
            proxy=lambda: request.getfixturevalue("server"),
        )
        yield scene
    # What is registered in MLflow is taken back; the project must not remember it.
    state = sys.modules.get(f"{shared.package}.runtime.state")
    if state:
        state.current().header_providers.clear()


# How to look at an effect: run, and tell what is seen.


def pipeline_runs(scene: Scene) -> int:
    scene.run("work")
    return len(scene.runs())


def without_a_server(scene: Scene) -> str:
    """Tell what becomes of a run whose server is away."""
    told = ""
    try:
        scene.run("work")
    except ClickException as error:
        told = error.message
    stores = list(scene.project.path.glob(".mlflow-offline/*/mlflow.db"))
    if not stores:
        return told.rpartition(": ")[2].partition(" (asked")[0]
    (run,) = scene.runs(f"sqlite:///{stores[0].as_posix()}")
    shutil.rmtree(scene.project.path / ".mlflow-offline")
    return f"recorded: {run.data.params}"


def store_of_the_run(scene: Scene) -> list[str]:
    """Name the stores that have a run more."""
    scene.run("work")
    return [name for name, uri in three_stores(scene).items() if scene.runs(uri)]


def store_of_the_model(scene: Scene) -> list[str]:
    """Name the stores that have the model which a node registers."""
    model = f"model-{uuid4().hex}"
    scene.params = {**(scene.params or {}), "model_name": model}
    scene.run("register")
    return [
        name
        for name, uri in three_stores(scene).items()
        if MlflowClient(uri, uri).search_registered_models(f"name = '{model}'")
    ]


def three_stores(scene: Scene) -> dict[str, str]:
    return {
        "mlflow": scene.project.tracking_uri,
        "first": scene.filled("sqlite:///TMP/first.db"),
        "second": scene.filled("sqlite:///TMP/second.db"),
    }


def variable_in_a_node(scene: Scene) -> Any:
    return scene.run("variable")["seen"].load()


def headers_at_the_server(scene: Scene) -> set[str | None]:
    seen = scene.proxy().headers
    seen.clear()
    scene.run("work")
    assert len(seen) > 2
    return {headers.get("X-Seen") for headers in seen}


def autologged(scene: Scene) -> bool:
    mlflow.autolog(log_models=False, silent=True)
    try:
        return "fit_intercept" in scene.new_run("fit").data.params
    finally:
        mlflow.autolog(disable=True)


def fit_is_logged(scene: Scene) -> bool:
    return "fit_intercept" in scene.new_run("fit").data.params


def name_of_the_experiment(scene: Scene) -> str:
    run = scene.new_run("work")
    name: str = scene.project.client.get_experiment(run.info.experiment_id).name
    return name


def folder_of_the_artifact(scene: Scene) -> str:
    run = scene.new_run("write")
    found = [
        file.relative_to(folder).parts[0]
        for folder in (scene.folder, scene.project.path)
        for file in folder.glob(f"*/**/{run.info.run_id}/**/note.txt")
    ]
    location = scene.own_experiment().artifact_location
    assert found == [location.rpartition("/")[2]]
    return found[0]


def tags_of_the_experiment(scene: Scene) -> dict[str, str]:
    scene.run("work")
    tags = scene.own_experiment().tags
    return {name: value for name, value in tags.items() if not name.startswith("mlflow.")}


def deleted_experiment_after_a_run(scene: Scene) -> tuple[str, int]:
    client = scene.project.client
    client.delete_experiment(client.create_experiment(scene.experiment))
    # How a refusal is told is the matter of a test of its own.
    with suppress(ClickException, MlflowException):
        scene.run("work")
    return scene.own_experiment().lifecycle_stage, len(scene.runs())


def continued_run(scene: Scene) -> list[str]:
    """Tell which of three runs is finished: two earlier ones or a new one."""
    scene.run("work")
    names = {run_id: word for word, run_id in scene.words.items()}
    finished = [run for run in scene.runs() if run.info.status == "FINISHED"]
    return [names.get(run.info.run_id, "new") for run in finished]


def two_earlier_runs(scene: Scene) -> None:
    client = scene.project.client
    experiment = client.create_experiment(scene.experiment)
    for word in ("RUN_A", "RUN_B"):
        scene.words[word] = client.create_run(experiment).info.run_id
        client.set_terminated(scene.words[word], "FAILED")


def name_of_the_run(scene: Scene) -> str | None:
    name: str | None = scene.new_run("work").info.run_name
    return name


def inner_run_is_a_child(scene: Scene) -> bool:
    # The run inside of the node has the environment and the parameters of the outer one.
    inner = {"env": scene.env, "params": scene.params}
    scene.params = {**(scene.params or {}), "inner": inner}
    scene.run("outer")
    runs = {run.info.run_name: run for run in scene.runs()}
    assert runs.keys() == {"outer", "work"}
    parent = runs["work"].data.tags.get("mlflow.parentRunId")
    assert parent in (None, runs["outer"].info.run_id)
    return parent is not None


def logged_parameters(pipeline: str) -> Callable[[Scene], dict[str, str]]:
    def look(scene: Scene) -> dict[str, str]:
        params: dict[str, str] = scene.new_run(pipeline).data.params
        return params

    return look


def logged_outputs(scene: Scene) -> list[str]:
    run = scene.new_run("write")
    artifacts = scene.project.client.list_artifacts(run.info.run_id, "outputs")
    return [file.path for file in artifacts]


def where_a_long_parameter_is(scene: Scene) -> str:
    refusal = ""
    try:
        scene.run("long")
    except ClickException as error:
        refusal = error.message
    if refusal:
        assert "'long' (7000)" in refusal
        assert scene.runs() == []
        return "nowhere"
    (run,) = scene.runs()
    params, tags = run.data.params, run.data.tags
    return f"{len(params['long'])} in a parameter" if params else f"{len(tags['long'])} in a tag"


def length_of_a_long_parameter(scene: Scene) -> int:
    return len(scene.new_run("long").data.params["long"])


class Set(NamedTuple):
    """A value as it is written, and what is seen then."""

    written: str
    seen: Any


@dataclass(frozen=True)
class Row:
    """What there is to know of one key."""

    key: str
    look: Callable[[Scene], Any]
    default: Any  # what is seen when nothing is set
    first: Set
    second: Set
    wrong: list[tuple[str, str]]  # values, and how the sentence goes on after the key
    nullable: bool = False
    along: dict[str, str] = field(default_factory=dict)  # keys that this one needs
    before: Callable[[Scene], None] = lambda _: None

    def __str__(self) -> str:
        return self.key


NO_STRING = [
    ("7", ": expected a text, got 7"),
    ("[a]", ": expected a text, got ['a']"),
    ("{a: 1}", ": expected a text, got {'a': 1}"),
]
EMPTY = ("''", ": expected a text that isn't empty, got ''")
NO_TEXT = [*NO_STRING, EMPTY]
# Where a number is taken for a text.
NO_WORD = [("true", ": expected a text, got True"), *NO_TEXT[1:]]
NO_FLAG = [
    ("maybe", ": expected true or false, got 'maybe'"),
    ("null", ": expected true or false, got None"),
    ("[true]", ": expected true or false, got [True]"),
]
NO_LIST = [
    ("work", ": expected a list, got 'work'"),
    ("{a: 1}", ": expected a list, got {'a': 1}"),
    ("null", ": expected a list, got None"),
    ("[work, 1]", "[1]: expected a text, got 1"),
    ("[[work]]", "[0]: expected a text, got ['work']"),
    ("[work, '']", "[1]: expected a text that isn't empty, got ''"),
]
NO_MAPPING = [
    ("a", ": expected keys with values, got 'a'"),
    ("[a]", ": expected keys with values, got ['a']"),
]
SERVER = "server.mlflow_tracking_uri"
PROVIDER = "server.request_header_provider"
KWARGS = "tracking.experiment.create_experiment_kwargs"
PARAMS = "tracking.params"
FLAT = {f"{PARAMS}.dict_params.flatten": "true"}
DEEP = {"deep.a.b": "1", "deep.c": "2"}

ROWS = [
    Row(
        SERVER,
        store_of_the_run,
        default=["mlflow"],
        first=Set("sqlite:///TMP/first.db", ["first"]),
        second=Set("sqlite:///TMP/second.db", ["second"]),
        wrong=[*NO_TEXT, ("ftp://127.0.0.1/runs", ": ")],
        nullable=True,
    ),
    Row(
        "server.mlflow_registry_uri",
        store_of_the_model,
        default=["mlflow"],
        first=Set("sqlite:///TMP/first.db", ["first"]),
        second=Set("sqlite:///TMP/second.db", ["second"]),
        wrong=[*NO_TEXT, ("ftp://127.0.0.1/models", ": ")],
        nullable=True,
    ),
    Row(
        "server.credentials",
        variable_in_a_node,
        default="None",
        first=Set("one", "t0p-1"),
        second=Set("two", "t0p-2"),
        wrong=[
            ("7", ": expected a text, got 7"),
            ("[a]", ": expected a text, got '***'"),  # may be a secret: the entry's values
            ("{TOKEN: t0p}", ": expected a text, got '***'"),
            EMPTY,
            ("three", ": credentials.yml has no entry 'three'; its entries: one, two"),
        ],
        nullable=True,
    ),
    Row(
        f"{PROVIDER}.type",
        headers_at_the_server,
        default={None},
        first=Set("PACKAGE.headers.First", {"First, plain, no context"}),
        second=Set("PACKAGE.headers.Second", {"Second, plain, no context"}),
        wrong=[*NO_TEXT, ("PACKAGE.headers.Third", ": "), ("Third", ": "), ("os.path", ": ")],
        nullable=True,
        along={SERVER: "SERVER"},
    ),
    Row(
        f"{PROVIDER}.pass_context",
        headers_at_the_server,
        default={"First, plain, no context"},
        first=Set("true", {"First, plain, PACKAGE"}),
        second=Set("false", {"First, plain, no context"}),
        wrong=NO_FLAG,
        along={SERVER: "SERVER", f"{PROVIDER}.type": "PACKAGE.headers.First"},
    ),
    Row(
        f"{PROVIDER}.init_kwargs",
        headers_at_the_server,
        default={"First, plain, no context"},
        first=Set("{word: hello}", {"First, hello, no context"}),
        second=Set("{word: [1, 2]}", {"First, [1, 2], no context"}),
        wrong=[
            *NO_MAPPING,
            ("null", ": expected keys with values, got None"),
            ("{wrod: hello}", ": "),
        ],
        along={SERVER: "SERVER", f"{PROVIDER}.type": "PACKAGE.headers.First"},
    ),
    Row(
        "tracking.disable_tracking.pipelines",
        pipeline_runs,
        default=1,
        first=Set("[other, work]", 0),
        second=Set("[other]", 1),
        wrong=NO_LIST,
    ),
    Row(
        "tracking.disable_tracking.disable_autologging",
        autologged,
        default=False,
        first=Set("false", True),
        second=Set("true", False),
        wrong=NO_FLAG,
    ),
    Row(
        "tracking.on_unreachable",
        without_a_server,
        default="start the server, or correct the address (http or https, host, port)",
        first=Set("offline", "recorded: {'x': '1'}"),
        second=Set("fail", "start the server, or correct the address (http or https, host, port)"),
        wrong=[
            (text, f": expected 'fail' or 'offline', got {shown}")
            for text, shown in [("wait", "'wait'"), ("true", "True"), ("null", "None")]
        ],
        along={SERVER: "http://127.0.0.1:1"},
    ),
    Row(
        "tracking.experiment.name",
        name_of_the_experiment,
        default="PACKAGE",
        first=Set("penguins", "penguins"),
        second=Set("2024", "2024"),
        wrong=NO_WORD,
        nullable=True,
    ),
    Row(
        f"{KWARGS}.artifact_location",
        folder_of_the_artifact,
        default="mlartifacts",
        first=Set("TMP/first", "first"),
        second=Set("in_the_project", "in_the_project"),
        wrong=NO_TEXT,
        nullable=True,
    ),
    Row(
        f"{KWARGS}.tags",
        tags_of_the_experiment,
        default={},
        first=Set("{team: 2024}", {"team": "2024"}),
        second=Set("{team: fish}", {"team": "fish"}),
        wrong=[*NO_MAPPING, ("{team: [birds]}", ".team: expected a text, got ['birds']")],
        nullable=True,
    ),
    Row(
        "tracking.experiment.restore_if_deleted",
        deleted_experiment_after_a_run,
        default=("active", 1),
        first=Set("false", ("deleted", 0)),
        second=Set("true", ("active", 1)),
        wrong=NO_FLAG,
    ),
    Row(
        "tracking.run.id",
        continued_run,
        default=["new"],
        first=Set("RUN_A", ["RUN_A"]),
        second=Set("RUN_B", ["RUN_B"]),
        wrong=[*NO_WORD, ("0123456789abcdef0123456789abcdef", ": ")],
        nullable=True,
        before=two_earlier_runs,
    ),
    Row(
        "tracking.run.name",
        name_of_the_run,
        default="work",
        first=Set("mine", "mine"),
        second=Set("7.5", "7.5"),
        wrong=NO_WORD,
        nullable=True,
    ),
    Row(
        "tracking.run.nested",
        inner_run_is_a_child,
        default=True,
        first=Set("false", False),
        second=Set("true", True),
        wrong=NO_FLAG,
    ),
    Row(
        f"{PARAMS}.dict_params.flatten",
        logged_parameters("deep"),
        default={"deep": "{'a': {'b': 1}, 'c': 2}"},
        first=Set("true", DEEP),
        second=Set("false", {"deep": "{'a': {'b': 1}, 'c': 2}"}),
        wrong=NO_FLAG,
    ),
    Row(
        f"{PARAMS}.dict_params.recursive",
        logged_parameters("deep"),
        default=DEEP,
        first=Set("false", {"deep.a": "{'b': 1}", "deep.c": "2"}),
        second=Set("true", DEEP),
        wrong=NO_FLAG,
        along=FLAT,
    ),
    Row(
        f"{PARAMS}.dict_params.sep",
        logged_parameters("deep"),
        default=DEEP,
        first=Set("/", {"deep/a/b": "1", "deep/c": "2"}),
        second=Set("--", {"deep--a--b": "1", "deep--c": "2"}),
        wrong=[*NO_STRING, ("null", ": expected a text, got None")],
        along=FLAT,
    ),
    Row(
        f"{PARAMS}.long_params_strategy",
        where_a_long_parameter_is,
        default="nowhere",
        first=Set("truncate", "5000 in a parameter"),
        second=Set("tag", "7000 in a tag"),
        wrong=[
            (text, f": expected 'fail', 'truncate' or 'tag', got {shown}")
            for text, shown in [
                ("cut", "'cut'"),
                ("7", "7"),
                ("null", "None"),
                ("[tag]", "['tag']"),
            ]
        ],
        along={f"{PARAMS}.max_length": "5000"},
    ),
    Row(
        f"{PARAMS}.max_length",
        length_of_a_long_parameter,
        default=6000,
        first=Set("3", 3),
        second=Set("400", 400),
        wrong=[
            ("three", ": expected a whole number, got 'three'"),
            ("true", ": expected a whole number, got True"),
            ("2.5", ": expected a whole number, got 2.5"),
            ("[3]", ": expected a whole number, got [3]"),
            ("0", ": expected greater than 0, got 0"),
            ("-3", ": expected greater than 0, got -3"),
        ],
        nullable=True,
        along={f"{PARAMS}.long_params_strategy": "truncate"},
    ),
    Row(
        "tracking.artifacts.datasets",
        logged_outputs,
        default=[],
        first=Set("[written]", ["outputs/written"]),
        second=Set('["wr*", nothing]', ["outputs/written"]),
        wrong=NO_LIST,
    ),
    Row(
        "tracking.autolog",
        fit_is_logged,
        default=False,
        first=Set("{sklearn: {log_models: false}}", True),
        second=Set("{sklearn: false}", False),
        wrong=[
            ("sklearn", ": expected keys with values, got 'sklearn'"),
            ("{sklearn: 3}", ".sklearn: expected true, false or options, got 3"),
            ("{sklern: true}", ".sklern: MLflow has no flavor 'sklern', did you mean 'sklearn'?"),
        ],
    ),
    Row(
        "tracking.redact",
        logged_parameters("api"),
        default={"api": "{'pin': '1234', 'token': '***'}"},
        first=Set('[pin, "t*"]', {"api": "{'pin': '***', 'token': '***'}"}),
        second=Set("[]", {"api": "{'pin': '1234', 'token': 't0p'}"}),
        wrong=NO_LIST,
    ),
    # Nobody has an address of class E: `ui` never gets as far as opening a port.
    Row(
        "ui.host",
        Scene.ui,
        default="127.0.0.1:BUSY",
        first=Set("240.0.0.1", "240.0.0.1:BUSY"),
        second=Set("240.0.0.2", "240.0.0.2:BUSY"),
        wrong=[*NO_TEXT, ("null", ": expected a text, got None")],
        along={"ui.port": "BUSY"},
    ),
    Row(
        "ui.port",
        Scene.ui,
        default="240.0.0.1:",
        first=Set("5001", "240.0.0.1:5001"),
        second=Set("'5002'", "240.0.0.1:5002"),
        wrong=[
            ("http", ": expected a whole number, got 'http'"),
            ("true", ": expected a whole number, got True"),
            ("80.5", ": expected a whole number, got 80.5"),
            ("[80]", ": expected a whole number, got [80]"),
            ("0", ": expected greater than 0, got 0"),
            ("65536", ": expected less than 65536, got 65536"),
        ],
        nullable=True,
        along={"ui.host": "240.0.0.1"},
    ),
]

# The rows of what a run shows; `kedro mlflow ui` has no `--params`.
RUN_ROWS = [row for row in ROWS if row.look is not Scene.ui]


def ready(scene: Scene, row: Row, value: str | None = None) -> None:
    """Write conf/base/mlflow.yml with what the row needs, and perhaps the key itself."""
    if "SERVER" in row.along.values():
        scene.words["SERVER"] = scene.proxy().uri
    scene.words["BUSY"] = str(scene.busy_port)
    needed = {"tracking.experiment.name": scene.experiment, **row.along}
    if row.key == "tracking.experiment.name":
        del needed[row.key]
    row.before(scene)
    scene.base({**needed, row.key: value} if value else needed)


def check(scene: Scene, row: Row, expected: Any) -> None:
    seen = row.look(scene)
    if isinstance(expected, str):
        expected = scene.filled(expected)
    elif isinstance(expected, set):
        expected = {text and scene.filled(text) for text in expected}
    assert seen == expected


def default_of(key: str) -> str:
    """Write the default as an interpolation takes it."""
    value: Any = MlflowConfig()
    for name in key.split("."):
        value = getattr(value, name)
    return json.dumps(value)


def leaves(group: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, about in group.model_fields.items():
        if isinstance(about.default, BaseModel):
            yield from leaves(type(about.default), f"{path}{name}.")
        else:
            yield path + name


# The keys that an empty text is right for: nothing between two names, a tag without a value, and
# what the user's own class is made with.
MAY_BE_EMPTY = {
    f"{PARAMS}.dict_params.sep": "",
    f"{KWARGS}.tags": {"team": ""},
    f"{PROVIDER}.init_kwargs": {"team": ""},
}


def test_every_other_text_of_mlflow_yml_is_refused_when_it_is_empty() -> None:
    accepted = {}
    for key in leaves(MlflowConfig):
        for empty in ("", [""], {"team": ""}):
            nested: Any = empty
            for name in reversed(key.split(".")):
                nested = {name: nested}
            with suppress(ValidationError):
                MlflowConfig.model_validate(nested)
                accepted[key] = empty

    assert accepted == MAY_BE_EMPTY


@pytest.fixture
def stores(empty_store: Path, tmp_path: Path) -> None:
    """Two stores more than the project's."""
    for name in ("first", "second"):
        shutil.copy(empty_store, tmp_path / f"{name}.db")


def test_every_key_of_mlflow_yml_has_a_row() -> None:
    assert [row.key for row in ROWS] == list(leaves(MlflowConfig))
    nullable = [key for key in leaves(MlflowConfig) if default_of(key) == "null"]
    assert [row.key for row in ROWS if row.nullable] == nullable


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_key_has_its_default(row: Row, scene: Scene, stores: None) -> None:
    ready(scene, row)

    check(scene, row, row.default)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_key_is_set_in_conf_base(row: Row, scene: Scene, stores: None) -> None:
    ready(scene, row, row.first.written)

    check(scene, row, row.first.seen)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_an_environment_overrides_a_key(row: Row, scene: Scene, stores: None) -> None:
    ready(scene, row, row.first.written)
    scene.environment("prod", row.key, row.second.written)
    scene.env = "prod"

    check(scene, row, row.second.seen)


@pytest.mark.parametrize("row", RUN_ROWS, ids=str)
def test_a_runtime_parameter_sets_a_key(row: Row, scene: Scene, stores: None) -> None:
    ready(scene, row)
    scene.environment("local", row.key, f"'${{runtime_params:value, {default_of(row.key)}}}'")
    scene.given(row.first.written)

    check(scene, row, row.first.seen)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_runtime_parameter_that_is_not_given_leaves_a_key_with_its_default(
    row: Row, scene: Scene, stores: None
) -> None:
    # What stands in conf/base is overridden by a default, but an empty mapping adds nothing to it.
    ready(scene, row, row.first.written if default_of(row.key) != "{}" else None)
    scene.environment("local", row.key, f"'${{runtime_params:value, {default_of(row.key)}}}'")

    check(scene, row, row.default)


@pytest.mark.parametrize("row", [row for row in RUN_ROWS if row.nullable], ids=str)
def test_a_runtime_parameter_sets_a_key_that_is_null_without_it(
    row: Row, scene: Scene, stores: None
) -> None:
    ready(scene, row)
    scene.environment("local", row.key, "${runtime_params:value, null}")
    scene.given(row.second.written)

    check(scene, row, row.second.seen)


@pytest.mark.parametrize(
    ("row", "value", "sentence"),
    [(row, *wrong) for row in ROWS for wrong in row.wrong],
    ids=str,
)
def test_a_wrong_value_is_told_in_one_sentence_and_nothing_is_made(
    row: Row, value: str, sentence: str, scene: Scene
) -> None:
    ready(scene, row)
    where = scene.environment("local", row.key, value)
    before = scene.count()

    assert_told(scene, row, value, f"{where}: {row.key}{sentence}", before)


@pytest.mark.parametrize("row", RUN_ROWS, ids=str)
def test_a_wrong_runtime_parameter_is_told_in_one_sentence_and_nothing_is_made(
    row: Row, scene: Scene
) -> None:
    ready(scene, row)
    where = scene.environment("local", row.key, "${runtime_params:value, null}")
    value, sentence = row.wrong[0]
    scene.given(value)
    before = scene.count()

    assert_told(scene, row, value, f"{where}: {row.key}{sentence}", before)


@pytest.mark.parametrize("source", ["${oc.env:KM_TEST_EMPTY, null}", "${runtime_params:value}"])
def test_a_variable_or_a_runtime_parameter_that_is_empty_is_told(
    source: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KM_TEST_EMPTY", "")
    row = next(row for row in ROWS if row.key == SERVER)
    ready(scene, row)
    where = scene.environment("local", row.key, source)
    scene.given("''")  # without the quotes it is null

    assert_told(scene, row, "", f"{where}: {row.key}{EMPTY[1]}", scene.count())


def assert_told(scene: Scene, row: Row, value: str, sentence: str, before: tuple[int, int]) -> None:
    if row.look is Scene.ui:
        ended = scene.command("ui")
        assert (ended.exit_code, ended.output) == (1, f"Error: {sentence}\n")
    else:
        with pytest.raises(ClickException) as told:
            scene.run("work")
        assert type(told.value).__name__ == "ConfigError"
        (line,) = told.value.message.splitlines()
        if sentence.endswith(": "):
            # Another library says what is wrong: its words may change, the value is named.
            group = row.key.rpartition(".")[0]
            assert re.match(rf"conf/(base|local)/mlflow.yml:\d+: ({row.key}|{group}): ", line)
            named = scene.filled(value).strip("{}").partition(":")[0].rpartition(".")[2]
            assert named in line
        else:
            assert line == sentence
    assert scene.count() == before


def test_the_ui_tells_of_a_busy_port_in_one_sentence(scene: Scene) -> None:
    port = scene.busy_port
    scene.project.mlflow_yml(f"ui: {{port: {port}}}")

    ended = scene.project.kedro("mlflow", "ui")

    assert ended.returncode == 1
    assert ended.stderr.endswith(
        f"Error: Can't listen on 127.0.0.1:{port} (Address already in use). Choose another with "
        "--host and --port, or leave the port out for a free one.\n"
    )
    assert "Traceback" not in ended.stdout


def experiment_requests(server: CountingProxy) -> list[str]:
    return [request for request in server.requests if "/experiments/" in request]


def test_a_run_asks_for_its_experiment_once_and_makes_it_once(
    scene: Scene, server: CountingProxy
) -> None:
    scene.base({SERVER: server.uri, "tracking.experiment.name": scene.experiment})
    server.requests.clear()

    scene.run("work")
    assert len(experiment_requests(server)) == 2

    server.requests.clear()
    scene.run("work")
    assert len(experiment_requests(server)) == 1


def test_a_pipeline_that_is_not_tracked_makes_no_request(
    scene: Scene, server: CountingProxy
) -> None:
    scene.base(
        {
            SERVER: server.uri,
            "tracking.experiment.name": scene.experiment,
            "tracking.disable_tracking.pipelines": "[work]",
        }
    )
    server.requests.clear()

    scene.run("work")

    assert server.requests == []


def test_two_processes_that_start_at_once_make_one_experiment(
    scene: Scene, server: CountingProxy
) -> None:
    scene.base({SERVER: server.uri, "tracking.experiment.name": scene.experiment})

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda _: scene.project.kedro("run", "--pipelines=work"), range(2)))

    assert [process.returncode for process in ended] == [0, 0], [p.stderr for p in ended]
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(scene.experiment)
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_deleted_experiment_that_is_not_restored_is_told_in_one_sentence(scene: Scene) -> None:
    client = scene.project.client
    client.delete_experiment(client.create_experiment(scene.experiment))
    scene.base(
        {
            "tracking.experiment.name": scene.experiment,
            "tracking.experiment.restore_if_deleted": "false",
        }
    )

    with pytest.raises(ClickException) as told:
        scene.run("work")

    (line,) = told.value.message.splitlines()
    assert scene.experiment in line
    assert scene.runs() == []
