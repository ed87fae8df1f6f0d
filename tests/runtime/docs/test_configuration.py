"""What `docs/configuration.md` shows is run, and does what the text says."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracking.request_header.registry import (
    _request_header_provider_registry as header_providers,
)
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from pydantic import BaseModel

from runtime.config.keys import MlflowConfig
from runtime.config.loading import read_credentials
from runtime.config.uris import anchor_uri

from ...conftest import REPOSITORY
from ...support.projects import ONE_NODE, Project, needs_kedro
from ...support.servers import CountingProxy, free_port
from ..cli.test_cli import context_of, fetch, pages

GUIDE = (REPOSITORY / "docs" / "configuration.md").read_text("utf-8")

SECTIONS = {
    text.partition("\n")[0]: text for text in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]
}

BLOCK = re.compile(
    r"(?:^<!-- (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)

DOUBLE = ONE_NODE.replace("2 * x", "1")


@dataclass(frozen=True)
class Block:
    """An example for a file, one command of a `console` block, or an output."""

    language: str
    file: str
    text: str


def blocks(section: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(section):
        file, language, text = match["file"] or "", match["language"], match["text"]
        texts = text.splitlines() if language == "console" else [text]
        found += [Block(language, file, text) for text in texts]
    return found


@dataclass
class Section:
    """A section of the guide, gone through in a project from its first block to its last."""

    project: Project
    left: list[Block] = field(default_factory=list)

    def _next(self, *languages: str) -> Block:
        block = self.left.pop(0)
        assert block.language in languages, block
        return block

    def write(self, **replaced: str) -> None:
        """Write the next example into the file that it names."""
        block = self._next("yaml", "python")
        text = block.text.replace("<package>", self.project.package)
        for old, new in replaced.items():
            assert ADDRESSES[old] in text, text
            text = text.replace(ADDRESSES[old], new)
        file = self.project.path / block.file.replace("<package>", self.project.package)
        file.write_text(text, encoding="utf-8")

    def kedro(self, **env: str) -> str:
        """Run the next command, which has to succeed; gives what it prints."""
        words = self.command()
        ended = self.project.kedro(*words, **env)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def command(self) -> list[str]:
        command = self._next("console").text
        assert command.startswith("uv run kedro ")
        return command.split()[3:]

    def output(self) -> str:
        return self._next("text").text


# What stands in examples for something that only the machine knows.
ADDRESSES = {"server": "http://127.0.0.1:5000", "port": "5001"}

_tested: set[str] = set()


def describes(title: str) -> pytest.MarkDecorator:
    """Give a test the section with this title, of which it has to use every block."""
    _tested.add(title)
    return pytest.mark.parametrize("section", [title], indirect=True)


@pytest.fixture
def section(request: pytest.FixtureRequest, project: Project) -> Iterator[Section]:
    project.pipeline(DOUBLE)
    project.parameters({"x": {"y": 1}})
    section = Section(project, blocks(SECTIONS[request.param]))
    yield section
    assert section.left == [], "the guide shows what no test runs"


def experiment_of(project: Project, run: Run) -> str:
    name: str = project.client.get_experiment(run.info.experiment_id).name
    return name


def in_store(project: Project, store: Path) -> list[Run]:
    return Project(project.path, project.package, f"sqlite:///{store.as_posix()}").all_runs()


def rows(section: str) -> list[list[str]]:
    """Read the first table of a section: the cells of each row, without the heading."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_example_and_command_of_the_guide_is_in_a_section_that_a_test_runs() -> None:
    assert {title for title, text in SECTIONS.items() if blocks(text)} == _tested
    assert sum(len(blocks(text)) for text in SECTIONS.values()) == len(blocks(GUIDE))
    assert GUIDE.count("```") == 2 * len(BLOCK.findall(GUIDE))
    for block in blocks(GUIDE):
        assert bool(block.file) is (block.language in ("yaml", "python")), block


@describes("Where the file is")
def test_an_environment_changes_single_keys(section: Section) -> None:
    section.write()
    section.write()

    section.kedro()

    run = section.project.only_run()
    assert experiment_of(section.project, run) == "penguins-prod"
    assert run.data.params == {"x.y": "1"}
    settings = section.project.path / "src" / section.project.package / "settings.py"
    assert '"merge_strategy": {"mlflow": "soft"}' in settings.read_text("utf-8")
    section.project.mlflow_yml("tracking: {redact: [a]}", env="base")
    section.project.mlflow_yml("tracking: {redact: [b]}", env="prod")
    assert context_of(section.project, "prod").mlflow.tracking.redact == ["b"]


@describes("Values from elsewhere")
def test_values_come_from_the_command_the_globals_and_the_environment(
    section: Section, empty_store: Path
) -> None:
    project = section.project
    store = project.path / "team.db"
    shutil.copy(empty_store, store)
    section.write()
    section.write()

    section.kedro()
    section.kedro(TEAM_STORE="sqlite:///team.db")

    first, (second,) = project.only_run(), in_store(project, store)
    assert first.info.run_name == "first-try"
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", second.info.run_name or "")
    assert experiment_of(project, first) == "penguins-forecast"


@describes("Where runs are kept")
def test_runs_are_kept_in_the_file_or_on_the_server_that_is_named(
    section: Section, empty_store: Path, server: CountingProxy
) -> None:
    project = section.project
    store = project.path / "runs" / "penguins.db"
    store.parent.mkdir()
    shutil.copy(empty_store, store)

    section.write()
    project.run()
    assert len(in_store(project, store)) == 1

    section.write(server=server.uri)
    project.run()
    found = MlflowClient(server.uri).get_experiment_by_name(project.package)
    assert found
    assert len(MlflowClient(server.uri).search_runs([found.experiment_id])) == 1

    assert project.all_runs() == []
    assert len(in_store(project, store)) == 1

    # Runs on PostgreSQL are among the tests of back ends.
    section.write()
    section.write()
    context = context_of(project)
    assert context.mlflow.server.mlflow_tracking_uri.startswith("postgresql+psycopg2://ada@")
    assert read_credentials(context) == {"PGPASSWORD": "change-me"}


@pytest.mark.parametrize(("written", "read"), rows("Where runs are kept"))
def test_uris_are_read_as_the_guide_says(written: str, read: str) -> None:
    project = PurePosixPath("/home/ada/penguins")
    assert anchor_uri(written.strip("`"), project) == read.strip("`")


@describes("Where models are registered")
def test_models_are_registered_where_the_guide_says(section: Section, empty_store: Path) -> None:
    project = section.project
    registry = project.path / "registry.db"
    shutil.copy(empty_store, registry)
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline
        from mlflow import MlflowClient

        def register():
            return MlflowClient().create_registered_model("penguins").name

        def create_pipeline():
            return Pipeline([Node(register, None, "name")])
        """
    )
    section.write()

    project.run()

    assert project.only_run().info.status == "FINISHED"
    with_the_runs, apart = (
        MlflowClient(project.tracking_uri, uri).search_registered_models()
        for uri in (project.tracking_uri, f"sqlite:///{registry.as_posix()}")
    )
    assert with_the_runs == []
    assert [model.name for model in apart] == ["penguins"]


@describes("Credentials")
def test_requests_carry_the_credentials(
    section: Section, server: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    section.write()
    section.write(server=server.uri)
    server.headers.clear()
    section.project.run()
    basic = base64.b64encode(b"ada:change-me").decode()
    assert {headers.get("Authorization") for headers in server.headers} == {f"Basic {basic}"}

    monkeypatch.setenv("TEAM_TOKEN", "t0p")
    section.write()
    server.headers.clear()
    section.project.run()
    assert {headers.get("Authorization") for headers in server.headers} == {"Bearer t0p"}

    # Runs with these are among the tests of back ends.
    section.write()
    given = read_credentials(context_of(section.project))
    assert given["MLFLOW_TRACKING_SERVER_CERT_PATH"] == "/etc/ssl/certs/company-ca.pem"
    assert given["MLFLOW_S3_ENDPOINT_URL"] == "https://s3.example.org"


@pytest.fixture
def no_header_provider_left() -> Iterator[None]:
    before = header_providers._registry[:]
    yield
    header_providers._registry[:] = before


@describes("Tokens that expire")
def test_each_request_has_the_token_that_holds_then(
    section: Section, server: CountingProxy, no_header_provider_left: None
) -> None:
    token = section.project.path / "conf" / "local" / "token.txt"
    section.write()
    section.write(server=server.uri)
    for text in ("first\n", "second\n"):
        token.write_text(text)
        server.headers.clear()
        section.project.run()
        assert {headers.get("X-Token") for headers in server.headers} == {text.strip()}
    token.unlink()
    server.headers.clear()
    section.project.run()
    assert {headers.get("X-Token") for headers in server.headers} == {None}


@describes("Experiments")
def test_an_experiment_is_made_as_described_and_brought_back(section: Section) -> None:
    project = section.project
    section.write()

    project.run()
    experiment = project.client.get_experiment_by_name("penguins-by-island")
    assert experiment
    place = project.path / "data" / "08_reporting" / "artifacts"
    assert experiment.artifact_location == place.as_uri()
    assert experiment.tags["owner"] == "ada"

    project.client.delete_experiment(experiment.experiment_id)
    project.run()
    assert len(project.client.search_runs([experiment.experiment_id])) == 2


@describes("The run")
@needs_kedro("1.2")  # which takes several pipelines
def test_a_run_is_named_continued_and_nested(section: Section) -> None:
    project = section.project
    project.pipeline(DOUBLE.replace('name="double"', 'name="another"').replace('"y"', '"z"'), "etl")
    project.run(pipeline_names=["etl", "work"])
    assert project.only_run().info.run_name == "etl+work"

    section.write()
    project.run()
    run = next(run for run in project.all_runs() if run.info.run_name == "nightly")
    project.client.set_tag(run.info.run_id, "seen", "once")
    project.run(params={"mlflow_run_id": run.info.run_id})
    assert len(project.all_runs()) == 2
    continued = project.client.get_run(run.info.run_id)
    assert (continued.info.status, continued.data.tags["seen"]) == ("FINISHED", "once")
    assert (continued.info.end_time or 0) > (run.info.end_time or 0)

    project.pipeline(
        """
        from pathlib import Path
        from kedro.framework.session import KedroSession
        from kedro.pipeline import Node, Pipeline

        def outer():
            with KedroSession.create(project_path=Path(__file__).parents[4]) as session:
                session.run(pipeline_names=["work"])
            return 1

        def create_pipeline():
            return Pipeline([Node(outer, None, "o")])
        """,
        name="outer",
    )
    section.write()
    project.run(pipeline_names=["outer"])
    inner = next(run for run in project.all_runs() if run.info.run_name == "work")
    assert "mlflow.parentRunId" not in inner.data.tags


@describes("Parameters")
def test_parameters_are_taken_apart_and_cut(section: Section) -> None:
    project = section.project
    project.pipeline(DOUBLE.replace("params:x", "params:model"))
    section.write()

    section.write()
    project.run()
    logged = {"model/depth": "3", "model/split/ratio": "0.2", "model/split/seed": "7"}
    run = project.only_run()
    assert run.data.params == logged

    project.mlflow_yml(
        (project.path / "conf" / "local" / "mlflow.yml")
        .read_text("utf-8")
        .replace("recursive: true", "recursive: false")
    )
    project.run()
    run = newest(project, {run.info.run_id})
    assert set(run.data.params) == {"model/depth", "model/split"}

    project.parameters({"model": "long " * 100})
    before = {run.info.run_id for run in project.all_runs()}
    section.write()
    project.run()
    assert newest(project, before).data.params == {"model": ("long " * 100)[:250]}


def newest(project: Project, before: set[str]) -> Run:
    """Give the one run that has come since."""
    (run,) = (run for run in project.all_runs() if run.info.run_id not in before)
    return run


@describes("What is not tracked")
@needs_kedro("1.2")  # which takes several pipelines
def test_a_disabled_pipeline_makes_no_run(section: Section) -> None:
    project = section.project
    project.pipeline(FIT, "etl")
    project.catalog(
        """
        slope:
          type: PACKAGE.runtime.MlflowArtifactDataset
          dataset: {type: json.JSONDataset, filepath: data/08_reporting/slope.json}
        """
    )
    section.write()
    project.run(pipeline_names=["etl"])
    assert project.all_runs() == []
    saved = project.path / "data" / "08_reporting" / "slope.json"
    assert json.loads(saved.read_text()) == 2

    project.run(pipeline_names=["etl", "work"])
    run = project.only_run()
    assert run.info.run_name == "etl+work"
    assert [file.path for file in project.client.list_artifacts(run.info.run_id)] == ["slope.json"]
    assert "fit_intercept" not in run.data.params


@describes("What libraries log by themselves")
def test_libraries_log_what_they_fit_when_it_is_wanted(section: Section) -> None:
    project = section.project
    project.pipeline(FIT, "fitting")
    section.write()
    project.run(pipeline_names=["fitting"])
    first = project.only_run()
    assert first.data.params["fit_intercept"] == "True"
    assert project.client.search_logged_models([first.info.experiment_id]) == []

    section.write()
    project.run(pipeline_names=["fitting"])
    second = newest(project, {first.info.run_id})
    assert "fit_intercept" not in second.data.params
    mlflow.sklearn.autolog(log_models=False)
    try:
        project.run(pipeline_names=["fitting"])
    finally:
        mlflow.sklearn.autolog(disable=True)
        AUTOLOGGING_INTEGRATIONS["sklearn"].clear()
    third = newest(project, {first.info.run_id, second.info.run_id})
    assert "fit_intercept" in third.data.params


FIT = """
from kedro.pipeline import Node, Pipeline
from sklearn.linear_model import LinearRegression

def fit():
    return round(float(LinearRegression().fit([[0], [1]], [1, 3]).coef_[0]))

def create_pipeline():
    return Pipeline([Node(fit, None, "slope")])
"""


@describes("Outputs as artifacts")
def test_outputs_become_artifacts_without_a_change_to_the_catalog(section: Section) -> None:
    project = section.project
    project.pipeline(
        """
        from kedro.pipeline import Node, Pipeline

        def report():
            return "a text", {"n": 1}, "left alone"

        def create_pipeline():
            return Pipeline([Node(report, None, ["my_report", "summary", "other"])])
        """
    )
    section.write()
    project.run()

    run_id = project.only_run().info.run_id
    found = {file.path for file in project.client.list_artifacts(run_id, "outputs")}
    assert found == {"outputs/my_report", "outputs/summary"}


@describes("Secrets among the parameters")
def test_values_with_the_name_of_a_secret_are_stored_as_stars(section: Section) -> None:
    project = section.project
    project.parameters({"x": {"api_key": 1, "customer_id": 2, "db.Password": 3, "token": 4}})
    section.write()

    project.run()

    assert project.only_run().data.params == {
        "x": str({"api_key": 1, "customer_id": "***", "db.Password": "***", "token": "***"})
    }


@describes("Looking at runs")
def test_the_pages_are_served_where_the_keys_say(section: Section) -> None:
    *group, command = section.command()
    assert (group, command) == (["mlflow"], "ui")
    port = str(free_port())
    section.write(port=port)

    with pages(section.project) as served:
        assert served.address == f"http://127.0.0.1:{port}"
        assert "<title>MLflow</title>" in fetch(served.address)

        assert served.end(signal.SIGINT) == 0

        assert served.left == set()


@describes("When something is wrong")
def test_mistakes_are_told_as_the_guide_shows(section: Section) -> None:
    section.write()

    ended = section.project.kedro("run")

    assert ended.returncode == 1
    told = ended.stderr.partition("Error: ")[2]
    assert sorted(told.splitlines()) == sorted(section.output().splitlines())
    assert section.project.all_runs() == []

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    section.project.mlflow_yml(f"server:\n  mlflow_tracking_uri: {address}\n")
    ended = section.project.kedro("run", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert ended.returncode == 1
    told = ended.stderr.partition("Error: ")[2]
    assert told == section.output().replace(ADDRESSES["server"], address)


@describes("A file with all keys")
def test_init_writes_all_keys_commented_out(section: Section) -> None:
    project = section.project
    before = context_of(project, "local").mlflow.model_dump()
    for env in ("local", "prod"):
        section.kedro()

        written = (project.path / "conf" / env / "mlflow.yml").read_text("utf-8")
        assert yaml.safe_load(written) is None
        assert {line.split(":")[0].strip("# ") for line in written.splitlines() if ":" in line} >= {
            key.rpartition(".")[2] for key, _ in defaults(MlflowConfig())
        }
        assert context_of(project, env).mlflow.model_dump() == before


@describes("Completion in editors")
def test_the_schema_is_where_the_first_line_says(section: Section) -> None:
    section.write()

    file = section.project.path / "conf" / "prod" / "mlflow.yml"
    first = file.read_text("utf-8").splitlines()[0]
    (path,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", first)
    path = path.replace("src/penguins", f"src/{section.project.package}")
    schema = json.loads((file.parent / path).read_text("utf-8"))
    assert set(yaml.safe_load(file.read_text("utf-8"))) <= set(schema["properties"])
    assert context_of(section.project, "prod").mlflow.ui.port == 5001


def defaults(group: BaseModel, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the keys with their defaults, in the order of the file."""
    for name in type(group).model_fields:
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from defaults(value, f"{path}{name}.")
        else:
            yield path + name, value


def test_the_table_has_every_key_with_its_default_and_meaning() -> None:
    table = rows("All keys")

    assert [(key.strip("`"), json.loads(value.strip("`"))) for key, value, _ in table] == list(
        defaults(MlflowConfig())
    )
    assert all(meaning for _, _, meaning in table)
