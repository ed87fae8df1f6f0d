"""The training pipeline."""

from kedro.pipeline import Node, Pipeline

from .nodes import evaluate, learning_curve, train_classifier, tune


def create_pipeline() -> Pipeline:
    """Make the pipeline."""
    return Pipeline(
        [
            Node(
                tune,
                ["train_set", "params:tuning.strengths", "params:tuning.folds"],
                ["best_strength", "tuning"],
                name="tune",
            ),
            Node(train_classifier, ["train_set", "best_strength"], "classifier", name="train"),
            Node(
                learning_curve,
                [
                    "train_set",
                    "best_strength",
                    "params:learning_curve.shares",
                    "params:tuning.folds",
                    "params:random_state",
                ],
                "learning_curve",
                name="learning_curve",
            ),
            Node(
                evaluate,
                ["classifier", "test_set"],
                ["accuracy", "scores", "confusion_matrix"],
                name="evaluate",
            ),
        ]
    )
