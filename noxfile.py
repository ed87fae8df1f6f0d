#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""What is done in this repository: `nox -l` lists it."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

HERE = Path(__file__).resolve().parent
# Tests wait for servers and processes a good part of their time: more of them than cores.
WORKERS = f"--numprocesses={(os.cpu_count() or 1) + 2}"
ENV = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Bytecode is worth keeping: without it each `kedro` takes seconds to compile MLflow.
    "PYTHONDONTWRITEBYTECODE": "",
}


def install(session: nox.Session, group: str) -> None:
    """Install a dependency group of pyproject.toml into the session's environment."""
    session.env.update(ENV)
    project = nox.project.load_toml("pyproject.toml")
    session.install(*nox.project.dependency_groups(project, group))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types, here and in generated projects."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    cache = session.cache_dir / "mypy"  # most of what it reads is the same in both
    for answers in (["example=true"], ["example=false", "scale_out=dask"]):
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder, "my_project")
            generate(session, project, *answers)
            with session.chdir(project):
                session.run("ruff", "check", ".")
                session.run("ruff", "format", "--check", ".")
                session.run("mypy", f"--cache-dir={cache}")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation's site into site/html and check it; `-- serve` shows it."""
    if sys.version_info.minor < 11:
        session.skip("Zensical, which builds the site, needs Python 3.11.")
    install(session, "docs")
    session.run("python", "-m", "docs.pages", silent=True)
    if session.posargs == ["serve"]:
        session.run("zensical", "serve")
    else:
        session.run("zensical", "build", "--strict", "--clean")
        session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the runtime; arguments go to pytest."""
    pytest(session, "tests/runtime")


@nox.session
def template(session: nox.Session) -> None:
    """Test the template with every answer; `-- --all` tests what takes long too."""
    pytest(session, "tests/template", "--dist=loadgroup", group="tests")


@nox.session
def backends(session: nox.Session) -> None:
    """Track runs on real stores and servers; `-- --all` tests what takes long too."""
    pytest(session, "tests/backends", "--dist=loadfile")


@nox.session
def e2e(session: nox.Session) -> None:
    """Generate, install, run, test and update whole projects; arguments go to pytest."""
    pytest(session, "tests/e2e")


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """Test projects with every Python, oldest and newest packages; write docs/compatibility.md."""
    report = str(session.cache_dir / "versions.xml")
    options = ["--all", "--numprocesses=2", f"--junitxml={report}", *session.posargs]
    install(session, "e2e")
    try:
        session.run("pytest", "tests/e2e/test_versions.py", *options)
    finally:
        session.run("python", "-m", "tests.support.compatibility", report)


@nox.session(default=False, venv_backend="none")
@nox.parametrize("resolution", ["lowest-direct", "highest"])
@nox.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def runtime_with(session: nox.Session, version: str, resolution: str) -> None:
    """Test the runtime with a Python, and the oldest or newest of what it stands on."""
    folder = session.cache_dir / f"{version}-{resolution}"
    python = folder / "bin" / "python"
    pins = folder / "pins.txt"
    # pyenv's shims answer for one version only.
    own = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    uv = partial(session.run, "uv", external=True, env=ENV)
    uv("venv", "--clear", f"--python={own[-1] if own else version}", str(folder))
    groups = ["--group=runtime", "--group=example", f"--resolution={resolution}"]
    uv("pip", "compile", *groups, f"--python={python}", f"--output-file={pins}", silent=True)
    # What tests it is new.
    uv("pip", "install", "--group=tests", f"--constraint={pins}", f"--python={python}")
    arguments = ["tests/runtime", WORKERS, *session.posargs]
    session.run(str(python), "-m", "pytest", *arguments, external=True, env=ENV)


def pytest(session: nox.Session, folder: str, *options: str, group: str | None = None) -> None:
    """Run the tests of a folder; `group` names their packages when it isn't the session."""
    install(session, group or session.name)
    session.run("pytest", folder, WORKERS, *options, *session.posargs)


@nox.session(default=False)
def config(session: nox.Session) -> None:
    """Write the template's mlflow.yml and its JSON Schema anew, from the models in config.py."""
    install(session, "runtime")
    session.run("python", "-m", "tests.support.shipped_config")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure side by side with plain Kedro and kedro-mlflow; `-- --help` lists the options."""
    install(session, "bench")
    environments = str(session.cache_dir / "bench")
    session.run("python", "-m", "benchmarks", f"--environments={environments}", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Generate the example into FOLDER, run it and show the run: `nox -s demo [-- FOLDER]`."""
    if session.posargs:
        project = Path(session.invoked_from, session.posargs[0])
    else:
        project = Path(tempfile.mkdtemp(prefix="km-template-"), "penguins")
    if project.exists() and any(project.iterdir()):
        session.error(f"{project} is not empty: name a new folder.")
    install(session, "copier")
    generate(session, project)
    # The project gets an environment of its own, not the session's.
    own = {"VIRTUAL_ENV": None, "UV_PROJECT_ENVIRONMENT": None}
    with session.chdir(project):
        session.run("uv", "sync", "--quiet", env=own, external=True)
        session.run("uv", "run", "kedro", "run", env=own, external=True)
        show = str(HERE / "demo" / "show_run.py")
        session.run("uv", "run", "python", show, env=own, external=True)


def generate(session: nox.Session, project: Path, *answers: str) -> None:
    """Generate a project from this checkout, with what isn't committed yet."""
    data = [f"--data={answer}" for answer in answers]
    # By its full path, which the project notes: an update finds it from anywhere.
    session.run(
        "copier", "copy", "--quiet", "--defaults", "--vcs-ref=HEAD", *data, str(HERE), str(project)
    )


if __name__ == "__main__":
    nox.main()
