"""Steps of the data processing."""

import pandas as pd
from sklearn.model_selection import train_test_split


def clean(raw: pd.DataFrame) -> pd.DataFrame:
    """Leave out the penguins that were not measured."""
    return raw.dropna(subset=["bill_length_mm"]).reset_index(drop=True)


def split(
    penguins: pd.DataFrame, test_size: float, random_state: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Divide the penguins in two, with the same share of each species in both."""
    train, test = train_test_split(
        penguins, test_size=test_size, random_state=random_state, stratify=penguins["species"]
    )
    return train, test
