"""Run commands in alternation, time them as whole processes and count their requests."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient

from tests.support.servers import CountingProxy

from .cases import VARIANTS, Case, Command, Store, Variant
from .projects import Project


@dataclass(frozen=True)
class Sample:
    """One process, from its start to its end; requests are counted on HTTP only."""

    seconds: float
    requests: int | None


@dataclass(frozen=True)
class Measured:
    """What came out for a case or a command; a variant that failed has no figures."""

    what: Case | Command
    store: Store
    samples: Mapping[Variant, Sequence[Sample]]
    failures: Mapping[Variant, str]
    imports_mlflow: frozenset[Variant] = frozenset()

    def seconds(self, variant: Variant) -> float | None:
        """Give the median wall time."""
        if variant in self.failures:
            return None
        return statistics.median(sample.seconds for sample in self.samples[variant])

    def requests(self, variant: Variant) -> int | None:
        """Give the highest number of requests that one process made."""
        counts = [s.requests for s in self.samples.get(variant, ()) if s.requests is not None]
        return max(counts) if counts and variant not in self.failures else None

    def ratio(self, variant: Variant) -> float | None:
        """Tell how many times as long as plain Kedro it takes."""
        plain, other = self.seconds("plain"), self.seconds(variant)
        return other / plain if plain and other else None

    def overhead_ratio(self) -> float | None:
        """Tell what part of the peer's time over plain Kedro the runtime takes."""
        plain, peer, ours = (self.seconds(variant) for variant in VARIANTS)
        if plain is None or peer is None or ours is None or peer <= plain:
            return None
        return (ours - plain) / (peer - plain)

    def complaints(self) -> list[str]:
        """Name what must not be: failures, and the runtime's requests above their limit."""
        where = f"{self.what.name} ({self.store})"
        said = [f"{where}: {variant} failed: {why}" for variant, why in self.failures.items()]
        count = self.requests("ours")
        if count is not None and count > self.what.limit:
            said.append(f"{where}: {count} requests, at most {self.what.limit} are allowed")
        if isinstance(self.what, Command) and "ours" in self.imports_mlflow:
            said.append(f"{where}: imports MLflow")
        return said


def measure(
    what: Case | Command,
    projects: Mapping[Variant, Project],
    repetitions: int,
    proxy: CountingProxy | None = None,
) -> Measured:
    """Measure `kedro run`, or a command, and look into what it did."""
    words = ("run",) if isinstance(what, Case) else what.words
    samples, failures = _alternate(words, projects, repetitions, proxy)
    imports: set[Variant] = set()
    for variant, project in projects.items():
        if variant in failures:
            continue
        if isinstance(what, Case):
            if variant != "plain" and (lack := _lack(project, what)):
                failures[variant] = lack
        elif _imports_mlflow(project, words):
            imports.add(variant)
    return Measured(what, "http" if proxy else "sqlite", samples, failures, frozenset(imports))


def _alternate(
    words: Sequence[str],
    projects: Mapping[Variant, Project],
    repetitions: int,
    proxy: CountingProxy | None,
) -> tuple[dict[Variant, list[Sample]], dict[Variant, str]]:
    """Take samples in turn, so that a slow minute of the machine slows every variant.

    A first one is thrown away: it compiles bytecode and makes the store and the experiment.
    """
    samples: dict[Variant, list[Sample]] = {variant: [] for variant in VARIANTS}
    failures: dict[Variant, str] = {}
    for repetition in range(repetitions + 1):
        for variant in VARIANTS:
            if variant in failures:
                continue
            if proxy:
                proxy.requests.clear()
            start = time.perf_counter()
            ended = projects[variant].kedro(*words)
            seconds = time.perf_counter() - start
            if ended.returncode:
                failures[variant] = f"exit status {ended.returncode}\n{ended.stdout}{ended.stderr}"
            elif repetition:
                count = len(proxy.requests) if proxy else None
                samples[variant].append(Sample(seconds, count))
    return samples, failures


def _imports_mlflow(project: Project, words: Sequence[str]) -> bool:
    profile = project.kedro(*words, PYTHONPROFILEIMPORTTIME="1").stderr
    return re.search(r"\| +mlflow$", profile, re.MULTILINE) is not None


def _lack(project: Project, case: Case) -> str:
    """Tell what the last run lacks: one that tracks too little is not fast."""
    client = MlflowClient(project.tracking_uri)
    experiment = client.get_experiment_by_name(project.experiment)
    runs = client.search_runs([experiment.experiment_id], max_results=1) if experiment else []
    if not runs:
        return "no run was tracked"
    run = runs[0]
    history = client.get_metric_history(run.info.run_id, "history") if case.steps else []
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    expected = {
        "status": "FINISHED",
        "parameters": case.nodes * case.parameters + case.leaves,
        "metrics": case.metrics + bool(case.steps),
        "steps": case.steps,
        "artifacts": case.artifacts,
    }
    found = {
        "status": run.info.status,
        "parameters": len(run.data.params),
        "metrics": len(run.data.metrics),
        "steps": len(history),
        "artifacts": len([file for file in files if file.startswith("artifact_")]),
    }
    return "" if found == expected else f"tracked {found} instead of {expected}"
