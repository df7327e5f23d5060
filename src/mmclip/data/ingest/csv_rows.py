"""Tables of values, CSV or Excel, plain or packed, as rows that say what is wrong with them."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, cast

from mmclip.data.file_kinds import kind_of
from mmclip.data.ingest.excel_rows import EXCEL_SUFFIXES, NO_VALUE, excel_lines, other_sheet
from mmclip.data.ingest.source_error import SourceError

DOWNLOAD_AGAIN = "download it again"

_PEEK_BYTES = 1 << 16
"""Looked at to tell what a table that cannot be read was written in."""


BLANKS = frozenset(("", "nan", "n/a", "na", "none", "null"))
"""Cells, in lower case, in which nothing stands."""

LONGEST_CELL = 1 << 24
"""Characters of a cell. [chosen: 16 million; Python's own limit, 131,072, stops at a report that
`text` would cut with a warning; an open quote is found by its own error]"""

_AS_TEXT = re.compile(r"=\"(.*)\"|'(?=\d)(.*)")
"""What makes Excel take a number for a text, and keep its zeros: ="00123", and '00123."""


class Row(NamedTuple):
    """The cells of a table's row by column, and what is wrong with it ("" when nothing is)."""

    cells: dict[str, str]
    problem: str


def header_of(
    path: Path, *, delimiter: str = ",", encoding: str = "utf-8", remedy: str = DOWNLOAD_AGAIN
) -> list[str]:
    """The column names of a table, without the white space around them.

    Args:
        path: As for `read_rows`, and so are the others.

    Raises:
        SourceError: When the table cannot be read.
    """
    with _lines(path, delimiter, encoding, remedy, strict=False) as lines:
        return _names(next(lines, []))


def read_rows(
    path: Path,
    columns: Collection[str],
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
    remedy: str = DOWNLOAD_AGAIN,
) -> Iterator[Row]:
    """The rows of a table, as they stream by; blank lines are no rows.

    A row has a problem when its number of fields is not the header's: a comma too many moves what
    stands behind it, even where the last field is empty. So has one with an error of Excel, such as
    "#N/A", or a formula without its value in one of `columns`: it would be everybody's patient id.
    A first line "sep=;", which Excel writes and obeys, names the delimiter.

    Args:
        path: The table, plain, packed by gzip, bzip2 or xz, or alone in a zip archive, whatever
            the name says; or an Excel file, whose first sheet is read.
        columns: Must be there, once each; the others are read as well.
        delimiter: Between the fields.
        encoding: As Python names it.
        remedy: The next step where the table cannot be read.

    Raises:
        SourceError: When the table cannot be read, or lacks a column or has it twice.
    """
    with _lines(path, delimiter, encoding, remedy) as lines:
        first = next(lines, [])
        header = _names(first)
        if not first:
            raise SourceError(f"{path} is empty; name a table with a header and rows")
        if missing := [name for name in columns if name not in header]:
            if remedy != DOWNLOAD_AGAIN:  # a user's own
                said = {name: repr(name) for name in columns}
                raise SourceError(f"{path}: {lacking(path, header, said, delimiter, encoding)}")
            raise SourceError(
                f"{path} has no column {', '.join(map(repr, missing))}; "
                f"{what_it_has(header, columns)}; {remedy}"
            )
        if doubled := sorted(name for name in set(columns) if header.count(name) > 1):
            raise SourceError(f"{path} has {', '.join(doubled)} twice; {remedy}")
        for values in lines:
            if len(values) <= 1 and not "".join(values).strip():
                continue
            problem = ""
            if len(values) not in (len(first), len(header)):
                problem = f"the row has {len(values)} fields, the header {len(header)}"
            cells = {k: v.strip() for k, v in zip(header, values, strict=False)}
            for name in columns:
                cell = cells.get(name, "")
                if cell == NO_VALUE:
                    problem = problem or (
                        f"{name} is a formula without a value; open the table in Excel and save it"
                    )
                elif cell.startswith("#") and cell.upper() in _EXCEL_ERRORS:
                    problem = problem or f"{name} is {cell}, an error of Excel"
            yield Row(cells, problem)


_EXCEL_ERRORS = frozenset(
    (
        "#N/A", "#NV", "#REF!", "#BEZUG!", "#VALUE!", "#WERT!", "#VALEUR!", "#NAME?", "#NOM?",
        "#DIV/0!", "#NUM!", "#NULL!", "#ZAHL!", "#N/D", "#\u00a1REF!", "#\u00a1VALOR!",
        "#\u00bfNOMBRE?", "#\u00a1DIV/0!", "#SPILL!", "#\u00dcBERLAUF!", "#CALC!",
    )
)  # fmt: skip
"""What a cell shows whose formula failed, as a look-up that finds nothing, in some languages."""


def id_of(cell: str) -> str:
    """The id in a cell, without Excel's signs of a text; "" where no letter or number stands in it.

    "-" and "?" would be everybody's patient id.
    """
    text = cell.strip()
    if (kept := _AS_TEXT.fullmatch(text)) is not None:
        text = (kept[1] or kept[2] or "").strip()
    is_id = text.lower() not in BLANKS and any(map(str.isalnum, text))
    return text if is_id else ""


def n_alike(ids: Collection[str]) -> int:
    """How many ids are another one's but for leading zeros or ".0", as of tables saved as numbers.

    Args:
        ids: Each once.
    """
    return len(ids) - len({re.sub(r"\.0+$", "", text).lstrip("0") for text in ids})


def _names(first: list[str]) -> list[str]:
    """The names in a table's first line, without those that commas behind the last one make."""
    names = [name.strip("\ufeff \t\r\n\xa0").strip() for name in first]
    while names and not names[-1]:  # as in BBox_List_2017.csv
        names.pop()
    return names


@contextmanager
def _lines(
    path: Path, delimiter: str, encoding: str, remedy: str, *, strict: bool = True
) -> Iterator[Iterator[list[str]]]:
    """The lines of a table as lists of cells; what a damaged one raises becomes one line."""
    if path.suffix.lower() in EXCEL_SUFFIXES:
        with excel_lines(path) as lines:
            yield lines
        return
    reader = None
    try:
        # -sig: spreadsheets write a byte order mark, which would hide the first column.
        is_utf_8 = codecs.lookup(encoding).name == "utf-8"
        _refuse_other(path, encoding, remedy)
        with (
            _unpacked(path) as file,
            io.TextIOWrapper(file, "utf-8-sig" if is_utf_8 else encoding, newline="") as text,
        ):
            first = text.readline()
            if said := re.fullmatch(r'"?sep=(.)"?[,;\t]*\s*', first.removeprefix("\ufeff")):
                delimiter, first = said[1], ""
            csv.field_size_limit(LONGEST_CELL)
            # strict: else an unclosed quote swallows all rows behind it in silence.
            reader = csv.reader(_chained(first, text), delimiter=delimiter, strict=strict)
            yield reader
    except UnicodeError:
        raise SourceError(_not_in(path, encoding, remedy)) from None
    except csv.Error as error:
        line = f", line {reader.line_num}" if reader is not None else ""
        raise SourceError(f"{path}{line}: {error}; {remedy}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{path} cannot be read: {why}; {remedy}") from None


def _chained(first: str, rest: io.TextIOWrapper) -> Iterator[str]:
    if first:
        yield first
    yield from rest


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a table, unpacked where they are packed: downloads are renamed, or unpacked."""
    with path.open("rb") as file:
        start = file.read(_MAGIC_BYTES)
    for magic, opened in _PACKERS.items():
        if start.startswith(magic):
            with opened(path) as file:
                yield cast(IO[bytes], file)
            return
    name = _table_in(path) if start == _ZIP_START or path.suffix.lower() == ".zip" else None
    if name is None:
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            yield file


_PACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}
_ZIP_START = b"PK\x03\x04"
_MAGIC_BYTES = 4


def _table_in(path: Path) -> str | None:
    """The table of a zip archive; None of one that is a document of its own, such as Excel's.

    Raises:
        SourceError: When it does not hold one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    except zipfile.BadZipFile:
        if path.suffix.lower() == ".zip":
            raise
        return None
    if {"[Content_Types].xml", "mimetype"} & set(names):
        return None
    tables = [name for name in names if name.lower().endswith(".csv")]
    tables = tables or [name for name in names if name.lower().endswith((".tsv", ".txt"))]
    if len(tables) != 1:
        raise SourceError(f"{path} holds {len(tables)} tables, not one; unpack it")
    return tables[0]


# -- what a table was written in --


def _refuse_other(path: Path, encoding: str, remedy: str) -> None:
    """Refuses what its encoding would read without an error and wrongly, and what is no table.

    UTF-16 without a mark is valid UTF-8 with a zero beside each letter; encodings of one byte read
    everything, UTF-8 as well, and Latin-1 has no letter where cp1252 has quotes and the euro.
    """
    with _unpacked(path) as file:
        start = file.read(_PEEK_BYTES)
    if (kind := kind_of(start)) is not None:
        kind = _EXCEL_STARTS.get(start[:4], kind)
        how = "save it as .xlsx, or as CSV UTF-8" if "Excel" in kind else "save it as CSV UTF-8"
        is_ours = remedy != DOWNLOAD_AGAIN
        raise SourceError(f"{path} is {kind} by its content; {how if is_ours else remedy}")
    name = codecs.lookup(encoding).name
    if name.startswith(("utf-16", "utf-32")):
        return
    is_other = _is_of_two_bytes(start)
    if not is_other and name in _ONE_BYTE and not start.isascii():
        is_controls = name == "iso8859-1" and any(0x80 <= byte < 0xA0 for byte in start)
        is_other = is_controls or _guess(path) != "cp1252"
    if is_other:
        raise SourceError(_not_in(path, encoding, remedy))


_EXCEL_STARTS = {
    _ZIP_START: "an Excel file, or one like it,",  # an archive with a table was unpacked
    b"\xd0\xcf\x11\xe0": "an Excel file of before 2007",
}
"""What a table is that begins as other documents do, too."""

_ONE_BYTE = ("iso8859-1", "iso8859-15", "cp1252")
"""Encodings of western Europe that read any file, as Python names them."""


def _is_of_two_bytes(start: bytes) -> bool:
    """Whether a quarter of the bytes are zeros, as in UTF-16; one alone is a row's own fault."""
    return start.count(0) > len(start) / 4


def _not_in(path: Path, encoding: str, remedy: str) -> str:
    """That a table is not in its encoding, with the one that it looks like and what to do."""
    name = "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding
    line, guess = _first_bad_line(path, encoding), _guess(path)
    if guess == "utf-8":
        return f'{path}, line {line}: not {name}; say encoding = "utf-8" in the mapping'
    said = f"{path}, line {line}: not {name}; save the table as UTF-8 (in Excel: Save As, CSV UTF-8"
    said += f"; or iconv -f {guess} -t utf-8)" if guess else ")"
    if remedy == DOWNLOAD_AGAIN:
        return f"{said}, or {remedy}"
    if not guess:
        return f"{said}, or say its encoding in the mapping, such as gb18030, shift_jis or cp1251"
    return f'{said}, or say encoding = "{guess}" in the mapping, as it looks like that'


def _guess(path: Path) -> str:
    """The encoding that a table's first bytes look like; "" of letters that are not western.

    Western words have one letter of their own, or two; others have nothing else.
    """
    with _unpacked(path) as file:
        start = file.read(_PEEK_BYTES)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _is_of_two_bytes(start):
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # not a letter that the peek has cut
            n_other = sum(map(len, re.findall(rb"[\x80-\xff]{3,}", start)))
            is_western = 2 * n_other <= sum(byte >= 0x80 for byte in start)
            return "cp1252" if is_western else ""  # Excel's on Windows, with Latin-1's letters
    else:
        return "utf-8"
    return "cp1252"


def _first_bad_line(path: Path, encoding: str) -> int:
    """The first line that is not in an encoding; 1 where lines cannot be told apart."""
    if codecs.lookup(encoding).name != "utf-8":
        return 1
    with _unpacked(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def lacking(
    path: Path, header: list[str], used: Mapping[str, str], delimiter: str, encoding: str
) -> str:
    """What columns a user's table lacks, and what to do.

    Args:
        path: The table; the first rows below its header are looked at.
        header: Names of its columns.
        used: By each name that the mapping gives, how it is told.
        delimiter: Of the mapping, and so is the encoding.
    """
    if (other := parted_by(header, delimiter, used)) is not None:
        what = {";": "semicolons", ",": "commas", "\t": "tabs", "|": "bars"}[other]
        return (
            f"its cells are parted by {what}, not by {delimiter!r}; say delimiter = "
            f"{json.dumps(other)} in the mapping"
        )
    missing = ", ".join(said for name, said in used.items() if name not in header)
    if path.suffix.lower() in EXCEL_SUFFIXES and (sheet := other_sheet(path, used, _TITLE_ROWS)):
        return (
            f"the first sheet has no column {missing}, and the sheet {sheet!r} has; move that one "
            f"to the front"
        )
    with _lines(path, delimiter, encoding, "", strict=False) as lines:
        for cells in islice(lines, _TITLE_ROWS):
            if used.keys() <= set(_names(cells)):
                return (
                    f"the first row has no column {missing}, and the row that starts with "
                    f"{cells[0]!r} has; delete the rows above that one"
                )
    return (
        f"no column {missing}; {what_it_has(header, used)}; name them in the mapping as the table "
        f"does"
    )


def what_it_has(first: Sequence[str], wanted: Collection[str]) -> str:
    """The columns of a table, where its first row is a header by one of the names in it.

    The first row of a table without a header is a patient's, and is never printed.
    """
    if not first:
        return "it is empty"
    known = {name.casefold() for name in wanted}
    names = [name.casefold() for name in first]
    if any(name in known or get_close_matches(name, known, 1, 0.8) for name in names if name):
        return f"its columns are {', '.join(first)}"
    return (
        f"its first row, with {len(first)} cells, has none of the names that are looked for, and "
        f"is not printed, as it may be a patient's; the first row must name the columns"
    )


_TITLE_ROWS = 20
"""Rows above a header that are looked at. [chosen: exports have one to five, such as a title]"""


def parted_by(header: list[str], delimiter: str, used: Collection[str]) -> str | None:
    """The delimiter by which a header would have more of the columns that a mapping names."""
    line = delimiter.join(header)
    found = {
        other: len(set(used) & {name.strip().strip('"') for name in line.split(other)})
        for other in (";", ",", "\t", "|")
        if other != delimiter
    }
    best = max(found, key=lambda other: found[other])
    return best if found[best] > len(set(used) & set(header)) else None
