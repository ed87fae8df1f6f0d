"""Steps of the training."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from sklearn.model_selection import cross_val_score
from sklearn.model_selection import learning_curve as sklearn_learning_curve
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def _divide(table: pd.DataFrame) -> tuple[pd.DataFrame, "pd.Series[str]"]:
    return table.drop(columns="species"), table["species"]


def _classifier(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, max_iter=1000))


def tune(
    train: pd.DataFrame, strengths: list[float], folds: int
) -> tuple[float, dict[str, list[dict[str, float]]]]:
    """Find the strength of regularisation that does best; each one is a nested run."""
    import mlflow  # here, so that commands which run nothing stay fast

    measurements, species = _divide(train)
    means = {}
    for strength in strengths:
        with mlflow.start_run(run_name=f"strength {strength}", nested=True):
            mlflow.log_param("strength", strength)
            scores = cross_val_score(_classifier(strength), measurements, species, cv=folds)
            for fold, score in enumerate(scores):
                mlflow.log_metric("accuracy", float(score), step=fold)
            means[strength] = float(scores.mean())
    history = [{"step": step, "value": mean} for step, mean in enumerate(means.values())]
    return max(means, key=means.__getitem__), {"accuracy": history}


def train_classifier(train: pd.DataFrame, strength: float) -> Pipeline:
    """Fit the classifier on the whole training table."""
    return _classifier(strength).fit(*_divide(train))


def learning_curve(
    train: pd.DataFrame, strength: float, shares: list[float], folds: int, random_state: int
) -> dict[int, float]:
    """Measure how the accuracy grows with the number of penguins."""
    sizes, _, scores = sklearn_learning_curve(
        _classifier(strength),
        *_divide(train),
        train_sizes=shares,
        cv=folds,
        shuffle=True,
        random_state=random_state,
    )
    return {int(size): float(score.mean()) for size, score in zip(sizes, scores, strict=True)}


def evaluate(classifier: Pipeline, test: pd.DataFrame) -> tuple[float, dict[str, float], Figure]:
    """Compare predictions with the truth: accuracy, F1 score of each species, a figure."""
    measurements, truth = _divide(test)
    predicted = classifier.predict(measurements)
    scores: Any = f1_score(truth, predicted, average=None, labels=classifier.classes_)
    figure = Figure(figsize=(5, 4), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(truth, predicted, ax=figure.subplots(), colorbar=False)
    return (
        float(accuracy_score(truth, predicted)),
        {
            f"f1_{species}": float(f1)
            for species, f1 in zip(classifier.classes_, scores, strict=True)
        },
        figure,
    )
