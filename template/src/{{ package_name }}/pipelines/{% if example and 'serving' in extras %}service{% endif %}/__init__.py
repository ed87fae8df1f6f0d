"""From the raw table to a model that answers requests with predictions."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
