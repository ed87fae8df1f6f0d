"""Run the project as a package: `python -m <package>`, with the options of `kedro run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kedro.framework.cli.utils import find_run_command
from kedro.framework.project import configure_project


def main(*args: Any, **kwargs: Any) -> Any:
    """Run a pipeline; in a notebook its outputs are returned."""
    package_name = Path(__file__).parent.name
    configure_project(package_name)
    # In a notebook click must not end the Python process.
    kwargs["standalone_mode"] = not hasattr(sys, "ps1")
    return find_run_command(package_name)(*args, **kwargs)


if __name__ == "__main__":
    main()
