"""Steps of the inference."""

import pandas as pd
from sklearn.pipeline import Pipeline


def predict(classifier: Pipeline, penguins: pd.DataFrame) -> pd.DataFrame:
    """Say of which species each penguin is, by its measures."""
    return penguins.assign(predicted=classifier.predict(penguins[classifier.feature_names_in_]))
