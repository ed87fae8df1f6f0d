"""The project of a command, as Kedro opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata


@contextmanager
def opened(metadata: ProjectMetadata, env: str | None, **options: Any) -> Iterator[Any]:
    """Open a session on a project, and return its context."""
    with KedroSession.create(project_path=metadata.project_path, env=env, **options) as session:
        yield session.load_context()  # type: ignore[attr-defined]
