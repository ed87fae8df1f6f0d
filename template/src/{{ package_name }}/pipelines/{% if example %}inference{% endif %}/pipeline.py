"""The inference pipeline."""

from kedro.pipeline import Node, Pipeline

from .nodes import predict


def create_pipeline() -> Pipeline:
    """Make the pipeline."""
    return Pipeline(
        [Node(predict, ["registered_classifier", "measurements"], "predictions", name="predict")]
    )
