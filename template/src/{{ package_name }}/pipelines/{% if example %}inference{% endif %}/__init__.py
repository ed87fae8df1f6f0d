"""From penguins and the registered model to their species."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
