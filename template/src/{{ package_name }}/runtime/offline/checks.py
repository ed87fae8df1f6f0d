"""What `kedro mlflow doctor` tells of the runs on disk."""

from __future__ import annotations

from pathlib import Path

from .disk import disks
from .replay import waiting


def runs_on_disk(project_path: Path) -> list[str]:
    """Return the ids of the runs in a project that wait to be replayed."""
    found = [waiting(disk.client()) for disk in disks(project_path)]
    return [family[0].info.run_id for families in found for family in families]
