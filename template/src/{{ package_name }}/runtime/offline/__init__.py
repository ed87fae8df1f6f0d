"""Runs that are kept on disk first, and replayed to a server that may go away."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from .. import credentials
from ..failures import is_away, reason_of
from ..loading import shown_uri
from .disk import Disk, DiskError
from .replay import replay, waiting

logger = logging.getLogger(__name__)

# In the environment of a run that is recorded, unless the user has set them.
OF_RUNS = {
    # What a node reads from the server isn't waited for, for minutes, when that is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # A thread that sends traces would lose them where a worker ends.
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
}

# In the environment of a replay. A request that creates something, and whose answer is lost, must
# not be made again by MLflow: the next replay looks first whether the server has done it.
OF_REPLAYS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def replay_after_run(disk: Disk, run_id: str, variables: Mapping[str, str | None]) -> None:
    """Replay what is on disk when a run has ended; what can't be replayed waits for the next time.

    Args:
        disk: Where the run is.
        run_id: The run's id on disk.
        variables: The environment that requests need: credentials.
    """
    where = shown_uri(disk.server.tracking_uri)
    key = f"replay {run_id}"
    credentials.export(key, {**variables, **OF_REPLAYS})
    try:
        with disk.locked():
            for outcome in replay(disk, waiting(disk.client())):
                name, on_disk = outcome.run.info.run_name, outcome.run.info.run_id
                if outcome.problem:
                    logger.warning(
                        "MLflow run '%s' (%s) stays in %s: %s",
                        name,
                        on_disk,
                        disk.folder,
                        outcome.problem,
                    )
                else:
                    logger.info(
                        "MLflow run '%s' (%s) is on %s as %s",
                        name,
                        on_disk,
                        where,
                        outcome.id_on_server,
                    )
    except KeyboardInterrupt:
        logger.warning(_STAYS, run_id, disk.folder, "interrupted")
        raise
    except DiskError as error:
        logger.warning(_STAYS, run_id, disk.folder, error.message)
    except Exception as error:  # the run has ended well, whatever this is
        if not is_away(error):
            logger.error("Not replayed", exc_info=True)
        logger.warning(_STAYS, run_id, disk.folder, f"{where}: {reason_of(error)}")
    finally:
        credentials.take_back(key)


_STAYS = "The run %s is in %s and not on the server (%s). `kedro mlflow sync` replays it."
