"""Tables of values apart by commas, plain or packed, as rows that say what is wrong with them."""

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

DOWNLOAD_AGAIN = "download it again"


class SourceError(ValueError):
    """A data set or its mapping cannot be read; the message names the place and the next step."""


class Row(NamedTuple):
    """The cells of a table's row by column, and what is wrong with it ("" when nothing is)."""

    cells: dict[str, str]
    problem: str


def header_of(path: Path, *, delimiter: str = ",", remedy: str = DOWNLOAD_AGAIN) -> list[str]:
    """The column names of a table, without the white space around them.

    Args:
        path: As for `read_rows`, and so are the others.

    Raises:
        SourceError: When the table cannot be read.
    """
    with _opened(path, remedy) as file:
        return _names(next(csv.reader(file, delimiter=delimiter), []))


def read_rows(
    path: Path, columns: Collection[str], *, delimiter: str = ",", remedy: str = DOWNLOAD_AGAIN
) -> Iterator[Row]:
    """The rows of a table, as they stream by; blank lines are no rows.

    A row has a problem when its number of fields is not the header's: a comma too many moves what
    stands behind it, even where the last field is empty.

    Args:
        path: The table, plain, as .gz, or alone in a .zip.
        columns: Must be there, once each; the others are read as well.
        delimiter: Between the fields.
        remedy: The next step where the table cannot be read.

    Raises:
        SourceError: When the table cannot be read, or lacks a column or has it twice.
    """
    with _opened(path, remedy) as file:
        # strict: else an unclosed quote swallows all rows behind it in silence.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            first = next(reader, [])
            header = _names(first)
            if not first:
                raise SourceError(f"{path} is empty; name a table with a header and rows")
            if missing := [name for name in columns if name not in header]:
                raise SourceError(
                    f"{path} has no column {', '.join(map(repr, missing))}; its columns are "
                    f"{', '.join(header)}; {remedy}"
                )
            if doubled := sorted(name for name in set(columns) if header.count(name) > 1):
                raise SourceError(f"{path} has {', '.join(doubled)} twice; {remedy}")
            for values in reader:
                if len(values) <= 1 and not "".join(values).strip():
                    continue
                problem = ""
                if len(values) not in (len(first), len(header)):
                    problem = f"the row has {len(values)} fields, the header {len(header)}"
                cells = {k: v.strip() for k, v in zip(header, values, strict=False)}
                yield Row(cells, problem)
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}; {remedy}") from None


def _names(first: list[str]) -> list[str]:
    """The names in a table's first line, without those that commas behind the last one make."""
    names = [name.strip() for name in first]
    while names and not names[-1]:  # as in BBox_List_2017.csv
        names.pop()
    return names


@contextmanager
def _opened(path: Path, remedy: str) -> Iterator[IO[str]]:
    """The text of a table; what a damaged one raises becomes one line."""
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would hide the first column.
        with _unpacked(path) as file:
            yield io.TextIOWrapper(file, "utf-8-sig", newline="")
    except UnicodeDecodeError:
        raise SourceError(
            f"{path}, line {_first_bad_line(path)}: not UTF-8; save the table as UTF-8 (for "
            f"example by iconv -f latin1 -t utf-8), or {remedy}"
        ) from None
    except (OSError, EOFError, csv.Error, zlib.error, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{path} cannot be read: {why}; {remedy}") from None


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            if len(names) != 1:
                raise SourceError(f"{path} holds {len(names)} tables, not one; unpack it")
            with archive.open(names[0]) as file:
                yield file
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)


def _first_bad_line(path: Path) -> int:
    with _unpacked(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError("only called for a table that is not UTF-8")
