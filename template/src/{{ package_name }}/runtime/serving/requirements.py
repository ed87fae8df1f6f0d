"""What a pipeline's model requires: what its project declares, and its own libraries as code.

Nothing is inferred: what a model gets depends neither on the lock file of a project, nor on what
happens to be imported or on PATH.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement  # comes with MLflow
from packaging.utils import canonicalize_name
from packaging.version import Version

# Before 3.11 Kedro brings it.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
# Before 3.11 Python's own knows only distributions that list their packages; MLflow brings this.
metadata = import_module(
    "importlib.metadata" if sys.version_info >= (3, 11) else "importlib_metadata"
)

logger = logging.getLogger(__name__)

# Folders of packages that requirements bring.
INSTALLED = {"site-packages", "dist-packages"}


def of_project(package: str) -> tuple[list[str], list[Path]]:
    """Return what a project requires, and the code of those libraries that are in no index.

    That is what it declares in `[project.dependencies]`, at the versions that are installed. A
    library that was installed from a folder or a file of this machine is given as its code, with
    what it requires in turn.
    """
    declared = _declared(package)
    if declared is None:
        logger.warning(
            "The model requires Kedro and MLflow only: expected `dependencies` under [project] in "
            "pyproject.toml, or `pip_requirements` among the arguments of log_model."
        )
    lines: dict[str, None] = {}
    code: list[Path] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [*map(Requirement, ("kedro", "mlflow")), *(declared or ())]
    while waiting:
        requirement = waiting.pop(0)
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        distribution = _distribution_of(requirement.name)
        folder = _local_folder(distribution)
        if folder is None:
            lines[_pinned(requirement, distribution)] = None
            continue
        paths = _code_of(distribution, folder)
        if not paths:
            logger.warning(
                "The model lacks %r, which was installed from %s: its code wasn't found. Add it "
                "to `code_paths` of log_model.",
                requirement.name,
                folder,
            )
        code += paths
        waiting += _applicable(distribution.requires or (), requirement.extras)
    return list(lines), list(dict.fromkeys(code))


def _declared(package: str) -> list[Requirement] | None:
    """Return the dependencies that a project declares, None where they can't be found."""
    project, _ = _project_settings(package)
    if "dependencies" in project:
        return _applicable(project["dependencies"])
    # A wheel, or a project that leaves its dependencies to the tool that builds it.
    names = metadata.packages_distributions().get(package) or [project.get("name")]
    distribution = _distribution_of(names[0]) if names[0] else None
    return distribution and _applicable(distribution.requires or ())


def _applicable(lines: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Return the requirements that apply here."""
    return [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _origin(distribution: Any) -> dict[str, Any]:
    """Return where a distribution was installed from, when that is no package index (PEP 610)."""
    # Packages of conda name the folder that conda-forge has built them in.
    if distribution is None or (distribution.read_text("INSTALLER") or "").strip() == "conda":
        return {}
    origin: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
    return origin


def _local_folder(distribution: Any) -> Path | None:
    """Return the folder or the file of this machine that a distribution was installed from."""
    url = urlsplit(_origin(distribution).get("url", ""))
    return Path(url2pathname(url.path)).resolve() if url.scheme == "file" else None


def _pinned(requirement: Requirement, distribution: Any) -> str:
    """Return a requirement at the version, or the commit, that is installed."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    if distribution is None:  # for another distribution that brings the same
        url = f" @ {_without_password(requirement.url)}" if requirement.url else ""
        return f"{requirement.name}{extras}{url or requirement.specifier}"
    name = f"{distribution.metadata['Name']}{extras}"
    origin = _origin(distribution)
    if not origin:
        return f"{name}=={Version(distribution.version).public}"
    url, vcs = _without_password(origin["url"]), origin.get("vcs_info")
    url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
    folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
    return f"{name} @ {url}{folder}"


def _code_of(distribution: Any, folder: Path) -> list[Path]:
    """Return the packages and modules of a distribution that was installed from a folder."""
    name = canonicalize_name(distribution.metadata["Name"])
    modules = {
        module
        for module, names in metadata.packages_distributions().items()
        if name in map(canonicalize_name, names)
    }
    home = Path(distribution.locate_file("")).resolve()
    if _origin(distribution).get("dir_info", {}).get("editable"):
        # It may list nothing but a file with the path of its modules. In the folder of the
        # library itself there are others beside them, such as its tests.
        home = folder
        modules |= {name.replace("-", "_"), *(m for m in list(sys.modules) if "." not in m)}
        for file in distribution.files or ():
            lines = file.locate().read_text().splitlines() if file.suffix == ".pth" else []
            inner = [line for line in lines if folder in Path(line).resolve().parents]
            modules |= {module.name for module in iter_modules(inner)}
    return [
        path
        for module in sorted(modules)
        for path in sources(module)
        if home in path.parents and not INSTALLED.intersection(path.relative_to(home).parts)
    ]


def sources(module: str) -> list[Path]:
    """Return the folders of a package, or the file of a module; nothing when it has neither."""
    try:
        spec = find_spec(module)
    except ValueError:  # `__main__`
        return []
    folders = list((spec and spec.submodule_search_locations) or ())
    if folders or spec is None:
        return [Path(folder).resolve() for folder in folders]
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


def _distribution_of(name: str) -> Any:
    """Return the distribution of that name, or else of the module of that name; None without one.

    `xgboost-cpu` brings the module of `xgboost`, too.
    """
    with suppress(metadata.PackageNotFoundError):
        return metadata.distribution(name)
    module = canonicalize_name(name).replace("-", "_")
    others = metadata.packages_distributions().get(module)
    return metadata.distribution(others[0]) if others else None


def _project_settings(package: str) -> tuple[dict[str, Any], dict[str, Any]]:
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


def indexes_of(package: str) -> list[str]:
    """Return the options of pip for the package indexes of a project, without passwords."""
    _, uv = _project_settings(package)
    tables = [uv, uv.get("pip", {})]
    main = [table["index-url"] for table in tables if "index-url" in table]
    extra = [url for table in tables for url in table.get("extra-index-url", ())]
    for index in uv.get("index", ()):
        (main if index.get("default") else extra).append(index["url"])
    options = [("--index-url", url) for url in main[:1]]
    options += [("--extra-index-url", url) for url in extra]
    lines = [f"{name} {_without_password(url)}" for name, url in options if url.startswith("http")]
    return list(dict.fromkeys(lines))


def _without_password(url: str) -> str:
    """Return a URL without a password; ssh keeps the name before it, which is `git` mostly."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = "" if parts.scheme.startswith("http") else user.partition(":")[0] + at
    return parts._replace(netloc=user + host, query="").geturl()
