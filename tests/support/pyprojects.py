"""The pyproject.toml of a project that is nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pyproject_of_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a project whose package is `shop`; gives what writes its pyproject.toml."""
    (tmp_path / "src" / "shop").mkdir(parents=True)
    (tmp_path / "src" / "shop" / "__init__.py").touch()
    (tmp_path / "src" / "pyproject.toml").write_text('[project]\ndependencies = ["ruff"]')
    monkeypatch.syspath_prepend(tmp_path / "src")

    def describe(text: str) -> None:
        tool = '[tool.kedro]\npackage_name = "shop"'
        (tmp_path / "pyproject.toml").write_text(f"{tool}\n{text}")

    return describe
