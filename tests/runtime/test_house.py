"""The rooms of the runtime: which module may import which, and how much an import brings."""

from __future__ import annotations

import ast
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime import state
from runtime.stores import credentials

from ..conftest import REPOSITORY

RUNTIME = REPOSITORY / "runtime"

# A project has these only where its owner asked for them. They may use all of the core.
EXTRAS = ("offline", "serving", "console")

# The core: a room may use those that come after it. The first is the package itself.
CORE = (
    "",
    "cli",
    "hooks",
    "binding",
    "datasets",
    "tracking",
    "stores",
    "extras",
    "config",
    "state",
    "_kedro",
    "_mlflow",
)


class Import(NamedTuple):
    """An import of one module of the runtime by another, by their names in it."""

    importer: str
    imported: str
    is_in_function: bool


def module_names() -> dict[str, Path]:
    """Map the name of each module, such as `tracking.handle`, to its file."""
    names = {}
    for file in sorted(RUNTIME.rglob("*.py")):
        parts = file.relative_to(RUNTIME).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = module_names()


def imports_of(name: str) -> Iterator[Import]:
    """Find what a module imports of the runtime, but for what only a type checker reads."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def search(tree: ast.AST, is_in_function: bool) -> Iterator[Import]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = package.split(".") if package else []
                stem = parts[: len(parts) + 1 - node.level] + (node.module or "").split(".")
                base = ".".join(part for part in stem if part)
                for alias in node.names:
                    inner = f"{base}.{alias.name}".removeprefix(".")
                    yield Import(name, inner if inner in MODULES else base, is_in_function)
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from search(node, is_in_function or is_function)

    yield from search(ast.parse(MODULES[name].read_text("utf-8")), False)


IMPORTS = [found for name in MODULES for found in imports_of(name)]


def room(module: str) -> str:
    return module.partition(".")[0]


def is_downwards(importer: str, imported: str) -> bool:
    """Check whether a room may use another one."""
    if importer == imported:
        return True
    if importer in EXTRAS:
        return imported in CORE
    return imported in CORE and CORE.index(importer) < CORE.index(imported)


def test_every_module_is_in_a_room_that_has_its_place() -> None:
    assert {room(name) for name in MODULES} == {*EXTRAS, *CORE}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {i.imported for i in IMPORTS if i.importer == name} - {name} for name in MODULES}

    TopologicalSorter(graph).prepare()  # raises an error that names the circle


def test_a_room_uses_only_those_below_it_and_the_core_uses_no_extra() -> None:
    assert not [i for i in IMPORTS if not is_downwards(room(i.importer), room(i.imported))]


def test_no_function_imports_a_module_of_the_runtime() -> None:
    assert not [i for i in IMPORTS if i.is_in_function]


def modules_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_a_metric_dataset_brings_only_the_base_of_datasets_and_the_handle() -> None:
    loaded = modules_after("import runtime.datasets.metrics")

    rooms = {f"runtime.{name}" for name in ("datasets", "tracking", "stores", "config")}
    loaded = {name for name in loaded - rooms if name.startswith("runtime.")}
    assert {name.removeprefix("runtime.") for name in loaded} == {
        "datasets.metrics",
        "datasets.base",
        "tracking.handle",
        "tracking.outbox",
        "tracking.active",
        "stores.server",
        "stores.embedded",
        "stores.moving",
        "stores.schema",
        "stores.credentials",
        "stores.errors",
        "extras",
        "config.errors",
        "config.uris",
        "state",
        "_mlflow",
    }


def test_settings_and_commands_wait_neither_for_mlflow_nor_for_pydantic() -> None:
    loaded = modules_after("from runtime import ConfigLoader, MlflowHook; import runtime.cli")

    assert "runtime.hooks" in loaded
    assert not {"mlflow", "pydantic", "sqlalchemy", "pandas"} & loaded


@pytest.mark.skipif(sys.platform == "win32", reason="Windows doesn't fork")
def test_a_forked_worker_holds_no_runs_of_its_parent() -> None:
    credentials.export("a run", {"HELD_BY_A_TEST": "1"})
    try:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            in_worker = pool.apply(credentials.exported, ["a run"])
        in_parent = credentials.exported("a run")
    finally:
        credentials.take_back("a run")

    assert (in_worker, in_parent) == ({}, {"HELD_BY_A_TEST": "1"})
    assert not state.current().exported
