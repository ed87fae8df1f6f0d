"""Train models in projects, load them in processes of their own, and time their predictions."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient

from .cases import VARIANTS, Prediction, Variant
from .environments import process_variables
from .projects import Project

Call = Literal["functions", "python model", "python model, no logging", "pyfunc"]

# Of a model, as the table shows them.
CALLS: tuple[Call, ...] = ("python model", "python model, no logging", "pyfunc")

SCRIPT = Path(__file__).with_name("calls.py")
ANSWER = "calls.json"


@dataclass(frozen=True)
class Sample:
    """One process: what each kind of call predicted in it, and the seconds that one takes."""

    predicted: Mapping[Call, Any]
    seconds: Mapping[Call, float]


@dataclass(frozen=True)
class MeasuredPrediction:
    """What came out for a prediction; a variant that failed has no figures."""

    what: Prediction
    samples: Mapping[Variant, Sequence[Sample]]
    failures: Mapping[Variant, str]

    def direct(self) -> float | None:
        """Give the median seconds of calling the nodes' functions directly."""
        return self._seconds("plain", "functions")

    def overhead(self, variant: Variant, call: Call) -> float | None:
        """Give the median seconds of a call above those of calling the functions directly."""
        direct, seconds = self.direct(), self._seconds(variant, call)
        return None if direct is None or seconds is None else seconds - direct

    def overhead_ratio(self, call: Call) -> float | None:
        """Tell what part of the peer's time above direct calls the runtime takes."""
        peer, ours = self.overhead("peer", call), self.overhead("ours", call)
        return ours / peer if ours is not None and peer is not None and peer > 0 else None

    def complaints(self) -> list[str]:
        """Name what failed."""
        return [f"{self.what.name}: {who} failed: {why}" for who, why in self.failures.items()]

    def _seconds(self, variant: Variant, call: Call) -> float | None:
        if variant in self.failures:
            return None
        return statistics.median(sample.seconds[call] for sample in self.samples[variant])


def measure_prediction(
    what: Prediction, projects: Mapping[Variant, Project], repetitions: int
) -> MeasuredPrediction:
    """Train with `kedro run`, then time calls in as many processes as there are repetitions."""
    samples: dict[Variant, list[Sample]] = {variant: [] for variant in VARIANTS}
    failures: dict[Variant, str] = {}
    models: dict[Variant, list[str]] = {}
    for variant, project in projects.items():
        ended = project.kedro("run", "--pipeline=first")
        models[variant] = _models(project) if variant != "plain" else []
        if ended.returncode:
            failures[variant] = f"exit status {ended.returncode}\n{ended.stdout}{ended.stderr}"
        elif variant != "plain" and len(models[variant]) != 1:
            failures[variant] = f"logged {len(models[variant])} models instead of one"
    # In turn, so that a slow minute of the machine slows every variant.
    for _ in range(repetitions):
        for variant in VARIANTS:
            if variant in failures:
                continue
            status, told = _call(projects[variant], models[variant])
            if status:
                failures[variant] = f"exit status {status}\n{told}"
            else:
                samples[variant].append(_answer(projects[variant]))
                if lack := _lack(samples[variant][-1], samples["plain"]):
                    failures[variant] = lack
    return MeasuredPrediction(what, samples, failures)


def _models(project: Project) -> list[str]:
    """List the URIs of the models that were logged."""
    client = MlflowClient(project.tracking_uri)
    experiment = client.get_experiment_by_name(project.experiment)
    if experiment is None:
        return []
    models = client.search_logged_models([experiment.experiment_id])
    return [f"models:/{model.model_id}" for model in models]


def _call(project: Project, words: Sequence[str]) -> tuple[int, str]:
    """Call in a process that logs as its libraries do, to a file; gives its status and the log."""
    log = project.path / "calls.log"
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            [str(project.environment / "bin" / "python"), str(SCRIPT), ANSWER, *words],
            cwd=project.path,
            env={
                **process_variables(),
                "PYTHONPATH": str(project.path / "src"),
                "MLFLOW_TRACKING_URI": project.tracking_uri,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return ended.returncode, log.read_text(encoding="utf-8")


def _answer(project: Project) -> Sample:
    return Sample(**json.loads((project.path / ANSWER).read_text(encoding="utf-8")))


def _lack(sample: Sample, direct: Sequence[Sample]) -> str:
    """Tell what is wrong with a prediction: one that isn't right is not fast."""
    expected = direct[0].predicted["functions"] if direct else None
    wrong = [name for name, value in sample.predicted.items() if direct and value != expected]
    return f"predicted another value than the functions: {', '.join(wrong)}" if wrong else ""
