"""What the runtime uses of MLflow and Kedro that isn't public is there, and does what it should."""

from __future__ import annotations

import subprocess
import sys

from kedro.pipeline import Node
from kedro.runner.task import Task

from runtime import _kedro

from ..conftest import REPOSITORY


def test_without_confirms() -> None:
    node = Node(in_a_process, {"code": "a"}, None, name="it", confirms="a")

    assert hasattr(Node, "_copy"), "Kedro's Node has no _copy: how is one made without `confirms`?"
    assert _kedro.without_confirms(node).confirms == []
    assert str(_kedro.without_confirms(node)) == str(node)


def test_keep_hooks_out() -> None:
    name = "_run_node_synchronization"
    assert hasattr(Task, name), f"Kedro's Task has no {name}: where do its workers get hooks?"
    in_a_process(  # nothing takes it back
        "from kedro.runner.task import Task\nfrom runtime._kedro import keep_hooks_out\n"
        "keep_hooks_out()\n"
        "assert not Task._run_node_synchronization('a', {}).hook.before_node_run(node=1)"
    )


def test_skip_type_hint_validation() -> None:
    told = in_a_process("import runtime.pipeline_model")

    assert "type hint" not in told, "MLflow's PythonModel has no _skip_type_hint_validation"


def in_a_process(code: str) -> str:
    """Run code in a process of its own; gives what it says, warnings included."""
    words = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr
