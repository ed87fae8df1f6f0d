"""Artifacts, metrics and models as Kedro datasets."""
