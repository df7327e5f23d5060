"""Predictions as CSV: numbers with all their digits, and no cell that a spreadsheet would run."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmclip.escape import safe_cell
from mmclip.files import write_atomic
from mmclip.prediction.decisions import decide
from mmclip.prediction.model import Skipped

DECISION = "{finding} present"
"""The column of a finding's decision."""

WriteRow = Callable[[Sequence[str]], object]


class PredictionTable:
    """A CSV of predictions, one line an image or a study; see `prediction_table`."""

    def __init__(
        self,
        write_row: WriteRow,
        findings: Sequence[str],
        thresholds: Mapping[str, float | None] | None,
        keys: Sequence[str],
    ) -> None:
        self._write_row = write_row
        self._thresholds = None if thresholds is None else [thresholds[f] for f in findings]
        header = [*keys, *findings]
        if thresholds is not None:
            header += [DECISION.format(finding=finding) for finding in findings]
        self._write_row([safe_cell(cell) for cell in header])

    def write(self, keys: Sequence[str | int], probabilities: Any) -> None:
        """Adds a line: what it is of, and k probabilities."""
        row = [safe_cell(key) if isinstance(key, str) else str(key) for key in keys]
        row += [repr(float(value)) for value in probabilities]
        if self._thresholds is not None:
            (decisions,) = decide(probabilities[None], self._thresholds)
            row += ["" if made is None else str(int(made)) for made in decisions]
        self._write_row(row)


@contextmanager
def prediction_table(
    path: Path,
    findings: Sequence[str],
    thresholds: Mapping[str, float | None] | None = None,
    keys: Sequence[str] = ("image_id",),
) -> Iterator[PredictionTable]:
    """A table to be written as it comes; a file of that name is whole.

    Args:
        path: Of the file.
        findings: One column each.
        thresholds: By finding; then each has a column of decisions: 1, 0, or empty without one.
        keys: Columns before them.
    """
    with _rows_of(path) as write_row:
        yield PredictionTable(write_row, findings, thresholds, keys)


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Writes the images that have no numbers, with the reason of each."""
    with _rows_of(path) as write_row:
        write_row(["image_id", "reason", "detail"])
        for one in skipped:
            write_row([safe_cell(one.image_id), one.reason, safe_cell(one.detail)])


@contextmanager
def _rows_of(path: Path) -> Iterator[WriteRow]:
    """A file to write rows into; a name that is no UTF-8 has its odd bytes as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        try:
            yield csv.writer(text, lineterminator="\n").writerow
        finally:
            text.detach()  # what it holds goes into the file
