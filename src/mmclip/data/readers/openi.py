"""The Open-I (Indiana University) chest X-ray collection, from its XML archive."""

import lzma
import re
import tarfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmclip.data.ingest.csv_rows import SourceError, read_rows
from mmclip.data.sample import Excluded, Reason, Record, Sample, View
from mmclip.data.text import make_report

OPENI_ARCHIVE, OPENI_REPORTS, OPENI_IMAGES = "NLMCXR_reports.tgz", "ecgen-radiology", "NLMCXR_png"
OPENI_VIEWS = "indiana_projections.csv"
_MAX_XML_BYTES = 1 << 20  # [chosen: the largest published report has 12 kB]


def read_openi(root: Path) -> Iterator[Record]:
    """The Open-I (Indiana University) chest X-ray collection, by the numbers of its reports.

    With the folder NLMCXR_png there is one record per image; without it, one text-only record a
    study. No patient ids are published: a study counts as a patient, so two studies of one patient
    can be in two splits. MeSH major tags go into `source_labels` as they are; they were given by
    people who read the report, not the image. Views come from Kaggle's indiana_projections.csv,
    where it lies in the folder: laterals are told apart, but not PA from AP.

    Args:
        root: The archive NLMCXR_reports.tgz, or a folder with it or with ecgen-radiology/*.xml.
            Nothing is extracted.

    Raises:
        SourceError: When there are no reports.
    """
    documents = sorted(_openi_documents(root), key=lambda item: _number(item[0]))
    if not documents:
        raise SourceError(f"{root} holds no Open-I reports ({OPENI_REPORTS}/*.xml)")
    has_images = (root / OPENI_IMAGES).is_dir()
    views = _openi_views(root) if has_images else {}
    return _openi_records(documents, has_images, views)


def _openi_records(
    documents: list[tuple[str, bytes]], has_images: bool, views: Mapping[str, View]
) -> Iterator[Record]:
    row = 0
    for name, data in documents:
        for record in _openi_study(row, name, data, has_images, views):
            yield record
            row += 1


def _number(name: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", Path(name).stem)
    return int(digits or 0), name


def _openi_documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the XML files, up to one byte more than allowed."""
    folder = root / OPENI_REPORTS
    if folder.is_dir():
        for path in folder.glob("*.xml"):
            with path.open("rb") as file:
                yield path.name, file.read(_MAX_XML_BYTES + 1)
        return
    archive = root if root.is_file() else root / OPENI_ARCHIVE
    if not archive.is_file():
        raise SourceError(f"{root} holds neither {OPENI_ARCHIVE} nor {OPENI_REPORTS}/")
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".xml"):
                    file = tar.extractfile(member)
                    assert file is not None  # true of a regular file
                    yield Path(member.name).name, file.read(_MAX_XML_BYTES + 1)
            _check_end(tar)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        why = str(error).partition("\n")[0].rstrip(":")
        raise SourceError(
            f"{archive} is no whole archive ({why}); download it again from openi.nlm.nih.gov"
        ) from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Looks for the zeros that end an archive: tarfile stops in silence where a header is broken.

    Reading them to the end also makes gzip compare its checksum.

    Raises:
        tarfile.ReadError: When the archive ends, or goes on, otherwise.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    is_ended = False
    while chunk := tar.fileobj.read(1 << 16):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("a header in the middle is broken")
        is_ended = True
    if not is_ended:
        raise tarfile.ReadError("its end is missing")


def _openi_views(root: Path) -> dict[str, View]:
    """Laterals by Kaggle's name of the image; frontal images are PA or AP, which is not said."""
    path = root / OPENI_VIEWS
    if not path.is_file():
        return {}
    return {
        cells["filename"].removesuffix(".dcm.png"): "L"
        for cells, problem in read_rows(path, ("filename", "projection"))
        if not problem and cells["projection"].lower() == "lateral"
    }


def _openi_study(
    row: int, name: str, data: bytes, has_images: bool, views: Mapping[str, View]
) -> list[Record]:
    """The records of one XML file; the first one's number is `row`."""
    study_id = f"CXR{Path(name).stem}"
    try:
        tree = _parse_xml(data)
    except ValueError as error:
        detail = f"{name}: {error}"
        return [Excluded(row=row, image_id=study_id, reason=Reason.BAD_VALUE, detail=detail)]
    sections = {
        str(part.get("Label")).upper(): "".join(part.itertext())
        for part in tree.iter("AbstractText")
    }
    report = make_report(sections.get("FINDINGS"), sections.get("IMPRESSION"))
    tags = tuple(text for tag in tree.iter("major") if (text := (tag.text or "").strip()))
    images = [str(image.get("id")) for image in tree.iter("parentImage")] if has_images else []
    if not images and report.text is None:
        given = ", ".join(label for label, text in sections.items() if text.strip()) or "no section"
        detail = f"{name} has neither findings nor an impression, but {given}"
        return [Excluded(row=row, image_id=study_id, reason=Reason.NOTHING_TO_LEARN, detail=detail)]
    return [
        Sample(
            image_id=image or study_id,
            study_id=study_id,
            patient_id=study_id,
            source="openi",
            image=f"{OPENI_IMAGES}/{image}.png" if image else None,
            view=views.get(f"{Path(name).stem}_{image.rpartition('_')[2]}", "unknown"),
            findings=report.findings,
            impression=report.impression,
            report=report.text,
            source_labels=tags,
            label_origin="report-reader" if tags else None,
        )
        for image in images or [""]
    ]


def _parse_xml(data: bytes) -> ET.Element:
    """Parses a small UTF-8 document without a document type, so that no entity can expand.

    Raises:
        ValueError: When it is something else.
    """
    if len(data) > _MAX_XML_BYTES:
        raise ValueError(f"the file is larger than {_MAX_XML_BYTES} bytes")
    text = data.decode()  # a UnicodeDecodeError is a ValueError
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("the file declares a document type or entities, which no report does")
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"no valid XML: {error}") from None
