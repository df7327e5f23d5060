"""Tables for people, whose numbers are whole however narrow the terminal is."""

from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mmclip.progress import console

GAP = 2
"""Columns of the terminal between two of a table."""

TEXT_LEAST = 16
"""Columns of the terminal under which no text is shown. [chosen: two words]"""


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] = (),
    justify: Literal["left", "right"] = "right",
    has_text: bool = False,
) -> None:
    """Prints a table on stderr: the first column is of words, the others of numbers.

    Where the terminal is too narrow, the first column breaks between its words, then columns are
    left out from the right, and named below: half a number is worse than none. A file or a pipe
    takes the whole table.

    Args:
        head: Names of the columns; all empty where they need none.
        rows: Their cells; a short row ends early.
        styles: Of the rows; none where it has no entry.
        justify: Of the numbers.
        has_text: The last column is of text, which is cut at the edge of the terminal.
    """
    lines, last = (head, *rows), len(head) - 1
    widths = [max(cell_len(line[i]) for line in lines if i < len(line)) for i in range(len(head))]
    least = max(cell_len(word) for line in lines for word in line[0].split() or [""])
    room = console.width if console.is_terminal else sum(widths) + GAP * last
    if has_text:  # it takes what is left beside the others
        left = room - sum(widths[:last]) - GAP * last
        widths[last] = min(widths[last], max(left, TEXT_LEAST))
    kept, used = 1, least
    while kept < len(head) and used + GAP + widths[kept] <= room:
        used += GAP + widths[kept]
        kept += 1
    # A word that is longer than the terminal goes on in its next line.
    widths[0] = min(widths[0], least + max(0, room - used))
    total = sum(widths[:kept]) + GAP * (kept - 1)
    table = Table(box=None, pad_edge=False, show_header=any(head), width=total)
    for i, name in enumerate(head[:kept]):
        side = "left" if i == 0 or (has_text and i == last) else justify
        table.add_column(name, width=widths[i], justify=side, no_wrap=i > 0)
    for i, row in enumerate(rows):
        cells = [Text(cell) for cell in row[:kept]]  # a finding may hold what looks like markup
        table.add_row(*cells, style=styles[i] if i < len(styles) else "")
    console.print(table, soft_wrap=True)
    if kept < len(head):
        console.print(f"left out, for a wider terminal: {', '.join(head[kept:])}", style="dim")
