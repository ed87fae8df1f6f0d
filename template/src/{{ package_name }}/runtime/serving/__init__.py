"""Pipelines as models of MLflow."""
