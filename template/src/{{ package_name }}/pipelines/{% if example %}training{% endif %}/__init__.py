"""From the training table to an evaluated, registered model."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
