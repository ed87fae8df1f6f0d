"""Steps of the data processing."""

import pandas as pd
from sklearn.model_selection import train_test_split


def clean(raw: pd.DataFrame) -> pd.DataFrame:
    """Leave out the penguins that were not measured."""
    return raw.dropna(subset=["bill_length_mm"]).reset_index(drop=True)


def measure(penguins: pd.DataFrame, features: list[str]) -> pd.DataFrame:
    """Keep what the species is told by, which is all that a request for a prediction has."""
    return penguins[features]


def split(
    measurements: pd.DataFrame, penguins: pd.DataFrame, test_size: float, random_state: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Divide the penguins in two, with the same share of each species in both."""
    species = penguins["species"]
    train, test = train_test_split(
        measurements.assign(species=species),
        test_size=test_size,
        random_state=random_state,
        stratify=species,
    )
    return train, test
