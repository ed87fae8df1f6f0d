"""The figures as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

from .cases import Case, Command
from .environments import PEER, PEER_VERSION
from .measure import Measured

RUNS_HEADER = (
    "run",
    "store",
    "requests, peer",
    "requests, ours [limit]",
    "plain, s",
    "peer, s",
    "ours, s",
    "ours ÷ plain",
    "overhead, ours ÷ peer",
    "goal",
)
COMMANDS_HEADER = (
    "command",
    "requests, peer",
    "requests, ours [limit]",
    "MLflow imported, peer",
    "MLflow imported, ours",
    "plain, s",
    "peer, s",
    "ours, s",
    "peer ÷ plain",
    "ours ÷ plain",
    "goal",
)

PAGE = """\
# What tracking costs

Measured on {date} with Python {python}, Kedro {kedro}, MLflow {mlflow} and {peer} {peer_version}
on {cores} cores; medians of {repetitions} repetitions.

{tables}

## What the figures are

The same project, generated from the template, runs in three variants: *plain* Kedro, which tracks
nothing and keeps metrics in JSON files; the *peer*, which is plain Kedro with {peer}; and *ours*,
the template's runtime. Plain Kedro and ours share an environment; the peer has one more, with
{peer} added and every other package the same.

- **store**: `sqlite` is a SQLite file, `http` an `mlflow server` on the same machine, which
  has a SQLite file behind it. Store and experiment exist already.
- **requests**: HTTP requests of one process, counted by a proxy in front of the server; the
  highest of all repetitions. Only `http` has requests. In brackets: how many the runtime may make.
- **plain, peer, ours**: wall time of the whole process, from its start to its end. The variants
  take turns, after a first round that isn't counted.
- **overhead, ours ÷ peer**: the runtime's time over plain Kedro, as a part of the peer's.
- **goal**: what the figure in the column before it should be at most.
- **MLflow imported**: whether the command imports `mlflow`.

A run that fails, or doesn't leave in the store what it should, gives no figures.

## Repeat it

```console
nox -s bench
```

writes this page anew. `nox -s bench -- --only PATTERN` measures the runs and commands whose name
matches PATTERN, `--store sqlite` or `--store http` one of the stores, `--repetitions N` repeats
less or more often; what is measured in part is only printed. Times hold for one machine and compare
within one page; the numbers of requests are the same everywhere, and `nox -s bench` fails when one
is above its limit.
"""


def tables(results: Sequence[Measured]) -> str:
    """Show what was measured."""
    runs = [
        (
            result.what.name,
            result.store,
            *_requests(result),
            *_seconds(result),
            _number(result.ratio("ours")),
            _number(result.overhead_ratio()),
            _number(result.what.goal),
        )
        for result in results
        if isinstance(result.what, Case)
    ]
    commands = [
        (
            f"`{result.what.name}`",
            *_requests(result),
            *("yes" if who in result.imports_mlflow else "no" for who in ("peer", "ours")),
            *_seconds(result),
            _number(result.ratio("peer")),
            _number(result.ratio("ours")),
            _number(result.what.goal),
        )
        for result in results
        if isinstance(result.what, Command)
    ]
    parts: list[tuple[Sequence[str], Sequence[Sequence[str]]]]
    parts = [(RUNS_HEADER, runs), (COMMANDS_HEADER, commands)]
    return "\n\n".join(_table(header, rows) for header, rows in parts if rows)


def page(results: Sequence[Measured], repetitions: int) -> str:
    """Write the whole page."""
    return PAGE.format(
        date=date.today().isoformat(),
        python=platform.python_version(),
        kedro=version("kedro"),
        mlflow=version("mlflow"),
        peer=PEER,
        peer_version=PEER_VERSION,
        cores=_cores(),
        repetitions=repetitions,
        tables=tables(results),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _requests(result: Measured) -> tuple[str, str]:
    if result.store == "sqlite":
        return "", ""
    peer, ours = result.requests("peer"), result.requests("ours")
    shown = ["failed" if count is None else str(count) for count in (peer, ours)]
    return shown[0], f"{shown[1]} [{result.what.limit}]"


def _seconds(result: Measured) -> tuple[str, str, str]:
    plain, peer, ours = (result.seconds(variant) for variant in ("plain", "peer", "ours"))
    return _number(plain, "failed"), _number(peer, "failed"), _number(ours, "failed")


def _number(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else f"{value:.2f}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
