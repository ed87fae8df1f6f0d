"""What is measured: runs of a given size, commands that track nothing, and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["plain", "peer", "ours"]
Store = Literal["sqlite", "http"]

VARIANTS: tuple[Variant, ...] = ("plain", "peer", "ours")
STORES: tuple[Store, ...] = ("sqlite", "http")


@dataclass(frozen=True)
class Case:
    """A run of a given size.

    Args:
        name: As the tables show it.
        limit: Requests that the runtime may make.
        goal: What its overhead over plain Kedro should be of the peer's, at most.
        nodes: Nodes of the pipeline; the first one has all the outputs below.
        parameters: Parameters of each node.
        leaves: Values in a nested dictionary, logged one by one: a power of ten.
        metrics: Metric datasets.
        steps: Steps of one metric history.
        artifacts: Files of 1 MB.
    """

    name: str
    limit: int
    goal: float | None = None
    nodes: int = 1
    parameters: int = 0
    leaves: int = 0
    metrics: int = 0
    steps: int = 0
    artifacts: int = 0


@dataclass(frozen=True)
class Command:
    """A `kedro` command that tracks nothing."""

    words: tuple[str, ...]
    limit: int = 0
    goal: float = 1.05

    @property
    def name(self) -> str:
        """The command as it is typed."""
        return " ".join(("kedro", *self.words))


@dataclass(frozen=True)
class Prediction:
    """A prediction by a pipeline that is a model.

    Args:
        name: As the tables show it.
        nodes: Nodes of the inference pipeline, one after another.
        parameters: Parameters, as many of them for each node.
        artifact: What the last node gets from the training, of 10 MB: an array that is kept as a
            pickle, or a list that is kept as JSON.
    """

    name: str
    nodes: int
    parameters: int = 0
    artifact: Literal["array", "list"] | None = None


CASES = (
    Case("one node, no parameters", limit=4),
    Case("ten nodes, no parameters", limit=4, nodes=10),
    Case("ten nodes with 20 parameters each", limit=6, goal=0.5, nodes=10, parameters=20),
    Case("a dictionary with 1,000 leaves, flattened", limit=14, goal=0.2, leaves=1000),
    Case("50 metric datasets", limit=5, metrics=50),
    Case("one metric history of 1,000 steps", limit=5, goal=0.2, steps=1000),
    Case("20 artifacts of 1 MB", limit=25, artifacts=20),
)

COMMANDS = (
    Command(("--help",)),
    Command(("registry", "list")),
    Command(("catalog", "list-patterns")),
    Command(("catalog", "describe-datasets")),
)

PREDICTIONS = (
    Prediction("prediction by one node", nodes=1),
    Prediction("prediction by ten nodes", nodes=10),
    Prediction("prediction by ten nodes, with 20 parameters", nodes=10, parameters=20),
    Prediction("prediction by ten nodes, with an array of 10 MB", nodes=10, artifact="array"),
    Prediction("prediction by ten nodes, with a list of 10 MB", nodes=10, artifact="list"),
)

# The project in which the commands run: a middling one.
COMMANDS_CASE = CASES[2]
