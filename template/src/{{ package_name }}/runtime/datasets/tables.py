"""Tables: those among a run's artifacts, and the table of past runs."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kedro.io import DatasetError

from .._mlflow import default_experiment_id
from ..stores.server import Server, all_results
from ..tracking.handle import RunHandle, attach
from .base import TrackedDataset, check, mode_of
from .files import fetch, folder_of, has_artifact

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

# What `log_table` refuses in the path of a table.
_REFUSED = "\"',:[]{}"

# Runs asked for in one request.
PAGE = 1000

_TIMES = ("start_time", "end_time")
_ATTRIBUTES = ("run_id", "experiment_id", "run_name", "status", "artifact_uri", *_TIMES)
_GROUPS = ("metrics.", "params.", "tags.")

# MLflow's `log_table` reads a run's list of tables, and then writes it: threads take turns.
_listing = threading.Lock()


class MlflowTableDataset(TrackedDataset):
    """A table among the run's artifacts, which MLflow's UI shows as one.

    `mlflow.log_table` writes it. JSON keeps texts, ten digits after a number's point, and times as
    texts; Parquet keeps all types. Neither keeps the index: `reset_index()` makes it a column.
    Columns of images (PIL's or MLflow's) are saved beside the table, and load as dictionaries with
    the path of each.

    Args:
        artifact_file: Path among the run's artifacts, ending in `.json` or `.parquet`; by default
            the dataset's name in the catalog with `.json`.
        run_id: Run to log to and load from instead of the current one.
        save_args: `mode`: `overwrite` (default) replaces a table that the run has already,
            `append` adds the rows to it. What a node yields is one table in both.
        metadata: Kept and not used.

    Raises:
        DatasetError: When an argument is none of these.
    """

    SHOWN = ("artifact_file", "run_id", "save_args")

    def __init__(
        self,
        artifact_file: str | None = None,
        run_id: str | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.artifact_file = _checked_file(artifact_file) if artifact_file else None
        self.run_id = run_id
        self.save_args = save_args or {}
        self.metadata = metadata
        self._mode = mode_of("save_args", self.save_args, ("overwrite", "append"))
        self._chunks: list[pd.DataFrame] = []  # what a node has yielded so far

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run; its name names the file when nothing else does."""
        super().bind(*args)
        self._chunks = []
        self.artifact_file = self.artifact_file or f"{self._name}.json"

    def load(self) -> pd.DataFrame:
        """Return the table.

        Not with MLflow's `load_table`: it makes the number 7 of the text "007", and finds no table
        that is missing in the run's list, as one may when two processes saved tables at once.
        """
        import pandas as pd

        with self._reading(), TemporaryDirectory() as folder:
            local = fetch(self._resolve_run(), PurePosixPath(self._required_file()), folder)
            if local.suffix == ".parquet":
                return pd.read_parquet(local)
            content = json.loads(local.read_text(encoding="utf-8"))
            return pd.DataFrame(content["data"], columns=content["columns"])

    def save(self, data: Any) -> None:
        """Log a DataFrame, a dictionary of lists, or a dictionary that is one row."""
        import pandas as pd

        file = self._required_file()
        if not isinstance(data, pd.DataFrame | Mapping):
            raise DatasetError(
                "MlflowTableDataset takes a DataFrame or a dictionary of lists, "
                f"got {type(data).__name__}."
            )
        if not self._is_tracked:
            return
        is_table = isinstance(data, pd.DataFrame) or any(
            map(pd.api.types.is_list_like, data.values())
        )
        run, table = self._resolve_run(), pd.DataFrame(data if is_table else [data])
        if self.in_chunks and self._mode == "overwrite":
            self._chunks.append(table)
            table = pd.concat(self._chunks, ignore_index=True)
        with _listing:
            if self._mode == "overwrite" and self._is_in(run):
                _make_empty(run, file)
            try:
                run.server.client.log_table(run.run_id, table, file)
            except json.JSONDecodeError:  # MLflow 3.17 cuts a list that is too long for its tag
                logger.warning("MLflow's list of tables is full: its UI won't show '%s'", file)

    def _required_file(self) -> str:
        return _checked_file(self._required("an `artifact_file`", self.artifact_file))

    def _is_in(self, run: RunHandle) -> bool:
        return has_artifact(run, PurePosixPath(self._required_file()))


class MlflowRunsDataset(TrackedDataset):
    """The runs of the project so far, to load as a DataFrame with a row for each.

    The run that loads it is left out, because it has not ended. Without `columns` there are
    `run_id`, `experiment_id`, `run_name`, `status`, `artifact_uri`, `start_time` and `end_time`
    (in UTC), then each `metrics.…`, `params.…` and `tags.…` that any of the runs has.

    Args:
        filter: Which runs, in MLflow's search syntax, such as `metrics.rmse < 1`; by default all
            that are not deleted.
        order_by: What to order by, such as `metrics.rmse DESC`, or a list; by default the newest
            run comes first.
        limit: How many runs at most; by default all.
        columns: The columns wanted, in this order; one that no run has is empty.
        experiment_names: Experiments to search instead of the current run's.
        include_current: Don't leave out the run that loads this.
        metadata: Kept and not used.

    Raises:
        DatasetError: When an argument is none of these.
    """

    SHOWN = ("filter", "order_by", "limit", "columns", "experiment_names", "include_current")

    def __init__(
        self,
        filter: str | None = None,  # noqa: A002
        order_by: str | list[str] | None = None,
        limit: int | None = None,
        columns: list[str] | None = None,
        experiment_names: str | list[str] | None = None,
        include_current: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        given: Any = limit
        is_number = isinstance(given, int) and given > 0
        check(given is None or is_number, "limit", "is a number of runs from 1", given)
        self.filter = filter
        self.order_by = _list_of_texts("order_by", order_by)
        self.limit = limit
        self.columns = _list_of_texts("columns", columns)
        rule = f"are among {', '.join(_ATTRIBUTES)}, metrics.…, params.… and tags.…"
        for column in self.columns:
            check(column in _ATTRIBUTES or column.startswith(_GROUPS), "columns", rule, column)
        self.experiment_names = _list_of_texts("experiment_names", experiment_names)
        self.include_current = include_current
        self.metadata = metadata

    def load(self) -> pd.DataFrame:
        """Search the runs, and return a table of them."""
        import pandas as pd

        with self._reading():
            rows = [
                {name: getattr(run.info, name) for name in _ATTRIBUTES}
                | {f"metrics.{name}": value for name, value in run.data.metrics.items()}
                | {f"params.{name}": value for name, value in run.data.params.items()}
                | {f"tags.{name}": value for name, value in run.data.tags.items()}
                for run in self._search()
            ]
        others = sorted({name for row in rows for name in row} - {*_ATTRIBUTES})
        table = pd.DataFrame(rows).reindex(columns=self.columns or [*_ATTRIBUTES, *others])
        for time in table.columns.intersection(_TIMES):
            table[time] = pd.to_datetime(table[time].astype("Int64"), unit="ms", utc=True)
        return table

    def _search(self) -> Iterable[Run]:
        server = self._server or Server.in_use()
        run = self._run if self._server else attach()
        experiments = self._experiment_ids(server.client, run)
        conditions = [self.filter] if self.filter else []
        if run and self.include_current:
            run.flush()
        elif run:
            conditions.append(f"attributes.run_id != '{run.run_id}'")
        if not experiments:
            return ()
        # Not `mlflow.search_runs`, which asks the server that the process points at.
        runs = all_results(
            server.client.search_runs,
            experiments,
            " and ".join(conditions),
            max_results=min(PAGE, self.limit or PAGE),
            order_by=self.order_by,
        )
        return islice(runs, self.limit)

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Raise an error: runs are what other datasets log to."""
        raise DatasetError(
            "MlflowRunsDataset only loads. To log to a run, save with MlflowMetricsDataset, "
            "MlflowTableDataset or another of the Mlflow datasets."
        )

    def _experiment_ids(self, client: MlflowClient, run: RunHandle | None) -> list[str]:
        if not self.experiment_names:
            if run and not self._other_server:
                return [run.experiment_id]
            if run:  # on disk, where its experiment has another id
                name = run.server.client.get_experiment(run.experiment_id).name
                known = client.get_experiment_by_name(name)
                return [known.experiment_id] if known else []
            if self._server:
                raise DatasetError(
                    "MlflowRunsDataset needs `experiment_names` in a pipeline that isn't tracked."
                )
            return [default_experiment_id()]
        ids = []
        for name in self.experiment_names:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise DatasetError(f"`experiment_names`: there is no experiment {name!r}.")
            ids.append(experiment.experiment_id)
        return ids

    def _exists(self) -> bool:
        return True


def _list_of_texts(argument: str, given: Any) -> list[str]:
    """Return a list of texts, which may be given as one text or be missing."""
    texts = [given] if isinstance(given, str) else list(given or ())
    for text in texts:
        if not isinstance(text, str):
            raise DatasetError(f"`{argument}` is a list of texts, got {text!r} in it.")
    return texts


def _checked_file(file: str) -> str:
    path = PurePosixPath(file)
    is_inside = not (path.is_absolute() or ".." in path.parts or set(_REFUSED) & set(file))
    rule = (
        f"is a path inside the run's artifacts without {' '.join(_REFUSED)} "
        "that ends in .json or .parquet"
    )
    check(is_inside and path.suffix in (".json", ".parquet"), "artifact_file", rule, file)
    return str(path)


def _make_empty(run: RunHandle, file: str) -> None:
    """Replace a table with an empty one: to a table that is there `log_table` adds its rows."""
    import pandas as pd

    with TemporaryDirectory() as folder:
        local = Path(folder, PurePosixPath(file).name)
        if local.suffix == ".parquet":
            pd.DataFrame().to_parquet(local)
        else:
            pd.DataFrame().to_json(local, orient="split")
        run.log_artifact(local, folder_of(PurePosixPath(file)))
