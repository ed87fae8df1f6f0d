"""Parameters become what MLflow can store, and none is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param

from runtime.config.errors import ConfigError
from runtime.tracking import params


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

    assert dict(params.flatten(nested, recursive=recursive, sep=".")) == flat


names = st.text(max_size=10) | st.text("./_ a:", max_size=6) | st.text("ab/", min_size=245)


@given(st.lists(st.tuples(names, st.integers())))
def test_renaming_loses_no_parameter_and_mlflow_takes_every_name(
    given: list[tuple[str, int]],
) -> None:
    renamed = params.rename(given)

    assert sorted(renamed.values()) == sorted(value for _, value in given)
    for name in renamed:
        _validate_param(name, "value")


@pytest.mark.parametrize("name", ["a", "a.b", "a/b", "a b", "a:b-c_d", "ünï", "a..b", ".a"])
def test_a_name_that_mlflow_takes_stays(name: str) -> None:
    assert params.rename([(name, 1), (f"{name}%", 2)])[name] == 1


def test_names_that_become_equal_stay_apart() -> None:
    renamed = params.rename([("a.d$e", 1), ("a.d%e", 2), ("a.d_e", 3)])

    assert renamed == {"a.d_e": 3, "a.d_e_2": 1, "a.d_e_3": 2}


def test_entries_that_flattening_gives_the_same_name_are_all_kept() -> None:
    given: dict[Any, Any] = {"a": {"b.c": 1, "b": {"c": 2}}, 3: {4: "integer keys"}}

    flat = params.flatten(given, recursive=True, sep=".")

    assert params.rename(flat) == {"a.b.c": 1, "a.b.c_2": 2, "3.4": "integer keys"}


def test_long_names_that_begin_alike_stay_apart() -> None:
    renamed = params.rename([("a" * 300 + "b", 1), ("a" * 300 + "c", 2)])

    assert sorted(renamed.values()) == [1, 2]
    assert {len(name) for name in renamed} == {250}


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
    with pytest.raises(ConfigError, match=r"3 characters .* 'long' \(6\)"):
        params.split_long({"long": "abcdef"}, limit=3, strategy="fail")
