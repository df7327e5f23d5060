"""How many images each reader calls present, absent, uncertain and unknown, over published tables.

    python bench/label_counts.py TABLES [--before counts.tsv] > counts.tsv

TABLES is torchxrayvision/data of that package's wheel, as for the tests (MMCLIP_TABLES). The output
is one line per data set and finding; with --before, the output of another commit, a cell that has
changed reads "before->after". No image is read: one empty file stands for all of a data set.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmclip.data.readers.chestxray14 import read_chestxray14
from mmclip.data.readers.chexpert import read_chexpert
from mmclip.data.readers.padchest import read_padchest
from mmclip.data.readers.rsna import read_rsna
from mmclip.data.readers.siim import read_siim
from mmclip.data.readers.vindr import read_vindr
from mmclip.data.sample import Record, Sample

COLUMNS = ("present", "absent", "uncertain", "unknown")
LABELS = (1, 0, -1)

SIIM_IMAGE = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"
PADCHEST_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
SETS: dict[str, tuple[Callable[[Path], Iterable[Record]], str, str, str]] = {
    # reader, table in TABLES, its name in the layout, an image of the layout
    "chestxray14": (
        read_chestxray14, "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017_v2020.csv.gz",
        "images/00000001_000.png",
    ),
    "chexpert": (
        read_chexpert, "chexpert_train.csv.gz", "train.csv.gz",
        "train/patient00001/study1/view1_frontal.jpg",
    ),
    "padchest": (
        read_padchest, PADCHEST_TABLE, PADCHEST_TABLE,
        "0/20536686640136348236148679891455886468_k6ga29.png",
    ),
    "rsna": (
        read_rsna, "kaggle_stage_2_train_labels.csv.zip", "stage_2_train_labels.csv.zip",
        "stage_2_train_images/0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm",
    ),
    "siim": (
        read_siim, "siim-pneumothorax-train-rle.csv.gz", "stage_2_train.csv.gz",
        f"dicom/a/b/{SIIM_IMAGE}.dcm",
    ),
    "vindr": (
        read_vindr, "vinbigdata-train.csv.gz", "train.csv.gz",
        "train/50a418190bc3fb1ef1633bf9678929b3.dicom",
    ),
}  # fmt: skip


def counts_of(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Images by finding, in the order of COLUMNS."""
    found = Counter(item for sample in samples for item in sample.labels.items())
    counts = {}
    for finding in sorted({finding for finding, _ in found}):
        known = [found[finding, label] for label in LABELS]
        counts[finding] = [*known, len(samples) - sum(known)]
    return counts


def count_all(tables: Path) -> dict[tuple[str, str], list[str]]:
    """The counts of every data set and finding, as text; those of a part of one besides."""
    counted = {}
    for name, (read, table, as_published, image) in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / image).parent.mkdir(parents=True)
            (root / image).write_bytes(b"")
            (root / as_published).symlink_to(tables.resolve() / table)
            samples = [record for record in read(root) if isinstance(record, Sample)]
        for part in sorted({name, *(sample.source for sample in samples)}):
            some = [s for s in samples if part in (name, s.source)]
            for finding, counts in counts_of(some).items():
                counted[part, finding] = [str(count) for count in counts]
    return counted


def compared(
    counted: dict[tuple[str, str], list[str]], before: dict[tuple[str, str], list[str]]
) -> dict[tuple[str, str], list[str]]:
    """The counts, with those of before where they differ; "-" where there was or is no finding."""
    none = ["-"] * len(COLUMNS)
    return {
        key: [
            now if now == then else f"{then}->{now}"
            for then, now in zip(before.get(key, none), counted.get(key, none), strict=True)
        ]
        for key in sorted({*counted, *before})
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Counts what readers make of published tables.")
    parser.add_argument("tables", type=Path, help="torchxrayvision/data of that package's wheel")
    parser.add_argument("--before", type=Path, help="the output of another commit")
    args = parser.parse_args()
    counted = count_all(args.tables)
    if args.before:
        with args.before.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))[1:]
        counted = compared(counted, {(row[0], row[1]): row[2:] for row in rows})
    out = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    out.writerow(("data_set", "finding", *COLUMNS))
    out.writerows((*key, *counts) for key, counts in counted.items())


if __name__ == "__main__":
    main()
