"""Every use of something of Kedro, or of Kedro's datasets, that isn't public.

Each function says why there is no public way, and the version that it was seen in; a test named
after it (tests/runtime/test_private.py) fails when it is there no more.
"""

from __future__ import annotations

from kedro.framework.hooks.manager import _NullPluginManager
from kedro.pipeline import Node
from kedro.runner.task import Task


def without_confirms(node: Node) -> Node:
    """Return a node that confirms no dataset.

    A copy with other arguments can't be made in public: `Node.inputs` doesn't tell which argument
    of the function an input is for. Seen in Kedro 1.7.
    """
    return node._copy(confirms=None)


def keep_hooks_out() -> None:
    """Have the tasks that this process runs for a ParallelRunner call no hooks.

    Kedro's tasks register the project's hooks in every worker where the project is known; there is
    no option for it. Seen in Kedro 1.7.
    """
    Task._run_node_synchronization = _NullPluginManager  # type: ignore[method-assign]
