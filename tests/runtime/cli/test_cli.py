"""`kedro mlflow init` and `kedro mlflow ui`, and the file for credentials."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient, environment_variables

from runtime.config.keys import MlflowConfig, commented_yaml
from runtime.config.loading import read_credentials
from runtime.offline.disk import disk_of
from runtime.stores.server import Server

from ...support.forks import Fork
from ...support.projects import ONE_NODE, Project, has
from ...support.servers import free_port


def refusal(ended: subprocess.CompletedProcess[str]) -> str:
    """Give the one sentence that a command has ended with."""
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    *logged, sentence = ended.stderr.splitlines()
    assert all(line.startswith("INFO ") for line in logged), logged
    return sentence.removeprefix("Error: ")


def context_of(project: Project, env: str | None = None) -> Any:
    bootstrap_project(project.path)
    with KedroSession.create(project_path=project.path, env=env) as session:
        return session.load_context()  # type: ignore[attr-defined]


def test_init_writes_every_key_and_changes_nothing_until_its_mark_is_taken_off(
    project: Project,
) -> None:
    project.mlflow_yml("tracking: {run: {name: always}}", env="base")
    file = project.path / "conf" / "prod" / "mlflow.yml"
    file.unlink()
    before = context_of(project, "prod").mlflow

    ended = project.kedro("mlflow", "init", "--env", "prod")

    assert ended.returncode == 0, ended.stderr
    assert f"Written: {file}" in ended.stdout
    text = file.read_text("utf-8")
    assert context_of(project, "prod").mlflow == before
    keys = re.sub("^# (?!How|yaml-)", "", text, flags=re.MULTILINE)
    assert yaml.safe_load(keys) == yaml.safe_load(commented_yaml())
    for line in ("tracking:", "  run:", "    nested: true"):
        assert f"\n# {line}\n" in text
        text = text.replace(f"\n# {line}\n", f"\n{line}\n")
    file.write_text(text.replace("nested: true", "nested: false"), encoding="utf-8")
    after = context_of(project, "prod").mlflow.tracking.run
    assert (after.name, after.nested) == ("always", False)


def test_init_replaces_a_file_only_by_force(project: Project) -> None:
    file = project.path / "conf" / "prod" / "mlflow.yml"
    project.mlflow_yml("# mine\ntracking: {run: {nested: no}}\n", env="prod")
    before = file.read_bytes()

    refused = project.kedro("mlflow", "init", "--env", "prod")

    assert refusal(refused) == f"{file} exists already; --force replaces it."
    assert file.read_bytes() == before
    assert project.kedro("mlflow", "init", "--env=prod", "--force").returncode == 0
    assert yaml.safe_load(file.read_text("utf-8")) is None


def test_init_writes_nothing_into_an_environment_that_is_not_there(project: Project) -> None:
    refused = project.kedro("mlflow", "init", "--env", "prdo")

    folder = project.path / "conf" / "prdo"
    assert refusal(refused) == f"{folder} is no environment: make the folder first."
    assert not folder.exists()


@pytest.mark.parametrize("options", [[], ["--env=base", "--force"], ["--env=team/ada"]])
def test_init_works_in_any_folder_of_the_project_and_names_the_schema(
    project: Project, options: list[str]
) -> None:
    (project.path / "conf" / "team" / "ada").mkdir(parents=True)
    inside = replace(project, path=project.path / "data" / "01_raw")

    ended = inside.kedro("mlflow", "init", *options)

    assert ended.returncode == 0, ended.stderr
    (written,) = re.findall(r"Written: (\S+)\. ", ended.stdout)
    first = Path(written).read_text("utf-8").splitlines()[0]
    schema = Path(written).parent / first.removeprefix("# yaml-language-server: $schema=")
    assert schema.resolve() == (
        project.path / "src" / project.package / "runtime" / "mlflow.schema.json"
    )


@dataclass
class Pages:
    """A `kedro mlflow ui` that serves, and the processes it has started, with their arguments."""

    address: str
    process: Fork
    children: dict[int, str]

    def end(self, how: signal.Signals) -> int:
        """Send a signal to the command alone, as a supervisor does; gives the exit status."""
        self.process.send_signal(how)
        return self.process.wait()

    @property
    def left(self) -> set[int]:
        if not has("mlflow", "3.10"):
            return set()  # its server ends a moment after the command
        return self.children.keys() & processes().keys()


def processes() -> dict[int, tuple[int, str]]:
    """List the processes of this machine: the parent and the arguments of each."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], check=True, capture_output=True, text=True
    )
    rows = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return {int(pid): (int(parent), "".join(args)) for pid, parent, *args in rows}


def descendants(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    everything = processes()
    parents = {pid}
    while parents:
        children = {p: args for p, (parent, args) in everything.items() if parent in parents}
        found |= children
        parents = set(children)
    return found


@contextmanager
def pages(project: Project, *options: str, **env: str) -> Iterator[Pages]:
    """Run `kedro mlflow ui` and wait until it serves."""
    process = project.start("mlflow", "ui", *options, new_session=True, PYTHONUNBUFFERED="1", **env)
    assert process.stdout
    try:
        log = ""
        for line in process.stdout:
            log += line
            if "Uvicorn running on" in line:
                break
        (address,) = re.findall(r"MLflow's pages: (\S+) ", log) or [log]
        assert f"Uvicorn running on {address}" in log, log
        yield Pages(address, process, descendants(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def fetch(address: str) -> str:
    with urllib.request.urlopen(address) as answer:
        text: str = answer.read().decode()
        return text


def test_ui_serves_the_embedded_store_on_a_free_port_until_ctrl_c(project: Project) -> None:
    project.pipeline(ONE_NODE)
    project.parameters({"x": 1})
    project.run()
    inside = replace(project, path=project.path / "src")

    with pages(inside) as served:
        assert "<title>MLflow</title>" in fetch(served.address)
        run = MlflowClient(served.address).get_run(project.only_run().info.run_id)
        assert run.data.params == {"x": "1"}
        assert len(served.children) >= 1
        assert not any(project.tracking_uri in args for args in served.children.values())

        assert served.end(signal.SIGINT) == 0

        assert served.left == set()


def test_ui_serves_on_the_given_port_with_credentials_and_registry_until_terminated(
    project: Project, empty_store: Path
) -> None:
    shutil.copy(empty_store, project.path / "registry.db")
    registry = f"sqlite:///{project.path.as_posix()}/registry.db"
    MlflowClient(project.tracking_uri, registry).create_registered_model("penguins")
    # Any variable that the server reads shows that it has them.
    project.write("conf/local/credentials.yml", "pages: {MLFLOW_STATIC_PREFIX: /team}")
    project.mlflow_yml(
        "server: {credentials: pages, mlflow_registry_uri: 'sqlite:///registry.db'}\nui: {port: 1}"
    )
    port = free_port()

    with pages(project, "--port", str(port), "--host", "127.0.0.1") as served:
        assert served.address == f"http://127.0.0.1:{port}"
        assert "<title>MLflow</title>" in fetch(f"{served.address}/team/")
        prefix = "/team" if has("mlflow", "3.12") else ""  # before, it is for the pages alone
        models = MlflowClient(served.address + prefix).search_registered_models()
        assert [model.name for model in models] == ["penguins"]

        assert served.end(signal.SIGTERM) == 0

        assert served.left == set()


def test_ui_shows_the_runs_that_are_to_be_replayed(project: Project, empty_store: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    project.mlflow_yml(f"server: {{mlflow_tracking_uri: '{uri}'}}")
    refused = project.kedro("mlflow", "ui", "--offline")
    disk = disk_of(Server(uri, uri), project.path)
    assert disk
    disk.folder.mkdir(parents=True)
    shutil.copy(empty_store, disk.folder / "mlflow.db")
    disk.client().create_experiment("only on disk", disk.artifacts.as_uri())

    assert refusal(refused) == f"--offline: no run on disk waits for {uri}"
    with pages(project, "--offline") as served:
        assert MlflowClient(served.address).get_experiment_by_name("only on disk")


@pytest.mark.parametrize("how", ["option", "key"])
def test_ui_says_in_one_sentence_that_a_port_is_taken(project: Project, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if how == "key":
            project.mlflow_yml(f"ui: {{port: {port}}}")

        refused = project.kedro("mlflow", "ui", *(["--port", str(port)] if how == "option" else []))

    assert refusal(refused) == (
        f"Can't listen on 127.0.0.1:{port} (Address already in use). Choose another with "
        "--host and --port, or leave the port out for a free one."
    )


@pytest.mark.parametrize(
    ("uri", "page", "opened"),
    [
        ("http://ada:t0p@127.0.0.1:9/team", "http://127.0.0.1:9/team", True),
        ("databricks", "databricks", False),
    ],
)
def test_ui_prints_and_opens_the_page_of_a_server_without_its_password(
    project: Project, tmp_path: Path, uri: str, page: str, opened: bool
) -> None:
    # What click opens a page with on Linux and macOS. It inherits our pipe, so that its output is
    # part of the command's.
    for name in ("xdg-open", "open"):
        project.write(f"bin/{name}", '#!/bin/sh\necho "opened $1"\n')
        (project.path / "bin" / name).chmod(0o755)
    project.mlflow_yml(f"server: {{mlflow_tracking_uri: '{uri}'}}")

    ended = project.kedro(
        "mlflow", "ui", PATH=f"{project.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    )

    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert f"The runs are on {page}" in lines
    assert (f"opened {page}" in lines) is opened
    assert "t0p" not in ended.stdout + ended.stderr


def examples(stub: str) -> str:
    """Take the comment marks off the examples, which stand after the introduction."""
    return re.sub(r"^# ?", "", stub.partition("\n\n")[2], flags=re.MULTILINE)


def test_the_file_for_credentials_is_empty_until_its_marks_are_taken_off(project: Project) -> None:
    stub = (project.path / "conf" / "local" / "credentials.yml").read_text("utf-8")
    assert yaml.safe_load(stub) is None
    assert context_of(project)._get_config_credentials() == {}

    project.write("conf/local/credentials.yml", examples(stub))
    entries = yaml.safe_load(examples(stub))

    assert {name for entry in entries.values() for name in entry} == {
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH",
        "PGPASSWORD",
        "DATABRICKS_HOST",
        "DATABRICKS_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_S3_ENDPOINT_URL",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_TENANT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
    }
    for name, entry in entries.items():
        project.mlflow_yml(f"server: {{credentials: {name}}}")
        assert read_credentials(context_of(project)) == entry
    (named,) = re.findall(r"`(server: .*)`", stub)
    assert yaml.safe_load(named)["server"]["credentials"] in entries
    MlflowConfig.model_validate(yaml.safe_load(named))


def test_mlflow_reads_the_variables_of_the_file_for_credentials(project: Project) -> None:
    stub = (project.path / "conf" / "local" / "credentials.yml").read_text("utf-8")
    names = {name for entry in yaml.safe_load(examples(stub)).values() for name in entry}
    read = "".join(
        inspect.getsource(importlib.import_module(module))
        for module in (
            # Those of the storages' own libraries are also what MLflow hands on to a container.
            "mlflow.projects.backend.local",
            "databricks.sdk.config",
            "azure.identity._constants",
        )
    )

    # PostgreSQL's own library reads this one (libpq).
    for name in names - {"PGPASSWORD"}:
        assert hasattr(environment_variables, name) or name in read, name
