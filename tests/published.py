"""Data sets as they are published: their real label tables where they are at hand, and synthetic
images.

The tables are those that the package torchxrayvision carries, in torchxrayvision/data/ of its
wheel. MMCLIP_TABLES names that folder; without it the tests of whole tables are skipped.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from mmclip.data.sample import Excluded, Record, Sample

FOLDER = os.environ.get("MMCLIP_TABLES", "")


def real_table(name: str) -> Path:
    """A real table; skips the test that asks where it is not at hand."""
    path = Path(FOLDER) / name
    if not FOLDER or not path.is_file():
        pytest.skip(f"needs {name} of torchxrayvision/data; name the folder by MMCLIP_TABLES")
    return path


def lay_out(root: Path, files: Mapping[str, bytes | str | Path]) -> Path:
    """Writes files by their paths under a folder; a path as content is linked."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            path.write_bytes(content)
    return root


def parted(records: Iterable[Record]) -> tuple[list[Sample], list[Excluded]]:
    """The images and the excluded rows of a reader."""
    samples: list[Sample] = []
    excluded: list[Excluded] = []
    for record in records:
        if isinstance(record, Sample):
            samples.append(record)
        else:
            excluded.append(record)
    return samples, excluded


def tally(samples: Iterable[Sample]) -> Counter[tuple[str, int]]:
    """Images by finding and label."""
    return Counter(item for sample in samples for item in sample.labels.items())
