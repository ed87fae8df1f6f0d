"""The sums in `docs/scale.md` add up, and start from what `benchmarks/SCALE.md` has."""

from __future__ import annotations

import operator
import re
from decimal import Decimal

import pytest

from ...conftest import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "scale.md").read_text("utf-8")
MEASURED = (REPOSITORY / "benchmarks" / "SCALE.md").read_text("utf-8")

BLOCKS = [
    line
    for block in re.findall(r"^```text\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
IN_WORDS = re.findall(r"`([^`\n]* = [^`\n]*)`", GUIDE)

TIMES = "\N{MULTIPLICATION SIGN}"
OPERATIONS = {TIMES: operator.mul, "÷": operator.truediv, "+": operator.add}

# Seconds of an hour; from ms to s, from MB to GB; from kB to GB.
CONVERSIONS = {"3,600", "1,000", "1,000,000"}
# The workers, their pools, and the connections that MLflow's own pool has.
SERVER = {"4", "2", "15"}


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?", text)


def value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def tables(text: str) -> list[dict[str, list[str]]]:
    """Read the tables of a text, without their headers: the cells of each row by its first one."""
    return [
        {
            first.strip(): [cell.strip() for cell in others]
            for first, *others in (line.strip("|").split("|") for line in table.splitlines()[2:])
        }
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    ]


_, ASSUMED, FIGURES, _ = tables(GUIDE)
NODES, AT_ONCE, STORED = tables(MEASURED)


@pytest.mark.parametrize("line", [*BLOCKS, *IN_WORDS])
def test_the_sum_adds_up(line: str) -> None:
    sum_, _, result = line.partition(" = ")
    first, *others = numbers(sum_)
    operations = re.findall(f"[{TIMES}÷+]", sum_)
    assert len(operations) == len(others)

    total = value(first)
    for operation, number in zip(operations, others, strict=True):
        total = OPERATIONS[operation](total, value(number))

    given = value(numbers(result)[0])
    assert total.quantize(given) == given


def test_the_sums_start_from_what_the_tables_of_the_guide_say() -> None:
    known = {number for (number,) in [*ASSUMED.values(), *FIGURES.values()]}
    known |= CONVERSIONS | SERVER

    for line in BLOCKS:
        sum_, _, result = line.partition(" = ")
        assert set(numbers(sum_)) <= known, line
        known.add(numbers(result)[0])


def test_the_figures_of_the_guide_are_those_that_were_measured() -> None:
    (pool,) = re.findall(r"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=(\d+)", MEASURED)
    sizes = [row[4].removesuffix(" kB") for row in AT_ONCE.values()]

    assert {name: number for name, (number,) in FIGURES.items()} == {
        "requests of a run with 10 nodes": NODES["10"][0],
        "server's processor for a run, 100 at once, ms": AT_ONCE["100"][2],
        "server's processor for a run with 1,000 nodes, ms": NODES["1,000"][3],
        "database's processor for a run, 100 at once, ms": AT_ONCE["100"][3],
        "in the database, a run with 10 nodes, kB": max(sizes, key=value),
        "in the database, a run with 1,000 nodes, kB": NODES["1,000"][5].removesuffix(" kB"),
        "first page of an experiment with 100,000 runs, ms": STORED["100,000"][2],
        "first page of an experiment with 10,000 runs, ms": STORED["10,000"][2],
        "connections of the pool": pool,
    }


def test_what_grows_with_the_stored_runs_is_told_as_it_was_measured() -> None:
    start, page, by_metric, size = (
        [row[column] for row in STORED.values()] for column in (1, 2, 3, 0)
    )
    few, more, many = STORED
    told = " ".join(GUIDE.split())

    assert f"{start[0]} ms with {few} runs, {start[2]} ms with {many}." in told
    first_page = f"{page[0]} ms with {few} runs in the experiment, {page[1]} ms with {more}"
    assert f"{first_page}, {page[2]} ms with {many}." in told
    assert f"{by_metric[0]}, {by_metric[1]} and {by_metric[2]} ms" in told
    assert f"from {more} to {many} runs {size[1]} became {size[2]}" in told
