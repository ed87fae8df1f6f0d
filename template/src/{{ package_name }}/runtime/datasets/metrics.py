"""Metrics of a run: one value, one value over steps, or many at once."""

from __future__ import annotations

import operator
import reprlib
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, ClassVar

from kedro.io import DatasetError

from ..tracking.handle import RunHandle
from ..tracking.outbox import Point
from .base import TrackedDataset, mode_of

if TYPE_CHECKING:
    from mlflow.entities import Metric

    from .models import ModelDataset

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class MetricDataset(TrackedDataset):
    """What all datasets of metrics share: points that MLflow takes, and gives back in order.

    `model` is the name of the dataset whose model the metrics belong to; `models` are the datasets
    of models that a node takes or makes together with them, of which one alone is that model.
    """

    models: Sequence[ModelDataset] = ()

    def __init__(
        self, run_id: str | None, metadata: dict[str, Any] | None, model: str | None
    ) -> None:
        self.run_id = run_id
        self.metadata = metadata
        self.model = model
        # Of each metric, the timestamp and the step that the last point got.
        self._last: dict[str, tuple[int, int]] = {}

    def _log(self, points: Sequence[Point]) -> None:
        if self._is_tracked:
            for key in {point.key for point in points}:
                _check_name(key)
            model_ids = {dataset.model_id for dataset in self.models}
            (model_id,) = model_ids if len(model_ids) == 1 else (None,)
            self._resolve_run().log_metrics(
                point._replace(model_id=model_id) for point in self._in_order(points)
            )

    def _in_order(self, points: Iterable[Point]) -> Iterator[Point]:
        """Return each point with a timestamp, which puts it after the point before it.

        MLflow keeps no other order than that of timestamp, step and value, and two points that
        are equal in these are one. So steps that repeat or fall need milliseconds of their own.
        """
        now = int(time.time() * 1000)
        for point in points:
            if point.timestamp is not None:
                yield point
                continue
            timestamp, step = self._last.get(point.key, (0, 0))
            timestamp = max(now, timestamp + (point.step <= step))
            self._last[point.key] = timestamp, point.step
            yield point._replace(timestamp=timestamp)

    def _is_in(self, run: RunHandle) -> bool:
        return any(self._is_mine(key) for key in run.metrics())

    @abstractmethod
    def _is_mine(self, key: str) -> bool:
        """Check whether a metric of the run is one that this dataset saves."""


class _OneMetricDataset(MetricDataset):
    """What the datasets of one metric share: its key, by default the name in the catalog."""

    SHOWN = ("key", "run_id", "load_args", "save_args", "model")

    # The first is the default.
    LOAD_MODES: ClassVar[tuple[str, ...]] = ()
    SAVE_MODES: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        key: str | None = None,
        run_id: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(run_id, metadata, model)
        self.key = key
        self.load_args = load_args or {}
        self.save_args = save_args or {}
        if self.LOAD_MODES:
            self._load_mode = mode_of("load_args", self.load_args, self.LOAD_MODES)
        self._save_mode = mode_of("save_args", self.save_args, self.SAVE_MODES)

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run; its name is the key when nothing else is."""
        super().bind(*args)
        self.key = self.key or self._name
        if self._run:
            _check_name(self.key)

    def _required_key(self) -> str:
        return self._required("a `key`", self.key)

    def _history(self, step: int | None = None) -> list[Metric]:
        """Return the points of the metric, or only those at a step."""
        run, key = self._resolve_run(), self._required_key()
        with self._reading():
            history = run.metric_history(key)
        if step is not None:
            history = [metric for metric in history if metric.step == step]
        if not history:
            at_step = "" if step is None else f" at step {step}"
            raise DatasetError(f"The run {run.run_id} has no metric '{key}'{at_step}.")
        return history

    def _is_mine(self, key: str) -> bool:
        return key == self._required_key()


class MlflowMetricDataset(_OneMetricDataset):
    """One number.

    Args:
        key: Name of the metric; by default the dataset's name in the catalog.
        run_id: Run to log to and load from instead of the current one.
        load_args: `step` to load, instead of the value last logged.
        save_args: `step` to log at, or `mode`: `overwrite` (default) logs at the last step there
            is, `append` at the one after; `timestamp` in milliseconds since 1970.
        metadata: Kept and not used.
        model: Dataset whose model the values belong to, where a node has several models.

    Raises:
        DatasetError: When an argument is none of these.
    """

    SAVE_MODES = ("overwrite", "append")

    def load(self) -> float:
        """Return the value last logged, or the one last logged at the step asked for."""
        step = self.load_args.get("step")
        if step is not None:
            step = _whole(step, self._required_key())
        return self._history(step)[-1].value

    def save(self, data: float) -> None:
        """Log one value."""
        key = self._required_key()
        value = _number(data, key)
        step, timestamp = (self.save_args.get(name) for name in ("step", "timestamp"))
        if step is None and self._is_tracked:
            last = self._resolve_run().last_step(key)
            step = 0 if last is None else last + (self._save_mode == "append")
        self._log([_point({"value": value, "step": step or 0, "timestamp": timestamp}, key)])


class MlflowMetricHistoryDataset(_OneMetricDataset):
    """One metric over steps.

    Points load in the order of their timestamps, which is the order they were saved in unless
    the timestamps were given.

    Args:
        key: Name of the metric; by default the dataset's name in the catalog.
        run_id: Run to log to and load from instead of the current one.
        load_args: `mode` of what is loaded: `list` of values (default), `dict` of the last value
            by step, or `history`, a list of `{"step": …, "value": …, "timestamp": …}`.
        save_args: `mode` of what is saved; in a `list` the steps count from 0 (over all the lists
            that a node yields), and in a `history` the timestamp, in milliseconds since 1970, may
            be left out.
        metadata: Kept and not used.
        model: Dataset whose model the values belong to, where a node has several models.

    Raises:
        DatasetError: When an argument is none of these.
    """

    LOAD_MODES = SAVE_MODES = ("list", "dict", "history")

    _count = 0  # of the values saved so far in mode `list`

    def load(self) -> list[float] | dict[int, float] | list[dict[str, Any]]:
        """Return all points of the metric."""
        history = self._history()
        if self._load_mode == "list":
            return [metric.value for metric in history]
        if self._load_mode == "dict":
            return {metric.step: metric.value for metric in history}
        return [
            {"step": metric.step, "value": metric.value, "timestamp": metric.timestamp}
            for metric in history
        ]

    def save(self, data: Any) -> None:
        """Log all points, in as few requests as MLflow allows."""
        self._log(self._points(self._required_key(), data))

    def _points(self, key: str, data: Any) -> list[Point]:
        takes = f"Metric '{key}' takes in mode '{self._save_mode}'"
        if self._save_mode == "dict":
            items = _items(data, f"{takes} a dictionary {{step: value}}")
            return [_point({"step": step, "value": value}, key) for step, value in items]
        if self._save_mode == "list":
            values = _elements(data, f"{takes} a list of numbers")
            start = self._count if self.in_chunks else 0
            self._count = start + len(values)
            return [Point(key, _number(value, key), i) for i, value in enumerate(values, start)]
        rule = f'{takes} a list of {{"step": …, "value": …}}'
        return [_point(item, key, rule) for item in _elements(data, rule)]


class _ManyMetricsDataset(MetricDataset):
    """What the datasets of many metrics share: a prefix, by default the name in the catalog."""

    SHOWN = ("prefix", "run_id", "model")

    def __init__(
        self,
        run_id: str | None = None,
        prefix: str | None = None,
        metadata: dict[str, Any] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(run_id, metadata, model)
        self.prefix = prefix

    def bind(self, *args: Any) -> None:
        """Bind the dataset to a Kedro run; its name is the prefix when nothing else is."""
        super().bind(*args)
        if self.prefix is None:
            self.prefix = self._name
        if self._run:
            _check_name(self._key("name"))

    def _key(self, name: Any) -> str:
        return f"{self.prefix}.{name}" if self.prefix else str(name)

    def _is_mine(self, key: str) -> bool:
        return key.startswith(self._key(""))

    def _values(self) -> dict[str, float]:
        run = self._resolve_run()
        with self._reading():
            values = {key: value for key, value in run.metrics().items() if self._is_mine(key)}
        if not values:
            which = f"metrics '{self._key('…')}'" if self.prefix else "metrics"
            raise DatasetError(f"The run {run.run_id} has no {which}.")
        return values


class MlflowMetricsDataset(_ManyMetricsDataset):
    """Many numbers: `{name: value}`, each logged as `prefix.name`.

    Args:
        run_id: Run to log to and load from instead of the current one.
        prefix: Put before each name, with a dot; by default the dataset's name in the catalog,
            and with an empty string nothing.
        metadata: Kept and not used.
        model: Dataset whose model the values belong to, where a node has several models.
    """

    def load(self) -> dict[str, float]:
        """Return the value of each metric, under the name that it was saved with."""
        prefix = self._key("")
        return {key.removeprefix(prefix): value for key, value in self._values().items()}

    def save(self, data: Mapping[str, Any]) -> None:
        """Log all values in one request."""
        items = _items(data, "MlflowMetricsDataset takes a dictionary {name: number}")
        keyed = [(self._key(name), value) for name, value in items]
        self._log([Point(key, _number(value, key)) for key, value in keyed])


class MlflowMetricsHistoryDataset(_ManyMetricsDataset):
    """Many metrics with steps: `{name: {"step": …, "value": …}}`, or a list of such points.

    Args:
        run_id: Run to log to and load from instead of the current one.
        prefix: Put before each name, with a dot; by default the dataset's name in the catalog,
            and with an empty string nothing.
        metadata: Kept and not used.
        model: Dataset whose model the values belong to, where a node has several models.
    """

    def load(self) -> dict[str, Any]:
        """Return the points of each metric under its full name; a single point as a dictionary."""
        run = self._resolve_run()
        loaded: dict[str, Any] = {}
        for key in self._values():
            points = [{"step": m.step, "value": m.value} for m in run.metric_history(key)]
            loaded[key] = points[0] if len(points) == 1 else points
        return loaded

    def save(self, data: Mapping[str, Any]) -> None:
        """Log all points, in as few requests as MLflow allows; a point may have a timestamp."""
        points = []
        items = _items(data, "MlflowMetricsHistoryDataset takes a dictionary {name: points}")
        for name, given in items:
            key = self._key(name)
            rule = f'Metric \'{key}\' takes {{"step": …, "value": …}} or a list of them'
            listed = [given] if isinstance(given, Mapping) else _elements(given, rule)
            points += [_point(item, key, rule) for item in listed]
        self._log(points)


def _check_name(key: str) -> None:
    """Refuse a name that MLflow refuses, before its point waits to be sent together with others."""
    from mlflow.utils import validation

    limit = validation.MAX_ENTITY_KEY_LENGTH
    is_valid = len(key) <= limit and validation.validate_param_and_metric_name(key)
    if not is_valid or validation.path_not_unique(key):
        raise DatasetError(
            f"MLflow refuses the metric name {_shown(key)}: a name has letters, digits, spaces and "
            f"any of _ - . : /, at most {limit} characters, and no part of it between slashes is "
            "empty, '.' or '..'."
        )


def _shown(value: Any) -> str:
    return " ".join(_short.repr(value).split())


def _number(value: Any, key: str) -> float:
    """Return a number, also of a bool, and of an array or a tensor of one element."""
    try:
        single = value.item() if hasattr(value, "item") else value
        if isinstance(single, (str, bytes)):
            raise TypeError("float() would read a number in it")
        return float(single)
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"Metric '{key}' takes a number, got {_shown(value)}.") from error


def _whole(value: Any, key: str, what: str = "step") -> int:
    """Return a step or a timestamp, a whole number also when a table has made it a float."""
    unit = " of milliseconds since 1970" if what == "timestamp" else ""
    rule = f"A {what} of metric '{key}' is a whole number{unit}"
    try:
        is_whole_float = isinstance(value, float) and value.is_integer()
        whole = int(value) if is_whole_float else operator.index(value)
    except TypeError as error:
        raise DatasetError(f"{rule}, got {_shown(value)}.") from error
    lowest = 0 if what == "timestamp" else -(2**63)
    if not lowest <= whole < 2**63:
        raise DatasetError(f"{rule} of 64 bits, got {whole}.")
    return whole


def _point(item: Any, key: str, rule: str = "") -> Point:
    """Return the point of `{"step": …, "value": …}`, in which a timestamp may be too."""
    if not (isinstance(item, Mapping) and {"step", "value"} <= item.keys()):
        raise DatasetError(f"{rule}, got {_shown(item)}.")
    value, step = _number(item["value"], key), _whole(item["step"], key)
    timestamp = item.get("timestamp")
    return Point(
        key, value, step, None if timestamp is None else _whole(timestamp, key, "timestamp")
    )


def _elements(data: Any, rule: str) -> list[Any]:
    """Return what is in a list, a tuple, a generator, a NumPy array or a pandas Series."""
    is_row = isinstance(data, Iterable) and getattr(data, "ndim", 1) == 1
    is_row = is_row and not isinstance(data, (str, bytes, Mapping, AbstractSet))
    elements = list(data) if is_row else []
    if not elements:
        raise DatasetError(f"{rule}, got {_shown(data)}.")
    return elements


def _items(data: Any, rule: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(data, Mapping) or not data:
        raise DatasetError(f"{rule}, got {_shown(data)}.")
    return data.items()
