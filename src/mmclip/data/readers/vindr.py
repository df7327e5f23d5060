"""VinDr-CXR: 18,000 images from two hospitals in Vietnam, read by radiologists one by one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmclip.data.ingest.csv_rows import SourceError, header_of, read_rows
from mmclip.data.readers.files import (
    Box,
    bad_value,
    find_table,
    image_of_unknown_patient,
    index_images,
    look_for_table,
)
from mmclip.data.readers.vocabulary import SourceWords, load_words
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Record, Split

WHERE = (
    "https://physionet.org/content/vindr-cxr/ or "
    "https://www.kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection"
)

_KAGGLE = "train.csv"
_PHYSIONET: dict[Split, tuple[str, ...]] = {
    "train": ("image_labels_train.csv",),
    "test": ("image_labels_test.csv",),
}
_BOX_TABLES = ("annotations_train.csv", "annotations_test.csv")
_FACTS = ("image_id", "rad_id")
_CONSENSUS = "consensus"


@dataclass
class _Reading:
    """What each radiologist named on one image."""

    split: Split | None
    named: dict[str, set[str]] = field(default_factory=dict)
    problem: str = ""


def read_vindr(root: Path) -> Iterator[Record]:
    """VinDr-CXR: one record per image, in the order of the table.

    Citation: Nguyen et al., Scientific Data 2022 (arXiv:2012.15029).
    Licence: PhysioNet Credentialed Health Data License 1.5.0; Kaggle's rules for its copy.
    Layout: PhysioNet's annotations/image_labels_train.csv and image_labels_test.csv (28 labels),
        one or both, or else Kaggle's train.csv (15 labels); the images in train/ and test/ or any
        other folders, as DICOM (.dicom or .dcm), or as PNG of that name.
    Quirks: Three radiologists read each training image, none seeing what the others marked. What
        most of them name is present, what none names absent, and what fewer name uncertain
        [chosen: their disagreement is kept]. Test images have one consensus. Who said what is kept
        in the source's labels ("R9: Cardiomegaly"). Kaggle's 3,000 test images have no labels and
        are not read. Patients are unknown: each image counts as one, and patients can be in two
        splits. All images are PA by the data set's own selection. Age and sex are those of the
        DICOM header, where it has them.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table or all images are missing, or a table has an unknown column.
    """
    words = load_words("vindr")
    readings: dict[str, _Reading] = {}
    columns: list[str] = []
    for split, names in _PHYSIONET.items():
        table = look_for_table(root, names)
        if table is not None:
            columns = _label_columns(table, words)
            _add_physionet(readings, table, split, columns)
    if not readings:
        _add_kaggle(readings, find_table(root, (_KAGGLE, *_PHYSIONET["train"]), WHERE))
    closed = tuple(words.finding(name) for name in columns) or words.closed
    images = index_images(root, {".dicom", ".dcm", ".png", ".jpg"}, WHERE)
    return _records(root, readings, closed, words, images)


def _label_columns(table: Path, words: SourceWords) -> list[str]:
    columns = [name for name in header_of(table) if name not in _FACTS]
    if unknown := [name for name in columns if name not in words.words]:
        raise SourceError(
            f"{table} has the columns {', '.join(map(repr, unknown))}, which findings/vindr.toml "
            f"does not know; download it again, or add them there"
        )
    return columns


def _add_physionet(
    readings: dict[str, _Reading], table: Path, split: Split, columns: list[str]
) -> None:
    for cells, problem in read_rows(table, ("image_id", *columns)):
        reading = readings.setdefault(cells.get("image_id", ""), _Reading(split))
        if not problem and reading.split != split:
            problem = "the image is in the tables of train and of test"
        if wrong := [] if problem else [c for c in columns if _number(cells[c]) not in (0, 1)]:
            problem = f"{wrong[0]} is {cells[wrong[0]]!r}, not 0 or 1"
        if problem:
            reading.problem = problem
            continue
        named = reading.named.setdefault(cells.get("rad_id") or _CONSENSUS, set())
        named |= {name for name in columns if _number(cells[name]) == 1}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _add_kaggle(readings: dict[str, _Reading], table: Path) -> None:
    for cells, problem in read_rows(table, ("image_id", "class_name", "rad_id")):
        reading = readings.setdefault(cells.get("image_id", ""), _Reading(None))
        if problem:
            reading.problem = problem
        else:
            reading.named.setdefault(cells["rad_id"], set()).add(cells["class_name"])


def _records(
    root: Path,
    readings: Mapping[str, _Reading],
    closed: tuple[str, ...],
    words: SourceWords,
    images: Mapping[str, str],
) -> Iterator[Record]:
    for row, (image_id, reading) in enumerate(readings.items()):
        image = images.get(image_id, f"{reading.split or 'train'}/{image_id}.dicom")
        try:
            if reading.problem:
                raise ValueError(reading.problem)
            labels = _vote(reading, closed, words)
        except ValueError as error:
            yield bad_value(row, image_id, str(error))
            continue
        yield image_of_unknown_patient(
            root,
            image_id,
            source="vindr",
            split=reading.split,
            image=image,
            view="PA",
            labels=labels,
            source_labels=tuple(
                f"{reader}: {name}"
                for reader, named in sorted(reading.named.items())
                for name in sorted(named)
            ),
        )


def _vote(reading: _Reading, closed: tuple[str, ...], words: SourceWords) -> dict[str, int]:
    """The label of each finding that was looked for, in the order of their names."""
    votes = Counter(
        finding
        for named in reading.named.values()
        for finding in {words.finding(name) for name in named}
    )
    n_readers = len(reading.named)

    def label(n: int) -> int:
        return PRESENT if 2 * n > n_readers else UNCERTAIN if n else ABSENT

    return {finding: label(votes[finding]) for finding in sorted({*closed, *votes})}


def read_vindr_boxes(root: Path) -> Iterator[Box]:
    """Every box of every radiologist, in pixels of the published image.

    Two radiologists who mark one lesion give two boxes.

    Raises:
        SourceError: When there is no table of boxes, or a finding is unknown.
    """
    words = load_words("vindr")
    found = [path for name in _BOX_TABLES if (path := look_for_table(root, (name,)))]
    for table in found or [find_table(root, (_KAGGLE, *_BOX_TABLES[:1]), WHERE)]:
        columns = ("x_min", "y_min", "x_max", "y_max")
        for cells, problem in read_rows(table, ("image_id", "class_name", *columns)):
            if not problem and not cells["x_min"]:
                continue  # a label of the whole image, such as "No finding"
            try:
                if problem:
                    raise ValueError(problem)
                finding = words.finding(cells["class_name"])
                left, top, right, bottom = (float(cells[name]) for name in columns)
            except ValueError as error:
                raise SourceError(f"{table}, {cells.get('image_id')}: {error}") from None
            yield Box(cells["image_id"], finding, left, top, right - left, bottom - top)
