"""PadChest, 160,861 images of 67,625 patients of the Hospital San Juan in Alicante."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from mmclip.data.ages import known_age, parse_sex
from mmclip.data.disease_prompts import NO_FINDING
from mmclip.data.ingest.csv_rows import read_rows
from mmclip.data.readers.files import (
    bad_value,
    find_table,
    index_images,
)
from mmclip.data.readers.vocabulary import SourceWords, load_words
from mmclip.data.sample import (
    PRESENT,
    UNCERTAIN,
    Excluded,
    LabelOrigin,
    Reason,
    Record,
    Sample,
    View,
)

WHERE = "https://bimcv.cipf.es/bimcv-projects/padchest/"

_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
_VIEWS: dict[str, View] = {
    "PA": "PA", "AP": "AP", "AP_horizontal": "AP", "L": "L", "COSTAL": "unknown", "UNK": "unknown",
}  # fmt: skip
_INFANT_YEARS = 0.5
"""The age of who was born in the year of the study. [chosen: between 0 and 1; 0 is no age]"""
_NOT_FOR_USE = "EXCLUDE"
_METHODS: dict[str, tuple[str, LabelOrigin]] = {
    "Physician": ("padchest-physician", "report-reader"),
    "RNN_model": ("padchest", "report-program"),
}
_COLUMNS = (
    "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth",
    "PatientSex_DICOM", "Projection", "MethodLabel", "Labels", "Report",
)  # fmt: skip


def read_padchest(root: Path) -> Iterator[Record]:
    """PadChest: one record per image, in the order of the table.

    Citation: Bustos et al., Medical Image Analysis 2020 (arXiv:1901.07441).
    Licence: PadChest Dataset Research Use Agreement; no commercial use, no sharing.
    Layout: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv or .csv.gz; the PNG images of 16
        bits in the folders 0 to 54 (from 0.zip to 54.zip), or in any others.
    Quirks: The images of which a physician labelled the report have the source `padchest-physician`
        (39,053, what papers test on), those labelled by a network `padchest`; the split
        `physician` keeps the first from training. Labels are a Python list, many of its words with
        a space in front, some empty. Places ("loc right") are columns of their own, and not read.
        "unchanged" and "suboptimal study" leave what is not named unknown; images with "exclude",
        or the projection EXCLUDE, are left out. 221 images are "normal" and something else: where
        that is a finding, "no finding" is uncertain. Reports are Spanish word stems without stop
        words; they are kept in `findings` as they are, and `report` stays empty: images are
        unpaired. The label nan means unlabelled. AP_horizontal is an image of a lying patient, and
        AP; COSTAL (ribs) and UNK have an unknown view. Ages are the year of the study less that of
        birth.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table or all images are missing.
    """
    table = find_table(root, (_TABLE,), WHERE)
    images = index_images(root, {".png", ".jpg"}, f"{WHERE} (0.zip to 54.zip)")
    return _records(table, images)


def _records(table: Path, images: Mapping[str, str]) -> Iterator[Record]:
    source = load_words("padchest")

    @cache
    def labels_of(words: tuple[str, ...]) -> dict[str, int]:
        return _labels(words, source)

    words_of = cache(_words)
    for row, (cells, problem) in enumerate(read_rows(table, _COLUMNS)):
        name = cells.get("ImageID", "")
        try:
            if problem:
                raise ValueError(problem)
            words = words_of(cells["Labels"])
            if cells["Projection"] == _NOT_FOR_USE or set(words) & set(source.left_out):
                detail = f"Projection {cells['Projection']}, Labels {', '.join(words)}"
                yield Excluded(row=row, image_id=name, reason=Reason.NOT_FOR_USE, detail=detail)
                continue
            labels = labels_of(words)
            for column, meanings in (("Projection", _VIEWS), ("MethodLabel", _METHODS)):
                if cells[column] not in meanings:
                    known = ", ".join(meanings)
                    raise ValueError(f"{column} is {cells[column]!r}, none of {known}")
        except ValueError as error:
            yield bad_value(row, name, str(error))
            continue
        named, origin = _METHODS[cells["MethodLabel"]]
        yield Sample(
            image_id=name,
            study_id=cells["StudyID"],
            patient_id=cells["PatientID"],
            source=named,
            image=images.get(Path(name).stem, f"{cells['ImageDir']}/{name}"),
            view=_VIEWS[cells["Projection"]],
            findings=_report(cells["Report"]),
            labels=labels,
            source_labels=words,
            label_origin=origin,
            age_years=_age_years(cells["PatientBirth"], cells["StudyDate_DICOM"]),
            sex=parse_sex(cells["PatientSex_DICOM"]),
        )


_NAN = re.compile(r"(?<=[\[,])\s*nan\s*(?=[,\]])")
"""A word that is missing in a list; Python knows no nan."""


def _words(cell: str) -> tuple[str, ...]:
    """The words of a cell such as "['pneumonia', ' pleural effusion', '']", each once.

    Raises:
        ValueError: When it is no list of words.
    """
    if cell in ("", "nan"):
        return ()
    try:
        listed = ast.literal_eval(_NAN.sub("''", cell))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise ValueError(f"Labels is {cell[:80]!r}, no list of words")
    return tuple(dict.fromkeys(word for part in listed if (word := part.strip())))


def _labels(words: tuple[str, ...], source: SourceWords) -> dict[str, int]:
    labels = source.labels(words) if words else {}
    others = [f for f, label in labels.items() if label == PRESENT and f != NO_FINDING]
    if labels.get(NO_FINDING) == PRESENT and others:
        labels[NO_FINDING] = UNCERTAIN
    return labels


def _report(cell: str) -> str | None:
    """The report as it was published; None where it has no word."""
    return cell if cell != "nan" and any(letter.isalpha() for letter in cell) else None


def _age_years(born: str, studied: str) -> float | None:
    """The age from a year ("1930.0") and a day ("20140915"); see `known_age`.

    None where either is not given.
    """
    try:
        years = int(studied[:4]) - int(float(born))
        return known_age(float(years) or _INFANT_YEARS)
    except (ValueError, OverflowError):
        return None
