"""A wrong answer gets one sentence, and nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import copier
import pytest
from copier.errors import CopierError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..conftest import Generate
from .conftest import read_toml

QUESTION = "package_name"

KEYWORDS = "class import lambda async await with match case type".split()

# Some are gone from, or new in, one of Python 3.10 to 3.14.
STANDARD_LIBRARY = """
json logging string test types site asynchat asyncore binhex cgi crypt distutils imp lib2to3
pipes smtpd telnetlib tomllib annotationlib compression
""".split()

INSTALLED = """
kedro kedro_datasets mlflow pandas numpy sklearn scipy matplotlib pydantic click rich omegaconf
yaml pytest ruff google docker flask fastapi sqlalchemy azure boto3 botocore databricks jwt tqdm
""".split()

# In the project, so a package of that name would be taken for it.
FOLDERS = "conf data notebooks src tests runtime".split()

IGNORED_BY_GIT = "build dist sessions mlruns mlartifacts".split()

REFUSED_BY_WINDOWS = "con prn aux nul com1 lpt9".split()

MISSHAPEN = [
    "",
    " ",
    "Penguins",
    "penguinStudy",
    "penguin-study",
    "penguin.study",
    "penguin study",
    " penguins",
    "penguins\n",
    "2penguins",
    "_penguins",
    # The distribution is called like the package, and its name can't end with a dash.
    "penguins_",
    "_",
    "__init__",
    "pingüinos",
    "ペンギン",
    "penguins/study",
    "../penguins",
    'penguins"',
]

TAKEN = (
    '"{}" is the name of something that the project installs or contains: '
    "choose another package name."
)
WANTED = (
    '"{}" is the name of a package that the project could then not install: '
    "choose another package name."
)
ADDRESS = "starts with http:// or https://"
EMAIL = "An e-mail address looks like name@example.org"
ONE_LINE = "is one line of text"
SCHEMA = "A schema of Unity Catalog is given as catalog.schema."
S3 = "A place on S3 is given as s3://bucket/folder."
GCS = "A place on Google Cloud Storage is given as gs://bucket/folder."
AZURE = "A place on Azure is given as wasbs://container@account.blob.core.windows.net/folder"

# Under which other answers a question is asked.
ASKED_WITH: dict[str, dict[str, object]] = {
    "tracking_uri": {"tracking_backend": "server"},
    "unity_catalog_schema": {"tracking_backend": "databricks"},
}

# By the answer to `artifact_store`.
WRONG_LOCATIONS = {
    "s3": [
        "",
        "bucket/folder",
        "s3://",
        "s3:///folder",
        "S3://bucket",
        "gs://bucket",
        "https://s3.example.org/bucket",
        "/data/runs",
        "s3://bucket/my folder",
        "s3://bucket/folder\n",
        's3://bucket/"',
        "s3://bucket/\\",
        # They would be committed.
        "s3://key:secret@bucket/folder",
        "s3://bucket/folder?X-Amz-Signature=secret",
    ],
    "gcs": ["", "gs://", "gcs://bucket", "s3://bucket", "gs://bucket folder", "gs://a:b@bucket"],
    "azure": [
        "",
        "wasbs://",
        "wasbs://container",
        "wasbs://container@account",
        "wasbs://container@account.example.org/folder",
        "wasb://container@account.blob.core.windows.net",
        "abfss://container@account/folder",
        "abfss://account.dfs.core.windows.net/folder",
        "https://account.blob.core.windows.net/container",
        "wasbs://container:key@account.blob.core.windows.net/folder",
        "abfss://container@account.dfs.core.windows.net/folder?sig=secret",
    ],
}
LOCATION = {"s3": S3, "gcs": GCS, "azure": AZURE}

WRONG: list[tuple[str, object, str]] = [
    *(("package_name", name, f'"{name}" is a keyword of Python') for name in KEYWORDS),
    *(
        ("package_name", name, f'"{name}" is a module of Python\'s standard library')
        for name in STANDARD_LIBRARY
    ),
    *(
        ("package_name", name, f'"{name}" is the name of something')
        for name in INSTALLED + FOLDERS + IGNORED_BY_GIT
    ),
    *(("package_name", name, f'"{name}"') for name in REFUSED_BY_WINDOWS),
    *(("package_name", name, json.dumps(name, ensure_ascii=False)) for name in MISSHAPEN),
    # Longer than a file's name may be.
    ("package_name", "p" * 256, "A package name has at most"),
    ("project_name", "", "The project needs a name"),
    ("project_name", "   ", "The project needs a name"),
    ("project_name", "\n", "The project needs a name"),
    ("project_name", "two\nlines", ONE_LINE),
    ("project_name", "a\ttab", ONE_LINE),
    # Line ends for YAML and for Python, though not for an editor.
    ("project_name", "two\x85lines", ONE_LINE),
    ("project_name", "two\u2028lines", ONE_LINE),
    ("description", "two\nlines", ONE_LINE),
    ("description", "two\x85lines", ONE_LINE),
    ("author_name", "two\nlines", ONE_LINE),
    ("author_email", "ada", EMAIL),
    ("author_email", "ada@", EMAIL),
    ("author_email", "@example.org", EMAIL),
    ("author_email", "ada@example@org", EMAIL),
    ("author_email", "ada lovelace@example.org", EMAIL),
    ("author_email", "Ada <ada@example.org>", EMAIL),
    ("author_email", '"ada"@example.org', EMAIL),
    ("author_email", "ada@example.org\n", EMAIL),
    ("tracking_uri", "", ADDRESS),
    ("tracking_uri", "mlflow.example.org", ADDRESS),
    ("tracking_uri", "ftp://mlflow.example.org", ADDRESS),
    ("tracking_uri", "sqlite:///mlflow.db", ADDRESS),
    ("tracking_uri", "http://", ADDRESS),
    ("tracking_uri", "http://mlflow example.org", ADDRESS),
    ("tracking_uri", 'http://mlflow.example.org/"', ADDRESS),
    ("tracking_uri", "http://mlflow.example.org\n", ADDRESS),
    ("tracking_uri", "http://mlflow.example.org:", ADDRESS),
    # It would be committed: credentials have a file that git ignores.
    ("tracking_uri", "http://ada:secret@mlflow.example.org", "leave user and password out"),
    ("licence", "GPL-3.0", "'GPL-3.0' is not in ['Apache-2.0', 'MIT', 'BSD-3-Clause', 'none']"),
    ("licence", "mit", "'mit' is not in ['Apache-2.0', 'MIT', 'BSD-3-Clause', 'none']"),
    ("licence", "", "'' is not in ['Apache-2.0', 'MIT', 'BSD-3-Clause', 'none']"),
    ("tracking_backend", "postgres", "'postgres' is not in ['sqlite', 'server'"),
    ("tracking_backend", "", "'' is not in ['sqlite', 'server'"),
    ("example", "maybe", "'maybe'"),
    ("unity_catalog_schema", "", SCHEMA),
    ("unity_catalog_schema", "models", SCHEMA),
    ("unity_catalog_schema", "main.models.penguins", SCHEMA),
    ("unity_catalog_schema", "main.my models", SCHEMA),
    ("unity_catalog_schema", "main.", SCHEMA),
    ("unity_catalog_schema", 'main.models"', SCHEMA),
    ("unity_catalog_schema", "main.models\n", SCHEMA),
    ("unity_catalog_schema", "c" * 40 + "." + "s" * 40, "at most 80 characters"),
    ("artifact_store", "minio", "'minio' is not in ['local', 's3', 'gcs', 'azure']"),
    ("artifact_store", "", "'' is not in ['local', 's3', 'gcs', 'azure']"),
    ("docker", "maybe", "'maybe'"),
    ("ci", "jenkins", "'jenkins' is not in ['github', 'gitlab', 'none']"),
    ("ci", "", "'' is not in ['github', 'gitlab', 'none']"),
    ("scale_out", "ray", "'ray' is not in ['none', 'dask']"),
    ("scale_out", "", "'' is not in ['none', 'dask']"),
]


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    WRONG,
    ids=[f"{question}={str(answer)[:30]!a}" for question, answer, _ in WRONG],
)
def test_a_wrong_answer_gets_one_sentence_and_nothing_is_written(
    generate: Generate, tmp_path: Path, question: str, answer: object, wrong: str
) -> None:
    with pytest.raises((ValueError, CopierError)) as refused:
        generate(tmp_path / "project", **{question: answer}, **ASKED_WITH.get(question, {}))

    (line,) = str(refused.value).splitlines()
    assert question in line
    assert wrong in line
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("store", "location"),
    [(store, location) for store, locations in WRONG_LOCATIONS.items() for location in locations],
)
def test_a_location_that_the_store_has_not_gets_one_sentence_and_nothing_is_written(
    generate: Generate, tmp_path: Path, store: str, location: str
) -> None:
    with pytest.raises(ValueError, match="artifact_location") as refused:
        generate(tmp_path / "project", artifact_store=store, artifact_location=location)

    (line,) = str(refused.value).splitlines()
    assert LOCATION[store] in line
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        (
            "package_name",
            "class",
            '"class" is a keyword of Python: choose another package name.',
        ),
        (
            "package_name",
            "kedro",
            TAKEN.format("kedro"),
        ),
        (
            "package_name",
            "xgboost",
            WANTED.format("xgboost"),
        ),
        ("project_name", "", "The project needs a name."),
        (
            "author_email",
            "ada",
            "An e-mail address looks like name@example.org; it may also stay empty.",
        ),
        (
            "licence",
            "GPL-3.0",
            "'GPL-3.0' is not in ['Apache-2.0', 'MIT', 'BSD-3-Clause', 'none']",
        ),
    ],
)
def test_the_command_line_ends_with_the_sentence_and_status_1(
    template: Path, tmp_path: Path, question: str, answer: str, sentence: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "copier", "copy", "--defaults"),
            *("--data", f"{question}={answer}", str(template), "project"),
        ],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"'{question}': {sentence}")
    assert not (tmp_path / "project").exists()


@pytest.fixture(scope="module")
def validate(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What is said of a package's name: alone, since a copy for each would take too long."""
    folder = tmp_path_factory.mktemp("wrong_answers") / "project"
    worker = copier.run_copy(str(template), folder, defaults=True, quiet=True, pretend=True)
    validator = worker.jinja_env.from_string(worker.template.questions_data[QUESTION]["validator"])

    def validate(name: str) -> str:
        return validator.render({QUESTION: name, "last_answers": {}})

    return validate


def test_a_good_package_name_is_not_refused(validate: Callable[[str], str]) -> None:
    good = "penguins penguin_study p x2 my_project mlflow_study kedro2 classes jsons".split()

    assert {name: validate(name) for name in good} == dict.fromkeys(good, "")


@pytest.mark.parametrize("name", ["xgboost", "scikit_learn", "torch", "notebook"])
def test_no_package_that_a_project_may_want_is_a_package_name(
    validate: Callable[[str], str], name: str
) -> None:
    assert validate(name) == WANTED.format(name)


def test_no_module_of_this_python_is_a_package_name(validate: Callable[[str], str]) -> None:
    names = sorted(name for name in sys.stdlib_module_names if re.match("[a-z]", name))

    assert [name for name in names if not validate(name)] == []


def test_nothing_that_a_project_installs_is_a_package_name(
    generate: Generate, validate: Callable[[str], str], tmp_path: Path
) -> None:
    pyproject = read_toml(generate(tmp_path / "example", scale_out="dask") / "pyproject.toml")
    # What these require in their turn changes too often to be held here.
    installed = {
        canonicalize_name(Requirement(text).name)
        for text in pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["dev"]
    }
    modules = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if any(canonicalize_name(name) in installed for name in distributions)
        if re.fullmatch("[a-z][a-z0-9_]*", module)
    }

    assert {"kedro", "mlflow", "sklearn"} <= modules
    assert [name for name in sorted(modules) if not validate(name)] == []
