"""Time predictions in a process of a variant; run in its project, with its environment's Python.

`python calls.py ANSWER` calls the nodes' functions, `python calls.py ANSWER MODEL_URI` a model.
ANSWER is the file to write to: what each kind of call predicted, and the seconds it takes.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import timeit
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from kedro.io import DataCatalog


def main(answer: str, model_uri: str | None = None) -> None:
    """Call, time, and write the answer."""
    catalog = DataCatalog.from_config(yaml.safe_load(Path("conf/base/catalog.yml").read_text()))
    rows = catalog.load("rows")
    calls = _calls_of_model(model_uri, rows) if model_uri else _calls_of_functions(catalog, rows)
    # The first call is not timed.
    predicted = {name: call().tolist() for name, call in calls.items()}
    seconds = {name: _seconds(call) for name, call in calls.items()}
    if "python model" in calls:
        logging.disable()
        seconds["python model, no logging"] = _seconds(calls["python model"])
    content = {"predicted": predicted, "seconds": seconds}
    Path(answer).write_text(json.dumps(content), encoding="utf-8")


def _calls_of_model(uri: str, rows: Any) -> dict[str, Callable[[], Any]]:
    import mlflow.pyfunc  # only here: who calls the functions needs no MLflow

    model = mlflow.pyfunc.load_model(uri)
    python_model = model.unwrap_python_model()
    return {
        "python model": lambda: python_model.predict(None, rows),
        "pyfunc": lambda: model.predict(rows),
    }


def _calls_of_functions(catalog: DataCatalog, rows: Any) -> dict[str, Callable[[], Any]]:
    parameters = yaml.safe_load(Path("conf/base/parameters.yml").read_text())
    catalog["parameters"] = parameters
    for name, value in parameters.items():
        catalog[f"params:{name}"] = value
    nodes = import_module("measured.pipelines.first.pipeline").create_inference().nodes
    # Each function's first input is the output of the one before.
    steps = [(node.func, [catalog.load(name) for name in node.inputs[1:]]) for node in nodes]

    def call() -> Any:
        data = rows
        for function, others in steps:
            data = function(data, *others)
        return data

    return {"functions": call}


def _seconds(call: Callable[[], Any]) -> float:
    # timeit turns the garbage collection off; a service has it.
    number, seconds = timeit.Timer(call, gc.enable).autorange()
    return seconds / number


if __name__ == "__main__":
    main(*sys.argv[1:])
