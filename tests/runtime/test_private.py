"""What the runtime uses of MLflow and Kedro that isn't public is there, and does what it should."""

from __future__ import annotations

import inspect

import pytest

from runtime import _mlflow


def test_default_experiment_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import fluent

    assert hasattr(fluent, "_get_experiment_id"), (
        "MLflow has no `fluent._get_experiment_id` any more: see `_mlflow.default_experiment_id`."
    )
    assert not inspect.signature(fluent._get_experiment_id).parameters
    monkeypatch.setattr(fluent, "_active_experiment_id", "7")
    assert _mlflow.default_experiment_id() == "7"
