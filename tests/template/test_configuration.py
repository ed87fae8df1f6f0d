"""A generated project says in its own files what is registered and what can be set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from omegaconf.resolvers import oc

from runtime.config.keys import MlflowConfig

from ..conftest import Generate
from ..support import shipped_config
from .conftest import read_toml

SERVER = "https://mlflow.example.org"
S3 = "s3://runs/penguins"
AZURE = "wasbs://runs@penguins.blob.core.windows.net"

LOCATION = "tracking.experiment.create_experiment_kwargs.artifact_location"
NAME = "tracking.experiment.name"


class Case(NamedTuple):
    """Answers, and the values that stand in mlflow.yml for them instead of the defaults."""

    answers: dict[str, object]
    written: dict[str, str]


CASES = {
    "sqlite": Case({}, {NAME: "penguin_study"}),
    "server": Case(
        {"tracking_backend": "server", "tracking_uri": SERVER},
        {"server.mlflow_tracking_uri": SERVER, NAME: "penguin_study"},
    ),
    "databricks": Case(
        # Databricks keeps the files itself.
        {"tracking_backend": "databricks", "artifact_store": "s3", "artifact_location": S3},
        {
            "server.mlflow_tracking_uri": "databricks",
            "server.mlflow_registry_uri": "databricks-uc",
            NAME: "/Shared/penguin_study",
        },
    ),
    "s3": Case(
        {"artifact_store": "s3", "artifact_location": S3}, {LOCATION: S3, NAME: "penguin_study"}
    ),
    "gcs": Case(
        {"artifact_store": "gcs"},
        {LOCATION: "gs://change-me/penguin_study", NAME: "penguin_study"},
    ),
    "azure": Case(
        {
            "tracking_backend": "server",
            "tracking_uri": SERVER,
            "artifact_store": "azure",
            "artifact_location": AZURE,
        },
        {"server.mlflow_tracking_uri": SERVER, LOCATION: AZURE, NAME: "penguin_study"},
    ),
}


class Project(NamedTuple):
    folder: Path
    written: dict[str, str]


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def project(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("configuration") / "penguin-study"
    generate(folder, example=False, docker=True, **case.answers)
    return Project(folder, case.written)


def merged(project: Project, environment: str) -> MlflowConfig:
    """Read mlflow.yml of an environment as Kedro does, with the settings of the project."""
    loader = OmegaConfigLoader(
        str(project.folder / "conf"),
        env=environment,
        base_env="base",
        default_run_env="local",
        config_patterns={"mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"]},
        merge_strategy={"mlflow": "soft"},
        custom_resolvers={"oc.env": oc.env},
    )
    return MlflowConfig.model_validate(loader["mlflow"])


def mlflow_yml(project: Project) -> str:
    return (project.folder / "conf/base/mlflow.yml").read_text("utf-8")


@pytest.mark.parametrize("file", shipped_config.files(), ids=lambda file: file.name)
def test_the_shipped_files_are_those_that_the_models_make(file: Path) -> None:
    assert file.read_text("utf-8") == shipped_config.files()[file], "run `nox -s config`"


def test_mlflow_yml_holds_every_key_with_its_default(project: Project) -> None:
    defaults = MlflowConfig().model_dump()
    for key, value in project.written.items():
        *groups, name = key.split(".")
        group = defaults
        for step in groups:
            group = group[step]
        group[name] = value

    written = yaml.safe_load(mlflow_yml(project))

    assert written == defaults
    # As texts, so that the order counts too: a reader goes from one to the other.
    assert json.dumps(written) == json.dumps(defaults)


def test_the_runtime_takes_mlflow_yml(project: Project) -> None:
    config = MlflowConfig.model_validate(yaml.safe_load(mlflow_yml(project)))

    assert config.server.mlflow_tracking_uri == project.written.get("server.mlflow_tracking_uri")
    assert config.tracking.experiment.name == project.written[NAME]


def test_production_runs_are_kept_where_the_others_are_in_an_experiment_of_their_own(
    project: Project,
) -> None:
    config, development = merged(project, "prod"), merged(project, "local")

    assert config.server == development.server
    assert config.tracking.experiment.name == f"{development.tracking.experiment.name}-prod"
    assert (
        config.tracking.experiment.create_experiment_kwargs
        == development.tracking.experiment.create_experiment_kwargs
    )


def test_the_tests_of_a_project_use_no_server_no_secrets_and_no_store(
    project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.folder / "conf", tmp_path / "conf")
    base = tmp_path / "conf/base/mlflow.yml"
    base.write_text(mlflow_yml(project).replace("credentials: null", "credentials: mine"), "utf-8")
    assert merged(Project(tmp_path, project.written), "local").server.credentials == "mine"
    env = "test" if (tmp_path / "conf/test").exists() else "base"
    assert f'env="{env}"' in (project.folder / "tests/test_run.py").read_text("utf-8")

    config = merged(Project(tmp_path, project.written), env)

    credentials = None if env == "test" else "mine"
    assert config.server == MlflowConfig().server.model_copy(update={"credentials": credentials})
    assert config.tracking.experiment.create_experiment_kwargs.artifact_location is None


def test_the_services_of_compose_have_runs_models_and_files(project: Project) -> None:
    config = merged(project, "docker")

    assert config.server.mlflow_tracking_uri == "http://127.0.0.1:5050"
    assert config.server.mlflow_registry_uri is None
    assert config.server.credentials is None
    assert config.tracking.experiment.name == "penguin_study"
    assert config.tracking.experiment.create_experiment_kwargs.artifact_location is None


def values(node: yaml.MappingNode) -> Iterator[yaml.Node]:
    """Find the keys that have a value and not just further keys."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from values(value)
        else:
            yield key


def test_each_key_of_mlflow_yml_has_a_line_of_comment(project: Project) -> None:
    lines = mlflow_yml(project).splitlines()
    root = yaml.compose(mlflow_yml(project))
    assert isinstance(root, yaml.MappingNode)

    bare = [
        key.value
        for key in values(root)
        if not lines[key.start_mark.line - 1].startswith(" " * key.start_mark.column + "# ")
    ]

    assert bare == []


SHOW_SETTINGS = """
import json, sys
from penguin_study import settings

print(json.dumps({
    "hooks": [f"{type(hook).__module__}.{type(hook).__name__}" for hook in settings.HOOKS],
    "patterns": settings.CONFIG_LOADER_ARGS["config_patterns"],
    "resolvers": {
        name: f"{resolver.__module__}.{resolver.__name__}"
        for name, resolver in settings.CONFIG_LOADER_ARGS["custom_resolvers"].items()
    },
    "merge_strategy": settings.CONFIG_LOADER_ARGS["merge_strategy"],
    "mlflow is imported": "mlflow" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def settings(generate: Generate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("settings")
    project = generate(folder / "penguin-study", example=False)
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_SETTINGS],
        # Also on Windows, where a process needs more of the environment than the path.
        env={**os.environ, "PYTHONPATH": str(project / "src")},
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    # Kedro says first which configuration of logging it has.
    found: dict[str, Any] = json.loads(shown.stdout.splitlines()[-1])
    return found


def test_settings_register_the_hook_of_the_runtime(settings: dict[str, Any]) -> None:
    assert settings["hooks"] == ["penguin_study.runtime.hooks.MlflowHook"]


def test_settings_register_the_pattern_of_mlflow_yml(settings: dict[str, Any]) -> None:
    assert settings["patterns"] == {"mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"]}
    assert settings["merge_strategy"] == {"mlflow": "soft"}


def test_settings_register_the_resolvers(settings: dict[str, Any]) -> None:
    assert settings["resolvers"].keys() == {"oc.env", "km.random_name"}
    assert (
        settings["resolvers"]["km.random_name"]
        == "penguin_study.runtime.config.resolvers.random_name"
    )


def test_reading_the_settings_does_not_import_mlflow(settings: dict[str, Any]) -> None:
    assert settings["mlflow is imported"] is False


def test_nothing_is_registered_by_entry_points(project: Project) -> None:
    pyproject = read_toml(project.folder / "pyproject.toml")

    assert "entry-points" not in pyproject["project"]
    assert pyproject["project"]["scripts"] == {"penguin-study": "penguin_study.__main__:main"}
