"""Measure all cases, print the tables and write RESULTS.md."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import CountingProxy, counting_proxy, mlflow_server

from . import report, scale
from .cases import (
    CASES,
    COMMANDS,
    COMMANDS_CASE,
    PREDICTIONS,
    STORES,
    Case,
    Command,
    Prediction,
    Store,
    Variant,
)
from .copying import COPYING, measure_copies
from .environments import make_environments
from .measure import Measured, measure
from .predictions import MeasuredPrediction, measure_prediction
from .projects import generate, make_projects

RESULTS = Path(__file__).with_name("RESULTS.md")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; gives the exit status."""
    options = _parser().parse_args(arguments)
    # Who is told to stop stops the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    if options.scale:
        return scale.main(options.environments.resolve())
    chosen = [what for what in (*CASES, *COMMANDS) if re.search(options.only, what.name)]
    predictions = [what for what in PREDICTIONS if re.search(options.only, what.name)]
    copying = [what for what in COPYING if re.search(options.only, what.name)]
    stores: tuple[Store, ...] = (options.store,) if options.store else STORES
    environments = make_environments(options.environments.resolve())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), environments, options.repetitions)
        generate(bench.generated)
        results = bench.measure(chosen, stores)
        predicted = bench.measure_predictions(predictions)
        copied = measure_copies(copying, Path(folder) / "copies", options.repetitions)
    results.sort(key=lambda result: chosen.index(result.what))

    print(f"\n{report.tables(results, predicted, copied)}\n")
    if not options.only and not options.store:
        page = report.page(results, predicted, copied, options.repetitions)
        RESULTS.write_text(page, encoding="utf-8")
    complaints = [complaint for result in results for complaint in result.complaints()]
    complaints += [complaint for result in predicted for complaint in result.complaints()]
    if not results and not predicted and not copied:
        complaints.append(f"No run, command, prediction or copy matches {options.only!r}.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


@dataclass(frozen=True)
class Bench:
    """Where and how often to measure."""

    folder: Path
    environments: Mapping[Variant, Path]
    repetitions: int

    @property
    def generated(self) -> Path:
        """The project that all others are copies of."""
        return self.folder / "generated"

    def measure(self, chosen: Sequence[Case | Command], stores: Sequence[Store]) -> list[Measured]:
        """Measure runs on each store, and commands."""
        results = []
        for store in stores:
            # Commands touch no store: once is enough, on HTTP, where a request would show.
            here = [what for what in chosen if isinstance(what, Case) or store == stores[-1]]
            if not here:
                continue
            with _server(store) as proxy:
                for number, what in enumerate(here):
                    print(f"{what.name} ({store}) …", file=sys.stderr, flush=True)
                    projects = make_projects(
                        self.generated,
                        self.folder / f"{store}-{number}",
                        what if isinstance(what, Case) else COMMANDS_CASE,
                        self.environments,
                        server=proxy.uri if proxy else None,
                    )
                    results.append(measure(what, projects, self.repetitions, proxy))
        return results

    def measure_predictions(self, chosen: Sequence[Prediction]) -> list[MeasuredPrediction]:
        """Measure predictions, which touch no store: their models are in SQLite files."""
        results = []
        for number, what in enumerate(chosen):
            print(f"{what.name} …", file=sys.stderr, flush=True)
            projects = make_projects(
                self.generated, self.folder / f"prediction-{number}", what, self.environments
            )
            results.append(measure_prediction(what, projects, self.repetitions))
        return results


@contextmanager
def _server(store: Store) -> Iterator[CountingProxy | None]:
    if store == "sqlite":
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow_server(Path(folder)) as port,
        counting_proxy(port) as proxy,
    ):
        yield proxy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument(
        "--repetitions", type=_positive, default=5, metavar="N", help="5 when left out"
    )
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="what has a name that matches"
    )
    parser.add_argument(
        "--scale", action="store_true", help="how it grows with nodes and runs, instead of all else"
    )
    parser.add_argument("--store", choices=STORES, help="both when left out")
    parser.add_argument(
        "--environments", type=Path, required=True, metavar="FOLDER", help="kept for the next time"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
