"""Readers of data sets by name: a folder as downloaded -> one record a row, in a stable order."""

from collections.abc import Iterator
from pathlib import Path

from mmclip.data.manifest import Record
from mmclip.data.openi import read_openi
from mmclip.data.tables import CsvMapping, SourceError, load_mapping, read_csv

__all__ = [
    "READERS",
    "CsvMapping",
    "SourceError",
    "load_mapping",
    "open_reader",
    "read_csv",
    "read_openi",
]

READERS = ("csv", "openi")
"""The names that `open_reader` knows."""


def open_reader(
    name: str, root: Path, *, mapping: Path | None, table: Path | None
) -> Iterator[Record]:
    """The records of a data set.

    Args:
        name: One of READERS.
        root: Its folder as downloaded; for openi also the archive itself.
        mapping: TOML file of a `CsvMapping`; csv only.
        table: Read in place of the table that the mapping names; csv only.

    Raises:
        SourceError: When the name is unknown, or an argument is missing or has no use here.
        ConfigError: When the mapping breaks a rule.
    """
    if name not in READERS:
        raise SourceError(f"there is no reader {name!r}; the readers are {', '.join(READERS)}")
    if not root.exists():
        raise SourceError(f"there is no folder {root}; give the data set's by --root")
    if name == "openi":
        if mapping is not None or table is not None:
            raise SourceError("openi has one layout; leave --mapping and --table out")
        return read_openi(root)
    if mapping is None:
        raise SourceError(
            "csv needs a file that says what the columns mean; write one after "
            "examples/mixed_films.toml and give it by --mapping"
        )
    return read_csv(root, load_mapping(mapping), table)
