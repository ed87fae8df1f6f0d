"""What is a secret is hidden in values and texts, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from pydantic import BaseModel

from runtime.config import hiding
from runtime.config.keys import MlflowConfig
from runtime.config.uris import passwords_in, shown_uri

SECRETS = hiding.Secrets(tuple(MlflowConfig().tracking.redact))


def secrets_of(
    credentials: dict[str, Any] | None = None,
    parameters: dict[str, Any] | None = None,
    words: tuple[str, ...] = (),
    server: dict[str, Any] | None = None,
) -> hiding.Secrets:
    """Return the secrets of a project with these credentials, parameters and names."""
    context: Any = SimpleNamespace(
        mlflow=MlflowConfig.model_validate({"server": server or {}}),
        config_loader={"credentials": credentials or {}},
        project_path=Path("/home/ada/penguins"),
    )
    return hiding.secrets_of(context, parameters, words)


def test_values_with_the_name_of_a_secret_are_starred_wherever_they_stand() -> None:
    given = {
        "api_token": "t0p",
        "db": {"user": "ada", "Password": "t0p"},
        "aws": {"credentials": {"id": "t0p"}},
        "hosts": [{"secret_key": "t0p"}],
        "max_tokens": 5,
    }

    shown = SECRETS.hide(given)

    assert "t0p" not in str(shown)
    assert shown["db"]["user"] == "ada"
    assert shown["max_tokens"] == 5
    assert SECRETS.hide("t0p", "aws.credentials.id") == "***"


def test_values_of_credentials_are_starred_wherever_they_stand() -> None:
    secrets = secrets_of({"s3": {"key": "AKIA0123"}, "db": {"password": "ab12"}})

    given = {"a": "AKIA0123", "b": ["ab12"], "c": "s3://AKIA0123@bucket", "d": {"e": "ab123"}}
    shown = {"a": "***", "b": ["***"], "c": "s3://***@bucket", "d": {"e": "ab123"}}
    assert secrets.hide(given) == shown
    assert "AKIA" not in repr(secrets)


class Login(BaseModel):
    password: str
    timeout: int = 3


@dataclass
class Api:
    endpoint: str
    login: Login
    others: list[Login] = field(default_factory=list)


def test_models_and_dataclasses_are_dictionaries_whose_secrets_are_starred() -> None:
    api = Api("http://example.org", Login(password="hunter2"), [Login(password="hunter3")])

    assert SECRETS.hide(hiding.plain({"api": api})) == {
        "api": {
            "endpoint": "http://example.org",
            "login": {"password": "***", "timeout": 3},
            "others": [{"password": "***", "timeout": 3}],
        }
    }


TRICKY = "pa\"ss'w\\o/rd&ü 1"


@pytest.mark.parametrize(
    "text",
    [
        TRICKY,
        f"ValueError: no way in with {TRICKY}",
        repr(f"with {TRICKY}"),
        json.dumps({"with": TRICKY}),
        json.dumps({"with": TRICKY}, ensure_ascii=False),
        quote(TRICKY),
        quote(TRICKY, safe=""),
        quote_plus(TRICKY),
    ],
)
@pytest.mark.parametrize("where", ["credentials", "parameters"])
def test_a_secret_is_hidden_in_every_form_in_which_texts_have_it(text: str, where: str) -> None:
    given: dict[str, Any] = {where: {"api": {"token": TRICKY}}}
    assert "rd" not in secrets_of(**given).hide_in(text)


def test_each_line_of_a_secret_and_a_binary_one_are_hidden() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQ==\n-----END KEY-----\n"
    secrets = secrets_of({"gcp": {"key": key, "binary": b"\x00\xffbinary\x01"}})

    for text in (key, repr(key), f"  > MIIEvQIBADANBg\n  > {b'kqhkiG9w0BAQ=='!r}"):
        assert "MIIE" not in secrets.hide_in(text)
        assert "kqhki" not in secrets.hide_in(text)
    assert secrets.hide_in(f"got {b'xx' + bytes([0, 255]) + b'binary' + bytes([1])!r}") == (
        "got b'xx***'"
    )


def test_a_number_with_the_name_of_a_secret_is_hidden_in_texts() -> None:
    secrets = secrets_of(parameters={"api": {"token": 90210123, "retries": 1000000}})

    assert secrets.hide_in("no way in with 90210123") == "no way in with ***"
    assert secrets.hide({"n": 1000000}) == {"n": 1000000}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://ada:pa/s#sw@host/db", "postgresql://***@host/db"),
        ("postgresql://ada:p@ss@host/db", "postgresql://***@host/db"),
        ("http://ada:t0p@host:5000", "http://***@host:5000"),
        ("mysql://host/db?user=ada&passwd=t0%2Fp&x=1", "mysql://host/db?user=ada&passwd=***&x=1"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dt0p", "mssql+pyodbc:///?odbc_connect=***"),
        ("Driver=x;UID=u;PWD={t;0p};Port=1", "Driver=x;UID=u;PWD=***;Port=1"),
        ("host=db password=t0p user=ada", "host=db password=*** user=ada"),
        ("https://host/blob?sv=1&sig=t0p", "https://host/blob?sv=1&sig=***"),
        ("http://host:5000/#/models/name@alias", "http://host:5000/#/models/name@alias"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("sqlite:////home/ada/mlflow.db", "sqlite:////home/ada/mlflow.db"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert shown_uri(uri) == shown
    assert shown_uri(f"can't open {uri} now") == f"can't open {shown} now"


@pytest.mark.parametrize(
    ("uri", "password"),
    [
        ("postgresql://ada:pa/s#sw@host/db", "pa/s#sw"),
        ("postgresql://ada:p%40ss@host/db", "p@ss"),
        ("mysql://host/db?passwd=t0%2Fp&x=1", "t0/p"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dt0p-1%3B", "t0p-1"),
    ],
)
def test_a_password_in_a_uri_is_hidden_where_it_stands_alone(uri: str, password: str) -> None:
    assert password in set(passwords_in(uri))
    for given in (
        {"credentials": {"db": {"con": uri}}},
        {"parameters": {"db": uri}},
        {"server": {"mlflow_tracking_uri": uri}},
        {"server": {"mlflow_registry_uri": uri}},
    ):
        assert secrets_of(**given).hide(password) == "***"


def test_users_places_numbers_and_words_of_the_project_are_shown() -> None:
    secrets = secrets_of(
        {
            "db": {"user": "mlflow", "password": "training", "connect_timeout": 1000},
            "s3": {"client_kwargs": {"region_name": "eu-central-1", "read_timeout": "0.01"}},
            "host": "db.example.org",
            "pin": {"password": "estimator", "token": "penguins"},
        },
        {"n_estimators": 1000, "rate": 0.01},
        words=("training", "evaluation"),
    )
    ordinary = {
        "n_estimators": 1000,
        "rate": 0.01,
        "pipeline_names": ["training"],
        "by": "mlflow at db.example.org in eu-central-1",
        "command": "kedro run --pipelines=training --params=n_estimators=1000,rate=0.01",
        "path": "/home/ada/penguins/src/nodes.py",
    }

    assert secrets.hide(ordinary) == ordinary
