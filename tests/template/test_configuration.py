"""A generated project says in its own files what is registered and what can be set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from runtime.config import MlflowConfig

from ..conftest import Generate
from . import shipped_config
from .conftest import read_toml

SERVER = "https://mlflow.example.org"


class Project(NamedTuple):
    folder: Path
    tracking_uri: str | None


@pytest.fixture(scope="module", params=["sqlite", "server"])
def project(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    backend: str = request.param
    answers = {"tracking_backend": backend}
    if backend == "server":
        answers["tracking_uri"] = SERVER
    folder = tmp_path_factory.mktemp("configuration") / "penguin-study"
    generate(folder, example=False, **answers)
    return Project(folder, SERVER if backend == "server" else None)


def mlflow_yml(project: Project) -> str:
    return (project.folder / "conf/base/mlflow.yml").read_text("utf-8")


@pytest.mark.parametrize("file", shipped_config.files(), ids=lambda file: file.name)
def test_the_shipped_files_are_those_that_the_models_make(file: Path) -> None:
    assert file.read_text("utf-8") == shipped_config.files()[file], "run `nox -s config`"


def test_mlflow_yml_holds_every_key_with_its_default(project: Project) -> None:
    defaults = MlflowConfig().model_dump()
    defaults["server"]["mlflow_tracking_uri"] = project.tracking_uri
    defaults["tracking"]["experiment"]["name"] = "penguin_study"

    written = yaml.safe_load(mlflow_yml(project))

    assert written == defaults
    # As texts, so that the order counts too: a reader goes from one to the other.
    assert json.dumps(written) == json.dumps(defaults)


def test_the_runtime_takes_mlflow_yml(project: Project) -> None:
    config = MlflowConfig.model_validate(yaml.safe_load(mlflow_yml(project)))

    assert config.server.mlflow_tracking_uri == project.tracking_uri
    assert config.tracking.experiment.name == "penguin_study"


@pytest.mark.parametrize("environment", ["prod", "test"])
def test_the_runtime_takes_the_mlflow_yml_of_other_environments(
    project: Project, environment: str
) -> None:
    path = project.folder / "conf" / environment / "mlflow.yml"

    assert MlflowConfig.model_validate(yaml.safe_load(path.read_text("utf-8")))


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
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def test_settings_register_the_hook_of_the_runtime(settings: dict[str, Any]) -> None:
    assert settings["hooks"] == ["penguin_study.runtime.hooks.MlflowHook"]


def test_settings_register_the_pattern_of_mlflow_yml(settings: dict[str, Any]) -> None:
    assert settings["patterns"] == {"mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"]}
    assert settings["merge_strategy"] == {"mlflow": "soft"}


def test_settings_register_the_resolvers(settings: dict[str, Any]) -> None:
    assert settings["resolvers"].keys() == {"oc.env", "km.random_name"}
    assert settings["resolvers"]["km.random_name"] == "penguin_study.runtime.resolvers.random_name"


def test_reading_the_settings_does_not_import_mlflow(settings: dict[str, Any]) -> None:
    assert settings["mlflow is imported"] is False


def test_nothing_is_registered_by_entry_points(project: Project) -> None:
    pyproject = read_toml(project.folder / "pyproject.toml")

    assert "entry-points" not in pyproject["project"]
    assert pyproject["project"]["scripts"] == {"penguin-study": "penguin_study.__main__:main"}
