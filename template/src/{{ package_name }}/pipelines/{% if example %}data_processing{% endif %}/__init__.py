"""From the raw table to one for training and one for the evaluation."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
