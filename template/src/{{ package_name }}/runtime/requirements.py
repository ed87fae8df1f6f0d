"""Which of the packages that a model has imported the project has it for."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement  # comes with MLflow
from packaging.version import Version

# Before 3.11 Kedro brings it.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
# Before 3.11 Python's own knows only distributions that list their packages; MLflow brings this.
metadata = import_module(
    "importlib.metadata" if sys.version_info >= (3, 11) else "importlib_metadata"
)

# What every model of a pipeline is loaded with.
_ALWAYS = ("cloudpickle", "kedro", "mlflow")


def needed(
    listed: Iterable[str],
    package: str,
    code: Path,
    modules: Iterable[str] = (),
    given: Iterable[str] = (),
) -> list[str]:
    """Make of the requirements that MLflow lists those that the pipeline needs.

    MLflow infers each package whose modules were imported, even if only because a library looks
    whether it is there, as some do for pytest. What is needed is what the project declares as its
    dependencies, or imports in its code, with the dependencies of these. The project itself isn't:
    it travels with the model. Where it isn't known what the project declares, all is needed.

    Args:
        listed: Requirements, such as `pandas==3.0.1`.
        package: The project's package.
        code: Folder of the code that travels with the model.
        modules: Those of its modules that the nodes are in. What a function there imports when it
            is called is needed, too.
        given: Requirements in the list that were not inferred: they stay.
    """
    lines = [line for line in listed if line]
    distributions = metadata.packages_distributions()
    own, declared = _project(package, distributions)
    lazy = _distributions_of(_lazy_imports(code, modules), distributions) - own
    if declared is None:
        known = _with_dependencies(map(_name, lines)) - own
    else:
        imported = _distributions_of(_imports(_trees(code.rglob("*.py"))), distributions)
        known = _closure([*declared, *map(Requirement, [*imported, *_ALWAYS])]) - own
    stay = known.union(map(_name, given))
    kept = [line for line in lines if line.startswith("-") or _name(line) in stay]
    if "kedro" not in map(_name, kept):
        kept.append(_pinned("kedro"))
    # MLflow leaves out what another package in its list needs, and that one may have gone here.
    lost = known & _with_dependencies(map(_name, lines)) | lazy
    lost -= _with_dependencies(map(_name, kept))
    return [*kept, *map(_pinned, _without_dependencies(filter(_is_installed, lost)))]


def _project(
    package: str, distributions: Mapping[str, list[str]]
) -> tuple[set[str], list[Requirement] | None]:
    """Name the distribution that a package is in, and give the dependencies that it declares.

    These are None where they can't be found: the project isn't installed, and its pyproject.toml
    leaves them to the tool that builds it.
    """
    own = {_normalized(name) for name in distributions.get(package, ())}
    if own:
        return own, [r for name in own for r in _requires(name)]
    # Not installed, or in a way that only the project's folder tells whose the package is.
    project = _pyproject(package).get("project", {})
    if "dependencies" in project:
        return set(), [r for r in map(Requirement, project["dependencies"]) if _applies(r)]
    if (name := project.get("name")) and _is_installed(name):
        return set(), list(_requires(name))
    return set(), None


def _pyproject(package: str) -> dict[str, Any]:
    """Read the pyproject.toml of a Kedro project; empty when there is none."""
    spec = find_spec(package)
    for folder in Path(spec.origin if spec and spec.origin else "").parents:
        file = folder / "pyproject.toml"
        if file.is_file():
            described: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
            if described.get("tool", {}).get("kedro", {}).get("package_name") == package:
                return described
    return {}


def _closure(roots: Iterable[Requirement]) -> set[str]:
    """Name the distributions that some need, themselves included."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        key = _normalized(requirement.name), frozenset(requirement.extras)
        if key not in seen:
            seen.add(key)
            waiting.extend(_requires(*key))
    return {name for name, _ in seen}


def _with_dependencies(names: Iterable[str]) -> set[str]:
    return _closure(Requirement(name) for name in names if _is_installed(name))


def _without_dependencies(names: Iterable[str]) -> Iterator[str]:
    """Give of some distributions those that no other of them needs."""
    closures = {name: _with_dependencies([name]) for name in names}
    while closures:
        name = max(sorted(closures), key=lambda name: len(closures[name]))
        covered = closures[name]
        closures = {other: its for other, its in closures.items() if other not in covered}
        yield name


def _requires(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    try:
        lines = requires(name) or ()
    except PackageNotFoundError:  # for another system, or another version of Python
        return
    for requirement in map(Requirement, lines):
        if _applies(requirement, extras):
            yield requirement


def _applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _is_installed(name: str) -> bool:
    return _version(name) is not None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):  # a URL or a file in the place of a name
        return None


def _pinned(name: str) -> str:
    return f"{name}=={Version(version(name)).public}"


def _lazy_imports(code: Path, modules: Iterable[str]) -> set[str]:
    """Name what the functions of some modules import when they are called."""
    places = [code.joinpath(*module.split(".")) for module in modules]
    files = [file for p in places for file in (p.with_suffix(".py"), p / "__init__.py")]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    trees = _trees(file for file in files if file.is_file())
    return _imports(
        node for tree in trees for node in ast.walk(tree) if isinstance(node, functions)
    )


def _trees(files: Iterable[Path]) -> Iterator[ast.AST]:
    for file in files:
        # A template, or a file for another version of Python, may be among them.
        with suppress(SyntaxError, ValueError):
            yield ast.parse(file.read_bytes())


def _imports(trees: Iterable[ast.AST]) -> set[str]:
    """Name the top-level modules that some code imports, wherever in it."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _distributions_of(modules: Iterable[str], distributions: Mapping[str, list[str]]) -> set[str]:
    return {_normalized(name) for module in modules for name in distributions.get(module, ())}


def _name(requirement: str) -> str:
    return _normalized(re.split(r"[=<>~!\[ ;@]", requirement, maxsplit=1)[0])


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
