"""What every reader of a published data set needs: its table, its images, and clear words if
not."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.dicom import read_header, silent_pydicom
from mmclip.data.ingest.csv_rows import SourceError, read_rows
from mmclip.data.pixels import ImageError
from mmclip.data.radiograph import text_of
from mmclip.data.sample import Excluded, Reason, Sample, Sex, Split, View
from mmclip.data.walk import walk

RASTER_SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True, slots=True)
class Box:
    """A place that a reader of the image marked, in pixels of the published image.

    `phrase` is the reader's own words for it, "" where the data set has none.
    """

    image_id: str
    finding: str
    left_px: float
    top_px: float
    width_px: float
    height_px: float
    phrase: str = ""


def bad_value(row: int, image_id: str, detail: str) -> Excluded:
    """A row that is left out for a value that cannot be read."""
    return Excluded(row=row, image_id=image_id, reason=Reason.BAD_VALUE, detail=detail)


def look_for_table(root: Path, names: Sequence[str]) -> Path | None:
    """The first of some files, as it is, as .gz, or as .zip, in a folder or in a folder of it."""
    inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for name in names:
        for folder in (root, *inside):
            for path in (folder / name, folder / f"{name}.gz", folder / f"{name}.zip"):
                if path.is_file():
                    return path
    return None


def find_table(root: Path, names: Sequence[str], where: str) -> Path:
    """As `look_for_table`.

    Args:
        where: Where a user gets the table.

    Raises:
        SourceError: When there is none.
    """
    path = look_for_table(root, names)
    if path is None:
        raise SourceError(f"{root} holds no {' or '.join(names)}; it comes from {where}")
    return path


def read_sound_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The cells of each row, where a row that cannot be read spoils the table.

    Args:
        path: As for `read_rows`.
        columns: As for `read_rows`; the first one names the row in errors.

    Raises:
        SourceError: As `read_rows`, and when a row has a problem.
    """
    for cells, problem in read_rows(path, columns):
        if problem:
            raise SourceError(f"{path}, {cells.get(columns[0])}: {problem}; download it again")
        yield cells


def paths_below(root: Path, suffixes: Collection[str]) -> Iterator[str]:
    """The files of some kinds under a folder, relative to it, with "/" between parts; see `walk`.

    Args:
        root: The folder.
        suffixes: In lower case, with the dot; those of the files may be in capitals.
    """
    for folder, _, names in walk(root):
        inside = Path(folder).relative_to(root)
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes:
                yield (inside / name).as_posix()


def index_images(root: Path, suffixes: Collection[str], where: str) -> dict[str, str]:
    """Where each image lies under a folder, by its name without the suffix.

    The folders between do not matter: releases of one data set differ in them. Of two images of one
    name the first in the order of paths is taken.

    Args:
        root: The data set's folder.
        suffixes: In lower case, with the dot.
        where: Where a user gets the images.

    Returns:
        Paths relative to the root, with "/" between parts.

    Raises:
        SourceError: When there is no image.
    """
    found: dict[str, str] = {}
    for path in paths_below(root, suffixes):
        found.setdefault(Path(path).stem, path)
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in sorted(suffixes))
        raise SourceError(
            f"{root} and its folders hold no image ({kinds}); images come from {where}"
        )
    return found


def with_its_suffix(root: Path, image: str, others: Sequence[str] = RASTER_SUFFIXES) -> str:
    """The path of an image with the suffix that it has: many keep smaller copies as PNG.

    Args:
        root: The data set's folder.
        image: As the table names it; it is given back where there is none.
        others: Suffixes that are looked for, in lower case and in capitals.
    """
    if (root / image).is_file():
        return image
    stem = os.path.splitext(image)[0]
    found = (stem + form for suffix in others for form in (suffix, suffix.upper()))
    return next((path for path in found if (root / path).is_file()), image)


def is_row_number(column: str) -> bool:
    """Whether a column is the one without a name that pandas writes in front of a table."""
    return not column or column.startswith("Unnamed:")


class DicomFacts(NamedTuple):
    """What a DICOM header says that a manifest may hold."""

    view: View = "unknown"
    age_years: float | None = None
    sex: Sex | None = None


_DICOM_VIEWS: dict[str, View] = {"PA": "PA", "AP": "AP", "LL": "L", "RL": "L", "LATERAL": "L"}


def dicom_facts(path: Path) -> DicomFacts:
    """View, age and sex from a DICOM header; unknown where it, or the file, cannot be read.

    Decoding says later what is wrong with a file. No other tag of the header is looked at.
    """
    keywords = ("ViewPosition", "PatientAge", "PatientSex")
    try:
        data = read_header(path, keywords)
    except ImageError:
        return DicomFacts()
    with silent_pydicom():  # it converts values, and complains of them, when they are asked for
        view, age, sex = (text_of(data, keyword) for keyword in keywords)
    return DicomFacts(_DICOM_VIEWS.get(view.upper(), "unknown"), parse_age(age), parse_sex(sex))


def image_of_unknown_patient(
    root: Path,
    image_id: str,
    *,
    source: str,
    image: str,
    labels: Mapping[str, int],
    source_labels: tuple[str, ...],
    split: Split | None = None,
    view: View | None = None,
) -> Sample:
    """The record of a DICOM image that counts as a study and a patient of its own.

    People labelled it who read the image.

    Args:
        root: The data set's folder.
        image_id: Also of study and patient.
        source: As are the following, a field of `Sample`.
        image: Relative to the root; its header gives age and sex.
        labels: By finding.
        source_labels: The source's own words.
        split: The source's, if it has one.
        view: Of all images of the source; None takes the header's.
    """
    facts = dicom_facts(root / image)
    return Sample(
        image_id=image_id,
        study_id=image_id,
        patient_id=image_id,
        source=source,
        split=split,
        image=image,
        view=facts.view if view is None else view,
        labels=dict(labels),
        source_labels=source_labels,
        label_origin="image-reader",
        age_years=facts.age_years,
        sex=facts.sex,
    )
