"""Measure tracked runs and predictions beside kedro-mlflow: `nox -s bench`."""
