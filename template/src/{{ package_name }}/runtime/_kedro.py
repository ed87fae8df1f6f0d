"""Every use of something of Kedro, or of Kedro's datasets, that isn't public.

Each function says why there is no public way, and the version that it was seen in; a test named
after it (tests/runtime/test_private.py) fails when it is there no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedro.config import OmegaConfigLoader
    from pluggy import PluginManager


def use_globals_of(loader: OmegaConfigLoader) -> None:
    """Let `${globals:…}` give the values of this loader.

    A loader registers the resolver only when it is made, in place of the one before, and where it
    looks values up isn't public. Seen in Kedro 1.0 to 1.7.
    """
    loader._register_globals_resolver()


def cached_dataset(dataset: Any) -> Any:
    """Return the dataset that a `CachedDataset` keeps the data of; None for any other dataset.

    Only its `load` and `save` reach it. Seen in Kedro 1.0 to 1.7.
    """
    from kedro.io import CachedDataset

    return dataset._dataset if isinstance(dataset, CachedDataset) else None


def hook_manager(hooks: Iterable[Any], disabled_plugins: Iterable[str]) -> PluginManager:
    """Return a manager of a project's hooks, and of those of plugins that aren't disabled.

    A session makes one for itself; `kedro.runner.task.Task` makes one in a worker from the settings
    of the process, which a worker of several projects doesn't have. Seen in Kedro 1.0 to 1.7.
    """
    from kedro.framework.hooks import manager

    made: PluginManager = manager._create_hook_manager()
    manager._register_hooks(made, hooks)
    manager._register_hooks_entry_points(made, disabled_plugins)
    return made
