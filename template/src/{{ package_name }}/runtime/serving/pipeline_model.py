"""A pipeline as a model of MLflow; this module travels with every model and needs no project."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped] # comes with MLflow
import kedro.runner
from kedro.io import (
    AbstractDataset,
    DataCatalog,
    DatasetError,
    MemoryDataset,
    SharedMemoryDataCatalog,
    SharedMemoryDataset,
)
from kedro.io.core import is_parameter
from kedro.pipeline import Pipeline
from kedro.runner import AbstractRunner, ParallelRunner, SequentialRunner
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

