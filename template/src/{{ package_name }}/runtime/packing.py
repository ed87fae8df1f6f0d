"""Log a pipeline, with what it needs to predict anywhere, as a model of MLflow."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped] # comes with MLflow
import mlflow.pyfunc
import numpy as np
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import (
    Model,
    ModelSignature,
    convert_input_example_to_serving_input,
    infer_signature,
)
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.model import PythonModelContext
from mlflow.types import Schema
from mlflow.utils.environment import _parse_pip_requirements

from ._kedro import uncached
from .datasets.models import REFUSED_IN_NAME
from .pipeline_ml import PipelineError
from .pipeline_model import KedroPipelineModel
from .requirements import needed

if TYPE_CHECKING:
    from kedro.io import DataCatalog
    from mlflow.models.model import ModelInfo

    from .params import Secrets
    from .tracking import RunHandle

logger = logging.getLogger(__name__)

# Rows to predict from for the signature and the requirements.
EXAMPLE_ROWS = 5

# Folders of packages that the requirements bring.
_INSTALLED = {"site-packages", "dist-packages"}


def check(
    model: KedroPipelineModel,
    catalog: DataCatalog,
    secrets: Secrets,
    arguments: Mapping[str, Any],
    given: Iterable[str] = (),
) -> None:
    """See before anything runs whether a model can be logged when all has run.

    Takes the arguments of `log`, and in `given` the datasets whose data stays in memory.

    Raises:
        PipelineError: When it can't, naming the parameter, argument or dataset.
    """
    known = inspect.signature(mlflow.pyfunc.log_model).parameters
    for name in arguments:
        if name not in known and name != "registered_model_alias":
            raise PipelineError(
                f"log_model_kwargs: MLflow's pyfunc.log_model has no argument {name!r}"
            )
    if refused := set(REFUSED_IN_NAME.findall(str(arguments.get("name")))):
        raise PipelineError(
            f"name: MLflow takes no {arguments['name']!r} as the name of a model, because of "
            f"{' '.join(sorted(refused))}"
        )
    for name, value in model.parameters.items():
        if secrets.hide(value, name) != value:
            raise PipelineError(
                f"{name!r} has a value that is or looks like a secret, and would be in the model "
                "for everybody to read: have the node read it from the environment, or take what "
                "its name matches out of tracking.redact in mlflow.yml."
            )
    dataset = uncached(catalog.get(model.input_name))
    in_memory = dataset is None or (dataset._EPHEMERAL and model.input_name not in given)
    for name in ("signature", "input_example"):
        if arguments.get(name) == "auto" and in_memory:
            raise PipelineError(
                f"{model.input_name!r} is only in memory, so that the model's {name} can't be "
                "taken from its data: give it an entry in catalog.yml, or give log_model_kwargs "
                f"a {name}, which may be None."
            )
    try:
        cloudpickle.dumps(model)
    except Exception as error:  # whatever an object of the nodes or the runner raises
        raise PipelineError(f"The inference pipeline can't be pickled: {error}") from error
    signature = arguments.get("signature")
    if isinstance(signature, str) and signature != "auto":
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
    with TemporaryDirectory() as folder:
        artifacts = model.extract_pipeline_artifacts(Path(folder, "artifacts"))
        example = None
        if arguments.get("signature") == "auto":
            arguments["signature"], example = _infer(model, artifacts, catalog)
        elif arguments.get("signature") is None:
            arguments["signature"] = False  # or MLflow infers one without the parameters
        if arguments.get("input_example") == "auto":
            rows = catalog.load(model.input_name) if example is None else example
            arguments["input_example"] = _first_rows(rows, 1)
        arguments["code_paths"] = _code(model, package, arguments.get("code_paths") or ())
        save = partial(_save, package, example, python_model=model, artifacts=artifacts)
        info = run.log_model(
            # MLflow's own way to log models of a kind of one's own.
            partial(
                Model.log,
                artifact_path=None,
                flavor=SimpleNamespace(__name__="mlflow.pyfunc", save_model=save),
                **arguments,
            ),
            arguments.get("registered_model_name"),
            alias,
        )
    logger.info("The pipeline is logged as the model %s", info.model_uri)
    return info


def _infer(
    model: KedroPipelineModel, artifacts: dict[str, str], catalog: DataCatalog
) -> tuple[ModelSignature, Any]:
    """Infer the signature; gives also rows of the input that the model can predict from.

    What can't be inferred is told in a warning: it must not cost the model of a long training.
    """
    data = catalog.load(model.input_name)
    rows = _first_rows(data, EXAMPLE_ROWS)
    predicted: Any = None
    if rows is not None:
        model.load_context(PythonModelContext(artifacts, None))
        try:
            predicted = model.predict(None, deepcopy(rows))
        except Exception as error:  # whatever the nodes raise
            logger.warning("The model can't predict from the first rows of its input: %s", error)
            rows = None
    name = repr(model.input_name)
    signature = ModelSignature(
        inputs=_tried(_input_schema, data, rows, what=f"schema of its input {name}"),
        outputs=_tried(_output_schema, predicted, what="schema of its output"),
        params=infer_signature(params=_inferable(model.inference_params)).params,
    )
    return signature, _tried(_jsonable, rows, what=f"example of its input {name}")


def _tried(describe: Callable[..., Any], *data: Any, what: str) -> Any:
    try:
        return describe(*data)
    except (MlflowException, TypeError, ValueError) as error:
        logger.warning("The model gets no %s: %s", what, error)
        return None


def _input_schema(data: Any, rows: Any) -> Schema:
    """Describe the input, if the model is then still handed what its nodes expect.

    MLflow makes a table of a list or a dictionary when it has a schema for them.
    """
    schema: Schema = infer_signature(data).inputs
    handed = _enforce_schema(data if rows is None else deepcopy(rows), schema)
    if not isinstance(handed, type(data)):
        raise TypeError(f"with it, a {type(data).__name__} becomes a {type(handed).__name__}")
    return schema


def _output_schema(predicted: Any) -> Schema | None:
    return None if predicted is None else infer_signature(model_output=predicted).outputs


def _jsonable(rows: Any) -> Any:
    if rows is not None:
        convert_input_example_to_serving_input(rows)
    return rows


def _first_rows(data: Any, rows: int) -> Any:
    """Give a few rows of what is in memory; None for other kinds of data."""
    package = type(data).__module__.partition(".")[0]
    if package == "pandas" and hasattr(data, "head"):
        return data.head(rows)
    if isinstance(data, list) or (package == "numpy" and np.ndim(data)):
        return data[:rows]
    return data if isinstance(data, dict | str | int | float) else None


def _inferable(params: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the parameters of a type that a signature can have."""
    return {name: value for name, value in params.items() if _is_inferable(name, value)}


def _is_inferable(name: str, value: Any) -> bool:
    try:
        infer_signature(params={name: value})
    except MlflowException as error:
        logger.info("The parameter %r can't be changed by requests: %s", name, error.message)
        return False
    return True


def _save(package: str, example: Any, *, path: str, mlflow_model: Model, **arguments: Any) -> None:
    """Save the model as MLflow does, but without traces of this machine."""
    inferred = arguments.get("pip_requirements") is None and arguments.get("conda_env") is None
    tried = inferred and example is not None and arguments.get("input_example") is None
    if tried:
        # MLflow finds what the model needs by trying it, imports inside of nodes included.
        arguments["input_example"] = example
    with TemporaryDirectory() as no_project:
        if "uv_project_path" in inspect.signature(mlflow.pyfunc.save_model).parameters:
            # From a lock file in this folder MLflow would take all that the project has installed.
            arguments.setdefault("uv_project_path", no_project)
        with _no_advice():
            mlflow.pyfunc.save_model(path, mlflow_model=mlflow_model, **arguments)
    if tried:
        for file in Path(path).glob("*input_example*"):
            file.unlink()
        mlflow_model.saved_input_example_info = None  # type: ignore[assignment]
    if inferred:
        given = _parse_pip_requirements(arguments.get("extra_pip_requirements"))[0]
        modules = arguments["python_model"].modules
        _write_requirements(Path(path), package, modules, given)
    for artifact in mlflow_model.flavors["python_function"].get("artifacts", {}).values():
        artifact["uri"] = artifact["path"]
    mlflow_model.artifact_path = f"models:/{mlflow_model.model_id}"
    mlflow_model.save(str(Path(path, "MLmodel")))
    for file in Path(path, "artifacts").rglob("MLmodel"):
        _forget_locations(file)


@contextmanager
def _no_advice() -> Iterator[None]:
    """Hide MLflow's advice to save a file of code instead: a pipeline is an object."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Passing a Python object")

    mlflow_logger = logging.getLogger("mlflow.pyfunc")
    mlflow_logger.addFilter(is_other)
    try:
        yield
    finally:
        mlflow_logger.removeFilter(is_other)


def _forget_locations(file: Path) -> None:
    """Take out of the description of a model where it, and what is in it, were before."""
    description = yaml.safe_load(file.read_text("utf-8"))
    artifacts = description["flavors"].get("python_function", {}).get("artifacts") or {}
    for artifact in artifacts.values():
        artifact["uri"] = artifact["path"]
    if "model_id" in description:
        description["artifact_path"] = f"models:/{description['model_id']}"
    file.write_text(yaml.safe_dump(description), encoding="utf-8")


def _write_requirements(
    folder: Path, package: str, modules: Iterable[str], given: Iterable[str]
) -> None:
    """Keep of the requirements, which MLflow has in two files, those that are needed."""
    requirements, conda = folder / "requirements.txt", folder / "conda.yaml"
    lines = requirements.read_text("utf-8").splitlines()
    lines = needed(lines, package, folder / "code", modules, given)
    requirements.write_text("\n".join(lines), encoding="utf-8")
    environment = yaml.safe_load(conda.read_text("utf-8"))
    for dependency in environment["dependencies"]:
        if isinstance(dependency, dict):
            dependency["pip"] = lines
    conda.write_text(yaml.safe_dump(environment, default_flow_style=False), encoding="utf-8")


def _code(model: KedroPipelineModel, package: str, given: Iterable[str]) -> list[str]:
    """List the code for the model: the package, what else of it isn't installed, what is given."""
    others = {name.partition(".")[0] for name in model.modules} - {
        package,
        "__main__",
        *sys.stdlib_module_names,
    }
    found = [path for path in map(_source_of, sorted(others)) if path]
    own = [path for path in found if not _INSTALLED.intersection(path.parts)]
    if path := _source_of(package):
        own.insert(0, path)
    there = [path.resolve() for path in own]
    return [*map(str, own), *(path for path in given if Path(path).resolve() not in there)]


def _source_of(module: str) -> Path | None:
    """Give the folder of a package, or the file of a module; None when it has neither."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    place = folders[0] if folders else spec.origin if spec.has_location else None
    return Path(place) if place else None
