"""The first pipeline of the project, to be filled."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
