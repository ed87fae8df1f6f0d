"""The runtime is plain Python that works under any package's name, and costs nothing to import."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import REPOSITORY

RUNTIME = REPOSITORY / "template" / "src" / "{{ package_name }}" / "runtime"
MODULES = sorted(RUNTIME.rglob("*.py"))

# Kedro and MLflow, and what comes with them.
INSTALLED = set(
    "click cloudpickle fsspec kedro mlflow numpy omegaconf packaging pandas pydantic pydantic_core "
    "requests rich sqlalchemy yaml".split()
)

# What is a model of MLflow, and what logs it: imported in functions, where a model is at hand.
OF_MODELS = {"packing", "pipeline_model"}


@pytest.fixture(params=MODULES, ids=lambda path: path.relative_to(RUNTIME).as_posix())
def module(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def imports(
    tree: ast.AST, *, on_import_only: bool = False
) -> Iterator[ast.Import | ast.ImportFrom]:
    """Find imports; either all, or those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif on_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif on_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.orelse, []), on_import_only=True)
        else:
            yield from imports(node, on_import_only=on_import_only)


def names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Name the packages that an absolute import imports from."""
    if isinstance(node, ast.ImportFrom):
        return set() if node.level else {(node.module or "").split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names}


def parsed(module: Path) -> ast.Module:
    return ast.parse(module.read_text("utf-8"), feature_version=(3, 10))


def test_the_runtime_is_there() -> None:
    assert {"__init__.py", "hooks.py", "config.py"} <= {module.name for module in MODULES}


def test_the_top_folder_links_to_the_runtime() -> None:
    assert (REPOSITORY / "runtime").is_symlink()
    assert (REPOSITORY / "runtime").resolve() == RUNTIME.resolve()


def test_the_runtime_holds_python_only() -> None:
    others = [path for path in RUNTIME.rglob("*") if path.is_file() and path not in MODULES]

    assert [path for path in others if path.parent.name != "__pycache__"] == []


def test_a_module_imports_nothing_beyond_kedro_and_mlflow(module: Path) -> None:
    imported = {name for node in imports(parsed(module)) for name in names(node)}

    assert imported <= INSTALLED | sys.stdlib_module_names


def test_a_module_names_the_runtime_only_relatively(module: Path) -> None:
    depth = len(module.relative_to(RUNTIME).parts)
    levels = [node.level for node in imports(parsed(module)) if isinstance(node, ast.ImportFrom)]

    assert all(level <= depth for level in levels)


def test_importing_a_module_does_not_import_mlflow(module: Path) -> None:
    imported = list(imports(parsed(module), on_import_only=True))
    of_runtime = {node.module for node in imported if isinstance(node, ast.ImportFrom)}

    if module.stem not in OF_MODELS:
        assert "mlflow" not in {name for node in imported for name in names(node)}
        assert not OF_MODELS & of_runtime
