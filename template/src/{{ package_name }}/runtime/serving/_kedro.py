"""What a pipeline as a model uses of Kedro that isn't public."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedro.pipeline import Node


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
    from kedro.framework.hooks.manager import _NullPluginManager
    from kedro.runner.task import Task

    Task._run_node_synchronization = _NullPluginManager  # type: ignore[method-assign]
