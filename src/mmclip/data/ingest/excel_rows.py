"""Sheets of Excel files as lines of text, as Excel shows them."""

import datetime
import re
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mmclip.data.ingest.source_error import SourceError

EXCEL_SUFFIXES = (".xlsx", ".xlsm")

NO_VALUE = "#FORMULA!"
"""In the place of a formula whose value the file does not hold."""

_WITHOUT_VALUE = re.compile(
    rb'<c r="([A-Z]+\d+)"([^>]*)><f[^>]*?(?:/>|>[^<]*</f>)\s*(?:<v\s*/>|<v></v>)?\s*</c>'
)
_ZEROS = re.compile(r'((?:"[^"]*"|\\.)*)(0{2,})((?:"[^"]*"|\\.)*)')
"""A number format of leading zeros, such as 00000000 or "P"0000."""


@contextmanager
def excel_lines(path: Path) -> Iterator[Iterator[list[str]]]:
    """The rows of the first sheet that is not hidden.

    Raises:
        SourceError: When the file cannot be read, or the package that reads it is not installed.
    """
    book = _opened(path)
    try:
        yield _rows(_shown(book)[0])
    finally:
        book.close()


def other_sheet(path: Path, used: Collection[str], n_rows: int) -> str | None:
    """The name of another sheet whose first rows hold all columns that are looked for."""
    book = _opened(path)
    try:
        for sheet in _shown(book)[1:]:
            if any(set(used) <= {n.strip() for n in row} for row in islice(_rows(sheet), n_rows)):
                return str(sheet.title)
    finally:
        book.close()
    return None


def _opened(path: Path) -> Any:
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ModuleNotFoundError:
        raise SourceError(
            f"{path} is an Excel file, and the package that reads one is not installed: "
            f"pip install 'mmclip[xlsx]', or save the table as CSV UTF-8"
        ) from None
    try:
        return openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, InvalidFileException) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(
            f"{path} cannot be read as an Excel file: {why}; save it as .xlsx, or as CSV UTF-8"
        ) from None


def _shown(book: Any) -> list[Any]:
    return [s for s in book.worksheets if s.sheet_state == "visible"] or list(book.worksheets)


def _rows(sheet: Any) -> Iterator[list[str]]:
    """Rows of the header's length: a sheet may hold empty cells behind or below its table."""
    sheet.reset_dimensions()  # what some programs write there is wrong, and would cut the table
    lacking = _cells_without_value(sheet)
    n_columns = 0
    for cells in sheet.iter_rows():
        values = [
            NO_VALUE if lacking and cell.value is None and _place(cell) in lacking else _text(cell)
            for cell in cells
        ]
        while values and not values[-1]:
            values.pop()
        n_columns = n_columns or len(values)
        if values:
            yield values + [""] * (n_columns - len(values))


def _place(cell: Any) -> str:
    return getattr(cell, "coordinate", "")  # a cell that is not in the file has none


def _cells_without_value(sheet: Any) -> frozenset[str]:
    """The formulas whose values the file lacks, as one has that Excel did not write.

    A formula that gives no text has a value of the type "str".
    """
    content = sheet.parent._archive.read(sheet._worksheet_path)
    if b"<f" not in content:
        return frozenset()
    found = _WITHOUT_VALUE.finditer(content)
    return frozenset(m[1].decode() for m in found if b't="str"' not in m[2])


def _text(cell: Any) -> str:
    """A cell as text: dates by ISO 8601, whole numbers without a point, booleans as TRUE and FALSE.

    A number that Excel shows with leading zeros (format 00000000) keeps them, and what the format
    puts beside them.
    """
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and (form := _ZEROS.fullmatch(str(cell.number_format))):
        before, behind = (re.sub(r'"([^"]*)"|\\(.)', r"\1\2", form[n]) for n in (1, 3))
        return f"{before}{str(value).zfill(len(form[2]))}{behind}"
    return str(value)
