"""The data processing pipeline."""

from kedro.pipeline import Node, Pipeline

from .nodes import clean, measure, split


def create_pipeline() -> Pipeline:
    """Make the pipeline."""
    return Pipeline(
        [
            Node(clean, "penguins_raw", "penguins", name="clean"),
            Node(measure, ["penguins", "params:features"], "measurements", name="measure"),
            Node(
                split,
                ["measurements", "penguins", "params:split.test_size", "params:random_state"],
                ["train_set", "test_set"],
                name="split",
            ),
        ]
    )
