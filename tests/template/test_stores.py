"""Each place for runs and files brings its library, its secrets and a word in the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from mlflow.store.artifact.artifact_repository_registry import (
    get_registered_artifact_repositories,
)
from mlflow.store.artifact.azure_blob_artifact_repo import AzureBlobArtifactRepository
from mlflow.store.artifact.azure_data_lake_artifact_repo import _parse_abfss_uri
from packaging.requirements import Requirement

from ..conftest import Generate
from .conftest import read_toml

S3 = "s3://runs/penguins"
GCS = "gs://runs/penguins"
BLOB = "wasbs://runs@account.blob.core.windows.net/penguins"
DATA_LAKE = "abfss://runs@account.dfs.core.windows.net/penguins"


class Case(NamedTuple):
    answers: dict[str, object]
    installed: set[str]
    entry: str | None


CASES = {
    "sqlite": Case({}, set(), None),
    "server": Case({"tracking_backend": "server"}, set(), "server_with_password"),
    "databricks": Case({"tracking_backend": "databricks"}, {"mlflow[databricks]"}, "databricks"),
    "s3": Case({"artifact_store": "s3", "artifact_location": S3}, {"boto3"}, "files_on_s3"),
    "gcs": Case(
        {"artifact_store": "gcs", "artifact_location": GCS},
        {"google-cloud-storage"},
        "files_on_gcs",
    ),
    "blob": Case(
        {"artifact_store": "azure", "artifact_location": BLOB},
        {"azure-identity", "azure-storage-blob"},
        "files_on_azure",
    ),
    "data lake": Case(
        {"artifact_store": "azure", "artifact_location": DATA_LAKE},
        {"azure-identity", "azure-storage-file-datalake"},
        "files_on_azure_data_lake",
    ),
    "s3 beside a server": Case(
        {"tracking_backend": "server", "artifact_store": "s3"}, {"boto3"}, "files_on_s3"
    ),
}


class Project(NamedTuple):
    folder: Path
    case: Case


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def project(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("stores") / "penguins"
    return Project(generate(folder, **case.answers), case)


def without_marks(stub: str) -> dict[str, Any]:
    """Read the stub of credentials.yml with the marks taken off every entry."""
    _, _, entries = stub.partition("\n\n")
    found: dict[str, Any] = yaml.safe_load(re.sub(r"^# ", "", entries, flags=re.MULTILINE))
    return found


def test_the_libraries_of_the_store_are_installed_and_no_others(project: Project) -> None:
    metadata = read_toml(project.folder / "pyproject.toml")["project"]

    named = {
        requirement.name + (f"[{','.join(requirement.extras)}]" if requirement.extras else "")
        for requirement in map(Requirement, metadata["dependencies"])
    }

    always = {"kedro", "mlflow", "scikit-learn"}
    assert {name for name in named if not name.startswith("kedro-datasets")} - always == (
        project.case.installed
    )


def test_the_readme_names_the_entry_of_credentials_yml_to_fill_in(project: Project) -> None:
    readme = (project.folder / "README.md").read_text("utf-8")
    stub = (project.folder / "conf/local/credentials.yml").read_text("utf-8")

    named = re.findall(r"^  credentials: (\w+)$", readme, flags=re.MULTILINE)

    assert named == ([project.case.entry] if project.case.entry else [])
    assert set(named) <= without_marks(stub).keys()
    # Until it is filled in there is nothing to read.
    assert yaml.safe_load(stub) is None


def test_every_entry_of_the_stub_holds_environment_variables(project: Project) -> None:
    stub = (project.folder / "conf/local/credentials.yml").read_text("utf-8")

    for entry in without_marks(stub).values():
        assert entry
        for name, value in entry.items():
            assert re.fullmatch("[A-Z0-9_]+", name)
            assert isinstance(value, str)


def test_the_readme_says_where_runs_and_files_are(project: Project) -> None:
    config = yaml.safe_load((project.folder / "conf/base/mlflow.yml").read_text("utf-8"))
    readme = (project.folder / "README.md").read_text("utf-8")
    (sentence,) = re.findall(r"^Every run is tracked .*", readme, flags=re.MULTILINE)

    experiment = config["tracking"]["experiment"]
    uri = config["server"]["mlflow_tracking_uri"]
    place = {None: "`mlflow.db`", "databricks": f"`{experiment['name']}`"}.get(uri, uri)
    assert place in sentence
    assert (experiment["create_experiment_kwargs"]["artifact_location"] or "") in sentence


@pytest.mark.parametrize(
    "location",
    [
        "s3://runs",
        "s3://runs.of.penguins/a/b/",
        "gs://runs",
        "gs://runs_of_penguins/2026",
        "wasbs://runs@account.blob.core.windows.net",
        "wasbs://$web@account.blob.core.chinacloudapi.cn/a/b",
        "wasbs://runs@account.blob.core.usgovcloudapi.net/a",
        "abfss://runs@account.dfs.core.windows.net/a/b",
        "abfss://runs@account.dfs.fabric.microsoft.com/a",
    ],
)
def test_mlflow_has_a_store_for_each_location_that_is_taken(
    generate: Generate, tmp_path: Path, location: str
) -> None:
    scheme = location.split(":")[0]
    store = {"s3": "s3", "gs": "gcs"}.get(scheme, "azure")
    project = generate(
        tmp_path / "penguins", artifact_store=store, artifact_location=location, example=False
    )

    config = yaml.safe_load((project / "conf/base/mlflow.yml").read_text("utf-8"))

    written = config["tracking"]["experiment"]["create_experiment_kwargs"]["artifact_location"]
    assert written == location
    assert scheme in get_registered_artifact_repositories()
    if scheme == "wasbs":
        assert AzureBlobArtifactRepository.parse_wasbs_uri(location)[1] == "account"
    if scheme == "abfss":
        assert _parse_abfss_uri(location)[1] == "account"


def test_models_on_databricks_are_in_the_schema_and_found_by_an_alias(
    generate: Generate, tmp_path: Path
) -> None:
    project = generate(
        tmp_path / "penguins",
        tracking_backend="databricks",
        unity_catalog_schema="main.birds",
        extras=["serving"],
    )

    catalog = yaml.safe_load((project / "conf/base/catalog.yml").read_text("utf-8"))
    service = (project / "src/penguins/pipelines/service/pipeline.py").read_text("utf-8")

    saved, loaded = catalog["classifier"]["save_args"], catalog["registered_classifier"]
    assert saved["registered_model_name"] == "main.birds.penguins-classifier"
    assert loaded["model_name"] == saved["registered_model_name"]
    assert loaded["alias"] == saved["registered_model_alias"]
    assert 'SCHEMA = "main.birds"' in service
    assert 'f"{SCHEMA}.penguins-service"' in service
