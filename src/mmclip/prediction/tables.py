"""Predictions as CSV: numbers with all their digits, and no cell that a spreadsheet would run."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmclip.escape import safe_cell
from mmclip.prediction.decisions import decide
from mmclip.prediction.model import Skipped

DECISION = "{finding} present"
"""The column of a finding's decision."""


class PredictionTable:
    """A CSV of predictions, one line an image or a study, written as it comes.

    It is written beside its place and moved there at the end: a table of that name is whole.
    """

    def __init__(
        self,
        path: Path,
        findings: Sequence[str],
        thresholds: Mapping[str, float | None] | None = None,
        keys: Sequence[str] = ("image_id",),
    ) -> None:
        """Starts the table.

        Args:
            path: Of the file.
            findings: One column each.
            thresholds: By finding; then each has a column of decisions: 1, 0, or empty without one.
            keys: Columns before them.
        """
        self.path = path
        self._aside = path.with_name(f"{path.name}.part")
        self._thresholds = None if thresholds is None else [thresholds[f] for f in findings]
        header = [*keys, *findings]
        if thresholds is not None:
            header += [DECISION.format(finding=finding) for finding in findings]
        self._file: IO[str] = _open(self._aside)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow([safe_cell(cell) for cell in header])

    def __enter__(self) -> "PredictionTable":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None:
            self._aside.replace(self.path)

    def write(self, keys: Sequence[str | int], probabilities: Any) -> None:
        """Adds a line: what it is of, and k probabilities."""
        row = [safe_cell(key) if isinstance(key, str) else str(key) for key in keys]
        row += [repr(float(value)) for value in probabilities]
        if self._thresholds is not None:
            (decisions,) = decide(probabilities[None], self._thresholds)
            row += ["" if made is None else str(int(made)) for made in decisions]
        self._writer.writerow(row)


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> None:
    """Writes the images that have no numbers, with the reason of each."""
    aside = path.with_name(f"{path.name}.part")
    with _open(aside) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_id", "reason", "detail"])
        for one in skipped:
            writer.writerow([safe_cell(one.image_id), one.reason, safe_cell(one.detail)])
    aside.replace(path)


def _open(path: Path) -> IO[str]:
    """A file for csv; a name that is no UTF-8 is written with its odd bytes as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
