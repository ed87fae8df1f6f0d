"""Measure tracked runs beside plain Kedro and beside kedro-mlflow: `nox -s bench`."""
