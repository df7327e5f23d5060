"""What a long task says of itself, in a terminal and where there is none."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from mmclip import progress as module
from mmclip.progress import progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in seconds, which a test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_now_and_then_and_at_the_end(clock, capsys):
    with progress("reading images", 4000) as advance:
        for moved_s in (5, 5, 20, 5):
            clock[0] += moved_s
            advance(1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading images: 3,000/4,000  30 s, 10 s left",
        "reading images: 4,000/4,000  35 s, 0 s left",
    ]


def test_what_was_done_before_counts_as_done_but_not_as_speed(clock, capsys):
    with progress("reading images", 100_000, done=90_000) as advance:
        clock[0] += 60
        advance(100, note="slow")
    assert (
        capsys.readouterr().err == "reading images: 90,100/100,000  slow  60 s, 1 h 39 min left\n"
    )


def test_nothing_is_shown_where_another_process_shows_it(clock, capsys):
    with progress("reading images", 2, show=False) as advance:
        clock[0] += 60
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_message_into_a_pipe_stands_in_one_line_and_a_table_fits_its_width():
    code = """
from rich.table import Table
from mmclip.progress import console
console.print("folder/" * 30 + " holds no images")
table = Table(box=None)
table.add_column("report")
table.add_row("effusion " * 20)
console.print(table)
"""
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=600, check=True)
    message, *rest = ended.stderr.splitlines()
    assert message == "folder/" * 30 + " holds no images" and ended.stdout == ""
    assert len(rest) > 2 and max(map(len, rest)) <= 80


@pytest.mark.parametrize("note", ["", "loss 12.345  1234 images/s"])
@pytest.mark.parametrize("width", [120, 80, 60, 44, 30, 20])
def test_the_line_of_a_terminal_cuts_nothing(width: int, note: str, monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(module, "console", terminal)
    what = "embedding images [/x]: what is done"
    with progress(what, 123_456, done=1000) as advance:
        advance(98_000, note)
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "\n", shown.getvalue())
    line = [line.strip() for line in plain.splitlines() if line.strip()][-1]
    assert len(line) < width and "\u2026" not in line
    parts = line.lstrip("\u2501\u2578\u257a ").split("  ")
    count = f"{what}: 99,000/123,456"
    assert parts[0] == (count if len(count) < width else "99,000/123,456")
    said = [*note.split("  "), *re.findall(r"\d+ s(?:, \d+ s left)?", line)]
    assert set(parts[1:]) <= set(said)
    assert width < 120 or (set(said) - {""} <= set(parts) and line[0] in "\u2501\u2578")
