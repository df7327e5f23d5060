"""A synthetic data set on disk, as a real one looks."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmclip.data.ingest.shards import process_pool
from mmclip.data.sample import Split
from mmclip.data.synthetic.patient import make_study
from mmclip.data.synthetic.preset import FINDINGS, Preset
from mmclip.files import write_atomic, write_text_atomic

STUDIES_FILE, LESIONS_FILE, MASKS_FILE = "studies.csv", "lesions.csv", "masks.npz"
MAPPING_FILE, PRESET_FILE, IMAGES_FOLDER = "mapping.toml", "preset.json", "images"

MAPPING = """\
# How `mmclip data build csv` reads studies.csv. A finding that is not in `labels` is absent.

source = "synthetic"

[columns]
image_id = "image_id"
study_id = "study_id"
patient_id = "patient_id"
image = "image"
split = "split"
view = "view"
age = "age"
sex = "sex"
findings = "findings"
impression = "impression"
labels = "labels"

[labels]
separator = "|"
blank = "absent"
closed = {{ "*" = [{findings}] }}
"""


def _save_study(preset: Preset, split: Split, index: int, images_folder: Path) -> list[dict]:
    """Writes the images of one patient and returns what the tables say of them."""
    rows = []
    for made in make_study(preset, split, index):
        name = f"{made.image_id}.png"
        Image.fromarray(made.image).save(images_folder / name)
        facts = {
            "image": f"{IMAGES_FOLDER}/{name}",
            "image_id": made.image_id,
            "patient_id": made.patient_id,
            "study_id": made.study_id,
            "split": split,
            "view": made.view,
            "age": made.age_years,
            "sex": made.sex,
            "labels": "|".join(made.labels),
            "findings": made.findings,
            "impression": made.impression,
            "held_out": "" if made.held_out is None else str(made.held_out),
        }
        packed = {name: np.packbits(mask) for name, mask in made.masks.items()}
        areas = {name: float(mask.mean()) for name, mask in made.masks.items()}
        rows.append({"facts": facts, "lesions": made.lesions, "packed": packed, "areas": areas})
    return rows


def _save_chunk(
    preset: Preset, split: Split, first: int, last: int, images_folder: Path
) -> list[dict]:
    return [
        row
        for index in range(first, last)
        for row in _save_study(preset, split, index, images_folder)
    ]


def holds_preset(root: Path, preset: Preset) -> bool:
    """Whether a folder was begun by `write_dataset` for this very preset, all knobs included."""
    known = root / PRESET_FILE
    return known.is_file() and known.read_text("utf-8") == _about(preset)


def _about(preset: Preset) -> str:
    return json.dumps(asdict(preset), indent=2) + "\n"


def write_dataset(
    preset: Preset,
    root: Path,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Path:
    """Writes a data set as a real one looks, for `mmclip data build csv` to read.

    images/*.png, studies.csv (one row per image), mapping.toml, lesions.csv (finding, side, size,
    zone and area of each lesion), masks.npz (`read_masks`) and preset.json. The bytes do not depend
    on `workers`; studies.csv is written last, so a folder that has it is complete.

    Args:
        root: Made when absent; must be empty or hold the same preset.
        workers: Processes.
        on_progress: Called with the number of patients done since the last call.

    Returns:
        `root`.

    Raises:
        ValueError: When the folder holds something else.
    """
    if root.is_dir() and any(root.iterdir()):
        if not holds_preset(root, preset):
            raise ValueError(
                f"{root} holds something other than preset {preset.name}, version "
                f"{preset.version}; give an empty folder"
            )
        (root / STUDIES_FILE).unlink(missing_ok=True)
    images_folder = root / IMAGES_FOLDER
    images_folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(root / PRESET_FILE, _about(preset))

    splits: list[Split] = list(get_args(Split))
    step = 50
    chunks: list[tuple[Preset, Split, int, int, Path]] = [
        (preset, split, first, min(first + step, preset.n_patients(split)), images_folder)
        for split in splits
        for first in range(0, preset.n_patients(split), step)
    ]
    rows: list[dict] = []

    def collect(results: Iterable[list[dict]]) -> None:
        for (_, _, first, last, _), result in zip(chunks, results, strict=True):
            rows.extend(result)
            on_progress(last - first)

    if workers <= 1:
        collect(_save_chunk(*chunk) for chunk in chunks)
    else:
        with process_pool(workers, "run the same command again") as pool:
            collect(pool.map(_save_chunk, *zip(*chunks, strict=True)))

    _save_tables(root, rows, preset)
    return root


def _save_tables(root: Path, rows: list[dict], preset: Preset) -> None:
    names = [(row["facts"]["image_id"], name) for row in rows for name in row["packed"]]
    packed = [row["packed"][name] for row in rows for name in row["packed"]]
    with write_atomic(root / MASKS_FILE) as file:
        np.savez_compressed(
            file,
            image_id=np.array([image_id for image_id, _ in names], dtype=str),
            finding=np.array([name for _, name in names], dtype=str),
            packed=np.array(packed, dtype=np.uint8).reshape(len(packed), -1),
            image_size=np.array(preset.image_size),
        )
    quoted = ", ".join(f'"{name}"' for name in FINDINGS)
    write_text_atomic(root / MAPPING_FILE, MAPPING.format(findings=quoted))
    lesions = [
        {
            "image_id": row["facts"]["image_id"],
            "finding": lesion.finding,
            "side": lesion.side,
            "size": lesion.size,
            "zone": lesion.zone,
            "kinds": "|".join(lesion.kinds),
            "area_ratio": f"{row['areas'][lesion.finding]:.6f}",
        }
        for row in rows
        for lesion in row["lesions"]
    ]
    _write_csv(root / LESIONS_FILE, lesions)
    _write_csv(root / STUDIES_FILE, [row["facts"] for row in rows])


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def read_masks(root: Path) -> dict[tuple[str, str], Bool[np.ndarray, "h w"]]:
    """The lesion masks of a written data set, by image id and finding."""
    with np.load(root / MASKS_FILE) as stored:
        px = int(stored["image_size"])
        masks = np.unpackbits(stored["packed"], axis=1, count=px * px).astype(bool)
        keys = zip(stored["image_id"].tolist(), stored["finding"].tolist(), strict=True)
        return dict(zip(keys, masks.reshape(-1, px, px), strict=True))
