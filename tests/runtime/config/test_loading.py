"""`mlflow.yml` is read, completed and checked."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import mlflow
import pytest
import s3fs  # type: ignore[import-untyped]
from click import ClickException
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow.tracking.request_header.registry import (
    _request_header_provider_registry as header_providers,
)

from runtime.config.resolvers import random_name
from runtime.config.uris import anchor_uri
from runtime.stores import credentials

from ...support.projects import ONE_NODE, Project, has
from ...support.s3 import S3
from ...support.servers import CountingProxy

# Packs a project's configuration and runs the project with it: where that is, and what is told.
Packed = Callable[[], tuple[str, list[str]]]


@pytest.mark.parametrize(
    ("uri", "anchored"),
    [
        ("sqlite:///mlflow.db", "sqlite:////my/project/mlflow.db"),
        ("sqlite:///db/runs.db?timeout=9", "sqlite:////my/project/db/runs.db?timeout=9"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:////my/project/mlflow.db"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
        ("sqlite:///C:/abs/mlflow.db", "sqlite:///C:/abs/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("mlruns", "file:///my/project/mlruns"),
        ("/abs/mlruns", "file:///abs/mlruns"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://ada@host/runs", "postgresql://ada@host/runs"),
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("databricks", "databricks"),
        ("databricks-uc", "databricks-uc"),
    ],
)
def test_relative_uris_start_at_the_project(uri: str, anchored: str) -> None:
    assert anchor_uri(uri, Path("/my/project")) == anchored


@pytest.mark.parametrize(
    ("uri", "anchored"),
    [
        ("sqlite:///mlflow.db", "sqlite:///C:/my project/mlflow.db"),
        ("sqlite:///D:/abs/mlflow.db", "sqlite:///D:/abs/mlflow.db"),
        ("mlruns", "file:///C:/my%20project/mlruns"),
        ("mlruns\\deep", "file:///C:/my%20project/mlruns/deep"),
        ("D:\\abs\\mlruns", "file:///D:/abs/mlruns"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_uris_on_windows_start_at_the_project_too(uri: str, anchored: str) -> None:
    assert anchor_uri(uri, PureWindowsPath("C:/my project")) == anchored


def test_every_mistake_is_told_with_file_line_key_value_and_what_is_right(
    project: Project,
) -> None:
    project.pipeline(ONE_NODE)
    project.mlflow_yml(
        """
        tracking:
          nmae: x
          run:
            nested: yes please
            nmae: x
          params:
            long_params_strategy: cut
        servre: {}
        """
    )

    ended = project.kedro("run")

    assert ended.returncode == 1
    assert sorted(ended.stderr.strip().partition("Error: ")[2].splitlines()) == [
        (
            "conf/local/mlflow.yml:3: tracking.nmae: unknown key, expected one of "
            "disable_tracking, on_unreachable, experiment, run, params, artifacts, autolog, "
            "redact"
        ),
        "conf/local/mlflow.yml:5: tracking.run.nested: expected true or false, got 'yes please'",
        "conf/local/mlflow.yml:6: tracking.run.nmae: unknown key, did you mean 'name'?",
        (
            "conf/local/mlflow.yml:8: tracking.params.long_params_strategy: "
            "expected 'fail', 'truncate' or 'tag', got 'cut'"
        ),
        "conf/local/mlflow.yml:9: servre: unknown key, did you mean 'server'?",
    ]
    assert "Traceback" not in ended.stdout
    assert project.all_runs() == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "conf/local/mlflow.yml:1: expected ',' or ']', but got '<stream end>'"),
        ("- 1", "conf/local/mlflow.yml:1: expected keys with values"),
        (
            "tracking: {run: {name: '${runtime_params:run_name}'}}",
            "conf/local/mlflow.yml:1: tracking.run.name: ",
        ),
        pytest.param(
            "server: {mlflow_tracking_uri: mlruns}",
            "conf/local/mlflow.yml:1: server.mlflow_tracking_uri: MLflow no longer keeps runs in",
            marks=pytest.mark.skipif(not has("mlflow", "3.13"), reason="MLflow still keeps them"),
        ),
        (
            "server: {mlflow_tracking_uri: databricks-uc}",
            "expected a path, a database or an address with http:// or https://, got 'databricks-",
        ),
        (
            "server: {mlflow_tracking_uri: databricks}\ntracking: {experiment: {name: penguins}}",
            "conf/local/mlflow.yml:2: tracking.experiment.name: expected a path in the workspace,",
        ),
        (
            "server: {credentials: mine}",
            "server.credentials: credentials.yml has no entry 'mine'; its entries: db, other",
        ),
        (
            "server: {credentials: db}",
            "the entry 'db' has to be environment variables, NAME: value",
        ),
        (
            "server: {request_header_provider: {type: nowhere.Provider}}",
            "server.request_header_provider: type 'nowhere.Provider' can't be used: No module",
        ),
        (
            "server: {request_header_provider: {type: pathlib.Path}}",
            "pathlib.Path is not a subclass of MLflow's RequestHeaderProvider",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_there_is_no_run(
    project: Project, text: str, sentence: str
) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.write("conf/local/credentials.yml", "other: {A: b}\ndb: {A: {B: c}}")
    project.mlflow_yml(text)

    with pytest.raises(ClickException) as told:
        project.run()

    assert type(told.value).__name__ == "ConfigError"
    assert sentence in told.value.message
    assert len(told.value.message.splitlines()) == 1
    assert project.all_runs() == []


@pytest.fixture(params=["tar.gz", "zip", "s3"])
def packed(project: Project, s3: S3, request: pytest.FixtureRequest) -> Packed:
    """Run a project with what its `conf` holds now, in an archive or a bucket."""
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    file_system = s3fs.S3FileSystem(**s3.credentials)

    def pack() -> str:
        if request.param == "s3":
            folder = f"{s3.bucket}/{project.package}"
            file_system.put(f"{project.path}/conf/", f"{folder}/conf/", recursive=True)
            return f"s3://{folder}/conf"
        kind = "gztar" if request.param == "tar.gz" else "zip"
        shutil.make_archive(str(project.path / "packed"), kind, project.path, "conf")
        return f"packed.{request.param}"

    def run() -> tuple[str, list[str]]:
        source = pack()
        ended = project.kedro("run", f"--conf-source={source}", **s3.environment)
        assert "Traceback" not in ended.stderr
        where = source if "://" in source else f"{source}/conf"
        return where, ended.stderr.partition("Error: ")[2].splitlines()

    return run


def test_a_mistake_in_an_archive_or_a_bucket_has_its_place_too(
    project: Project, packed: Packed
) -> None:
    project.mlflow_yml("# ours\ntracking:\n  run:\n    nmae: x", env="base")
    project.mlflow_yml("tracking:\n  run: {nested: yes please}\n  redact: ${nothing}")
    place, (interpolation,) = packed()

    assert interpolation.startswith(f"{place}/local/mlflow.yml:3: tracking.redact: ")

    project.mlflow_yml("tracking:\n  run: {nested: yes please}")
    _, mistakes = packed()

    assert mistakes == [
        f"{place}/base/mlflow.yml:4: tracking.run.nmae: unknown key, did you mean 'name'?",
        (
            f"{place}/local/mlflow.yml:2: tracking.run.nested: expected true or false, "
            "got 'yes please'"
        ),
    ]

    project.mlflow_yml("tracking:\n  redact: ['*pin']", env="base")
    project.mlflow_yml("tracking:\n  redact: {a: b}")
    _, mistakes = packed()

    assert mistakes == [
        f"{place}/local/mlflow.yml:2: tracking.redact: expected a list, got {{'a': 'b'}}"
    ]


def test_what_is_no_yaml_in_an_archive_or_a_bucket_is_told_in_a_sentence(
    project: Project, packed: Packed
) -> None:
    project.mlflow_yml("ui:\n  port: [1")
    place, mistakes = packed()

    assert mistakes == [f"{place}/local/mlflow.yml:2: expected ',' or ']', but got '<stream end>'"]

    project.mlflow_yml("ui: {port: 5000}\nserver: {credentials: mine}")
    place, (mistake,) = packed()

    assert mistake.startswith(
        f"{place}/local/mlflow.yml:2: server.credentials: credentials.yml has no entry 'mine'"
    )


def test_a_file_that_kedro_ignores_is_not_checked(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.mlflow_yml("tracking: [", env="local/.ipynb_checkpoints")

    project.run()

    assert project.only_run().info.status == "FINISHED"


def test_a_group_without_keys_has_the_defaults(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.mlflow_yml("server:\ntracking:\n")

    project.run()

    assert project.only_run().info.status == "FINISHED"


def test_credentials_are_in_the_environment_during_the_run_and_nowhere_after_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.pipeline(
        """
        import os
        from kedro.pipeline import Node, Pipeline

        def read():
            names = ["MLFLOW_TRACKING_PASSWORD", "A_NUMBER", "A_FLAG", "SET_BEFORE"]
            return [os.environ.get(name) for name in names]

        def create_pipeline():
            return Pipeline([Node(read, None, "seen")])
        """
    )
    project.write(
        "conf/local/credentials.yml",
        """
        one: {MLFLOW_TRACKING_PASSWORD: t0p-secret, A_NUMBER: 7, A_FLAG: true, SET_BEFORE: new}
        two: {MLFLOW_TRACKING_PASSWORD: t0p-other}
        """,
    )
    monkeypatch.setenv("SET_BEFORE", "old")

    project.mlflow_yml("server: {credentials: one}")
    assert project.run()["seen"].load() == ["t0p-secret", "7", "true", "new"]
    assert os.environ["SET_BEFORE"] == "old"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ

    project.mlflow_yml("server: {credentials: two}")
    assert project.run()["seen"].load() == ["t0p-other", None, None, "old"]

    bootstrap_project(project.path)
    with KedroSession.create(project_path=project.path) as session:
        assert "t0p" not in repr(session.load_context().mlflow)  # type: ignore[attr-defined]
    ended = project.kedro("run")
    assert ended.returncode == 0
    assert "Saving data to" in ended.stderr
    assert "t0p-" not in ended.stdout + ended.stderr
    for file in [project.path / "mlflow.db", *project.path.glob("mlartifacts/**/*.*")]:
        assert b"t0p-" not in file.read_bytes()


def test_a_password_in_an_address_is_not_shown(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project()
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    address = server.uri.replace("http://", "http://ada:t0p-secret@")
    project.mlflow_yml(f"server: {{mlflow_tracking_uri: '{address}'}}")

    ended = project.kedro("run")

    assert ended.returncode == 0, ended.stderr
    assert f"Look at it: {server.uri}/#/experiments/" in ended.stderr
    assert "t0p-secret" not in ended.stdout + ended.stderr


def test_runs_that_overlap_take_back_only_their_own_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BOTH", "before")
    monkeypatch.delenv("FIRST", raising=False)

    credentials.export("1", {"BOTH": "one", "FIRST": "one"})
    credentials.export("2", {"BOTH": "two"})
    credentials.take_back("1")
    assert (os.environ["BOTH"], os.environ.get("FIRST")) == ("two", None)
    credentials.take_back("2")
    assert os.environ["BOTH"] == "before"


def test_a_header_provider_is_registered_once_and_asked_for_every_request(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.write(
        f"src/{project.package}/headers.py",
        """
        import itertools
        from mlflow.tracking.request_header.abstract_request_header_provider import (
            RequestHeaderProvider,
        )

        class Token(RequestHeaderProvider):
            made = 0

            def __init__(self, prefix, kedro_context):
                Token.made += 1
                self.prefix, self.numbers = prefix, itertools.count()
                self.project = kedro_context.project_path.name

            def in_context(self):
                return True

            def request_headers(self):
                return {"X-Token": f"{self.prefix}-{self.project}-{next(self.numbers)}"}
        """,
    )
    project.mlflow_yml(
        f"""
        server:
          request_header_provider:
            type: {project.package}.headers.Token
            pass_context: true
            init_kwargs: {{prefix: bearer}}
        """
    )
    server.headers.clear()

    project.run()
    project.run()

    tokens = [headers.get("X-Token", "") for headers in server.headers]
    assert len(tokens) == len(set(tokens)) > 6  # a new one for each request
    assert all(token.startswith(f"bearer-{project.package}-") for token in tokens)
    assert sys.modules[f"{project.package}.headers"].Token.made == 1
    header_providers._registry.pop()


def test_the_requests_of_spawned_workers_have_the_providers_headers_too(
    new_project: Callable[..., Project], server: CountingProxy
) -> None:
    project = new_project(tracking_backend="server", tracking_uri=server.uri)
    project.pipeline(
        """
        import mlflow
        from kedro.pipeline import Node, Pipeline

        def log():
            mlflow.log_metric("m", 1)
            return 1

        def create_pipeline():
            return Pipeline([Node(log, None, "y")])
        """
    )
    project.write(
        f"src/{project.package}/headers.py",
        """
        from mlflow.tracking.request_header.abstract_request_header_provider import (
            RequestHeaderProvider,
        )

        class Token(RequestHeaderProvider):
            def in_context(self):
                return True

            def request_headers(self):
                return {"X-Token": "t0ken"}
        """,
    )
    project.mlflow_yml(
        f"server: {{request_header_provider: {{type: {project.package}.headers.Token}}}}"
    )
    server.headers.clear()

    ended = project.kedro("run", "--runner=ParallelRunner", KEDRO_MP_CONTEXT="spawn")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {headers.get("X-Token") for headers in server.headers} == {"t0ken"}
    assert any("log-metric" in request for request in server.requests)


@pytest.mark.parametrize("disabled", [True, False])
def test_autologging_is_off_unless_mlflow_yml_leaves_it_on(
    project: Project, disabled: bool
) -> None:
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline
        from sklearn.linear_model import LinearRegression

        def fit():
            return float(LinearRegression().fit([[0], [1]], [1, 3]).coef_[0])

        def create_pipeline():
            return Pipeline([Node(fit, None, "slope")])
        """
    )
    project.mlflow_yml(
        f"tracking: {{disable_tracking: {{disable_autologging: {str(disabled).lower()}}}}}"
    )
    mlflow.autolog(log_models=False)
    try:
        project.run()
    finally:
        mlflow.autolog(disable=True)

    assert ("fit_intercept" in project.only_run().data.params) is not disabled


@pytest.mark.parametrize("nested", [True, False])
def test_a_kedro_run_inside_of_a_node_is_a_child_when_nested(
    project: Project, nested: bool
) -> None:
    project.pipeline(
        """
        from pathlib import Path
        from kedro.framework.session import KedroSession
        from kedro.pipeline import Node, Pipeline

        def outer():
            with KedroSession.create(project_path=Path(__file__).parents[4]) as session:
                session.run(pipeline_names=["inner"])
            return 1

        def create_pipeline():
            return Pipeline([Node(outer, None, "y")])
        """
    )
    project.pipeline(ONE_NODE, name="inner")
    project.parameters({"x": 1})
    project.mlflow_yml(f"tracking: {{run: {{nested: {str(nested).lower()}}}}}")

    project.run(pipeline_names=["work"])

    runs = {run.info.run_name: run for run in project.all_runs()}
    assert {name: run.info.status for name, run in runs.items()} == {
        "work": "FINISHED",
        "inner": "FINISHED",
    }
    parent = runs["inner"].data.tags.get("mlflow.parentRunId")
    assert parent == (runs["work"].info.run_id if nested else None)


def test_the_limit_of_a_parameter_can_be_set(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": "abcdef"})
    project.mlflow_yml("tracking: {params: {max_length: 3, long_params_strategy: truncate}}")

    project.run()

    assert project.only_run().data.params == {"x": "abc"}


def test_without_mlflow_yml_a_run_is_tracked(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    for file in project.path.glob("conf/*/mlflow.yml"):
        file.unlink()

    project.run()

    run = project.only_run()
    assert project.client.get_experiment(run.info.experiment_id).name == project.package


def test_the_environment_variable_names_the_server_when_mlflow_yml_does_not(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    elsewhere = f"sqlite:///{PurePosixPath(tmp_path)}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)

    project.run()

    assert project.all_runs() == []
    project.tracking_uri = elsewhere
    experiment = project.client.get_experiment(project.only_run().info.experiment_id)
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_a_run_does_not_warn_of_what_kedro_calls_and_hides_no_other_warning(
    project: Project,
) -> None:
    mine = "register_new_resolver() is mine"
    warned = f"def double(x):\n    import warnings\n    warnings.warn({mine!r})"
    project.pipeline(ONE_NODE.replace("def double(x):", warned))
    project.parameters({"x": 1})
    bootstrap_project(project.path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        project.run()

    said = [str(warning.message) for warning in caught]
    assert [text for text in said if "register_new_resolver" in text] == [mine]


def test_an_environment_changes_single_keys(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": {"y": 1}})
    project.mlflow_yml("tracking: {params: {dict_params: {flatten: true}}}", env="local")
    project.pipeline(ONE_NODE.replace("2 * x", "1"))

    project.run()
    project.run(env="prod")

    prod, local = project.all_runs()
    if "prod" not in project.client.get_experiment(prod.info.experiment_id).name:
        prod, local = local, prod
    assert project.client.get_experiment(prod.info.experiment_id).name.endswith("-prod")
    assert prod.data.params == {"x": "{'y': 1}"}
    assert local.data.params == {"x.y": "1"}


def test_a_run_is_named_by_a_runtime_parameter_or_at_random(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.mlflow_yml("tracking: {run: {name: '${runtime_params:run_name, ${km.random_name:}}'}}")

    project.run(params={"run_name": "mine"})
    project.run()

    drawn, given = (run.info.run_name for run in project.all_runs())
    assert given == "mine"
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", drawn)


def test_random_names_differ() -> None:
    assert len({random_name() for _ in range(50)}) > 40


def test_a_deleted_experiment_is_restored(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    experiment = project.client.create_experiment(project.package)
    project.client.delete_experiment(experiment)

    project.run()

    assert project.only_run().info.experiment_id == experiment


def test_a_run_is_continued_by_its_id_and_ended(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    earlier = project.client.create_run(project.client.create_experiment(project.package))
    project.client.set_terminated(earlier.info.run_id, "FAILED")
    project.mlflow_yml(f"tracking: {{run: {{id: {earlier.info.run_id}}}}}")

    project.run()

    run = project.only_run()
    assert (run.info.run_id, run.info.status) == (earlier.info.run_id, "FINISHED")
    assert run.data.params == {"x": "1"}


def test_secrets_stay_out_of_parameters_tags_and_the_command(project: Project) -> None:
    project.pipeline(ONE_NODE.replace("params:x", "params:api").replace("2 * x", "1"))
    project.parameters({"api": {"token": "t0p-secret", "url": "http://example.org"}})

    project.run(params={"api": {"token": "t0p-secret-2"}})

    run = project.only_run()
    assert "***" in run.data.params["api"]
    assert "t0p-secret" not in str(run.to_dictionary())
