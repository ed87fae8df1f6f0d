"""The example, with what the template generates for each back end, leaves there what SQLite has."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
import yaml

from ..conftest import REPOSITORY
from ..support import forks
from ..support.postgres import PASSWORD as POSTGRES_PASSWORD
from ..support.postgres import Postgres
from ..support.projects import Project
from ..support.servers import counting_proxy
from ..support.storages import Locked
from ..support.tokens import PROVIDER, USES, provide
from .conftest import SECRET, Gated, Served

STUB = "conf/local/credentials.yml"

# Of the machine, so that no client looks for keys in the network.
MACHINE = {"AWS_EC2_METADATA_DISABLED": "true"}


@dataclass(frozen=True)
class BackEnd:
    """What is answered and filled in for a back end, and where its runs are read.

    Attributes:
        answers: Answers to the template's questions.
        entry: Entry of the stub of credentials.yml that is for it.
        values: What stands there for each variable; None for a line that isn't needed.
        server: Further keys of `server` in mlflow.yml, given the project.
        address: Where its runs are read; the project's own SQLite file when left out.
    """

    answers: Mapping[str, object]
    entry: str = ""
    values: Mapping[str, str | None] = field(default_factory=dict)
    server: Callable[[Project], dict[str, Any]] = lambda _: {}
    address: str = ""

    @property
    def variables(self) -> dict[str, str]:
        return {name: value for name, value in self.values.items() if value is not None}


def on_a_server(uri: str) -> dict[str, object]:
    return {"tracking_backend": "server", "tracking_uri": uri}


@pytest.fixture
def sqlite() -> BackEnd:
    return BackEnd({})


@pytest.fixture
def postgresql(postgres: Postgres) -> BackEnd:
    uri = postgres.create(f"examples-{uuid4()}")
    return BackEnd(
        {},
        "database_with_password",
        {"PGPASSWORD": POSTGRES_PASSWORD},
        server=lambda _: {"mlflow_tracking_uri": uri},
        address=uri,
    )


@pytest.fixture
def server(plain: Served) -> BackEnd:
    return BackEnd(on_a_server(plain.uri), address=plain.uri)


@pytest.fixture
def server_with_password(guarded: Served) -> BackEnd:
    return BackEnd(
        on_a_server(guarded.uri),
        "server_with_password",
        {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": SECRET},
        address=guarded.uri,
    )


@pytest.fixture
def server_with_token(plain: Served) -> Iterator[BackEnd]:
    def refuse(path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        return None if headers.get("Authorization") == f"Bearer {SECRET}" else (401, "no token")

    with counting_proxy(plain.port, refuse) as proxy:
        yield BackEnd(
            on_a_server(proxy.uri),
            "server_with_token",
            {"MLFLOW_TRACKING_TOKEN": SECRET},
            address=proxy.uri,
        )


@pytest.fixture
def server_with_tokens_that_expire(gated: Gated) -> BackEnd:
    return BackEnd(
        on_a_server(gated.proxy.uri),
        server=lambda project: provide(project, gated.proxy.uri, USES),
        address=gated.server.uri,
    )


@pytest.fixture
def server_with_own_certificate(encrypted: Served) -> BackEnd:
    return BackEnd(
        on_a_server(encrypted.uri),
        "server_with_own_certificate",
        {
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(encrypted.ca),
            "MLFLOW_TRACKING_CLIENT_CERT_PATH": None,
        },
        address=encrypted.uri,
    )


@pytest.fixture
def s3_from_the_run(locked: Locked) -> BackEnd:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL")
    return BackEnd(
        {"artifact_store": "s3", "artifact_location": f"s3://{locked.s3.bucket}/examples"},
        "files_on_s3",
        {name: locked.opening[name] for name in names},
    )


@pytest.fixture
def s3_behind_the_server(proxying: Served) -> BackEnd:
    return BackEnd(on_a_server(proxying.uri), address=proxying.uri)


ALWAYS = ["server_with_password"]
ALSO = """
sqlite postgresql server server_with_token server_with_tokens_that_expire
server_with_own_certificate s3_from_the_run s3_behind_the_server
""".split()


def filled(stub: str, entry: str, values: Mapping[str, str | None]) -> str:
    """Take the marks off an entry of credentials.yml and fill it in, as the stub asks to."""
    (lines,) = re.findall(rf"^# {entry}:.*\n(?:#   .*\n)+", stub, re.MULTILINE)
    own = yaml.safe_load(re.sub("^# ", "", lines, flags=re.MULTILINE))
    assert own.keys() == {entry}
    # The names are those of the stub: a wrong one has no value here.
    written = {name: values[name] for name in own[entry] if values[name] is not None}
    return stub.replace(lines, yaml.safe_dump({entry: written}))


def set_up(project: Project, back_end: BackEnd, env: str) -> None:
    """Do what the README says for a back end, in an environment."""
    server = back_end.server(project)
    if back_end.entry:
        server["credentials"] = back_end.entry
        stub = (project.path / STUB).read_text("utf-8")
        text = filled(stub, back_end.entry, back_end.values)
        project.write(f"conf/{env}/credentials.yml", text)
    if server:
        file = project.path / f"conf/{env}/mlflow.yml"
        options = yaml.safe_load(file.read_text("utf-8")) if file.exists() else {}
        project.mlflow_yml(yaml.safe_dump({**options, "server": server}), env)


TRAINING = ("__default__",)
EVERY_PIPELINE = ("__default__", "inference", "service")


def kept(
    project: Project, back_end: BackEnd, pipelines: tuple[str, ...], env: str, **variables: str
) -> Any:
    """Run pipelines of the example and read back all that they leave."""
    for pipeline in pipelines:
        ended = project.kedro(
            "run", f"--pipelines={pipeline}", f"--env={env}", **MACHINE, **variables
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    experiment = project.package + ("-prod" if env == "prod" else "")
    file = project.path / "read.json"
    words = [back_end.address or project.tracking_uri, experiment, project.package, str(file)]
    path = os.pathsep.join([str(REPOSITORY), str(project.path / "src")])
    given = {**os.environ, **MACHINE, **back_end.variables, "PYTHONPATH": path}
    ended = forks.run("tests.support.reading", words, project.path, given)
    assert ended.returncode == 0, ended.stderr
    return json.loads(file.read_text("utf-8"))


@pytest.fixture
def example(new_project: Callable[..., Project]) -> Callable[..., Project]:
    def make(**answers: object) -> Project:
        project = new_project(example=True, **answers)
        # Its models carry the project's code, which is to be the same for all back ends.
        project.write(f"src/{project.package}/headers.py", PROVIDER)
        return project

    return make


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Any]:
    """What pipelines have left in SQLite, once they have been run there."""
    return {}


@pytest.fixture
def in_sqlite(
    example: Callable[..., Project], references: dict[tuple[str, ...], Any]
) -> Callable[[tuple[str, ...]], Any]:
    """Tell what pipelines leave when nothing is answered, nor filled in."""

    def tell(pipelines: tuple[str, ...]) -> Any:
        if pipelines not in references:
            references[pipelines] = kept(example(), BackEnd({}), pipelines, "local")
        return references[pipelines]

    return tell


InSqlite = Callable[[tuple[str, ...]], Any]


def test_what_is_compared_is_all_that_the_example_leaves(in_sqlite: InSqlite) -> None:
    found = in_sqlite(TRAINING)

    runs = found["runs"]
    tried = {f"__default__: strength {strength}" for strength in (0.01, 0.1, 1.0, 10.0)}
    assert runs.keys() == {"__default__", *tried}
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert all(run["params"] and run["metrics"] for run in runs.values())
    assert runs["__default__"]["artifacts"].keys() == {"figures/confusion_matrix.png"}
    assert len(runs["__default__"]["metrics"]["learning_curve"]) == 5
    assert found["models"].keys() == {"__default__: classifier"}
    assert found["registered"].keys() == {"penguins-classifier/1"}
    (of_run, predicted) = found["registered"]["penguins-classifier/1"]
    assert of_run == "__default__"
    assert found["models"]["__default__: classifier"]["predicted"] == predicted
    assert set(predicted) == {"Adelie", "Chinstrap", "Gentoo"}


THOROUGH = {"local": EVERY_PIPELINE, "prod": TRAINING}


@pytest.mark.parametrize(
    ("name", "env", "pipelines"),
    [
        *(pytest.param(name, "local", TRAINING, id=name) for name in ALWAYS),
        *(
            pytest.param(
                name, env, pipelines, id=f"{name}-{env}-thorough", marks=pytest.mark.thorough
            )
            for env, pipelines in THOROUGH.items()
            for name in [*ALWAYS, *ALSO]
        ),
    ],
)
def test_the_example_leaves_in_a_back_end_what_it_leaves_in_sqlite(
    request: pytest.FixtureRequest,
    example: Callable[..., Project],
    in_sqlite: InSqlite,
    name: str,
    env: str,
    pipelines: tuple[str, ...],
) -> None:
    back_end: BackEnd = request.getfixturevalue(name)
    project = example(**back_end.answers)
    set_up(project, back_end, env)

    assert kept(project, back_end, pipelines, env) == in_sqlite(pipelines)


@pytest.mark.thorough
def test_the_example_leaves_with_the_services_of_docker_what_it_leaves_in_sqlite(
    example: Callable[..., Project], proxying: Served, in_sqlite: InSqlite
) -> None:
    project = example(docker=True, artifact_store="s3")
    config = project.path / "conf/docker/mlflow.yml"
    text = config.read_text("utf-8")
    address = "http://127.0.0.1:${oc.env:MLFLOW_PORT, 5050}"
    assert address in text
    config.write_text(text.replace(address, proxying.uri), "utf-8")

    found = kept(project, BackEnd({}, address=proxying.uri), EVERY_PIPELINE, "docker")

    assert found == in_sqlite(EVERY_PIPELINE)


@pytest.mark.thorough
def test_the_example_leaves_where_its_tests_want_it_what_it_leaves_in_sqlite(
    example: Callable[..., Project], plain: Served, in_sqlite: InSqlite
) -> None:
    project = example(**on_a_server("http://mlflow.invalid"), artifact_store="s3")
    back_end = BackEnd({}, address=plain.uri)

    found = kept(project, back_end, EVERY_PIPELINE, "test", MLFLOW_TRACKING_URI=plain.uri)

    assert found == in_sqlite(EVERY_PIPELINE)
