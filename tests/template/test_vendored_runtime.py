"""The runtime is plain Python that works under any package's name, and costs nothing to import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import REPOSITORY

RUNTIME = REPOSITORY / "template" / "src" / "{{ package_name }}" / "runtime"
MODULES = sorted(RUNTIME.rglob("*.py"))

# Kedro and MLflow, and what comes with them.
INSTALLED = set(
    "alembic click cloudpickle fsspec kedro mlflow numpy omegaconf packaging pandas pluggy "
    "pydantic pydantic_core requests rich sqlalchemy yaml".split()
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


# The only modules that may use what isn't public of Kedro and MLflow.
FOR_PRIVATE = {"_kedro.py", "_mlflow.py"}

# Underscored, and documented all the same: by Python, and by fsspec for its file systems.
DOCUMENTED = {"_exit", "_replace", "_strip_protocol"}

SQL_ON_MLFLOWS_TABLES = re.compile(
    r"\b(SELECT|UPDATE|DELETE|INSERT)\b.*"
    r"\b(runs|tags|params|metrics|experiments|model_versions|logged_models)\b",
    re.DOTALL,
)

SOURCES = [
    path
    for path in sorted((REPOSITORY / "template" / "src").rglob("*.py"))
    if path.name not in FOR_PRIVATE
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(node: ast.AST) -> bool:
    """Tell whether this is `self` or `cls`."""
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree: ast.AST) -> Iterator[str]:
    """Name what a module, its classes and their objects have, as far as the module defines it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Attribute) and is_own(node.value):
                yield node.attr


def names_used(node: ast.AST) -> Iterator[str]:
    """Name what one node uses of an object or module that isn't its own."""
    if isinstance(node, ast.Attribute) and not is_own(node.value):
        yield node.attr
    elif isinstance(node, ast.Call):
        yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        if isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):  # getattr, setattr, …
            yield from (str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant))
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        yield str(node.slice.value)  # of os.environ, or of an object's __dict__
    elif isinstance(node, (ast.Import, ast.ImportFrom)) and names(node) & {"kedro", "mlflow"}:
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in [*modules, *(alias.name for alias in node.names)]:
            yield from name.split(".")


def private_uses(source: Path) -> list[str]:
    """List where a module uses what isn't public of another, as `file:line: name`."""
    tree = parsed(source)
    own = set(defined(tree))
    return [
        f"{source.name}:{node.lineno}: {name}"  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        for name in names_used(node)
        if is_private(name) and name not in own | DOCUMENTED
    ]


def sql_on_mlflows_tables(source: Path) -> list[str]:
    """List the statements on the tables of MLflow in a module."""
    return [
        f"{source.name}:{node.lineno}: {node.value}"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if SQL_ON_MLFLOWS_TABLES.search(node.value)
    ]


@pytest.fixture(params=SOURCES, ids=lambda path: path.name)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_module_uses_nothing_that_is_not_public(source: Path) -> None:
    assert private_uses(source) == []


def test_a_module_has_no_sql_on_mlflows_tables(source: Path) -> None:
    assert sql_on_mlflows_tables(source) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from mlflow.utils.environment import _parse_pip_requirements", "_parse_pip_requirements"),
        ("from mlflow.tracking._model_registry.utils import get_store", "_model_registry"),
        ("import kedro.framework._cli", "_cli"),
        ("fluent._active_run_stack.get()", "_active_run_stack"),
        ("client._tracking_client.store", "_tracking_client"),
        ("context._package_name = 'x'", "_package_name"),
        ("Server.of(uri).client._tracking_client", "_tracking_client"),
        ("catalog['x']._dataset", "_dataset"),
        ("getattr(dataset, '_dataset', None)", "_dataset"),
        ("setattr(module, '_thread_pool', None)", "_thread_pool"),
        ("sys._getframe()", "_getframe"),
        ("os.environ['_MLFLOW_X'] = ''", "_MLFLOW_X"),
        ("os.environ.update(_MLFLOW_X='')", "_MLFLOW_X"),
    ],
)
def test_what_is_not_public_is_found(code: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(code)

    assert private_uses(tmp_path / "module.py") == [f"module.py:1: {found}"]


@pytest.mark.parametrize(
    "code",
    [
        "from kedro import __version__",
        "from . import _mlflow\n_mlflow.engines()",
        "import sys\nsys.modules[__name__].__dict__",
        "os._exit(1)",
        "class A:\n    def f(self, other):\n        self._x = 1\n        return other._x",
        "class A:\n    _x: int\ndef f(a):\n    return a._x",
        "class A(Base):\n    def f(self):\n        return self._inherited",
    ],
)
def test_what_is_public_or_ones_own_is_not_taken_for_private(code: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(code)

    assert private_uses(tmp_path / "module.py") == []
