"""An embedded store that was moved or copied with its folder, and the files beside it.

MLflow keeps where the files of each run are as absolute URIs. A store belongs to the folder that it
lies in: what it has of the folder that it comes from is changed to this one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from .. import _mlflow
from ..config.uris import local_path

logger = logging.getLogger(__name__)

# Of an experiment that each store has: what is read of it says where the store was made.
_DEFAULT_EXPERIMENT = "0"


def follow(uri: str, file: Path, location: str) -> None:
    """Point a store at the files beside it, when it was moved or copied with its folder.

    Args:
        uri: The store.
        file: Its SQLite file.
        location: Where its files go, as mlflow.yml says.
    """
    if origin := origin_of(uri, file, location):
        _mlflow.replace_folder(uri, origin.as_uri(), file.parent.as_uri())
        logger.info("%s was in %s: its runs' files are looked for beside it now", file, origin)


def origin_of(uri: str, file: Path, location: str) -> Path | None:
    """Return the folder that a store was moved or copied from; None for one that was not.

    Args:
        uri: The store.
        file: Its SQLite file.
        location: Where its files go, as mlflow.yml says.
    """
    from mlflow import MlflowClient

    recorded = MlflowClient(uri).get_experiment(_DEFAULT_EXPERIMENT).artifact_location
    recorded = recorded.removesuffix(f"/{_DEFAULT_EXPERIMENT}")
    if recorded == location or not recorded.startswith("file:"):
        return None
    before, here = local_path(recorded), file.parent
    places = [here / "mlartifacts"]
    if location.startswith("file:"):
        places.append(local_path(location))
    for place in places:
        if not place.is_relative_to(here):
            continue
        name = place.relative_to(here)
        if before.parts[-len(name.parts) :] != name.parts:
            continue
        origin = Path(*before.parts[: -len(name.parts)])
        original = origin / file.name
        if original.exists() and original.samefile(file):  # another way to the same folder
            continue
        # What lies in a folder of its own, without a store beside it, was put there on purpose.
        if original.exists() or not before.exists():
            return origin
    return None
