"""MIMIC-CXR and MIMIC-CXR-JPG: 377,110 images of 65,379 patients in Boston, with their reports."""

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mmclip.data.ingest.csv_rows import SourceError, header_of, read_rows
from mmclip.data.readers.chexpert import label_values
from mmclip.data.readers.files import (
    DicomFacts,
    bad_value,
    dicom_facts,
    is_row_number,
    read_sound_rows,
    with_its_suffix,
)
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import LabelOrigin, Record, Sample, Split, View
from mmclip.data.text import Report, make_report, parse_report
from mmclip.data.walk import walk

WHERE = "https://physionet.org/content/mimic-cxr/"
WHERE_JPG = "https://physionet.org/content/mimic-cxr-jpg/"

_METADATA, _SPLIT = "mimic-cxr-2.0.0-metadata.csv", "mimic-cxr-2.0.0-split.csv"
_LABELS = ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv")
_BY_RADIOLOGIST = "mimic-cxr-2.1.0-test-set-labeled.csv"
_THEIR_NAMES = {"Airspace Opacity": "Lung Opacity"}
_RECORDS = "cxr-record-list.csv"
_SECTIONS, _ZIP = "mimic_cxr_sectioned.csv", "mimic-cxr-reports.zip"
_SPLITS: dict[str, Split] = {"train": "train", "validate": "val", "test": "test"}
_VIEWS: dict[str, View] = {
    "PA": "PA",
    "AP": "AP",
    "LATERAL": "L",
    "LL": "L",  # left lateral: the left side at the detector
    "RL": "L",
    "XTABLE LATERAL": "L",
}  # others, such as "AP LLD", lie down or turn the patient: unknown
_GROUP = re.compile(r"p\d\d")

logger = logging.getLogger(__name__)


class _Tree(NamedTuple):
    """What the walk under a root finds, without entering the folders of patients."""

    groups: Mapping[str, list[str]]  # "p10" -> the folders that hold one, relative, as "files/"
    files: Mapping[str, Path]  # by name

    def table(self, name: str) -> Path | None:
        """A table, plain or packed."""
        return self.files.get(name) or self.files.get(f"{name}.gz")

    def places(self, inside: str) -> list[str]:
        """The paths that a file such as p10/p10000032/s50414267.txt may have, from the root."""
        return [folder + inside for folder in self.groups.get(inside.partition("/")[0], ())]


class _Row(NamedTuple):
    """An image as a table names it."""

    image_id: str
    patient: str  # the number, as is the study
    study: str
    problem: str
    view: str | None  # None where the table does not tell

    @property
    def folder(self) -> str:
        """As p10/p10000032/s50414267, in which the image lies."""
        return f"p{self.patient[:2]}/p{self.patient}/s{self.study}"


class _Labels(NamedTuple):
    """What was read in the report of a study: column -> value, where there is one."""

    cells: Mapping[str, str]
    names: Mapping[str, str]  # column -> CheXpert's name of it, where that is another
    origin: LabelOrigin | None


_UNLABELLED = _Labels({}, {}, None)


def read_mimic_cxr_jpg(root: Path) -> Iterator[Record]:
    """MIMIC-CXR-JPG: one record per image, in the order of the metadata table.

    Citation: Johnson et al., Scientific Data 2019; MIMIC-CXR-JPG: arXiv:1901.07042.
    Licence: PhysioNet Credentialed Health Data License 1.5.0; no sharing.
    Layout: mimic-cxr-2.0.0-metadata.csv and -split.csv, both needed; -chexpert.csv or, where that
        is not there, -negbio.csv for labels, and mimic-cxr-2.1.0-test-set-labeled.csv; all as .csv
        or .csv.gz, in the root or any folder of it. Images as
        files/p10/p10000032/s50414267/IMAGE.jpg. Reports, which MIMIC-CXR publishes apart:
        mimic-cxr-reports.zip, or unpacked as p10/p10000032/s50414267.txt in any folder, or else
        mimic_cxr_sectioned.csv, as MIMIC-CXR's own code makes it.
    Quirks: The split "validate" is val. Labels are mined from reports, and stand beside them:
        images of a pair never train on their labels. Of the studies in the table of 2.1.0, all of
        test, they are those that a radiologist gave, who read the report, too. That table has
        "Airspace Opacity" for "Lung Opacity", and no subject_id. Views such as "AP LLD" (lying on
        the side) and blank are unknown. Eight studies have no report. Addenda and wet reads stand
        above a line of underscores and are left out: they tell of calls and corrections, not of
        the image. Where a report has no headings, all of it is read. Age and sex are not published
        with the images.

    Args:
        root: The folder that holds all of this; the parent of two PhysioNet downloads will do.

    Raises:
        SourceError: When the metadata, the splits or all images are missing, or there are neither
            labels nor reports.
    """
    tree = _walk(root)
    metadata, split = tree.table(_METADATA), tree.table(_SPLIT)
    for name, path in ((_METADATA, metadata), (_SPLIT, split)):
        if path is None:
            raise SourceError(f"{root} and its folders hold no {name}(.gz); from {WHERE_JPG}")
    assert metadata is not None
    return _records(root, tree, metadata, split, ".jpg")


def read_mimic_cxr(root: Path) -> Iterator[Record]:
    """MIMIC-CXR, the images as DICOM: one record per image, in the order of cxr-record-list.csv.

    Citation: Johnson et al., Scientific Data 2019.
    Licence: PhysioNet Credentialed Health Data License 1.5.0; no sharing.
    Layout: cxr-record-list.csv(.gz), images as files/p10/p10000032/s50414267/IMAGE.dcm, reports as
        files/p10/p10000032/s50414267.txt, in mimic-cxr-reports.zip or as the other reader's.
        The tables of MIMIC-CXR-JPG for metadata, splits and labels, if they are there.
        cxr-study-list.csv names the reports, whose paths follow from the study: it is not read.
    Quirks: As `read_mimic_cxr_jpg`. Without the split table patients are dealt anew, and a
        warning says so. Views are those of the metadata table, or else of the DICOM header; age
        and sex those of the header, where it has them.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the list or all images are missing, or there are neither labels nor
            reports.
    """
    tree = _walk(root)
    table, split = tree.table(_RECORDS), tree.table(_SPLIT)
    if table is None:
        raise SourceError(f"{root} and its folders hold no {_RECORDS}(.gz); it is from {WHERE}")
    if split is None:
        logger.warning(
            "mimic-cxr: no %s: patients are dealt anew, so results compare with no others; the "
            "table is in %s",
            _SPLIT,
            WHERE_JPG,
        )
    return _records(root, tree, table, split, ".dcm")


def _walk(root: Path) -> _Tree:
    groups: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    for folder, folders, names in walk(root):
        inside = Path(folder).relative_to(root).as_posix()
        for name in names:
            files.setdefault(name, Path(folder) / name)
        for name in folders:
            if _GROUP.fullmatch(name):
                groups.setdefault(name, []).append("" if inside == "." else f"{inside}/")
        folders[:] = [name for name in folders if not _GROUP.fullmatch(name)]
    return _Tree(groups, files)


def _records(
    root: Path, tree: _Tree, table: Path, split: Path | None, suffix: str
) -> Iterator[Record]:
    """Checks what can be checked at once, and opens the rest."""
    where = WHERE_JPG if suffix == ".jpg" else WHERE
    if not tree.groups:
        raise SourceError(
            f"{root} and its folders hold no image (files/p10/p10000032/s50414267/*{suffix}); "
            f"images come from {where}"
        )
    labels = {**_read_labels(tree), **_read_labels_of_radiologist(tree)}
    report_of = _report_reader(root, tree)
    if report_of is None and not labels:
        raise SourceError(
            f"{root} and its folders hold neither reports ({_ZIP}, p10/p10000032/s50414267.txt or "
            f"{_SECTIONS}) nor labels ({_LABELS[0]}); reports come from {WHERE}, labels from "
            f"{WHERE_JPG}"
        )
    splits = _read_splits(split) if split else None
    return _images(root, tree, table, splits, labels, report_of, suffix)


def _images(
    root: Path,
    tree: _Tree,
    table: Path,
    splits: Mapping[str, Split] | None,
    labels: Mapping[str, _Labels],
    report_of: Callable[[str], Report] | None,
    suffix: str,
) -> Iterator[Record]:
    words = load_words("mimic-cxr")
    views = _read_views(tree) if suffix == ".dcm" else {}
    for row, sample in enumerate(_rows(table)):
        problem = sample.problem
        if not problem and splits is not None and sample.image_id not in splits:
            problem = f"the image is not in {_SPLIT}"
        try:
            if problem:
                raise ValueError(problem)
            cells, names, origin = labels.get(sample.study, _UNLABELLED)
            said = label_values(cells, cells)
        except ValueError as error:
            yield bad_value(row, sample.image_id, str(error))
            continue
        path = f"{sample.folder}/{sample.image_id}"
        places = tree.places(path + suffix)
        if suffix == ".jpg":
            places = [with_its_suffix(root, place) for place in places]
        image = _first_there(root, places) or f"files/{path}{suffix}"
        facts = dicom_facts(root / image) if suffix == ".dcm" else DicomFacts()
        view = views.get(sample.image_id) if sample.view is None else sample.view
        report = report_of(sample.folder) if report_of else Report(None, None, None)
        yield Sample(
            image_id=sample.image_id,
            study_id=f"s{sample.study}",
            patient_id=f"p{sample.patient}",
            source="mimic-cxr",
            split=splits[sample.image_id] if splits else None,
            image=image,
            view=facts.view if view is None else _VIEWS.get(view, "unknown"),
            findings=report.findings,
            impression=report.impression,
            report=report.text,
            labels={words.finding(names.get(n, n)): value for n, value in said.items()},
            source_labels=tuple(f"{name}={value}" for name, value in said.items()),
            label_origin=origin,
            age_years=facts.age_years,
            sex=facts.sex,
        )


def _rows(table: Path) -> Iterator[_Row]:
    """The images that a table names, with the view where it has that column."""
    for cells, problem in read_rows(table, ("dicom_id", "subject_id", "study_id")):
        patient, study = (_number(cells.get(name, "")) for name in ("subject_id", "study_id"))
        if not problem and not (patient.isdigit() and study.isdigit()):
            problem = f"subject_id is {patient!r} and study_id {study!r}; both must be numbers"
        view = cells.get("ViewPosition")
        yield _Row(cells.get("dicom_id", ""), patient, study, problem, view)


def _number(text: str) -> str:
    """An id as a whole number: a table that was saved again may say 50414267.0."""
    return text.removesuffix(".0")


def _read_views(tree: _Tree) -> dict[str, str | None]:
    """The view of each image by the metadata of MIMIC-CXR-JPG; empty without it."""
    table = tree.table(_METADATA)
    return {row.image_id: row.view for row in _rows(table)} if table else {}


def _read_splits(table: Path) -> dict[str, Split]:
    """The official split of each image.

    Raises:
        SourceError: When the table is damaged.
    """
    splits: dict[str, Split] = {}
    for cells, problem in read_rows(table, ("dicom_id", "split")):
        split = _SPLITS.get(cells.get("split", ""))
        if problem or split is None:
            why = problem or f"the split {cells['split']!r} is none of {', '.join(_SPLITS)}"
            raise SourceError(f"{table}, {cells.get('dicom_id')}: {why}; download it again")
        splits[cells["dicom_id"]] = split
    return splits


def _read_labels(tree: _Tree) -> dict[str, _Labels]:
    """What a program read in the report of each study.

    Raises:
        SourceError: When a table has other columns than CheXpert's, or a row is damaged.
    """
    table = next((path for name in _LABELS if (path := tree.table(name))), None)
    if table is None:
        return {}
    return _label_table(table, {}, "report-program")


def _read_labels_of_radiologist(tree: _Tree) -> dict[str, _Labels]:
    """What a radiologist read in the report of each of 687 studies of test; empty without it.

    Raises:
        SourceError: As for `_read_labels`.
    """
    table = tree.table(_BY_RADIOLOGIST)
    return _label_table(table, _THEIR_NAMES, "report-reader") if table else {}


def _label_table(table: Path, names: Mapping[str, str], origin: LabelOrigin) -> dict[str, _Labels]:
    known = {finding: name for name, finding in names.items()}
    columns = tuple(known.get(name, name) for name in load_words("mimic-cxr").words)
    header = {name for name in header_of(table) if not is_row_number(name)}
    unknown = header - {"subject_id", "study_id", *columns}
    if unknown:
        raise SourceError(
            f"{table} has the columns {', '.join(sorted(unknown))}; download it again"
        )
    found: dict[str, _Labels] = {}
    for cells in read_sound_rows(table, ("study_id", *columns)):
        said = {name: cells[name] for name in columns if cells[name]}
        found[_number(cells["study_id"])] = _Labels(said, names, origin)
    return found


def _report_reader(root: Path, tree: _Tree) -> Callable[[str], Report] | None:
    """What gives the report of a study by its folder's name, or None where there are no reports.

    Whole reports come before sections that another program cut.
    """
    if _ZIP in tree.files:
        texts = _zip_reader(tree.files[_ZIP])
    elif _has_texts(root, tree):
        texts = _file_reader(root, tree)
    elif path := tree.table(_SECTIONS):
        return _section_reader(path)
    else:
        return None

    @lru_cache(maxsize=64)  # images of one study follow one another
    def report_of(folder: str) -> Report:
        return parse_report(texts(folder))

    return report_of


def _has_texts(root: Path, tree: _Tree) -> bool:
    """Whether a report lies where reports of any group of patients lie; stops at the first."""
    return any(
        next((root / folder / group).glob("p*/s*.txt"), None) is not None
        for group, folders in tree.groups.items()
        for folder in folders
    )


def _file_reader(root: Path, tree: _Tree) -> Callable[[str], str | None]:
    def text_of(folder: str) -> str | None:
        path = _first_there(root, tree.places(f"{folder}.txt"))
        return (root / path).read_text("utf-8-sig", "replace") if path else None

    return text_of


def _zip_reader(path: Path) -> Callable[[str], str | None]:
    """Raises: SourceError: When the archive is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is no whole archive ({error}); download it again") from None
    # What stands before p10/ differs between releases.
    names = {"/".join(name.split("/")[-3:]): name for name in archive.namelist()}

    def text_of(folder: str) -> str | None:
        name = names.get(f"{folder}.txt")
        if name is None:
            return None
        try:
            return archive.read(name).decode("utf-8", "replace")
        except (OSError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path}, {name}: {error}; download it again") from None

    return text_of


def _section_reader(path: Path) -> Callable[[str], Report]:
    """Reports from mimic_cxr_sectioned.csv: findings and impression, else the last paragraph."""
    columns = ("study", "impression", "findings", "last_paragraph")
    cut: dict[str, tuple[str, str, str]] = {}
    for cells, problem in read_rows(path, columns):
        if problem:
            raise SourceError(f"{path}, {cells.get('study')}: {problem}; make it again")
        cut[cells["study"]] = cells["findings"], cells["impression"], cells["last_paragraph"]

    def report_of(folder: str) -> Report:
        findings, impression, last = cut.get(folder.rpartition("/")[2], ("", "", ""))
        report = make_report(findings, impression)
        return report if report.text else parse_report(last or None)

    return report_of


def _first_there(root: Path, paths: list[str]) -> str | None:
    return next((path for path in paths if (root / path).is_file()), None)
