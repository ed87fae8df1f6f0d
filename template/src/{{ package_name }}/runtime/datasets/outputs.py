"""Log outputs of nodes as artifacts, without a word in the catalog."""

from __future__ import annotations

import json
import logging
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .._kedro import uncached
from .base import TrackedDataset
from .files import has_file, log_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kedro.io import AbstractDataset

    from ..tracking.handle import RunHandle

logger = logging.getLogger(__name__)

# Rows that the preview of a table shows.
PREVIEW_ROWS = 100


def is_wanted(name: str, patterns: Iterable[str]) -> bool:
    """Check whether a dataset's name, without its transcoding, matches one of the patterns."""
    plain = name.partition("@")[0]
    return any(fnmatchcase(plain, pattern) for pattern in patterns)


def log_output(run: RunHandle, name: str, dataset: AbstractDataset[Any, Any], data: Any) -> None:
    """Log what a node has given to a dataset, in the folder `outputs/<name>` of the artifacts.

    That is the dataset's own file, or where it has none a file of a kind that MLflow's pages show:
    a table as Parquet with a preview of its first rows, a figure or image as PNG, a text, JSON. The
    rest is pickled. Datasets that log by themselves are left to do so.
    """
    dataset = uncached(dataset)
    if isinstance(dataset, TrackedDataset):
        return
    plain = name.partition("@")[0]
    folder = f"outputs/{plain}"
    if has_file(dataset):
        log_file(run, dataset, folder, data)
        return
    with TemporaryDirectory() as local:
        _write(Path(local, plain.replace("/", "_")), data)
        for file in sorted(Path(local).iterdir()):
            run.log_artifact(file, folder)


def _write(path: Path, data: Any) -> None:
    """Write data beside a path without an ending, in files with the ending of their kind."""
    if _is_a(data, "pandas", "DataFrame"):
        try:
            data.to_parquet(path.with_name(f"{path.name}.parquet"))
        # Arrow raises errors of these kinds for mixed columns, and for types that it doesn't know.
        except (ValueError, TypeError, NotImplementedError) as error:
            logger.info("%s can't be Parquet and is pickled: %s", path.name, error)
            _pickle(path, data)
        preview = data.head(PREVIEW_ROWS).to_html(max_cols=50)
        path.with_name("preview.html").write_text(preview, encoding="utf-8")
    elif _is_a(data, "matplotlib.figure", "Figure"):
        data.savefig(path.with_name(f"{path.name}.png"), bbox_inches="tight")
    elif _is_a(data, "plotly.basedatatypes", "BaseFigure"):
        data.write_html(path.with_name(f"{path.name}.html"))
    elif _is_a(data, "PIL.Image", "Image"):
        data.save(path.with_name(f"{path.name}.png"))
    elif isinstance(data, str):
        path.with_name(f"{path.name}.txt").write_text(data, encoding="utf-8")
    else:
        try:
            text = json.dumps(data, indent=2, ensure_ascii=False)
        except (TypeError, ValueError):
            logger.info("%s is pickled: MLflow's pages can't show it", path.name)
            _pickle(path, data)
        else:
            path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")


def _is_a(data: Any, module: str, name: str) -> bool:
    """Check whether data is of a type of a library, which is imported by now if it is."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(data, kind)


def _pickle(path: Path, data: Any) -> None:
    import cloudpickle  # type: ignore[import-untyped] # comes with MLflow

    try:
        content = cloudpickle.dumps(data)
    except Exception as error:  # whatever the object's own code raises
        logger.warning("%s is not logged, it can't be pickled: %s", path.name, error)
    else:
        path.with_name(f"{path.name}.pkl").write_bytes(content)
