"""The first pipeline."""

from kedro.pipeline import Node, Pipeline

from .nodes import first_step


def create_pipeline() -> Pipeline:
    """Make the pipeline."""
    return Pipeline([Node(first_step, "params:greeting", "message", name="first_step")])
