"""Which of the packages that a model has imported the project has it for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement  # comes with MLflow

# What every model of a pipeline is loaded with.
_ALWAYS = ("cloudpickle", "kedro", "mlflow")


def needed(inferred: Iterable[str], package: str, code: Path) -> list[str]:
    """Leave out of the requirements that MLflow inferred what the pipeline doesn't need.

    MLflow lists each package whose modules were imported, even if only because a library looks
    whether it is there, as some do for pytest. What is needed is what the project declares as its
    dependencies, or imports in its code, with the dependencies of these. The project itself isn't:
    it travels with the model.

    Args:
        inferred: Requirements, such as `pandas==3.0.1`.
        package: The project's package.
        code: Folder of the code that travels with the model.
    """
    distributions = packages_distributions()
    own = {_normalized(name) for name in distributions.get(package, ())}
    declared = [r for name in own for r in _requires(name, frozenset())]
    imported = [d for module in _imports(code) for d in distributions.get(module, ())]
    roots = [*declared, *map(Requirement, [*imported, *_ALWAYS])]
    known = _closure(roots) - own
    return [line for line in inferred if line.startswith("-") or _name(line) in known]


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


def _requires(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    try:
        lines = requires(name) or ()
    except PackageNotFoundError:  # for another system, or another version of Python
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _imports(code: Path) -> set[str]:
    """Name the top-level modules that the files of a folder import, wherever in them."""
    found: set[str] = set()
    for file in code.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def _name(requirement: str) -> str:
    return _normalized(re.split(r"[=<>~!\[ ;@]", requirement, maxsplit=1)[0])


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
