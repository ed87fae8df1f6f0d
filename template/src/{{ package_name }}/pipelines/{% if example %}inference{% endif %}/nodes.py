"""Steps of the inference."""

import pandas as pd
from sklearn.pipeline import Pipeline


def predict(classifier: Pipeline, measurements: pd.DataFrame) -> pd.DataFrame:
    """Say of which species each penguin is."""
    return measurements.assign(predicted=classifier.predict(measurements))
