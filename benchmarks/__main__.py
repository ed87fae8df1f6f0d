"""Measure all cases, print the tables and write RESULTS.md."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.runtime.servers import CountingProxy, counting_proxy, mlflow_server

from . import report
from .cases import CASES, COMMANDS, COMMANDS_CASE, STORES, Case, Store
from .environments import make_environments
from .measure import Measured, measure
from .projects import generate, make_projects

RESULTS = Path(__file__).with_name("RESULTS.md")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; gives the exit status."""
    options = _parser().parse_args(arguments)
    # Who is told to stop stops the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    chosen = [what for what in (*CASES, *COMMANDS) if re.search(options.only, what.name)]
    stores: tuple[Store, ...] = (options.store,) if options.store else STORES
    environments = make_environments(options.environments.resolve())
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder, "generated")
        generate(generated)
        for store in stores:
            # Commands touch no store: once is enough, on HTTP, where a request would show.
            here = [what for what in chosen if isinstance(what, Case) or store == stores[-1]]
            with _server(store) as proxy:
                for number, what in enumerate(here):
                    print(f"{what.name} ({store}) …", file=sys.stderr, flush=True)
                    projects = make_projects(
                        generated,
                        Path(folder, f"{store}-{number}"),
                        what if isinstance(what, Case) else COMMANDS_CASE,
                        environments,
                        server=proxy.uri if proxy else None,
                    )
                    results.append(measure(what, projects, options.repetitions, proxy))
    results.sort(key=lambda result: chosen.index(result.what))

    print(f"\n{report.tables(results)}\n")
    if not options.only and not options.store:
        RESULTS.write_text(report.page(results, options.repetitions), encoding="utf-8")
    complaints = [complaint for result in results for complaint in result.complaints()]
    if not results:
        complaints.append(f"No run and no command matches {options.only!r}.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


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
        "--only", default="", metavar="PATTERN", help="runs and commands whose name matches"
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
