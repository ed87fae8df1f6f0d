"""Tracking with MLflow for this Kedro project.

Everything a project uses is named here and imported on first use, so that `kedro` commands
that track nothing stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import extras

if TYPE_CHECKING:
    from .config.config_loader import ConfigLoader as ConfigLoader
    from .config.errors import ConfigError as ConfigError
    from .config.resolvers import random_name as random_name
    from .datasets.artifacts import MlflowArtifactDataset as MlflowArtifactDataset
    from .datasets.metrics import MlflowMetricDataset as MlflowMetricDataset
    from .datasets.metrics import MlflowMetricHistoryDataset as MlflowMetricHistoryDataset
    from .datasets.metrics import MlflowMetricsDataset as MlflowMetricsDataset
    from .datasets.metrics import MlflowMetricsHistoryDataset as MlflowMetricsHistoryDataset
    from .datasets.models import (
        MlflowModelLocalFileSystemDataset as MlflowModelLocalFileSystemDataset,
    )
    from .datasets.models import MlflowModelRegistryDataset as MlflowModelRegistryDataset
    from .datasets.models import MlflowModelTrackingDataset as MlflowModelTrackingDataset
    from .datasets.tables import MlflowRunsDataset as MlflowRunsDataset
    from .datasets.tables import MlflowTableDataset as MlflowTableDataset
    from .hooks import MlflowHook as MlflowHook
    from .offline.hook import OfflineHook as OfflineHook
    from .serving.hook import ServingHook as ServingHook
    from .serving.pipeline_ml import pipeline_ml_factory as pipeline_ml_factory
    from .serving.pipeline_model import KedroPipelineModel as KedroPipelineModel
    from .stores.project import MlflowConfig as MlflowConfig

_MODULES = {
    "ConfigError": "config.errors",
    "ConfigLoader": "config.config_loader",
    "MlflowConfig": "stores.project",
    "MlflowHook": "hooks",
    "MlflowArtifactDataset": "datasets.artifacts",
    "MlflowMetricDataset": "datasets.metrics",
    "MlflowMetricHistoryDataset": "datasets.metrics",
    "MlflowMetricsDataset": "datasets.metrics",
    "MlflowMetricsHistoryDataset": "datasets.metrics",
    "MlflowModelLocalFileSystemDataset": "datasets.models",
    "MlflowModelRegistryDataset": "datasets.models",
    "MlflowModelTrackingDataset": "datasets.models",
    "MlflowRunsDataset": "datasets.tables",
    "MlflowTableDataset": "datasets.tables",
    "random_name": "config.resolvers",
}

__all__ = [*_MODULES, *extras.public_names()]


def __getattr__(name: str) -> Any:
    if extra := extras.owner_of_name(name):
        module = extras.load(extra, extras.EXTRAS[extra].names[name], f"`{name}`")
    elif name in _MODULES:
        module = import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
