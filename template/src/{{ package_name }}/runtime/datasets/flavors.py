"""MLflow's flavors: a module each that saves, logs and loads one kind of model."""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from tempfile import mkdtemp
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kedro.io import DatasetError

from .base import check

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

# The signature that MLflow infers from an input example, and the parts of one that is written down.
_AUTO = "auto"
_SIGNATURE_PARTS = ("inputs", "outputs", "params")

_WORKFLOWS = ("python_model", "loader_module")

# The arguments of `log_model` with which a user says what a model requires.
_REQUIREMENTS = ("pip_requirements", "conda_env", "uv_project_path", "uv_groups", "uv_extras")

# The step whose metrics in the run MLflow gives to a model that is logged: one that no metric has.
_NO_STEP = -1

# MLflow notes which environment variables a model reads when it tries the input example, by
# exchanging methods of `os.environ`; two threads at once would not put them back.
_trying_example = threading.Lock()


def _is_not_about_pip(record: logging.LogRecord) -> bool:
    # MLflow 3.17 warns with each model where there is no pip, as in every environment of uv. Then
    # conda.yaml only names no version of it.
    return not record.getMessage().startswith("Failed to resolve installed pip version")


logging.getLogger("mlflow.utils.environment").addFilter(_is_not_about_pip)


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

    def log(
        self, model: Any, arguments: Mapping[str, Any], *, with_metrics: bool = True
    ) -> ModelInfo:
        """Log a model to MLflow's active run with the arguments of `log_model`.

        Without `with_metrics` MLflow doesn't give it the metrics that the run has already.
        """
        if (
            not with_metrics
            and "step" in inspect.signature(self._module_with("log_model").log_model).parameters
        ):
            arguments = {"step": _NO_STEP, **arguments}
        example = arguments.get("input_example")
        with nullcontext() if example is None else _trying_example:
            info: ModelInfo = self._write("log_model", model, arguments)
        return info

    def save(self, model: Any, folder: Path, arguments: Mapping[str, Any]) -> None:
        """Write a model to a folder that doesn't exist yet, with the arguments of `save_model`."""
        self._write("save_model", model, {"path": str(folder), **arguments})

    def load(self, uri: str, arguments: Mapping[str, Any]) -> Any:
        """Load a model with the arguments of `load_model`."""
        from mlflow import get_tracking_uri

        load_model = self._module_with("load_model").load_model
        # MLflow 3.17 reads the path of a model as if it was a URI: a folder such as job%2Fx isn't
        # found. A copy in another folder is.
        if "%" in uri and Path(uri).is_absolute():
            uri = str(copytree(uri, Path(mkdtemp(), "model")))
        elif (
            "%25" in f"{uri}{get_tracking_uri()}"
            and "dst_path" in inspect.signature(load_model).parameters
        ):
            arguments = {"dst_path": mkdtemp(), **arguments}
        try:
            return load_model(model_uri=uri, **arguments)
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
            names = (arguments.get(key) for key in ("name", "artifact_path", "path"))
            name, kind = next((name for name in names if name), None), type(model).__name__
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
        DatasetError: When there is no input example for it, or the signature is none.
    """
    arguments = dict(save_args)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping):
        data, given = data
        arguments.update(given)
    signature = signature_of(arguments.pop("signature", None))
    if signature == _AUTO and arguments.get("input_example") is None:
        raise DatasetError(
            "`signature: auto` needs an input example, in `save_args` or returned by the node as "
            '`(model, {"input_example": data})`.'
        )
    if signature not in (None, _AUTO):
        arguments["signature"] = signature
    return data, arguments


def signature_of(given: Any) -> Any:
    """Return the signature of a model, MLflow's object where it is given as a mapping.

    That is what MLflow writes to MLmodel, or the same in YAML instead of JSON.

    Raises:
        DatasetError: When it is a text other than `auto`, or no mapping that MLflow can read.
    """
    if not isinstance(given, str | Mapping) or given == _AUTO:
        return given
    rule = f"is `{_AUTO}`, or a mapping of {', '.join(_SIGNATURE_PARTS)} as in MLmodel"
    written: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    check(written and set(written) <= set(_SIGNATURE_PARTS), "save_args.signature", rule, given)
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature

    parts = {
        name: part if isinstance(part, str) else json.dumps(part) for name, part in written.items()
    }
    try:
        return ModelSignature.from_dict(parts)
    except (MlflowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"`save_args.signature` {rule}, got {given!r}: {_one_line(error)}"
        ) from error


def with_requirements(
    flavor: ModuleType,
    model: Any,
    arguments: Mapping[str, Any],
    more: Iterable[str] = (),
    options: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the arguments of `log_model` or `save_model` with what the flavor requires.

    Else MLflow lists all that the project's `uv.lock` has, or imports the model in another process
    to see what it needs.

    Args:
        flavor: MLflow's module for the kind of model, or one's own, which may say nothing.
        model: The model to log.
        arguments: The arguments so far; requirements among them are all that the model gets, but
            for `extra_pip_requirements`, which come in addition.
        more: What the model requires besides its flavor. MLflow adds itself.
        options: Options for pip, put first.
    """
    given = dict(arguments)
    requirements_of = getattr(flavor, "get_default_pip_requirements", None)
    if requirements_of and all(given.get(name) is None for name in _REQUIREMENTS):
        known = {"model": getattr(model, "model", model)}
        for library in ("cloudpickle", "skops"):
            is_wanted = given.get("serialization_format") in (None, library)
            known[f"include_{library}"] = is_wanted and find_spec(library) is not None
        taken = inspect.signature(requirements_of).parameters
        lines = requirements_of(**{name: known[name] for name in known if name in taken})
        extra = given.get("extra_pip_requirements") or []
        extra = [f"-r {extra}"] if isinstance(extra, str) else extra
        # In order, because the tools that build wheels list what is declared in theirs.
        lines = sorted({*more, *lines}, key=lambda line: line.lower().split("=="))
        given["pip_requirements"] = [*options, *lines, *extra]
        given["extra_pip_requirements"] = None
    is_pyfunc = flavor.__name__ == "mlflow.pyfunc"
    if is_pyfunc and "uv_project_path" in inspect.signature(flavor.save_model).parameters:
        # MLflow copies the lock of the working folder all the same. There is none beside this file.
        given.setdefault("uv_project_path", str(Path(__file__).parent))
    return given


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
