"""Write runs to the terminal: a table of the latest, one whole, what differs between two."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .runs import Whole, common_metrics, differences, duration_of, pipeline_of, telling_tags

if TYPE_CHECKING:
    from mlflow.entities import Run

_COLOURS = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}

# How wide a value may be in a table; how many characters of an id are shown at least.
_WIDEST, _ID = 40, 8

# How many metrics are tried for a place in the table at most.
_TRIED = 30


def console() -> Console:
    """Make a console that writes names as they are, and colours on a terminal only."""
    return Console(markup=False, emoji=False, highlight=False)


def show_latest(
    out: Console, runs: Sequence[Run], metrics: Sequence[str] | None, parameters: Sequence[str]
) -> None:
    """Write a table of runs.

    Args:
        out: Where to.
        runs: At least one.
        metrics: Names or patterns of those to show; None for as many as there is room for.
        parameters: Names or patterns of those to show.
    """
    names = chosen(parameters, sorted({name for run in runs for name in run.data.params}))
    known = common_metrics(runs)
    if metrics is not None:
        everything = sorted({key for run in runs for key in run.data.metrics})
        out.print(_table(runs, chosen(metrics, everything), names))
        return
    tables = (_table(runs, known[:size], names) for size in range(min(len(known), _TRIED), 0, -1))
    table = next((table for table in tables if _fits(out, table)), _table(runs, [], names))
    out.print(table)
    shown = [str(column.header) for column in table.columns]
    left = [name for name in known if name not in shown]
    if left:
        some = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        out.print(f"Not shown: {count(len(left), 'metric')} ({some}); --metrics chooses.")


def chosen(patterns: Iterable[str], known: Sequence[str]) -> list[str]:
    """Give the names that fit patterns; a plain name is taken whether it is known or not."""
    names: dict[str, None] = {}
    for pattern in patterns:
        is_plain = not set("*?[") & set(pattern)
        found = [pattern] if is_plain else [n for n in known if fnmatchcase(n, pattern)]
        names |= dict.fromkeys(found)
    return list(names)


def _fits(out: Console, table: Table) -> bool:
    unlimited = out.options.update(width=10_000)
    return out.measure(table, options=unlimited).maximum <= out.width


def _table(runs: Sequence[Run], metrics: Sequence[str], parameters: Sequence[str]) -> Table:
    now, length = time.time(), _id_length(runs)
    # By default a run's name is its pipeline's: that need not be told twice.
    has_pipelines = any(pipeline_of(run) not in ("", run.info.run_name) for run in runs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("id", "name", "status", "age"):
        table.add_column(name, no_wrap=True)
    table.add_column("duration", no_wrap=True, justify="right")
    if has_pipelines:
        table.add_column("pipeline", no_wrap=True)
    for name in metrics:
        table.add_column(name, justify="right")
    for name in parameters:
        table.add_column(name)
    for run in runs:
        table.add_row(
            run.info.run_id[:length],
            _short(run.info.run_name or ""),
            _status(run),
            age(now - run.info.start_time / 1000),
            _lasted(run, now),
            *([_short(pipeline_of(run))] if has_pipelines else []),
            *(_number(run.data.metrics.get(name)) for name in metrics),
            *(_short(run.data.params.get(name, "-")) for name in parameters),
        )
    return table


def _id_length(runs: Sequence[Run]) -> int:
    """Tell how much of their ids sets these runs apart."""
    ids = {run.info.run_id for run in runs}
    longest = max(map(len, ids))
    lengths = range(min(_ID, longest), longest)
    return next((n for n in lengths if len({i[:n] for i in ids}) == len(ids)), longest)


def show_whole(out: Console, seen: Whole) -> None:
    """Write all that there is to see of one run."""
    run, now = seen.run, time.time()
    tags = telling_tags(run)
    error, node = tags.pop("kedro_error", ""), tags.pop("kedro_failed_node", "")
    _rows(out, "", {"run": run.info.run_id, "name": run.info.run_name, "status": _status(run)})
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.info.start_time / 1000))
    _rows(
        out,
        "",
        {
            "started": f"{started}, {age(now - run.info.start_time / 1000)}",
            "duration": _lasted(run, now),
            "pipeline": pipeline_of(run) or "-",
            **({"failed in": node} if node else {}),
            **({"error": Text(error, style="red")} if error else {}),
        },
    )
    _rows(out, "Parameters", dict(sorted(run.data.params.items())))
    _metrics(out, seen)
    _rows(out, "Models", {model["name"]: _registered(model) for model in seen.models})
    _rows(out, "Artifacts", {_path(a): _size(a["size"]) for a in seen.artifacts})
    children = {child.info.run_id: _in_a_line(child, now) for child in seen.children}
    _rows(out, "Child runs", children)
    _rows(out, "Tags", tags)
    for lack in seen.lacks:
        out.print(lack, style="yellow")


def _rows(out: Console, title: str, rows: Mapping[str, Any]) -> None:
    """Write names and values below a title; nothing without any."""
    if not rows:
        return
    if title:
        _title(out, title)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value if isinstance(value, Text) else str(value))
    out.print(table)


def _title(out: Console, title: str) -> None:
    out.print(f"\n{title}", style="bold")


def _metrics(out: Console, seen: Whole) -> None:
    if not seen.steps:
        return
    _title(out, "Metrics")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", style="dim", no_wrap=True, min_width=10)
    table.add_column("latest", justify="right")
    table.add_column("steps", justify="right")
    for name, steps in seen.steps.items():
        table.add_row(name, _number(seen.run.data.metrics[name]), str(steps))
    out.print(table)


def _registered(model: Mapping[str, Any]) -> str:
    versions = [f"{version['name']} v{version['version']}" for version in model["registered"]]
    as_what = f", registered as {', '.join(versions)}" if versions else ""
    return f"{model['model_id']}{as_what}"


def _path(artifact: Mapping[str, Any]) -> str:
    return f"{artifact['path']}/" if artifact["is_folder"] else str(artifact["path"])


def _in_a_line(run: Run, now: float) -> Text:
    values = [f"{name}={_number(run.data.metrics[name])}" for name in common_metrics([run])]
    what = [run.info.run_name or "", _lasted(run, now), *values[:5]]
    return Text.assemble(_status(run), f"  {'  '.join(what)}")


def show_differences(out: Console, first: Run, second: Run) -> None:
    """Write what differs between two runs, or that nothing does."""
    now, length = time.time(), _id_length([first, second])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="dim", overflow="fold", min_width=10)
    for run in (first, second):
        table.add_column(run.info.run_id[:length], overflow="fold", ratio=1)
    started = [age(now - run.info.start_time / 1000) for run in (first, second)]
    lasted = [_lasted(run, now) for run in (first, second)]
    table.add_row("name", first.info.run_name or "", second.info.run_name or "")
    table.add_row("status", _status(first), _status(second))
    table.add_row("age", *started)
    table.add_row("duration", *lasted)
    found = differences(first, second)
    for kind, title in (("params", "Parameters"), ("metrics", "Metrics"), ("tags", "Tags")):
        if found[kind]:
            table.add_row("")
            table.add_row(Text(title, style="not dim bold"))
        for name, pair in found[kind].items():
            table.add_row(name, *map(_value, pair))
    out.print(table)
    if not any(found.values()):
        out.print("\nNo parameter, metric or tag differs.")


def _value(value: Any) -> str:
    return _number(value) if isinstance(value, float | int) else "-" if value is None else value


def _status(run: Run) -> Text:
    status = str(run.info.status)
    is_deleted = run.info.lifecycle_stage == "deleted"
    return Text(f"{status}, deleted" if is_deleted else status, style=_COLOURS.get(status, ""))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.5g}"


def _short(text: str) -> str:
    """Bring a text onto a line of a table."""
    line = " ".join(text.split())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"


def count(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _size(size: int | None) -> str:
    """Write a number of bytes; folders have none."""
    if size is None:
        return ""
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def age(seconds: float) -> str:
    """Write how long ago something was."""
    if seconds < 10:
        return "just now"
    for unit, length, limit in (
        ("s", 1, 60),
        ("min", 60, 3600),
        ("h", 3600, 48 * 3600),
    ):
        if seconds < limit:
            return f"{int(seconds / length)} {unit} ago"
    return f"{int(seconds / 86400)} days ago"


def lasting(seconds: float) -> str:
    """Write how long something took."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _lasted(run: Run, now: float) -> str:
    text = lasting(duration_of(run, now))
    return text if run.info.end_time is not None else f"{text} so far"
