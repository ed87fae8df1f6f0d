"""Tables: those among a run's artifacts, and the table of past runs."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kedro.io import DatasetError

from ..server import Server
from ..tracking import RunHandle, attach
from .tracked import TrackedDataset

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

# What MLflow refuses in the path of a table.
_REFUSED = "\"',:[]{}"

# Runs asked for in one request.
PAGE = 1000

_TIMES = ("start_time", "end_time")
_ATTRIBUTES = ("run_id", "experiment_id", "run_name", "status", "artifact_uri", *_TIMES)
_GROUPS = ("metrics.", "params.", "tags.")


class MlflowTableDataset(TrackedDataset):
    """A table among the run's artifacts, which MLflow's UI shows as one.

    The file and its entry in the run are those of `mlflow.log_table`. In JSON a number, a text, a
    list or a dictionary loads as it was saved, numbers to 15 digits; a time loads as a text, and
    an infinity as missing. Parquet keeps all types. Neither keeps the index: `reset_index()`
    makes it a column. Columns of images (PIL's or MLflow's) are saved beside the table, and load
    as dictionaries with the path of each.

    Args:
        artifact_file: Path among the run's artifacts, ending in `.json` or `.parquet`; by default
            the dataset's name in the catalog with `.json`.
        run_id: Run to log to and load from instead of the current one.
        load_args: `run_ids`, a list of runs whose tables are loaded one below the other, and
            `extra_columns`, what to tell of each table's run, such as `run_id` or `params.seed`.
        save_args: `mode`: `overwrite` (default) replaces a table that the run has already,
            `append` adds the rows to it, as `mlflow.log_table` does. What a node yields is one
            table in both.
        metadata: Kept and not used.

    Raises:
        DatasetError: When an argument is none of these.
    """

    def __init__(
        self,
        artifact_file: str | None = None,
        run_id: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.artifact_file = _checked_file(artifact_file) if artifact_file else None
        self.run_id = run_id
        self._load_args = _only("load_args", load_args, ("run_ids", "extra_columns"))
        self._save_args = _only("save_args", save_args, ("mode",))
        self.metadata = metadata
        self._run_ids = _texts("load_args.run_ids", self._load_args.get("run_ids"))
        self._extra = _columns("load_args.extra_columns", self._load_args.get("extra_columns"))
        self._is_begun = False  # whether this has saved something
        self._mode = self._save_args.get("mode", "overwrite")
        if self._mode not in ("overwrite", "append"):
            raise DatasetError(f"`save_args.mode` is one of overwrite, append, got {self._mode!r}.")

    def bind(self, server: Server | None, run: RunHandle | None, name: str) -> None:
        """Tie the dataset to a Kedro run; its name names the file when nothing else does."""
        super().bind(server, run, name)
        self.artifact_file = self.artifact_file or f"{self._name}.json"

    def load(self) -> pd.DataFrame:
        """Load the table, or those of several runs as one."""
        import pandas as pd

        given = [attach(self._server, run_id) for run_id in self._run_ids]
        runs = [run for run in given if run] or [self._resolve_run()]
        return pd.concat([self._of_run(run) for run in runs], ignore_index=True)

    def save(self, data: Any) -> None:
        """Log a DataFrame, or a dictionary of lists."""
        file, table = self._required_file(), _table(data)
        if not self._is_tracked:
            return
        run = self._resolve_run()
        is_more = self._mode == "append" or (self.in_chunks and self._is_begun)
        if is_more and _has(run, file):
            import pandas as pd

            table = pd.concat([_read(run, file), table], ignore_index=True)
        with tempfile.TemporaryDirectory() as folder:
            _write(_with_image_files(table, file, Path(folder)), Path(folder, file))
            run.server.client.log_artifacts(run.run_id, folder)
        _enter(run, file)
        self._is_begun = True

    def _of_run(self, run: RunHandle) -> pd.DataFrame:
        file = self._required_file()
        try:
            table = _read(run, file)
        except Exception as error:  # each kind of artifact store has its own for what isn't there
            if _has(run, file):
                raise
            raise DatasetError(f"The run {run.run_id} has no table '{file}'.") from error
        if self._extra:
            told = _frame([run.server.client.get_run(run.run_id)], self._extra)
            for column in self._extra:
                new = f"{column}_" if column in table else column
                table[new] = told[column].iloc[0]
        return table

    def _required_file(self) -> str:
        if not self.artifact_file:
            raise DatasetError(
                "MlflowTableDataset needs an `artifact_file` outside a Kedro run, where it "
                "doesn't know its name in the catalog."
            )
        return _checked_file(self.artifact_file)

    def _exists(self) -> bool:
        try:
            run = self._resolve_run()
        except DatasetError:  # no run, no table
            return False
        return _has(run, self._required_file())

    def _describe(self) -> dict[str, Any]:
        return {
            "artifact_file": self.artifact_file,
            "run_id": self.run_id,
            "load_args": self._load_args or None,
            "save_args": self._save_args or None,
        }


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
        self.filter = filter
        self.order_by = _texts("order_by", order_by)
        self.limit = _limit(limit)
        self.columns = _columns("columns", columns)
        self.experiment_names = _texts("experiment_names", experiment_names)
        self.include_current = include_current
        self.metadata = metadata

    def load(self) -> pd.DataFrame:
        """Search the runs."""
        from mlflow.utils import get_results_from_paginated_fn

        server = self._server or Server.in_use()
        run = self._run if self._server else attach()
        experiments = self._experiment_ids(server, run)
        conditions = [self.filter] if self.filter else []
        if run and self.include_current:
            run.flush()
        elif run:
            conditions.append(f"attributes.run_id != '{run.run_id}'")

        def page(size: int, token: str | None) -> Sequence[Run]:
            return server.client.search_runs(
                experiments,
                " and ".join(conditions),
                max_results=size,
                order_by=self.order_by,
                page_token=token,
            )

        return _frame(get_results_from_paginated_fn(page, PAGE, self.limit), self.columns)

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Refuse: runs are what other datasets log to.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(
            "MlflowRunsDataset only loads. To log to a run, save with MlflowMetricsDataset, "
            "MlflowTableDataset or another of the Mlflow datasets."
        )

    def _experiment_ids(self, server: Server, run: RunHandle | None) -> list[str]:
        if not self.experiment_names:
            if run:
                return [run.experiment_id]
            if self._server:
                raise DatasetError(
                    "MlflowRunsDataset needs `experiment_names` in a pipeline that isn't tracked."
                )
            from mlflow.tracking import fluent

            return [str(fluent._get_experiment_id())]
        found = {name: server.client.get_experiment_by_name(name) for name in self.experiment_names}
        missing = [name for name, experiment in found.items() if experiment is None]
        if missing:
            raise DatasetError(f"`experiment_names`: there is no experiment {missing[0]!r}.")
        return [experiment.experiment_id for experiment in found.values() if experiment]

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {
            "filter": self.filter,
            "order_by": self.order_by or None,
            "limit": self.limit,
            "columns": self.columns or None,
            "experiment_names": self.experiment_names or None,
            "include_current": self.include_current or None,
        }


def _only(name: str, given: dict[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    if unknown := [key for key in given or {} if key not in known]:
        raise DatasetError(f"`{name}` takes {' and '.join(known)}, got {unknown[0]!r}.")
    return given or {}


def _limit(given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or given < 1):
        raise DatasetError(f"`limit` is a number of runs from 1, got {given!r}.")
    return given


def _texts(name: str, given: Any) -> list[str]:
    """Read a list of texts, which may be one text or missing."""
    texts = [given] if isinstance(given, str) else list(given or ())
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise DatasetError(f"`{name}` is a list of texts, got {wrong[0]!r} in it.")
    return texts


def _columns(name: str, given: Any) -> list[str]:
    columns = _texts(name, given)
    for column in columns:
        if column not in _ATTRIBUTES and not column.startswith(_GROUPS):
            raise DatasetError(
                f"`{name}` are among {', '.join(_ATTRIBUTES)}, metrics.…, params.… and tags.…, "
                f"got {column!r}."
            )
    return columns


def _frame(runs: Sequence[Run], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Make a table of runs, with the types of its columns whether there are runs or not."""
    import pandas as pd

    rows = [_row(run) for run in runs]
    found = sorted({name for row in rows for name in row} - {*_ATTRIBUTES})
    frame = {}
    for column in columns or [*_ATTRIBUTES, *found]:
        values = [row.get(column) for row in rows]
        if column in _TIMES:
            frame[column] = pd.to_datetime(pd.Series(values, dtype="Int64"), unit="ms", utc=True)
        else:
            is_metric = column.startswith("metrics.")
            frame[column] = pd.Series(values, dtype="float64" if is_metric else "object")
    return pd.DataFrame(frame)


def _row(run: Run) -> dict[str, Any]:
    return {
        **{name: getattr(run.info, name) for name in _ATTRIBUTES},
        **{f"metrics.{name}": value for name, value in run.data.metrics.items()},
        **{f"params.{name}": value for name, value in run.data.params.items()},
        **{f"tags.{name}": value for name, value in run.data.tags.items()},
    }


def _checked_file(file: str) -> str:
    path = PurePosixPath(file)
    if path.suffix not in (".json", ".parquet"):
        raise DatasetError(f"`artifact_file` ends in .json or .parquet, got {file!r}.")
    if path.is_absolute() or ".." in path.parts or set(_REFUSED) & set(file):
        raise DatasetError(
            f"`artifact_file` is a path inside the run's artifacts without {' '.join(_REFUSED)}, "
            f"got {file!r}."
        )
    return str(path)


def _table(data: Any) -> pd.DataFrame:
    """Make a table of a DataFrame, or of a dictionary of columns or of one row."""
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data
    if not isinstance(data, Mapping):
        kind = type(data).__name__
        raise DatasetError(
            f"MlflowTableDataset takes a DataFrame or a dictionary of lists, got {kind}."
        )
    is_row = not any(pd.api.types.is_list_like(column) for column in data.values())
    return pd.DataFrame([data] if is_row else data)


def _has(run: RunHandle, file: str) -> bool:
    folder = str(PurePosixPath(file).parent)
    artifacts = run.server.client.list_artifacts(run.run_id, None if folder == "." else folder)
    return any(artifact.path == file and not artifact.is_dir for artifact in artifacts)


def _read(run: RunHandle, file: str) -> pd.DataFrame:
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        local = Path(run.server.client.download_artifacts(run.run_id, file, folder))
        if local.suffix == ".parquet":
            return pd.read_parquet(local)
        # Not pandas' reader: it makes a number of the text "007".
        content = json.loads(local.read_text(encoding="utf-8"))
        return pd.DataFrame(content["data"], columns=content["columns"])


def _write(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="split", index=False, date_format="iso", double_precision=15)


def _with_image_files(table: pd.DataFrame, file: str, folder: Path) -> pd.DataFrame:
    """Write the images in a table to files, as `mlflow.log_table` does, and put their paths in."""

    def written(image: Any) -> dict[str, str]:
        from mlflow.tracking.multimedia import compress_image_size

        path = PurePosixPath("table_images", PurePosixPath(file).with_suffix(""), str(uuid4()))
        full, small = path.with_suffix(".png"), path.with_suffix(".webp")
        (folder / path.parent).mkdir(parents=True, exist_ok=True)
        image.save(str(folder / full))
        compress_image_size(image).save(str(folder / small))
        return {"type": "image", "filepath": str(full), "compressed_filepath": str(small)}

    columns = {}
    for column, kind in table.dtypes.items():
        if kind != "object":
            continue
        images = [_is_image(value) for value in table[column]]
        if any(images) and not all(images):
            raise DatasetError(f"Column {column!r} is of images, but not all of it.")
        if any(images):
            columns[column] = table[column].map(written)
    return table.assign(**columns)


def _is_image(value: Any) -> bool:
    """Tell by what is done with it, whether PIL's or MLflow's."""
    return all(hasattr(value, name) for name in ("save", "resize", "size"))


def _enter(run: RunHandle, file: str) -> None:
    """Put a table on the run's list of tables, which MLflow's UI and `mlflow.load_table` read."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

    client = run.server.client
    with _alone():
        listed = json.loads(client.get_run(run.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": file, "type": "table"}
        if entry in listed:
            return
        tag = json.dumps([*listed, entry])
        if len(tag) > MAX_TAG_VAL_LENGTH:
            logger.warning("MLflow's list of tables is full: its UI won't show '%s' as one", file)
            return
        client.set_tag(run.run_id, MLFLOW_LOGGED_ARTIFACTS, tag)


@contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock over this user's threads and processes: the tag is read, then written.

    SQLite's locks are the same on all systems, and end with the process that holds them.
    """
    user = getattr(os, "getuid", str)()  # Windows has a folder for each user
    path = Path(tempfile.gettempdir(), f"mlflow-tables-{user}.lock")
    with closing(sqlite3.connect(path, timeout=300, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        yield
