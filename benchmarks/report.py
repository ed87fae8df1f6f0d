"""The figures as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

from .cases import Case, Command
from .copying import MeasuredCopy
from .environments import PEER, PEER_VERSION
from .measure import Measured
from .predictions import CALLS, MeasuredPrediction

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
PREDICTIONS_HEADER = (
    "prediction",
    "call",
    "functions, µs",
    "peer, µs above",
    "ours, µs above",
    "ours ÷ peer",
)
COPIES_HEADER = ("command", "files", "seconds", "fastest", "slowest")

MEASURED_ON = """\
Measured on {date} with Python {python}, Kedro {kedro}, MLflow {mlflow} and {peer} {peer_version}
on {cores} cores; medians of {repetitions} repetitions."""

PAGE = """\
# What tracking costs

{measured_on}

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

{predictions}

{copies}

## Repeat it

```console
nox -s bench
```

writes this page anew. `nox -s bench -- --only PATTERN` measures the runs, commands, predictions
and copies whose name matches PATTERN, `--store sqlite` or `--store http` one of the stores,
`--repetitions N` repeats less or more often; what is measured in part is only printed. Times hold
for one machine and compare within one page; the numbers of requests are the same everywhere, and
`nox -s bench` fails when one is above its limit.
"""

PREDICTIONS = """\
## What predicting costs

{measured_on}

{table}

The inference pipeline is tied to its training by `pipeline_ml_factory`, {peer}'s or the template's,
and `kedro run` logs it as a model. `mlflow.pyfunc.load_model` loads the model in a new process for
each repetition; the variants take turns. There it predicts from a table of three rows, again and
again until 0.2 seconds are over. The figures are the microseconds of one call.

- **functions**: calling the functions of the pipeline's nodes one after another on loaded data,
  without Kedro and MLflow. Each does next to nothing, so that what comes on top of it shows.
- **call**: `python model` is `model.unwrap_python_model().predict(None, data)`, the code of the
  peer or ours alone; `pyfunc` is `model.predict(data)`, in which MLflow first checks the data
  against the signature, and hands on the defaults of the parameters.
- **peer, ours**: the microseconds above those of the functions.
- **ours ÷ peer**: our microseconds above the functions, as a part of the peer's.

Logging is as Kedro and MLflow set it up, with the output in a file; much of the peer's cost is
that with it Kedro tells of each node and of each dataset that is loaded or saved. `no logging` is
the same after `logging.disable()`. The peer also copies the loaded datasets for each call. A
variant that predicts another value than the functions gives no figures.
"""

COPIES = """\
## What copying and updating take

{measured_on}

{table}

Each command runs as a whole process on a repository of the template in a folder, so that no
network is in it. `kedro new` makes the smallest project that Kedro itself has. An update is that
of an untouched project in git; *the next version* has one file more and one that has changed.
Copier generates the project twice for an update, as it was and as it will be.
"""


def tables(
    results: Sequence[Measured],
    predictions: Sequence[MeasuredPrediction],
    copies: Sequence[MeasuredCopy] = (),
) -> str:
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
    predicted = [
        (
            prediction.what.name,
            call,
            _microseconds(prediction.direct()),
            _microseconds(prediction.overhead("peer", call)),
            _microseconds(prediction.overhead("ours", call)),
            "" if (ratio := prediction.overhead_ratio(call)) is None else f"{ratio:.4f}",
        )
        for prediction in predictions
        for call in CALLS
    ]
    parts: list[tuple[Sequence[str], Sequence[Sequence[str]]]]
    copied = [
        (
            copy.what.name,
            str(copy.files),
            *map(_number, (copy.median, min(copy.seconds), max(copy.seconds))),
        )
        for copy in copies
    ]
    parts = [
        (RUNS_HEADER, runs),
        (COMMANDS_HEADER, commands),
        (PREDICTIONS_HEADER, predicted),
        (COPIES_HEADER, copied),
    ]
    return "\n\n".join(table(header, rows) for header, rows in parts if rows)


def page(
    results: Sequence[Measured],
    predictions: Sequence[MeasuredPrediction],
    copies: Sequence[MeasuredCopy],
    repetitions: int,
) -> str:
    """Write the whole page."""
    return PAGE.format(
        measured_on=_measured_on(repetitions),
        peer=PEER,
        tables=tables(results, []),
        predictions=predictions_section(predictions, repetitions),
        copies=copies_section(copies, repetitions),
    )


def predictions_section(predictions: Sequence[MeasuredPrediction], repetitions: int) -> str:
    """Write the page's section on predictions, which says itself when it was measured."""
    section = PREDICTIONS.format(
        measured_on=_measured_on(repetitions), peer=PEER, table=tables([], predictions)
    )
    return section.rstrip()


def copies_section(copies: Sequence[MeasuredCopy], repetitions: int) -> str:
    """Write the page's section on copies, which says itself when it was measured."""
    section = COPIES.format(measured_on=_measured_on(repetitions), table=tables([], [], copies))
    return section.rstrip()


def _measured_on(repetitions: int) -> str:
    return MEASURED_ON.format(
        date=date.today().isoformat(),
        python=platform.python_version(),
        kedro=version("kedro"),
        mlflow=version("mlflow"),
        peer=PEER,
        peer_version=PEER_VERSION,
        cores=cores(),
        repetitions=repetitions,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown, the first column to the left."""
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


def _microseconds(seconds: float | None) -> str:
    return "failed" if seconds is None else f"{seconds * 1e6:,.0f}"


def cores() -> int:
    """Tell how many processors there are to use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
