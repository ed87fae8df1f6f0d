"""What the Mlflow datasets share: the run that they log to, and how they show themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kedro.io import AbstractDataset, DatasetError

from ..config.uris import shown_uri
from ..stores.errors import is_away, reason_of
from ..stores.server import Server
from ..tracking.handle import RunHandle, attach

if TYPE_CHECKING:
    from mlflow.entities import RunInfo

# What MLflow answers when a run, a model, a version or an alias isn't there.
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


def check(is_right: object, argument: str, rule: str, given: object) -> None:
    """Check an argument of a dataset.

    Raises:
        DatasetError: When it isn't right, with the rule and with what was given.
    """
    if not is_right:
        raise DatasetError(f"`{argument}` {rule}, got {given!r}.")


def mode_of(argument: str, given: Mapping[str, Any], modes: Sequence[str]) -> str:
    """Return the `mode` in an argument of a dataset, by default the first that there is.

    Raises:
        DatasetError: When it is none of them.
    """
    mode: str = given.get("mode", modes[0])
    check(mode in modes, f"{argument}.mode", f"is one of {', '.join(modes)}", mode)
    return mode


def info_of(run: RunHandle) -> RunInfo:
    """Return what the server knows of a run.

    Raises:
        DatasetError: When it has no such run.
    """
    from mlflow.exceptions import MlflowException

    try:
        return run.server.client.get_run(run.run_id).info
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        where = shown_uri(run.server.tracking_uri)
        raise DatasetError(f"There is no run '{run.run_id}' on {where}.") from error


class TrackedDataset(AbstractDataset[Any, Any]):
    """A dataset that logs to a run: that of the Kedro run whose catalog it is in.

    Outside a Kedro run it logs to the run that is open in MLflow. A `run_id` of its own goes
    before both.
    """

    # The attributes that Kedro shows, each an argument of the same name.
    SHOWN: ClassVar[tuple[str, ...]] = ()

    run_id: str | None = None
    metadata: dict[str, Any] | None = None

    # Whether a node yields what is saved here, so that each `save` brings only a part of it.
    in_chunks: bool = False

    _name: str = ""
    _server: Server | None = None
    _run: RunHandle | None = None

    def bind(self, server: Server | None, run: RunHandle | None, name: str) -> None:
        """Bind the dataset to a Kedro run.

        Args:
            server: Where the project's runs and models are; None outside of a Kedro run.
            run: The run to log to; None when the pipeline's tracking is disabled.
            name: The dataset's name in the catalog.
        """
        self._server, self._run, self._name = server, run, name.partition("@")[0]

    def copy_to(self, folder: Path) -> dict[str, Any] | None:  # noqa: ARG002
        """Copy what would be loaded to a local folder.

        Returns:
            The configuration of the dataset that loads the copy, with a path relative to the
            folder; None when there is no file, and what is loaded can be kept instead.
        """
        return None

    @property
    def _is_tracked(self) -> bool:
        """Whether to log at all: not in a Kedro run whose tracking is disabled."""
        return self._server is None or self._run is not None

    def _resolve_run(self) -> RunHandle:
        return self._run_with(self.run_id)

    def _run_with(self, run_id: str | None) -> RunHandle:
        """Return the run of an id, by default the current one.

        Raises:
            DatasetError: When there is none.
        """
        if self._run and run_id in (None, self._run.run_id):
            return self._run
        run = attach(self._server, run_id)
        if run is None:
            raise DatasetError(
                f"{type(self).__name__} has no run to use: run it in a pipeline that is tracked, "
                "give it a `run_id`, or open a run with `mlflow.start_run()`."
            )
        return run

    @property
    def _other_server(self) -> Server | None:
        """The project's server, where the run is not there but on disk until it is replayed."""
        return self._server if self._run and self._run.server != self._server else None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the server when it is away while something is read from it.

        Raises:
            DatasetError: Instead of whatever MLflow raises then.
        """
        try:
            yield
        except Exception as error:  # each kind of store has errors of its own
            if self._other_server is None or not is_away(error):
                raise
            where = shown_uri(self._other_server.tracking_uri)
            raise DatasetError(
                f"{type(self).__name__} '{self._name}' can't be loaded: the MLflow server {where} "
                f"is away ({reason_of(error)}), and the run can't read it from the disk."
            ) from error

    def _required(self, argument: str, value: str | None) -> str:
        """Return an argument that is by default the dataset's name in the catalog.

        Raises:
            DatasetError: When there is neither.
        """
        if not value:
            raise DatasetError(
                f"{type(self).__name__} needs {argument} outside a Kedro run, where it doesn't "
                "know its name in the catalog."
            )
        return value

    def _exists(self) -> bool:
        try:
            run = self._resolve_run()
        except DatasetError:  # no run, nothing in it
            return False
        return self._is_in(run)

    def _is_in(self, run: RunHandle) -> bool:
        """Check whether a run has what the dataset would load.

        For each dataset that leaves `_exists` as it is; models and past runs have one of their own.
        """
        raise NotImplementedError

    def _describe(self) -> dict[str, Any]:
        return {name: getattr(self, name) or None for name in self.SHOWN}

    def _init_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._init_config()
        # Kedro 1.7 has the arguments of an inherited `__init__` as those of `*args, **kwargs`.
        if {"args", "kwargs"} <= config.keys():
            given = inspect.signature(type(self)).bind(*config.pop("args"), **config.pop("kwargs"))
            config |= {
                name: given.arguments[name] for name in given.arguments if name != "metadata"
            }
        return config
