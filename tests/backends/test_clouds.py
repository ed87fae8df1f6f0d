"""Artifacts for Azure and Google Cloud, up to the requests that their client libraries make."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from ..support.projects import Project
from .conftest import SECRET

PIPELINE = """
from kedro.pipeline import Node, Pipeline

def write():
    return "measured by hand"

def create_pipeline():
    return Pipeline([Node(write, None, "note")])
"""

CATALOG = """
note:
  type: PACKAGE.runtime.MlflowArtifactDataset
  dataset: {type: text.TextDataset, filepath: data/08_reporting/note.txt}
"""


@dataclass(frozen=True)
class Asked:
    """One request: what for, with which `Authorization`, and what came with it."""

    line: str
    authorization: str
    body: bytes


@dataclass
class Cloud:
    """A server that takes everything, and keeps what it was asked."""

    port: int
    asked: list[Asked] = field(default_factory=list)

    def upload_of(self, body: bytes) -> Asked:
        (found,) = [asked for asked in self.asked if body in asked.body]
        return found


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            line = f"{self.command} {self.path}"
            served.asked.append(Asked(line, self.headers.get("Authorization", ""), body))
            answer = json.dumps({"name": "note.txt", "bucket": "penguins"}).encode()
            self.send_response(200 if self.command == "POST" else 201)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", formatdate(usegmt=True))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_POST = take

        def log_message(self, *args: Any) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Cloud(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


def run_with(project: Project, place: str, variables: dict[str, str]) -> str:
    """Run with artifacts in a place, and credentials for it; gives the run's id."""
    project.pipeline(PIPELINE)
    project.catalog(CATALOG)
    experiment = {"create_experiment_kwargs": {"artifact_location": place}}
    options = {"server": {"credentials": "files"}, "tracking": {"experiment": experiment}}
    project.mlflow_yml(yaml.safe_dump(options))
    project.write("conf/local/credentials.yml", yaml.safe_dump({"files": variables}))

    project.run()

    run = project.only_run()
    assert run.info.status == "FINISHED"
    assert SECRET not in str(run.to_dictionary())
    run_id: str = run.info.run_id
    return run_id


def test_azure_is_asked_to_keep_the_artifact_with_the_key_of_the_account(
    new_project: Callable[..., Project], cloud: Cloud
) -> None:
    key = base64.b64encode(SECRET.encode()).decode()
    run_id = run_with(
        new_project(),
        "wasbs://files@penguins.blob.core.windows.net/runs",
        {
            "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;"
            f"AccountName=penguins;AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{cloud.port}/penguins;"
        },
    )

    upload = cloud.upload_of(b"measured by hand")
    path = upload.line.partition("?")[0]
    assert path == f"PUT /penguins/files/runs/{run_id}/artifacts/note.txt"
    assert upload.authorization.startswith("SharedKey penguins:")
    assert key not in upload.authorization


def test_google_cloud_is_asked_to_keep_the_artifact(
    new_project: Callable[..., Project], cloud: Cloud
) -> None:
    run_id = run_with(
        new_project(),
        "gs://penguins/runs",
        {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{cloud.port}"},
    )

    upload = cloud.upload_of(b"measured by hand")
    assert upload.line.startswith("POST /upload/storage/v1/b/penguins/o?")
    assert f"runs/{run_id}/artifacts/note.txt".encode() in upload.body
