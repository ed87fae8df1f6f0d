"""Parameters become what MLflow can store, and none is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param_name

from runtime import params
from runtime.config import MlflowConfig

SECRETS = MlflowConfig().tracking.redact


def test_only_parameters_are_selected_and_lose_their_prefix() -> None:
    inputs = {"params:a.b": 1, "parameters": {"a": {"b": 1}}, "penguins": "a table"}

    assert params.select(inputs) == {"a.b": 1, "parameters": {"a": {"b": 1}}}


@pytest.mark.parametrize(
    ("recursive", "flat"),
    [
        (True, {"a.b": 1, "a.c.d": 2, "a.c.e": {}, "f": [3]}),
        (False, {"a.b": 1, "a.c": {"d": 2, "e": {}}, "f": [3]}),
    ],
)
def test_dictionaries_are_flattened_to_the_depth_asked_for(
    recursive: bool, flat: dict[str, Any]
) -> None:
    nested = {"a": {"b": 1, "c": {"d": 2, "e": {}}}, "f": [3]}

    assert params.flatten(nested, recursive=recursive, sep=".") == flat


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.integers()))
def test_renaming_loses_no_parameter_and_mlflow_takes_every_name(given: dict[str, int]) -> None:
    renamed = params.rename(given)

    assert sorted(renamed.values()) == sorted(given.values())
    for name in renamed:
        assert params._REFUSED.search(name) is None


def test_names_that_become_equal_stay_apart() -> None:
    renamed = params.rename({"a.d$e": 1, "a.d%e": 2, "a.d_e": 3})

    assert renamed == {"a.d_e": 3, "a.d_e_2": 1, "a.d_e_3": 2}
    for name in renamed:
        _validate_param_name(name)


def test_values_with_the_name_of_a_secret_are_starred_wherever_they_stand() -> None:
    given = {
        "api_token": "t0p",
        "db": {"user": "ada", "Password": "t0p"},
        "aws": {"credentials": {"id": "t0p"}},
        "hosts": [{"secret_key": "t0p"}],
        "max_tokens": 5,
    }

    shown = params.redact(given, SECRETS)

    assert "t0p" not in str(shown)
    assert shown["db"]["user"] == "ada"
    assert shown["max_tokens"] == 5


def test_a_parameter_below_a_secret_name_is_starred() -> None:
    assert params.redact("t0p", SECRETS, "aws.credentials.id") == "***"


@pytest.mark.parametrize(
    ("strategy", "logged", "tags"),
    [
        ("truncate", {"short": "ab", "long": "abc"}, {}),
        ("tag", {"short": "ab"}, {"long": "abcdef"}),
    ],
)
def test_long_values_are_cut_or_become_tags(
    strategy: str, logged: dict[str, str], tags: dict[str, str]
) -> None:
    given = {"short": "ab", "long": "abcdef"}

    assert params.split_long(given, limit=3, strategy=strategy) == (logged, tags)


def test_long_values_fail_with_name_and_length() -> None:
    with pytest.raises(ValueError, match=r"3 characters .* 'long' \(6\)"):
        params.split_long({"long": "abcdef"}, limit=3, strategy="fail")
