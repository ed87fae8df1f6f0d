"""Tables in the terminal, for the commands of extras."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.table import Table

# What a terminal takes for commands, in names and values of a store that anybody writes to.
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Console(Console):
    """A console that writes texts without control characters."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """Return the parts of what is written; colours are not in their texts."""
        for text, style, control in super().render(*args, **kwargs):
            yield Segment(text if control else text.translate(CONTROLS), style, control)


def new_console(width: int | None = None) -> Console:
    """Return a console that writes names as they are, and colours on a terminal only."""
    return _Console(markup=False, emoji=False, highlight=False, width=width)


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
