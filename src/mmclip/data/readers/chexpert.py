"""CheXpert, its 11 GB small release, and CheXpert Plus: Stanford's images, labels and reports."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.ingest.csv_rows import SourceError, header_of, read_rows
from mmclip.data.readers.files import (
    bad_value,
    find_table,
    is_row_number,
    look_for_table,
    with_its_suffix,
)
from mmclip.data.readers.vocabulary import SourceWords, load_words
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Record, Sample, Split, View
from mmclip.data.text import make_report, parse_report
from mmclip.data.walk import walk

WHERE = "https://aimi.stanford.edu/datasets/chexpert-chest-x-rays"
WHERE_PLUS = "https://aimi.stanford.edu/datasets/chexpert-plus"
WHERE_TEST = "https://github.com/rajpurkarlab/cheXpert-test-set-labels"

# One table of each split is read, the first that is there; the last one has a row a study.
_TABLES: dict[Split, tuple[str, ...]] = {
    "train": ("train.csv",),
    "val": ("valid.csv", "val_labels.csv"),
    "test": ("test.csv", "test_labels.csv", "groundtruth.csv"),
}
_PLUS_TABLE = "df_chexpert_plus_240401.csv"
_PLUS_LABELS = "chexbert_labels/impression_fixed.json"
_PLUS_SPLITS: dict[str, Split] = {"train": "train", "valid": "val", "test": "test"}
_FACTS = ("Path", "Study", "Sex", "Age", "Frontal/Lateral", "AP/PA")
_VALUES = {"1": PRESENT, "0": ABSENT, "-1": UNCERTAIN}
_SUFFIXES = (".jpg", ".png", ".dcm")


def read_chexpert(root: Path) -> Iterator[Record]:
    """CheXpert: one record per image, in the order of the tables of train, validation and test.

    Citation: Irvin et al., AAAI 2019 (arXiv:1901.07031); test labels: Rajpurkar et al., CHIL 2021.
    Licence: Stanford University Dataset Research Use Agreement; no commercial use, no sharing.
    Layout: train.csv, valid.csv (or val_labels.csv), test_labels.csv (or test.csv; or
        groundtruth.csv, with a row a study), at least one of them, in the root or in a folder of
        it; val_labels.csv and test_labels.csv come with the images in CheXlocalize, groundtruth.csv
        from the authors of Rajpurkar et al. Images in any folders, as
        patient00001/study1/view1_frontal.jpg: train/ and valid/ of CheXpert-v1.0-small/ and
        CheXpert-v1.0/, or the folders of the four "CheXpert-v1.0 batch" archives. What stands
        before the patient in the column Path makes no difference, nor does the suffix.
    Quirks: 1, 0, -1 and blank are present, absent, uncertain and unknown, as they stand; what to
        make of -1 is for who trains. Train labels are mined from reports, the others are read by
        radiologists. Age 0 (3 images) stands for unknown, 90 for 90 and more. 17 frontal images
        have "LL" or "RL" as AP/PA: their view is unknown, as is that of frontal test images.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When no table or no image is there, or a table has a column that is unknown.
    """
    tables: dict[Split, Path] = {
        split: path for split, names in _TABLES.items() if (path := look_for_table(root, names))
    }
    if not tables:
        raise SourceError(
            f"{root} and the folders in it hold none of train.csv, valid.csv and test_labels.csv; "
            f"train.csv and valid.csv come with the images from {WHERE}, the labels of the test "
            f"images from {WHERE_TEST}"
        )
    words = load_words("chexpert")
    columns = {path: _label_columns(path, words) for path in tables.values()}
    patients = _index_patients(root, WHERE)
    return _records(root, tables, columns, patients)


def _label_columns(table: Path, words: SourceWords) -> dict[str, str]:
    """Label column -> finding.

    Raises:
        SourceError: When the table has a column that is neither, or no label column.
    """
    columns = [n for n in header_of(table) if n not in _FACTS and not is_row_number(n)]
    if unknown := [name for name in columns if name not in words.words]:
        raise SourceError(
            f"{table} has the columns {', '.join(map(repr, unknown))}, which CheXpert has not; "
            f"download it again, or read it by `mmclip data build csv`"
        )
    if not columns:
        raise SourceError(f"{table} has no label column; download it again")
    return {name: words.finding(name) for name in columns}


def _index_patients(root: Path, where: str) -> dict[str, str]:
    """The folder that holds each patient's folder, relative to the root, "" for itself.

    Raises:
        SourceError: When there is none.
    """
    found: dict[str, str] = {}
    for folder, folders, _ in walk(root):
        inside = Path(folder).relative_to(root).as_posix()
        for name in folders:
            if name.startswith("patient"):
                found.setdefault(name, "" if inside == "." else f"{inside}/")
        folders[:] = [name for name in folders if not name.startswith("patient")]
    if not found:
        raise SourceError(
            f"{root} and its folders hold no image (patient00001/study1/...); images come from "
            f"{where}"
        )
    return found


def _records(
    root: Path,
    tables: Mapping[Split, Path],
    columns: Mapping[Path, Mapping[str, str]],
    patients: Mapping[str, str],
) -> Iterator[Record]:
    row = 0
    for split, table in tables.items():
        place = "Study" if "Study" in header_of(table) else "Path"
        for cells, problem in read_rows(table, (place, *columns[table])):
            path = _tail(cells.get(place, ""), 2 if place == "Study" else 3)
            for image in [path] if place == "Path" else _images_of(root, path, patients):
                yield _image(root, row, image, cells, problem, split, columns[table], patients)
                row += 1


def _tail(path: str, parts: int) -> str:
    """What is the same in every release, such as patient00001/study1/view1_frontal.jpg."""
    return "/".join(path.replace("\\", "/").strip("/").split("/")[-parts:])


def _images_of(root: Path, study: str, patients: Mapping[str, str]) -> list[str]:
    """The images of a study, or one that is not there."""
    folder = root / (patients.get(study.partition("/")[0], "") + study)
    names = sorted(path.name for path in folder.glob("view*") if path.suffix in _SUFFIXES)
    return [f"{study}/{name}" for name in names] or [f"{study}/view1_frontal.jpg"]


def _image(
    root: Path,
    row: int,
    path: str,
    cells: Mapping[str, str],
    problem: str,
    split: Split,
    columns: Mapping[str, str],
    patients: Mapping[str, str],
) -> Record:
    image_id = os.path.splitext(path)[0]
    try:
        if problem:
            raise ValueError(problem)
        if path.count("/") != 2:
            raise ValueError(f"{path!r} is no patient/study/view")
        values = label_values(cells, columns)
    except ValueError as error:
        return bad_value(row, image_id, str(error))
    patient, study, name = path.split("/")
    return Sample(
        image_id=image_id,
        study_id=f"{patient}/{study}",
        patient_id=patient,
        source="chexpert",
        split=split,
        image=with_its_suffix(root, patients.get(patient, "") + path, _SUFFIXES),
        view=_view(cells.get("Frontal/Lateral", ""), cells.get("AP/PA", ""), name),
        labels={columns[column]: value for column, value in values.items()},
        source_labels=tuple(f"{column}={value}" for column, value in values.items()),
        label_origin="report-program" if split == "train" else "image-reader",
        age_years=parse_age(cells.get("Age", "")),
        sex=parse_sex(cells.get("Sex", "")),
    )


def label_values(cells: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, int]:
    """What each column says, where it says something.

    Raises:
        ValueError: When a value is none of 1, 0, -1 and blank.
    """
    values = {}
    for column in columns:
        if (text := cells[column]) and text.lower() != "nan":
            value = _VALUES.get(text.removesuffix(".0"))
            if value is None:
                raise ValueError(f"{column} is {text!r}, not 1, 0, -1 or blank")
            values[column] = value
    return values


def _view(side: str, direction: str, name: str) -> View:
    if side == "Lateral" or (not side and "lateral" in name):
        return "L"
    return "PA" if direction == "PA" else "AP" if direction == "AP" else "unknown"


def read_chexpert_plus(root: Path) -> Iterator[Record]:
    """CheXpert Plus: the images of CheXpert with their reports, in the order of the table.

    Citation: Chambon et al., 2024 (arXiv:2405.19538).
    Licence: Stanford University Dataset Research Use Agreement; no commercial use, no sharing.
    Layout: df_chexpert_plus_240401.csv; images as PNG, DICOM or CheXpert's JPEG in any folders, as
        patient42142/study5/view1_frontal.png; chexbert_labels/impression_fixed.json, if the images
        shall have labels, too.
    Quirks: `path_to_image` ends in .jpg whatever the image is. Most reports have an impression and
        no findings; where both are missing, what the whole report says is read. Images of a pair
        never train on their labels. Written after the documentation: no real table was at hand.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the table or all images are missing.
    """
    table = find_table(root, (_PLUS_TABLE,), WHERE_PLUS)
    patients = _index_patients(root, WHERE_PLUS)
    return _plus_records(root, table, patients, _plus_labels(root))


def _plus_records(
    root: Path, table: Path, patients: Mapping[str, str], labels: Mapping[str, dict[str, int]]
) -> Iterator[Record]:
    words = load_words("chexpert-plus")
    columns = (
        "path_to_image", "frontal_lateral", "ap_pa", "report", "section_findings",
        "section_impression", "split",
    )  # fmt: skip
    for row, (cells, problem) in enumerate(read_rows(table, columns)):
        path = _tail(cells.get("path_to_image", ""), 3)
        image_id = os.path.splitext(path)[0]
        if not problem and path.count("/") != 2:
            problem = f"{path!r} is no patient/study/view"
        if not problem and cells["split"] not in _PLUS_SPLITS:
            problem = f"split is {cells['split']!r}, not {' or '.join(_PLUS_SPLITS)}"
        if problem:
            yield bad_value(row, image_id, problem)
            continue
        patient, study, name = path.split("/")
        report = make_report(cells["section_findings"], cells["section_impression"])
        if report.text is None:
            report = parse_report(cells["report"])
        values = labels.get(image_id, {})
        yield Sample(
            image_id=image_id,
            study_id=f"{patient}/{study}",
            patient_id=patient,
            source="chexpert-plus",
            split=_PLUS_SPLITS[cells["split"]],
            image=with_its_suffix(root, patients.get(patient, "") + path, _SUFFIXES),
            view=_view(cells["frontal_lateral"], cells["ap_pa"], name),
            findings=report.findings,
            impression=report.impression,
            report=report.text,
            labels={words.finding(column): value for column, value in values.items()},
            source_labels=tuple(f"{column}={value}" for column, value in values.items()),
            label_origin="report-program" if image_id in labels else None,
            age_years=parse_age(cells.get("age", "")),
            sex=parse_sex(cells.get("sex", "")),
        )


def _plus_labels(root: Path) -> dict[str, dict[str, int]]:
    """What CheXbert read in the impression of each image, by the image's id; empty without the
    file.

    Raises:
        SourceError: When a line of the file is not what it should be.
    """
    path = root / _PLUS_LABELS
    if not path.is_file():
        return {}
    words = load_words("chexpert-plus")
    found: dict[str, dict[str, int]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                said = json.loads(line)
                image = os.path.splitext(_tail(said.pop("path_to_image"), 3))[0]
                cells = {k: "" if v is None else f"{v:g}" for k, v in said.items()}
                found[image] = label_values(
                    cells, {column: words.finding(column) for column in cells}
                )
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise SourceError(f"{path}, line {number}: {error}; download it again") from None
    return found
