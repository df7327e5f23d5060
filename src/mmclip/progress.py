"""One progress display for every long task: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())
"""Messages for people go to stderr, so that stdout carries results alone. Into a file or a pipe
they are never wrapped: logs are searched by the paths in them. No text is markup: it may hold the
name of somebody's finding."""

LINE_EVERY_S = 15.0

SPEED_OVER_S = 300.0
"""The bar's estimate is of the work of so many seconds. [chosen: a chunk of large images takes a
minute, and over Rich's 30 s there would mostly be no estimate]"""

Advance = Callable[..., None]
"""advance(n=1, note=""): n more units are done; the note stands behind the bar."""


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
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, speed_estimate_period=SPEED_OVER_S) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(n: int = 1, note: str | None = None) -> None:
                bar.advance(task, n)
                if note is not None:
                    bar.update(task, note=note)

            yield advance
    else:
        yield _plain(what, total, done)


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
        said = [f"{what}: {completed:,}/{total:,}", text, f"{_clock(elapsed)}, {_clock(left)} left"]
        print("  ".join(part for part in said if part), file=sys.stderr, flush=True)

    return advance


def _clock(seconds: float) -> str:
    """Such as "59 s", "59 min" or "1 h 40 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
