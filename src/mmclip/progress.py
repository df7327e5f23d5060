"""One progress display for every long task: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_IS_TERMINAL = bool(sys.stderr) and sys.stderr.isatty()  # None where who starts Python closed it

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=not _IS_TERMINAL)
"""Messages for people go to stderr, so that stdout carries results alone. Into a file or a pipe
they are never wrapped: logs are searched by the paths in them. No text is markup: it may hold the
name of somebody's finding."""

LINE_EVERY_S = 15.0

SPEED_OVER_S = 300.0
"""The bar's estimate is of the work of so many seconds. [chosen: a chunk of large images takes a
minute, and over Rich's 30 s there would mostly be no estimate]"""

GAP, BAR_WIDTH, BAR_LEAST = 2, 28, 10
"""Columns of the terminal between two parts of the line, of the bar, and of the least room that a
bar with its gap needs. [chosen]"""

Advance = Callable[..., None]
"""advance(n=1, note=""): n more units are done; the note stands behind the bar."""


def counted(n: int, noun: str, verb: tuple[str, str] | None = None) -> str:
    """A number of things in words, such as "1 image is" or "2,000 images are".

    Args:
        n: How many.
        noun: Of one, whose plural takes an s, or ies for y.
        verb: Of one and of several.
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    said = f"{n:,} {noun if n == 1 else plural}"
    return said if verb is None else f"{said} {verb[n != 1]}"


@contextmanager
def progress(what: str, total: int, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Shows how far a task is, how fast it goes and how long it still takes.

    Args:
        what: The task, in a few words.
        total: Units of work in all.
        done: Units done before, when a task is resumed.
        show: False on all processes but the main one.
    """
    if not show:
        yield lambda n=1, note="": None
    elif console.is_terminal:
        with Progress(_Line(), console=console, speed_estimate_period=SPEED_OVER_S) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(n: int = 1, note: str | None = None) -> None:
                bar.advance(task, n)
                if note is not None:
                    bar.update(task, note=note)

            yield advance
    else:
        yield _plain(what, total, done)


class _Line(ProgressColumn):
    """A bar, and the line that is printed where there is no terminal."""

    def render(self, task: Task) -> Table:
        """What fits whole: the count first, then the times, the note and the bar."""
        room = console.width - 1  # of the cursor
        count = _count(task.description, int(task.completed), int(task.total or 0))
        parts = [count if cell_len(count) <= room else count.rpartition(" ")[2]]
        room -= cell_len(parts[0])
        for part in (_times(task.elapsed or 0.0, task.time_remaining), task.fields["note"]):
            if part and GAP + cell_len(part) <= room:
                parts.insert(1, part)  # the note stands before the times, as in `_plain`
                room -= GAP + cell_len(part)
        cells: list[ProgressBar | Text] = [Text("  ".join(parts), no_wrap=True)]
        if room >= BAR_LEAST:
            width = min(BAR_WIDTH, room - GAP)
            cells.insert(0, ProgressBar(task.total, task.completed, width=width))
        line = Table.grid(padding=(0, GAP))
        line.add_row(*cells)
        return line


def _count(what: str, completed: int, total: int) -> str:
    return f"{what}: {completed:,}/{total:,}"


def _times(elapsed_s: float, left_s: float | None) -> str:
    """How long a task has taken, and still takes where that can be said."""
    return _clock(elapsed_s) + ("" if left_s is None else f", {_clock(left_s)} left")


def _plain(what: str, total: int, done: int) -> Advance:
    start = last = time.monotonic()
    completed, text = done, ""

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal completed, last, text
        completed += n
        text = text if note is None else note
        now = time.monotonic()
        if completed < total and now - last < LINE_EVERY_S:
            return
        last = now
        elapsed = now - start
        left = elapsed / max(completed - done, 1) * (total - completed)
        said = (_count(what, completed, total), text, _times(elapsed, left))
        print("  ".join(part for part in said if part), file=sys.stderr, flush=True)

    return advance


def _clock(seconds: float) -> str:
    """Such as "59 s", "59 min" or "1 h 40 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
