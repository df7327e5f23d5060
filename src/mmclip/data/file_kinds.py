"""What a file is by its first bytes, where it is none of what a command reads."""

import re

_STARTS = (
    (b"\x1f\x8b", "a gzip archive"), (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"), (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"), (b"Rar!", "a RAR archive"),
    (b"PAR1", "a Parquet file"), (b"ARROW1", "an Arrow file"), (b"%PDF", "a PDF"),
    (b"\x89HDF", "an HDF5 file"), (b"SQLite format 3", "an SQLite database"),
    (b"\x93NUMPY", "a NumPy array"), (b"{\\rtf", "an RTF document"),
    (b"\xd0\xcf\x11\xe0", "a document of an old Office, or of Windows"),
)  # fmt: skip
_TEXTS = (
    (re.compile(rb"<(!doctype html|html|head|table)", re.IGNORECASE), "a web page (HTML)"),
    (re.compile(rb"<\?xml"), "XML"),
    (
        re.compile(rb"version https://git-lfs"),
        "a pointer of Git LFS (see `git lfs pull`)",
    ),
    (re.compile(rb"[./]*(git/)?annex/objects/"), "a pointer of git-annex"),
    (re.compile(rb"[\[{]\s*[\[{\"]"), "JSON"),
)


def kind_of(start: bytes) -> str | None:
    """The kind of a file by its first bytes, with its article; None of one that is not known."""
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return kind
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for pattern, kind in _TEXTS if pattern.match(text)), None)


def but_it_is(start: bytes) -> str:
    """The kind of a file for the end of an error, with what to do about an archive; "" of none."""
    kind = kind_of(start[:_START_BYTES])
    if kind is None:
        return ""
    return f", but {kind}{'; unpack it' if kind.endswith('archive') else ''}"


_START_BYTES = 256
