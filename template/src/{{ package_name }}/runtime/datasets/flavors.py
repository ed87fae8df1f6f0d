"""MLflow's flavors: a module each that saves, logs and loads one kind of model."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kedro.io import DatasetError

from .base import check
from .requirements import with_requirements

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

_WORKFLOWS = ("python_model", "loader_module")

# MLflow notes which environment variables a model reads when it tries the input example, by
# exchanging methods of `os.environ`; two threads at once would not put them back.
_trying_example = threading.Lock()


@dataclass(frozen=True)
class Flavor:
    """A flavor by the name of its module, which is imported when it is first used.

    Args:
        name: MLflow's module for the kind of model, such as `mlflow.sklearn`, or one's own.
        workflow: What a model of `mlflow.pyfunc` is: a `python_model`, or a `loader_module`.

    Raises:
        DatasetError: When there is no such module, or no such workflow.
    """

    name: str
    workflow: str | None = None

    def __post_init__(self) -> None:
        is_flavor = _is_module(self.name) and not _is_module(f"mlflow.{self.name}")
        check(is_flavor, "flavor", "is a module such as mlflow.sklearn", self.name)
        is_workflow = not self._is_pyfunc or self.workflow in _WORKFLOWS
        rule = "of the flavor mlflow.pyfunc is `python_model` or `loader_module`"
        check(is_workflow, "pyfunc_workflow", rule, self.workflow)

    @property
    def _is_pyfunc(self) -> bool:
        return self.name == "mlflow.pyfunc"

    def log(self, model: Any, arguments: Mapping[str, Any]) -> ModelInfo:
        """Log a model to MLflow's active run with the arguments of `log_model`."""
        example = arguments.get("input_example")
        with nullcontext() if example is None else _trying_example:
            info: ModelInfo = self._write("log_model", model, arguments)
        return info

    def save(self, model: Any, folder: Path, arguments: Mapping[str, Any]) -> None:
        """Write a model to a folder that doesn't exist yet, with the arguments of `save_model`."""
        self._write("save_model", model, {"path": str(folder), **arguments})

    def load(self, uri: str, arguments: Mapping[str, Any]) -> Any:
        """Load a model with the arguments of `load_model`."""
        module = self._module_with("load_model")
        try:
            return module.load_model(model_uri=uri, **arguments)
        except Exception as error:  # whatever the libraries of so many kinds of models raise
            raise DatasetError(f"{self.name} can't load {uri}: {_one_line(error)}") from error

    def _write(self, function: str, model: Any, arguments: Mapping[str, Any]) -> Any:
        module = self._module_with(function)
        write = getattr(module, function)
        try:
            arguments = with_requirements(module, model, arguments)
            if self._is_pyfunc:
                return write(**{str(self.workflow): model}, **arguments)
            return write(model, **arguments)
        except Exception as error:  # as above
            name, kind = arguments.get("name") or arguments.get("path"), type(model).__name__
            raise DatasetError(
                f"{self.name} can't save a {kind} as {str(name)!r}: {_one_line(error)}"
            ) from error

    def _module_with(self, function: str) -> ModuleType:
        try:
            module = import_module(self.name)
        except ImportError as error:
            raise DatasetError(
                f"The flavor {self.name} can't be imported, is its library installed? {error}"
            ) from error
        if not hasattr(module, function):
            raise DatasetError(
                f"`flavor` is a module such as mlflow.sklearn, got {self.name!r}, which has no "
                f"`{function}`."
            )
        return module


def unpack(data: Any, save_args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Separate a model from the arguments for saving it that come with it as `(model, arguments)`.

    The example and the signature of a model are known where its data is: in the node. They go
    before those of the catalog. With `signature: auto` MLflow infers it from the input example.

    Raises:
        DatasetError: When there is no input example for it.
    """
    arguments = dict(save_args)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping):
        data, given = data
        arguments.update(given)
    signature = arguments.get("signature")
    if isinstance(signature, str):
        if signature != "auto" or arguments.get("input_example") is None:
            raise DatasetError(
                "`signature: auto` needs an input example, in `save_args` or returned by the node "
                f'as `(model, {{"input_example": data}})`; got the signature {signature!r}'
                f"{' without one' if signature == 'auto' else ''}."
            )
        del arguments["signature"]
    return data, arguments


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_module(name: Any) -> bool:
    """Check whether a module exists, without the import of MLflow that `find_spec` would do."""
    package, *inner = str(name).split(".")
    spec = find_spec(package) if package else None
    if spec is None or not inner:
        return spec is not None
    return any(
        Path(folder, *inner).is_dir() or Path(folder, *inner).with_suffix(".py").is_file()
        for folder in spec.submodule_search_locations or ()
    )
