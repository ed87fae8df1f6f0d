"""Write runs to the terminal: a table of the latest, one with its details, what differs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..cli.tables import new_table, width_of
from ..tracking.ending import duration_in_words
from .runs import Details, common_metrics, differences, duration_of, pipeline_of, shown_tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from rich.console import Console

_COLOURS = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}

# How wide a text may be in the table of runs, and how many characters of an id it has at least.
_TEXT_WIDTH, _ID_LENGTH = 40, 8

# How many metrics are tried for a place in the table of runs at most.
_MOST_METRICS = 30


def show_latest(
    console: Console, runs: Sequence[Run], metrics: Sequence[str] | None, params: Sequence[str]
) -> None:
    """Write a table of runs.

    Args:
        console: Where to.
        runs: At least one.
        metrics: Names or patterns of those to show; None for as many as there is room for.
        params: Names or patterns of those to show.
    """
    params = _matching(params, {name for run in runs for name in run.data.params})
    if metrics is not None:
        metrics = _matching(metrics, {name for run in runs for name in run.data.metrics})
        console.print(_table(runs, metrics, params))
        return
    known = common_metrics(runs)
    shown = known[:_MOST_METRICS]
    while shown and width_of(_table(runs, shown, params), console) > console.width:
        shown = shown[:-1]
    console.print(_table(runs, shown, params))
    if hidden := known[len(shown) :]:
        names = ", ".join(hidden[:5]) + (", …" if len(hidden) > 5 else "")
        console.print(f"Not shown: {count(len(hidden), 'metric')} ({names}); --metrics chooses.")


def _matching(patterns: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that match patterns; a plain name is taken whether it is known or not."""
    names: list[str] = []
    for pattern in patterns:
        is_plain = not set("*?[") & set(pattern)
        names += [pattern] if is_plain else sorted(n for n in known if fnmatchcase(n, pattern))
    return list(dict.fromkeys(names))


def _table(runs: Sequence[Run], metrics: Sequence[str], params: Sequence[str]) -> Table:
    now, length = time.time(), _id_length(runs)
    table = new_table()
    for name in ("id", "name", "status", "age"):
        table.add_column(name, no_wrap=True, max_width=_TEXT_WIDTH)
    table.add_column("duration", no_wrap=True, justify="right")
    # By default a run's name is its pipeline's: that need not be shown twice.
    has_pipelines = any(pipeline_of(run) not in ("", run.info.run_name) for run in runs)
    if has_pipelines:
        table.add_column("pipeline", no_wrap=True, max_width=_TEXT_WIDTH)
    for name in metrics:
        table.add_column(name, justify="right")
    for name in params:
        table.add_column(name, no_wrap=True, max_width=_TEXT_WIDTH)
    for run in runs:
        table.add_row(
            run.info.run_id[:length],
            _on_one_line(run.info.run_name),
            _status(run),
            _age(run, now),
            _duration(run, now),
            *([pipeline_of(run)] if has_pipelines else []),
            *(_number(run.data.metrics.get(name)) for name in metrics),
            *(_on_one_line(run.data.params.get(name, "-")) for name in params),
        )
    return table


def _id_length(runs: Sequence[Run]) -> int:
    """Return how many characters of their ids set these runs apart."""
    ids = {run.info.run_id for run in runs}
    longest = max(map(len, ids))
    lengths = range(min(_ID_LENGTH, longest), longest)
    return next((n for n in lengths if len({i[:n] for i in ids}) == len(ids)), longest)


def show_details(console: Console, details: Details) -> None:
    """Write everything that belongs to one run."""
    run, now = details.run, time.time()
    tags = shown_tags(run)
    error, node = tags.pop("kedro_error", ""), tags.pop("kedro_failed_node", "")
    refused, rule = tags.pop("kedro_failed_dataset", ""), tags.pop("kedro_failed_rule", "")
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.info.start_time / 1000))
    summary = {
        "run": run.info.run_id,
        "name": run.info.run_name,
        "status": _status(run),
        "started": f"{started}, {_age(run, now)}",
        "duration": _duration(run, now),
        "pipeline": pipeline_of(run) or "-",
        **({"failed in": node} if node else {}),
        **({"refused": refused} if refused else {}),
        **({"rule": rule} if rule else {}),
        **({"error": Text(error, style="red")} if error else {}),
    }
    _show_values(console, "", summary)
    _show_values(console, "Parameters", dict(sorted(run.data.params.items())))
    if details.steps:
        console.print("\nMetrics", style="bold")
        table = new_table()
        table.add_column("name", style="dim", no_wrap=True, min_width=10)
        table.add_column("latest", justify="right")
        table.add_column("steps", justify="right")
        for name, steps in details.steps.items():
            table.add_row(name, _number(run.data.metrics[name]), str(steps))
        console.print(table)
    _show_values(console, "Models", {model["name"]: _model(model) for model in details.models})
    artifacts = {
        f"{entry['path']}/" if entry["is_folder"] else entry["path"]: (
            "" if entry["size"] is None else decimal(entry["size"])
        )
        for entry in details.artifacts
    }
    _show_values(console, "Artifacts", artifacts)
    children = {child.info.run_id: _summary(child, now) for child in details.children}
    _show_values(console, "Child runs", children)
    _show_values(console, "Tags", tags)
    for problem in details.problems:
        console.print(problem, style="yellow")


def _show_values(console: Console, title: str, values: Mapping[str, Any]) -> None:
    """Write names and values below a title; nothing without any."""
    if not values:
        return
    if title:
        console.print(f"\n{title}", style="bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, value if isinstance(value, Text) else str(value))
    console.print(table)


def _model(model: Mapping[str, Any]) -> str:
    versions = [f"{version['name']} v{version['version']}" for version in model["registered"]]
    registered = f", registered as {', '.join(versions)}" if versions else ""
    return f"{model['model_id']}{registered}"


def _summary(run: Run, now: float) -> Text:
    metrics = [f"{name}={_number(run.data.metrics[name])}" for name in common_metrics([run])]
    words = [run.info.run_name or "", _duration(run, now), *metrics[:5]]
    return Text.assemble(_status(run), f"  {'  '.join(words)}")


def show_differences(console: Console, first: Run, second: Run) -> None:
    """Write what differs between two runs, or that nothing does."""
    now, runs = time.time(), (first, second)
    table = new_table()
    table.add_column("", style="dim", overflow="fold", min_width=10)
    for run in runs:
        table.add_column(run.info.run_id[: _id_length(runs)], overflow="fold", ratio=1)
    table.add_row("name", *(run.info.run_name for run in runs))
    table.add_row("status", *map(_status, runs))
    table.add_row("age", *(_age(run, now) for run in runs))
    table.add_row("duration", *(_duration(run, now) for run in runs))
    by_kind = differences(first, second)
    for kind, title in (("params", "Parameters"), ("metrics", "Metrics"), ("tags", "Tags")):
        if by_kind[kind]:
            table.add_row("")
            table.add_row(Text(title, style="not dim bold"))
        for name, values in by_kind[kind].items():
            table.add_row(name, *(v if isinstance(v, str) else _number(v) for v in values))
    console.print(table)
    if not any(by_kind.values()):
        console.print("\nNo parameter, metric or tag differs.")


def _status(run: Run) -> Text:
    status = str(run.info.status)
    is_deleted = run.info.lifecycle_stage == "deleted"
    return Text(f"{status}, deleted" if is_deleted else status, style=_COLOURS.get(status, ""))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.5g}"


def _on_one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _age(run: Run, now: float) -> str:
    seconds = now - run.info.start_time / 1000
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _duration(run: Run, now: float) -> str:
    text = duration_in_words(duration_of(run, now))
    return text if run.info.end_time is not None else f"{text} so far"


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
