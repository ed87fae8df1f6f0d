"""Log a pipeline, with what it needs to predict anywhere, as a model of MLflow."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped] # comes with MLflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
from kedro.io import DatasetError
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.pyfunc.model import PythonModelContext
from mlflow.types import Schema

from .._kedro import uncached
from ..config.hiding import plain
from ..datasets.flavors import with_requirements
from ..datasets.models import check_names
from .pipeline_ml import PipelineError
from .pipeline_model import KedroPipelineModel, is_in_memory
from .requirements import INSTALLED, indexes_of, of_project, sources

if TYPE_CHECKING:
    from kedro.io import DataCatalog
    from mlflow.models.model import ModelInfo

    from ..config.hiding import Secrets
    from ..tracking.handle import RunHandle

logger = logging.getLogger(__name__)

# Rows to predict from for the signature.
EXAMPLE_ROWS = 5


def check(
    model: KedroPipelineModel,
    catalog: DataCatalog,
    secrets: Secrets,
    arguments: Mapping[str, Any],
    given: Iterable[str] = (),
) -> None:
    """Check before anything runs that a model can be logged when all has run.

    Args:
        model: The pipeline's model.
        catalog: Where the data of its input is.
        secrets: What must not be in the model.
        arguments: Those of `log`.
        given: The datasets whose data stays in memory.

    Raises:
        PipelineError: When it can't, naming the parameter, argument or dataset.
    """
    known = inspect.signature(mlflow.pyfunc.log_model).parameters
    for name in arguments:
        if name not in known and name != "registered_model_alias":
            raise PipelineError(
                f"log_model_kwargs: MLflow's pyfunc.log_model has no argument {name!r}"
            )
    try:
        check_names(arguments, group="")
    except DatasetError as error:
        raise PipelineError(str(error)) from error
    for name, value in model.parameters.items():
        if secrets.hide(plain(value), name) != plain(value):
            raise PipelineError(
                f"{name!r} has a value that is or looks like a secret, and would be in the model "
                "for everybody to read: have the node read it from the environment, or take what "
                "its name matches out of tracking.redact in mlflow.yml."
            )
    dataset = uncached(catalog.get(model.input_name))
    in_memory = dataset is None or (is_in_memory(dataset) and model.input_name not in given)
    for name in ("signature", "input_example"):
        if arguments.get(name) == "auto" and in_memory:
            raise PipelineError(
                f"{model.input_name!r} is only in memory, so that the model's {name} can't be "
                "taken from its data: give it an entry in catalog.yml, or give log_model_kwargs "
                f"a {name}, which may be None."
            )
    try:
        pickled = cloudpickle.dumps(model)
    except Exception as error:  # whatever an object of the nodes or the runner raises
        raise PipelineError(f"The inference pipeline can't be pickled: {error}") from error
    if secrets.are_in(pickled.decode(errors="replace")):
        raise PipelineError(
            "A node of the inference pipeline holds a secret, such as a value of credentials.yml "
            "bound by functools.partial, and it would be in the model for everybody to read: have "
            "the node read it from the environment."
        )
    signature = arguments.get("signature")
    if not (signature in (None, False, "auto") or isinstance(signature, ModelSignature)):
        raise PipelineError(
            f"signature: expected auto, a ModelSignature or None, got {signature!r}"
        )


def log(
    run: RunHandle,
    model: KedroPipelineModel,
    catalog: DataCatalog,
    package: str,
    arguments: Mapping[str, Any],
) -> ModelInfo:
    """Log a pipeline's model to a run.

    Args:
        run: The run to log to.
        model: The pipeline's model.
        catalog: Where the data of its input is, to infer the signature from.
        package: The project's package, which travels with the model.
        arguments: Arguments of `mlflow.pyfunc.log_model`; `signature` and `input_example` may be
            `auto`, and there may be a `registered_model_alias`.
    """
    arguments = dict(arguments)
    alias = arguments.pop("registered_model_alias", None)
    data = None
    if "auto" in (arguments.get("signature"), arguments.get("input_example")):
        data = catalog.load(model.input_name)
    with TemporaryDirectory() as folder, TemporaryDirectory() as code_folder:
        artifacts = model.extract_pipeline_artifacts(Path(folder))
        for file in Path(folder).rglob("MLmodel"):
            _Description.load(str(file)).save(str(file))
        if arguments.get("signature") == "auto":
            arguments["signature"] = _infer(model, artifacts, data)
        elif arguments.get("signature") is None:
            arguments["signature"] = False  # or MLflow infers one without the parameters
        if arguments.get("input_example") == "auto":
            arguments["input_example"] = _first_rows(data, 1)
        # After the prediction, which may have imported more of the project's libraries.
        required, libraries = of_project(package)
        code = _code(model, package, libraries)
        given = [Path(path).resolve() for path in arguments.get("code_paths") or ()]
        arguments["code_paths"] = [
            *_copied(code, Path(code_folder)),
            *(str(path) for path in given if path not in code),
        ]
        arguments = with_requirements(
            mlflow.pyfunc, model, arguments, required, indexes_of(package)
        )
        # What `mlflow.pyfunc.log_model` does, with a description of our own.
        write = partial(_Description.log, None, mlflow.pyfunc, artifacts=artifacts, **arguments)
        run.flush()  # MLflow gives the model the metrics that the run has
        info = run.log_model(
            partial(write, python_model=model), arguments.get("registered_model_name"), alias
        )
    logger.info("The pipeline is logged as the model %s", info.model_uri)
    return info


class _Description(Model):
    """MLflow's description of a model, without the paths of the machine that it was made on.

    MLflow writes there where the store keeps the model, and where its artifacts were before.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to the file MLmodel."""
        described: dict[str, Any] = deepcopy(super().to_dict())
        if self.model_id:
            described["artifact_path"] = f"models:/{self.model_id}"
        pyfunc = described["flavors"].get("python_function", {})
        for artifact in (pyfunc.get("artifacts") or {}).values():
            artifact["uri"] = artifact["path"]
        return described


def _infer(model: KedroPipelineModel, artifacts: dict[str, str], data: Any) -> ModelSignature:
    """Infer the signature from the data of the input, and a prediction from its first rows.

    What can't be inferred is a warning: it must not cost the model of a long training.
    """
    rows, predicted = _first_rows(data, EXAMPLE_ROWS), None
    if rows is not None:
        model.load_context(PythonModelContext(artifacts, None))
        try:
            predicted = model.predict(None, deepcopy(rows))
        except Exception as error:  # whatever the nodes raise
            logger.warning("The model can't predict from the first rows of its input: %s", error)
    known = model.inference_params
    params = {name: value for name, value in known.items() if _is_inferable(name, value)}
    inputs = _schema(_input_schema, data, f"its input {model.input_name!r}")
    outputs = None
    if predicted is not None:
        outputs = _schema(
            lambda output: infer_signature(model_output=output).outputs, predicted, "its output"
        )
    return ModelSignature(inputs, outputs, infer_signature(params=params).params)


def _is_inferable(name: str, value: Any) -> bool:
    try:
        infer_signature(params={name: value})
    except MlflowException as error:
        logger.info("The parameter %r can't be changed by requests: %s", name, error.message)
        return False
    return True


def _schema(infer: Callable[[Any], Any], data: Any, of_what: str) -> Any:
    """Infer a schema; None with a warning where MLflow has none for the data."""
    try:
        return infer(data)
    except (MlflowException, TypeError, ValueError) as error:
        logger.warning("The model gets no schema of %s: %s", of_what, error)
        return None


def _input_schema(data: Any) -> Schema:
    """Return the schema of the input, if with it nodes still get the kind of data they expect.

    MLflow makes a table of a list, a dictionary or a series when it has a schema for them.
    """
    schema: Schema = infer_signature(data).inputs
    if not (schema.is_tensor_spec() or isinstance(data, pd.DataFrame)):
        raise TypeError(f"with it, MLflow would make a table of a {type(data).__name__}")
    return schema


def _first_rows(data: Any, rows: int) -> Any:
    """Return the first rows of data in memory; None for data of a kind that has none."""
    package = type(data).__module__.partition(".")[0]
    if package == "pandas" and hasattr(data, "head"):
        return data.head(rows)
    if isinstance(data, list) or (package == "numpy" and np.ndim(data)):
        return data[:rows]
    return data if isinstance(data, dict | str | int | float) else None


def _code(model: KedroPipelineModel, package: str, libraries: Iterable[Path]) -> list[Path]:
    """Return the code for the model: the package, and modules that aren't installed."""
    known = {package, "__main__", *sys.stdlib_module_names}
    others = {name.partition(".")[0] for name in model.modules} - known
    files = [path for module in sorted(others) for path in sources(module)]
    own = [path for path in files if not INSTALLED.intersection(path.parts)]
    return list(dict.fromkeys([*sources(package), *own, *libraries]))


def _copied(code: Iterable[Path], folder: Path) -> list[str]:
    """Copy the folders of code without the secrets in them; MLflow would copy all."""
    paths = []
    for path in code:
        if path.is_dir():
            copy = folder / path.name
            path = copytree(path, copy, ignore=_secret_files, dirs_exist_ok=True)
        paths.append(str(path))
    return list(dict.fromkeys(paths))


def _secret_files(folder: str, names: list[str]) -> set[str]:
    """Return which files of a folder are no code: hidden ones, keys, and folders of secrets."""
    return {
        name
        for name in names
        if name == "__pycache__"
        or name.startswith(".")
        or name.endswith((".pem", ".key"))
        or (name == "secrets" and not Path(folder, name, "__init__.py").exists())
    }
