"""The RSNA Pneumonia Detection Challenge of 2018, stage 2: 26,684 images of ChestX-ray14."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmclip.data.ingest.csv_rows import read_rows
from mmclip.data.readers.files import (
    Box,
    bad_value,
    find_table,
    image_of_unknown_patient,
    index_images,
    look_for_table,
    read_sound_rows,
)
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import Record

WHERE = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge"

_LABELS, _CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
_POSITIVE = {"Lung Opacity", "Target=1"}


@dataclass
class _Marks:
    """What all rows of one image say."""

    classes: set[str] = field(default_factory=set)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    problem: str = ""


def read_rsna(root: Path) -> Iterator[Record]:
    """RSNA Pneumonia, stage 2: one record per image, in the order of the table.

    Citation: Shih et al., Radiology: Artificial Intelligence 2019; images: ChestX-ray14.
    Licence: the challenge's rules: academic research and education, no commercial use.
    Layout: stage_2_train_labels.csv and stage_2_detailed_class_info.csv (or .csv.zip, as Kaggle
        packs them; without the second, an image without a box is only known to have no pneumonia);
        the images in stage_2_train_images/ or any other folder, as DICOM, or as PNG of that name.
        The 3,000 images of stage_2_test_images/ have no labels and are not read.
    Quirks: An image with several boxes has several rows. `patientId` names an image; which patient
        it is of is unknown, so each image counts as a patient, and patients can be in two splits.
        All images are from ChestX-ray14: who trains there must not test here. View, age and sex are
        those of the DICOM header; ages such as 155 become unknown.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table or all images are missing.
    """
    marks = _marks(root)
    images = index_images(root, {".dcm", ".png", ".jpg"}, f"{WHERE} (stage_2_train_images)")
    return _records(root, marks, images)


def _records(
    root: Path, marks: Mapping[str, _Marks], images: Mapping[str, str]
) -> Iterator[Record]:
    words = load_words("rsna")
    for row, (image_id, said) in enumerate(marks.items()):
        image = images.get(image_id, f"stage_2_train_images/{image_id}.dcm")
        try:
            if said.problem:
                raise ValueError(said.problem)
            labels = words.labels(sorted(said.classes))
        except ValueError as error:
            yield bad_value(row, image_id, str(error))
            continue
        yield image_of_unknown_patient(
            root,
            image_id,
            source="rsna",
            image=image,
            labels=labels,
            source_labels=tuple(sorted(said.classes)),
        )


def _marks(root: Path) -> dict[str, _Marks]:
    """What is said of each image, in the order of the table.

    Raises:
        SourceError: When the table is missing.
    """
    marks: dict[str, _Marks] = {}
    table = find_table(root, (_LABELS,), WHERE)
    columns = ("patientId", "x", "y", "width", "height", "Target")
    classes = _classes(root)
    for cells, problem in read_rows(table, columns):
        image_id = cells.get("patientId", "")
        said = marks.setdefault(image_id, _Marks())
        if problem:
            said.problem = problem
            continue
        target = cells["Target"].removesuffix(".0")
        if target not in ("0", "1"):
            said.problem = f"Target is {cells['Target']!r}, not 0 or 1"
            continue
        target = f"Target={target}"
        said.classes |= classes.get(image_id, {target})
        if (target in _POSITIVE) != bool(said.classes & _POSITIVE):
            said.problem = f"{target}, but its class is {', '.join(sorted(said.classes))}"
        try:
            if target in _POSITIVE:
                left, top, width, height = (float(cells[name]) for name in columns[1:5])
                said.boxes.append((left, top, width, height))
        except ValueError:
            said.problem = said.problem or "Target=1 without a whole box"
    return marks


def _classes(root: Path) -> dict[str, set[str]]:
    """The detailed class of each image; empty without the table."""
    path = look_for_table(root, (_CLASSES,))
    found: dict[str, set[str]] = {}
    for cells in read_sound_rows(path, ("patientId", "class")) if path else ():
        found.setdefault(cells["patientId"], set()).add(cells["class"])
    return found


def read_rsna_boxes(root: Path) -> Iterator[Box]:
    """The boxes of opacities that may be pneumonia, in pixels of the 1024 px images.

    Raises:
        SourceError: When the table is missing.
    """
    for image_id, said in _marks(root).items():
        for left, top, width, height in said.boxes:
            yield Box(image_id, "pneumonia", left, top, width, height)
