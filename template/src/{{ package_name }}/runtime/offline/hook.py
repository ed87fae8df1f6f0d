"""The hook that keeps each run on disk until it has ended, and then replays it to the server."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kedro.framework.hooks import hook_impl

from ..binding import context_of_run, is_tracked, keep_run_in, run_of
from ..config.loading import read_credentials
from ..stores.errors import is_away, reason_of
from .disk import Disk, DiskError, disk_of, ended_families, experiment_on_disk
from .replay import replay, replaying

if TYPE_CHECKING:
    from kedro.io import DataCatalog

    from ..stores.project import MlflowConfig

logger = logging.getLogger(__name__)

# In the environment of a run that is kept on disk, unless the user has set them.
RUN_VARIABLES = {
    # What a node reads from the server isn't waited for, for minutes, when that is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # A thread that sends traces would lose them where a worker ends.
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
}

_STAYS = "The run %s is in %s and not on the server (%s). `kedro mlflow sync` replays it."


class OfflineHook:
    """Keep runs on disk first where mlflow.yml has `tracking.on_unreachable: offline`.

    Its wrappers are called before those of `MlflowHook` and return after them, whatever the order
    in `HOOKS`.
    """

    def __init__(self) -> None:
        # Of each Kedro run in progress, by the id of its catalog: a service session has several.
        self._disks: dict[int, tuple[Disk, Mapping[str, str]]] = {}

    @hook_impl(wrapper=True, tryfirst=True)
    def before_pipeline_run(
        self, run_params: dict[str, Any], catalog: DataCatalog
    ) -> Iterator[None]:
        """Have the run opened in the store on disk."""
        context = context_of_run()
        config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
        is_offline = config.tracking.on_unreachable == "offline" and is_tracked(context, run_params)
        experiment = config.tracking.experiment
        disk = disk_of(
            config.server.connection,
            context.project_path,
            restore_if_deleted=experiment.restore_if_deleted,
        )
        if disk is None or not is_offline:
            return (yield)
        self._disks[id(catalog)] = disk, read_credentials(context)
        keep_run_in(catalog, disk.store, experiment_on_disk(disk, experiment), RUN_VARIABLES)
        logger.info(
            "The run is kept on disk until it has ended: `kedro mlflow ui --offline` shows it"
        )
        try:
            return (yield)
        except BaseException:
            self._replay(catalog)
            raise

    @hook_impl(wrapper=True, tryfirst=True)
    def after_pipeline_run(self, catalog: DataCatalog) -> Iterator[None]:
        """Replay what is on disk, now that the run has ended."""
        try:
            return (yield)
        finally:
            self._replay(catalog)

    @hook_impl(wrapper=True, tryfirst=True)
    def on_pipeline_error(self, catalog: DataCatalog) -> Iterator[None]:
        """Replay what is on disk, now that the run has failed."""
        try:
            return (yield)
        finally:
            self._replay(catalog)

    def _replay(self, catalog: DataCatalog) -> None:
        disk, variables = self._disks.pop(id(catalog), (None, {}))
        run = run_of(catalog)
        if disk and run and run.server == disk.store:
            replay_after_run(disk, run.run_id, variables)


def replay_after_run(disk: Disk, run_id: str, variables: Mapping[str, str]) -> None:
    """Replay what is on disk when a run has ended; what can't be replayed waits for the next time.

    Args:
        disk: Where the run is.
        run_id: The run's id on disk.
        variables: The environment that requests need: credentials.
    """
    try:
        with replaying(disk, variables):
            for outcome in replay(disk, ended_families(disk.client())):
                run = f"MLflow run '{outcome.run.info.run_name}' ({outcome.run.info.run_id})"
                if outcome.problem:
                    logger.warning("%s stays in %s: %s", run, disk.folder, outcome.problem)
                else:
                    logger.info("%s is on %s as %s", run, disk.address, outcome.id_on_server)
    except KeyboardInterrupt:
        logger.warning(_STAYS, run_id, disk.folder, "interrupted")
        raise
    except DiskError as error:
        logger.warning(_STAYS, run_id, disk.folder, error.message)
    except Exception as error:  # the run has ended well, whatever this is
        if not is_away(error):
            logger.error("Not replayed", exc_info=True)
        logger.warning(_STAYS, run_id, disk.folder, f"{disk.address}: {reason_of(error)}")
