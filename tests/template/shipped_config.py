"""The files of the template that are made from the models: `python -m` this writes them."""

from __future__ import annotations

import json
from pathlib import Path

from runtime.config import commented_yaml, json_schema

BASE = Path(__file__).parents[2] / "template" / "conf" / "base"


def files() -> dict[Path, str]:
    """Give what the files have to hold."""
    answers = {
        "server.mlflow_tracking_uri": (
            "{{ tracking_uri if tracking_backend == 'server' else 'null' }}"
        ),
        "tracking.experiment.name": '"{{ package_name }}"',
    }
    return {
        BASE / "mlflow.yml.jinja": commented_yaml(answers),
        BASE / "mlflow.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
