"""Real stores and servers, each started once on loopback."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import trustme
import yaml
from kedro.runner import ParallelRunner, SequentialRunner
from mlflow.tracking.request_header.registry import (
    _request_header_provider_registry as header_providers,
)

from ..runtime.conftest import elsewhere, empty_store, new_project, pattern
from ..support import everything, work
from ..support.everything import Recorded, record
from ..support.postgres import Postgres, postgres_server
from ..support.projects import Project
from ..support.s3 import S3, s3_server
from ..support.servers import CountingProxy, counting_proxy, mlflow_server
from ..support.storages import Locked, locked_s3_server, variables
from ..support.tokens import Gate
from ..support.work import SECRET

__all__ = ["SECRET", "elsewhere", "empty_store", "new_project", "pattern"]

# What a worker process has, the process that starts it has too.
RUNNERS = [pytest.param(SequentialRunner, marks=pytest.mark.thorough), ParallelRunner]

Reach = Callable[..., Project]


@pytest.fixture
def project(new_project: Callable[..., Project]) -> Project:
    """A project with the pipeline that logs in every way."""
    project = new_project()
    work.fill(project)
    return project


@pytest.fixture
def on(new_project: Callable[..., Project]) -> Reach:
    """Make a project whose runs are kept at an address, with variables in its credentials."""

    def on(uri: str, **credentials: str) -> Project:
        project = new_project()
        project.tracking_uri = uri
        server = {"mlflow_tracking_uri": uri}
        if credentials:
            server["credentials"] = "team_server"
            project.write(
                "conf/local/credentials.yml", yaml.safe_dump({"team_server": credentials})
            )
        project.mlflow_yml(yaml.safe_dump({"server": server}, sort_keys=False))
        work.fill(project)
        return project

    return on


@pytest.fixture(autouse=True)
def no_header_provider_left() -> Iterator[None]:
    before = header_providers._registry[:]
    yield
    header_providers._registry[:] = before


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@dataclass(frozen=True)
class Served:
    """A server, the folder that it works in, and the file of the CA that its clients trust."""

    port: int
    folder: Path
    scheme: str = "http"
    ca: Path | None = None

    @property
    def uri(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def has(self, secret: str) -> bool:
        """Tell whether a text is in the store, in an artifact, or there in another writing."""
        encoded = base64.b64encode(secret.encode())
        contents = [file.read_bytes() for file in self.folder.rglob("*") if file.is_file()]
        assert contents
        return any(secret.encode() in text or encoded in text for text in contents)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An MLflow server that asks for nothing."""
    folder = tmp_path_factory.mktemp("plain")
    with mlflow_server(folder) as port:
        yield Served(port, folder)


@pytest.fixture
def port(plain: Served) -> int:
    return plain.port


@pytest.fixture(scope="session")
def recorded(
    plain: Served, pattern: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recorded]:
    """A project with a run on disk that is to be replayed."""
    with record(plain.port, pattern(example=False), tmp_path_factory.mktemp("recorded")) as found:
        yield found


@pytest.fixture
def to_replay(
    recorded: Recorded, new_project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorded]:
    """The same, with a client that gives up soon, and nothing of it on the server."""
    for name, value in everything.IMPATIENT.items():
        monkeypatch.setenv(name, value)
    yield recorded
    recorded.proxy.heal()
    recorded.put_away()
    for module in list(sys.modules):
        if module.partition(".")[0] == recorded.project.package:
            del sys.modules[module]


@dataclass(frozen=True)
class Gated:
    """A server, and in front of it a gate that asks for tokens."""

    proxy: CountingProxy
    gate: Gate
    server: Served


@pytest.fixture
def gated(plain: Served) -> Iterator[Gated]:
    gate = Gate()
    with counting_proxy(plain.port, gate.refuse) as proxy:
        yield Gated(proxy, gate, plain)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An MLflow server with MLflow's own basic authentication; its user is `admin`."""
    folder = tmp_path_factory.mktemp("guarded")
    # MLflow's own settings, but for a cache: without it each request takes half a second.
    settings = (Path(mlflow.__file__).parent / "server" / "auth" / "basic_auth.ini").read_text()
    config = tmp_path_factory.mktemp("settings") / "basic_auth.ini"
    config.write_text(f"{settings}\nauth_cache_ttl_seconds = 600\n")
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only for tests",
    }
    with mlflow_server(folder, "--app-name=basic-auth", env=env) as port:
        yield Served(port, folder)


@pytest.fixture(scope="session")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An MLflow server over TLS, with a certificate of a CA of its own."""
    folder = tmp_path_factory.mktemp("encrypted")
    certificates = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(certificates / "ca.pem"))
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(str(certificates / "key.pem"))
    for part in own.cert_chain_pems:
        part.write_to_path(str(certificates / "cert.pem"), append=True)
    files = f"--ssl-keyfile {certificates / 'key.pem'} --ssl-certfile {certificates / 'cert.pem'}"
    with mlflow_server(folder, f"--uvicorn-opts={files}") as port:
        yield Served(port, folder, "https", certificates / "ca.pem")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def proxying(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An MLflow server that keeps artifacts in the bucket."""
    folder = tmp_path_factory.mktemp("proxying")
    place = f"s3://{s3.bucket}/proxied"
    with mlflow_server(folder, artifacts=place, env=variables(s3)) as port:
        yield Served(port, folder)


@pytest.fixture
def locked() -> Iterator[Locked]:
    with locked_s3_server() as server:
        yield server
