"""The files of the template that are made from the models: `python -m` this writes them."""

from __future__ import annotations

import json
from pathlib import Path

from runtime.config.keys import commented_yaml, json_schema

TEMPLATE = Path(__file__).parents[2] / "template"
SCHEMA = "src/{{ package_name }}/runtime/mlflow.schema.json"


def files() -> dict[Path, str]:
    """Give what the files have to hold."""
    answers = {
        "server.mlflow_tracking_uri": (
            "{{ {'sqlite': 'null', 'server': tracking_uri, 'databricks': 'databricks'}"
            "[tracking_backend] }}"
        ),
        "server.mlflow_registry_uri": (
            "{{ 'databricks-uc' if tracking_backend == 'databricks' else 'null' }}"
        ),
        # On Databricks an experiment is found in the workspace, by its whole path.
        "tracking.experiment.name": (
            "\"{{ '/Shared/' if tracking_backend == 'databricks' }}{{ package_name }}\""
        ),
        "tracking.experiment.create_experiment_kwargs.artifact_location": (
            "{{ 'null' if tracking_backend == 'databricks' or artifact_store == 'local' "
            "else artifact_location | to_json }}"
        ),
    }
    return {
        TEMPLATE / "conf/base/mlflow.yml.jinja": commented_yaml(answers, f"../../{SCHEMA}"),
        TEMPLATE / SCHEMA: json.dumps(json_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
