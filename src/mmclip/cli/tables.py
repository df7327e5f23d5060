"""Tables for people, whose numbers are whole however narrow the terminal is."""

from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mmclip.progress import console

GAP = 2
"""Columns of the terminal between two of a table."""


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] = (),
    justify: Literal["left", "right"] = "right",
) -> None:
    """Prints a table on stderr: the first column is of words, the others of numbers.

    Where the terminal is too narrow, the first column breaks between its words, then columns are
    left out from the right, and named below: half a number is worse than none.

    Args:
        head: Names of the columns.
        rows: Their cells; a short row ends early.
        styles: Of the rows; none where it has no entry.
        justify: Of the numbers.
    """
    least = max(cell_len(word) for row in (head, *rows) for word in row[0].split() or [""])
    kept, room = 1, console.width - least
    for i in range(1, len(head)):
        room -= GAP + max(cell_len(row[i]) for row in (head, *rows) if len(row) > i)
        if room < 0:
            break
        kept += 1
    table = Table(box=None, pad_edge=False)
    table.add_column(head[0], min_width=least)
    for name in head[1:kept]:
        table.add_column(name, justify=justify, no_wrap=True)
    for i, row in enumerate(rows):
        cells = [Text(cell) for cell in row[:kept]]  # a finding may hold what looks like markup
        table.add_row(*cells, style=styles[i] if i < len(styles) else "")
    console.print(table)
    if kept < len(head):
        console.print(f"left out, for a wider terminal: {', '.join(head[kept:])}", style="dim")
