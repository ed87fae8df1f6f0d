"""What a model has to be installed with: what its flavor requires, from the project's indexes.

Nothing is inferred: what a model gets depends neither on the lock file of a project, nor on what
happens to be imported or on PATH.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement  # comes with MLflow
from packaging.utils import canonicalize_name

# Before 3.11 Kedro brings it.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
# Before 3.11 Python's own knows only distributions that list their packages; MLflow brings this.
metadata = import_module(
    "importlib.metadata" if sys.version_info >= (3, 11) else "importlib_metadata"
)

# The package of the project that this runtime is part of.
PROJECT = __name__.partition(".runtime")[0]

# The arguments of `log_model` with which a user says what a model requires.
_GIVEN = ("pip_requirements", "conda_env", "uv_project_path", "uv_groups", "uv_extras")


def _is_not_about_pip(record: logging.LogRecord) -> bool:
    # MLflow 3.17 warns with each model where there is no pip, as in every environment of uv. Then
    # conda.yaml only names no version of it.
    return not record.getMessage().startswith("Failed to resolve installed pip version")


logging.getLogger("mlflow.utils.environment").addFilter(_is_not_about_pip)


def with_requirements(
    flavor: ModuleType,
    model: Any,
    arguments: Mapping[str, Any],
    more: Iterable[str] = (),
    package: str = PROJECT,
) -> dict[str, Any]:
    """Return the arguments of `log_model` or `save_model` with requirements among them.

    Args:
        flavor: MLflow's module for the kind of model, or one's own, which may say nothing.
        model: The model to log.
        arguments: The arguments so far. What they say that the model requires is all that it does;
            their `extra_pip_requirements` are added to what is listed otherwise.
        more: What the model requires besides its flavor. MLflow adds itself.
        package: The package of the project, whose package indexes are listed too.
    """
    given = dict(arguments)
    if all(given.get(name) is None for name in _GIVEN):
        lines = _of_flavor(flavor, model, given)
        extra = given.get("extra_pip_requirements") or []
        extra = [f"-r {extra}"] if isinstance(extra, str) else extra
        if lines is not None:
            # In order, because the tools that build wheels list what is declared in theirs.
            lines = sorted({*more, *lines}, key=lambda line: line.lower().split("=="))
            given["pip_requirements"] = [*_indexes(package), *lines, *extra]
            given["extra_pip_requirements"] = None
    # Else MLflow's pyfunc flavor copies the uv.lock of the working folder into the model, which
    # `--env-manager=uv` then takes for its requirements. There is none beside this file.
    is_pyfunc = flavor.__name__ == "mlflow.pyfunc"
    if is_pyfunc and "uv_project_path" in inspect.signature(flavor.save_model).parameters:
        given.setdefault("uv_project_path", str(Path(__file__).parent))
    return given


def _of_flavor(flavor: ModuleType, model: Any, arguments: Mapping[str, Any]) -> list[str] | None:
    """Return what a flavor requires for a model, None when it doesn't say."""
    requirements_of = getattr(flavor, "get_default_pip_requirements", None)
    if requirements_of is None:
        return None
    serialization, options = arguments.get("serialization_format"), {}
    for name in inspect.signature(requirements_of).parameters:
        if name == "model":
            options[name] = getattr(model, "model", model)
        elif name.startswith("include_"):  # a library that the model may be serialized with
            library = name.removeprefix("include_")
            is_used = serialization in (None, library)
            options[name] = is_used and distribution_of(library) is not None
    return [_as_installed(Requirement(line)) for line in requirements_of(**options)]


def _as_installed(requirement: Requirement) -> str:
    """Return a requirement by the name of what is installed, such as `xgboost-cpu`."""
    if distribution := distribution_of(requirement.name):
        requirement.name = distribution.metadata["Name"]
    return str(requirement)


def distribution_of(name: str) -> Any:
    """Return the distribution of that name, or else of the module of that name; None without one.

    `xgboost-cpu` brings the module of `xgboost`, too.
    """
    with suppress(metadata.PackageNotFoundError):
        return metadata.distribution(name)
    module = canonicalize_name(name).replace("-", "_")
    others = metadata.packages_distributions().get(module)
    return metadata.distribution(others[0]) if others else None


def project_settings(package: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `[project]` and the settings of uv of a Kedro project; empty without its folder."""
    spec = find_spec(package)
    for folder in Path(spec.origin if spec and spec.origin else "").parents:
        pyproject = _toml(folder / "pyproject.toml")
        tools = pyproject.get("tool", {})
        if tools.get("kedro", {}).get("package_name") == package:
            # What is in uv.toml goes before, as it does for uv.
            return pyproject.get("project", {}), _toml(folder / "uv.toml") or tools.get("uv", {})
    return {}, {}


def _toml(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}


def _indexes(package: str) -> list[str]:
    """Return the options of pip for the package indexes of a project, without passwords."""
    _, uv = project_settings(package)
    tables = [uv, uv.get("pip", {})]
    main = [table["index-url"] for table in tables if "index-url" in table]
    extra = [url for table in tables for url in table.get("extra-index-url", ())]
    for index in uv.get("index", ()):
        (main if index.get("default") else extra).append(index["url"])
    options = [("--index-url", url) for url in main[:1]]
    options += [("--extra-index-url", url) for url in extra]
    lines = [f"{name} {without_password(url)}" for name, url in options if url.startswith("http")]
    return list(dict.fromkeys(lines))


def without_password(url: str) -> str:
    """Return a URL without a password; ssh keeps the name before it, which is `git` mostly."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = "" if parts.scheme.startswith("http") else user.partition(":")[0] + at
    return parts._replace(netloc=user + host, query="").geturl()
