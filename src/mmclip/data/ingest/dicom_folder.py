"""A tree of DICOM files as a PACS exports it, joined with a table of reports.

What is known of a patient stays in the files: ids become keyed hashes, and no path, number, name or
date reaches a record.
"""

import hmac
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.dicom import read_header, silent_pydicom
from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.ingest.csv_table import find_table
from mmclip.data.ingest.report_table import (
    ReportMapping,
    Reports,
    load_report_mapping,
    read_reports,
)
from mmclip.data.pixels import ImageError
from mmclip.data.radiograph import CONTENT_KEYWORDS, text_of, view_of, why_no_chest
from mmclip.data.sample import Excluded, Reason, Record, Sample
from mmclip.data.walk import is_utf_8, walk

logger = logging.getLogger(__name__)

OLDEST_YEARS = 90.0
"""An age above it is told as this one: higher ones are rare enough to name a person. [HIPAA]"""

_KEYWORDS = (
    "SOPInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID", "PatientAge",
    "PatientSex", *CONTENT_KEYWORDS,
)  # fmt: skip


@dataclass(frozen=True)
class DicomOptions:
    """What the reader `dicom` is told beside its folder.

    Attributes:
        id_key: File of the key by which ids are hashed.
        reports: Table of reports, in place of the mapping's.
        keep_age_and_sex: Whether records hold them.
    """

    id_key: Path
    reports: Path | None = None
    keep_age_and_sex: bool = False


def load_or_make_key(path: Path) -> bytes:
    """The key of a file, which is made of random bytes, for its owner alone, where it is not there.

    Raises:
        SourceError: When it cannot be read or made, or is shorter than 16 bytes.
    """
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
            logger.warning(
                "ids are hashed by the new key %s: keep it apart from the data; with the same key "
                "the same patient gets the same id",
                path,
            )
        key = path.read_bytes().strip()
    except OSError as error:
        raise SourceError(
            f"the key {path} cannot be read: {error.strerror}; give a file of 16 bytes or more by "
            f"--id-key"
        ) from None
    if len(key) < 16:
        raise SourceError(
            f"the key {path} has {len(key)} bytes; give 16 or more, best 32 at random"
        )
    return key


def read_dicom_folder(root: Path, mapping: Path | None, options: DicomOptions) -> Iterator[Record]:
    """The radiographs of the chest below a folder, one record a file, in the order of their paths.

    A file that is no DICOM, another modality or another part of the body is excluded by reason.
    Then follow the folders that cannot be read, and the reports that belong to no image that is
    read, each excluded. Row i is the i-th file in the order of paths, so whoever has the folder
    finds it.

    Args:
        root: The folder.
        mapping: TOML file of a `ReportMapping`; None reads images alone.
        options: The rest.

    Raises:
        SourceError: At once, when the table or the key cannot be read.
        ConfigError: When the mapping breaks a rule.
    """
    key = load_or_make_key(options.id_key)
    meant = None if mapping is None else load_report_mapping(mapping)
    if meant is None and options.reports is not None:
        raise SourceError("--reports needs a file that says what its columns mean; give --mapping")
    table = None if meant is None else find_table(root, meant.table, options.reports)
    reports = Reports() if meant is None or table is None else read_reports(table, meant)
    ours = {p.resolve() for p in (mapping, table, options.id_key) if p is not None}
    return _records(root, meant, reports, key, options.keep_age_and_sex, ours)


# -- files --


def _records(
    root: Path, mapping: ReportMapping | None, reports: Reports, key: bytes, keeps: bool,
    ours: set[Path],
) -> Iterator[Record]:  # fmt: skip
    counts: Counter[str] = Counter()
    row = 0
    barred: list[OSError] = []
    for path in _files(root, barred):
        if path.resolve() in ours:
            continue
        with silent_pydicom():  # it converts values, and complains of them, when they are asked for
            record = _record(row, path, root, mapping, reports, key, keeps)
        if isinstance(record, Sample):
            counts["images"] += 1
            counts["without"] += record.report is None
        yield record
        row += 1
    for error in barred:
        image_id = _hash(key, "file", str(error.filename))
        detail = f"a folder that cannot be read: {error.strerror}"
        yield Excluded(row=row, image_id=image_id, reason=Reason.IMAGE_UNREADABLE, detail=detail)
        row += 1
    if barred:
        logger.warning(
            "%d folders cannot be read, and what they hold is left out; `find %s -type d ! "
            "-readable` lists them", len(barred), root,
        )  # fmt: skip
    for number, said in enumerate(reports.ids):
        if number not in reports.found:
            counts["reports"] += 1
            yield Excluded(
                row=row, image_id=_hash(key, "report", said), reason=Reason.REPORT_WITHOUT_IMAGE
            )
            row += 1
    if mapping is not None:
        logger.warning(
            "%d of %d images have no report; %d of %d reports have no image that is read",
            counts["without"], counts["images"], counts["reports"], len(reports.ids),
        )  # fmt: skip
        if reports.empty:
            logger.warning(
                "%d reports add nothing to others of their study: they tell who was called, or "
                "have no words", len(reports.empty),
            )  # fmt: skip
        _warn_of_numbers(reports)


def _warn_of_numbers(reports: Reports) -> None:
    """Says where accession numbers of table and files are one but for how they are written."""
    n = len(reports.by_accession)
    n_missed = sum(not reports.found.issuperset(reports.by_accession[a]) for a in reports.missed)
    if n_missed:
        logger.warning(
            "%d of %d accession numbers of the table would be those of files but for leading "
            "zeros, a \".0\", signs or capitals; export the column as text, or write it as the "
            "files do", n_missed, n,
        )  # fmt: skip
    elif n and not reports.found:
        logger.warning(
            "none of %d accession numbers is in the files; compare one with AccessionNumber of a "
            "file, or join by study_id, the column of StudyInstanceUID", n,
        )  # fmt: skip


def _files(root: Path, barred: list[OSError]) -> Iterator[Path]:
    for folder, _, names in walk(root, barred.append):
        yield from (Path(folder) / name for name in names)


def _record(
    row: int, path: Path, root: Path, mapping: ReportMapping | None, reports: Reports, key: bytes,
    keeps: bool,
) -> Record:  # fmt: skip
    image = path.relative_to(root).as_posix()
    try:
        if not is_utf_8(image):
            raise ImageError(Reason.IMAGE_UNREADABLE, "its path is not UTF-8; rename it")
        data = read_header(path, _KEYWORDS)
    except ImageError as error:
        image_id = _hash(key, "file", image)
        return Excluded(row=row, image_id=image_id, reason=error.reason, detail=error.detail)
    instance = text_of(data, "SOPInstanceUID")
    image_id = _hash(key, "image", instance) if instance else _hash(key, "file", image)
    if (why := why_no_chest(data)) is not None:
        return Excluded(row=row, image_id=image_id, reason=why[0], detail=why[1])
    study, accession = text_of(data, "StudyInstanceUID"), text_of(data, "AccessionNumber")
    patient = text_of(data, "PatientID")
    report = reports.report_of(accession, study)
    age = parse_age(text_of(data, "PatientAge")) if keeps else None
    return Sample(
        image_id=image_id,
        study_id=_hash(key, "study", study or accession) if study or accession else image_id,
        patient_id=_hash(key, "patient", patient) if patient else "",
        source=mapping.source if mapping is not None else "dicom",
        image=image,
        view=view_of(data, mapping.views if mapping is not None else {}),
        findings=report.findings,
        impression=report.impression,
        report=report.text,
        age_years=None if age is None else min(age, OLDEST_YEARS),
        sex=parse_sex(text_of(data, "PatientSex")) if keeps else None,
    )


def _hash(key: bytes, kind: str, value: str) -> str:
    """A keyed hash: without the key, nobody who guesses an id can tell whether it is the one."""
    return hmac.digest(key, os.fsencode(f"{kind}\0{value}"), "sha256").hex()[:24]
