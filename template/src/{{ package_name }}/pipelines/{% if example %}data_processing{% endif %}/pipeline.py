"""The data processing pipeline."""

from kedro.pipeline import Node, Pipeline

from .nodes import clean, split


def create_pipeline() -> Pipeline:
    """Make the pipeline."""
    return Pipeline(
        [
            Node(clean, "penguins_raw", "penguins", name="clean"),
            Node(
                split,
                ["penguins", "params:split.test_size", "params:random_state"],
                ["train_set", "test_set"],
                name="split",
            ),
        ]
    )
