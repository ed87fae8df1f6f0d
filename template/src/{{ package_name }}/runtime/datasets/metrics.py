"""Metrics of a run: one value, one value over steps, or many at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kedro.io import DatasetError

from ..tracking import Point
from .tracked import TrackedDataset


def _number(value: Any, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"Metric '{key}' takes a number, got {value!r}.") from error


class _OneMetricDataset(TrackedDataset):
    """What the datasets of one metric share: its key, by default the name in the catalog."""

    def __init__(
        self,
        key: str | None = None,
        run_id: str | None = None,
        load_args: dict[str, Any] | None = None,
        save_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.key = key
        self.run_id = run_id
        self._load_args = load_args or {}
        self._save_args = save_args or {}
        self.metadata = metadata

    def bind(self, *args: Any) -> None:
        super().bind(*args)
        self.key = self.key or self._name

    def _required_key(self) -> str:
        if not self.key:
            raise DatasetError(f"{type(self).__name__} needs a `key` outside a catalog.")
        return self.key

    def _mode(self, args: Mapping[str, Any], choices: tuple[str, ...]) -> str:
        mode: str = args.get("mode", choices[0])
        if mode not in choices:
            raise DatasetError(f"`mode` is one of {', '.join(choices)}, got {mode!r}.")
        return mode

    def _exists(self) -> bool:
        return self._required_key() in self._resolve_run().metric_keys()

    def _describe(self) -> dict[str, Any]:
        return {"key": self.key, "run_id": self.run_id}


class MlflowMetricDataset(_OneMetricDataset):
    """One number.

    Args:
        key: Name of the metric; by default the dataset's name in the catalog.
        run_id: Run to log to and load from instead of the current one.
        load_args: `step` to load, instead of the last value logged.
        save_args: `step` to log at, or `mode`: `overwrite` (default) logs at the last step there
            is, `append` at the one after.
        metadata: Kept and not used.
    """

    def load(self) -> float:
        """Give the value last logged, or that of the step asked for."""
        history = self._resolve_run().metric_history(self._required_key())
        if (step := self._load_args.get("step")) is not None:
            history = [metric for metric in history if metric.step == step]
        if not history:
            at = "" if step is None else f" at step {step}"
            raise DatasetError(f"The run has no metric '{self.key}'{at}.")
        return history[-1].value

    def save(self, data: float) -> None:
        """Log one value."""
        key, mode = self._required_key(), self._mode(self._save_args, ("overwrite", "append"))
        value = _number(data, key)
        if not self._is_tracked:
            return
        run = self._resolve_run()
        step = self._save_args.get("step")
        if step is None:
            last = run.last_step(key)
            step = 0 if last is None else last + (mode == "append")
        run.log_metrics([Point(key, value, step, self._save_args.get("timestamp"))])


class MlflowMetricHistoryDataset(_OneMetricDataset):
    """One metric over steps.

    Args:
        key: Name of the metric; by default the dataset's name in the catalog.
        run_id: Run to log to and load from instead of the current one.
        load_args: `mode` of what is loaded: `list` of values (default), `dict` of values by
            step, or `history`, a list of `{"step": …, "value": …, "timestamp": …}`.
        save_args: `mode` of what is saved; in a `list` the steps count from 0, and in a
            `history` the timestamp may be left out.
        metadata: Kept and not used.
    """

    _MODES = ("list", "dict", "history")

    def load(self) -> list[float] | dict[int, float] | list[dict[str, Any]]:
        """Give all points of the metric."""
        mode = self._mode(self._load_args, self._MODES)
        history = self._resolve_run().metric_history(self._required_key())
        if mode == "list":
            return [metric.value for metric in history]
        if mode == "dict":
            return {metric.step: metric.value for metric in history}
        return [
            {"step": metric.step, "value": metric.value, "timestamp": metric.timestamp}
            for metric in history
        ]

    def save(self, data: Any) -> None:
        """Log all points, in as few requests as MLflow allows."""
        key, mode = self._required_key(), self._mode(self._save_args, self._MODES)
        points = list(self._points(key, mode, data))
        if self._is_tracked:
            self._resolve_run().log_metrics(points)

    @staticmethod
    def _points(key: str, mode: str, data: Any) -> Iterable[Point]:
        if mode == "dict":
            if not isinstance(data, Mapping):
                raise DatasetError(f"Metric '{key}' takes {{step: value}}, got {data!r}.")
            return (Point(key, _number(value, key), step) for step, value in data.items())
        if isinstance(data, Mapping) or not isinstance(data, Iterable):
            raise DatasetError(f"Metric '{key}' takes a list in mode '{mode}', got {data!r}.")
        if mode == "list":
            return (Point(key, _number(value, key), step) for step, value in enumerate(data))
        return (
            Point(key, _number(item["value"], key), item.get("step", 0), item.get("timestamp"))
            for item in data
        )


class _ManyMetricsDataset(TrackedDataset):
    """What the datasets of many metrics share: a prefix, by default the name in the catalog."""

    def __init__(
        self,
        run_id: str | None = None,
        prefix: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.run_id = run_id
        self.prefix = prefix
        self.metadata = metadata

    def bind(self, *args: Any) -> None:
        super().bind(*args)
        if self.prefix is None:
            self.prefix = self._name

    def _key(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def _keys(self) -> list[str]:
        start = self._key("")
        return [key for key in self._resolve_run().metric_keys() if key.startswith(start)]

    def _exists(self) -> bool:
        return bool(self._keys())

    def _describe(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "run_id": self.run_id}


class MlflowMetricsDataset(_ManyMetricsDataset):
    """Many numbers: `{name: value}`, each logged as `prefix.name`.

    Args:
        run_id: Run to log to and load from instead of the current one.
        prefix: Put before each name, with a dot; by default the dataset's name in the catalog,
            and with an empty string nothing.
        metadata: Kept and not used.
    """

    def load(self) -> dict[str, float]:
        """Give the last value of each metric, under the name that it was saved with."""
        run, start = self._resolve_run(), self._key("")
        return {key.removeprefix(start): run.metric_history(key)[-1].value for key in self._keys()}

    def save(self, data: Mapping[str, Any]) -> None:
        """Log all values in one request."""
        if not isinstance(data, Mapping):
            raise DatasetError(f"MlflowMetricsDataset takes {{name: value}}, got {data!r}.")
        points = [Point(self._key(name), _number(value, name)) for name, value in data.items()]
        if self._is_tracked:
            self._resolve_run().log_metrics(points)


class MlflowMetricsHistoryDataset(_ManyMetricsDataset):
    """Many metrics with steps: `{name: {"step": …, "value": …}}`, or a list of such points.

    Args:
        run_id: Run to log to and load from instead of the current one.
        prefix: Put before each name, with a dot; by default the dataset's name in the catalog,
            and with an empty string nothing.
        metadata: Kept and not used.
    """

    def load(self) -> dict[str, Any]:
        """Give the points of each metric under its full name; a single point as a dictionary."""
        run = self._resolve_run()
        loaded: dict[str, Any] = {}
        for key in self._keys():
            points = [{"step": m.step, "value": m.value} for m in run.metric_history(key)]
            loaded[key] = points[0] if len(points) == 1 else points
        return loaded

    def save(self, data: Mapping[str, Any]) -> None:
        """Log all points, in as few requests as MLflow allows."""
        if not isinstance(data, Mapping):
            raise DatasetError(
                f"MlflowMetricsHistoryDataset takes {{name: [points]}}, got {data!r}."
            )
        points = [
            Point(self._key(name), _number(item["value"], name), item["step"])
            for name, items in data.items()
            for item in self._checked(name, items)
        ]
        if self._is_tracked:
            self._resolve_run().log_metrics(points)

    @staticmethod
    def _checked(name: str, items: Any) -> list[Mapping[str, Any]]:
        listed = items if isinstance(items, list) else [items]
        for item in listed:
            if not (isinstance(item, Mapping) and {"step", "value"} <= item.keys()):
                raise DatasetError(
                    f'Metric \'{name}\' takes {{"step": …, "value": …}} or a list of them, '
                    f"got {item!r}."
                )
        return listed
