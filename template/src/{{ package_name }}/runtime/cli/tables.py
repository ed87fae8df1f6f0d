"""Tables in the terminal, for the commands of extras."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return a table without lines, with a heading for each column."""
    return Table(
        *columns,
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def width_of(table: Table, console: Console) -> int:
    """Return how wide a console must be to show a table without folding anything."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum
