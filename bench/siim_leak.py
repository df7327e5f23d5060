"""How many images of SIIM-ACR a split of rows puts into train and into test.

    python bench/siim_leak.py stage_2_train.csv

An image with several masks has several rows. Splits of rows (60, 20 and 20 %, as the lists of
MedKLIP and MAVL were made) are drawn with 100 seeds and held against splits of images with the same
ratios, as `mmclip data split --name clean` draws them. The table may be packed (.csv.gz). The last
line is one JSON object.
"""

import argparse
import csv
import gzip
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmclip.data.leakage.splits import clean_split
from mmclip.data.sample import RandomSplit, Sample

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
"""Source: rows of the lists in HieuPhan33/CVPR2024_MAVL, 6,949 / 2,316 / 2,317."""


def read_rows(table: Path) -> list[tuple[str, bool]]:
    """The image of each row, and whether the row holds a mask."""
    content = table.read_bytes()
    text = (gzip.decompress(content) if table.suffix == ".gz" else content).decode("utf-8")
    lines = csv.reader(text.splitlines()[1:])
    return [(line[0], line[1].strip() not in ("-1", "")) for line in lines]


def row_split(images: Sequence[str], seed: int) -> tuple[set[str], set[str]]:
    """The images of train and of test, where rows are dealt."""
    order: list[int] = np.random.default_rng(seed).permutation(len(images)).tolist()
    n_train = round(SHARES["train"] * len(images))
    n_test = round(SHARES["test"] * len(images))
    return {images[i] for i in order[:n_train]}, {images[i] for i in order[len(images) - n_test :]}


def image_split(records: Sequence[Sample], seed: int) -> tuple[set[str], set[str]]:
    """The images of train and of test, as `mmclip data split --name clean` deals them."""
    chosen = clean_split(records, RandomSplit(seed, SHARES["val"], SHARES["test"]))
    return set(chosen["train"]), set(chosen["test"])


def measure(rows: Sequence[tuple[str, bool]], seeds: Sequence[int]) -> dict[str, object]:
    """Images in train and test over seeds, and their share among the images of test."""
    images = [image for image, _ in rows]
    positive = {image for image, has_mask in rows if has_mask}
    out: dict[str, object] = {
        "rows": len(rows), "images": len(set(images)), "positive_images": len(positive),
        "seeds": len(seeds),
    }  # fmt: skip
    records = [
        Sample(image_id=name, study_id=name, patient_id=name, source="siim")
        for name in dict.fromkeys(images)
    ]
    for name in ("rows", "images"):
        shared, of_test, of_positive = [], [], []
        for seed in seeds:
            train, test = row_split(images, seed) if name == "rows" else image_split(records, seed)
            both = train & test
            shared.append(len(both))
            of_test.append(len(both) / len(test))
            of_positive.append(len(both & positive) / len(test & positive))
        out[f"split_of_{name}"] = {
            "shared_mean": statistics.mean(shared), "shared_min": min(shared),
            "shared_max": max(shared), "share_of_test": round(statistics.mean(of_test), 4),
            "share_of_positive_test": round(statistics.mean(of_positive), 4),
        }  # fmt: skip
    return out


def main() -> None:
    """Prints what each way of splitting shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", type=Path, help="stage_2_train.csv, or the packed one")
    parser.add_argument("--seeds", type=int, default=100, help="number of draws")
    args = parser.parse_args()
    found = measure(read_rows(args.table), range(args.seeds))
    print(
        f"{found['rows']:,} rows of {found['images']:,} images, {found['positive_images']:,} "
        f"positive"
    )
    for name in ("rows", "images"):
        print(f"split of {name}: {found[f'split_of_{name}']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
