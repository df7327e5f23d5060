"""Readers of data sets by name: a folder as downloaded -> one record per image, in a stable
order."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mmclip.data.ingest.csv_mapping import CsvMapping, load_mapping
from mmclip.data.ingest.csv_table import SourceError, read_csv, read_mapped
from mmclip.data.ingest.dicom_folder import DicomOptions, read_dicom_folder
from mmclip.data.readers.chestxray14 import read_chestxray14
from mmclip.data.readers.chexpert import read_chexpert, read_chexpert_plus
from mmclip.data.readers.covidx import read_covidx
from mmclip.data.readers.mimic import read_mimic_cxr, read_mimic_cxr_jpg
from mmclip.data.readers.nlm_tb import read_montgomery, read_shenzhen
from mmclip.data.readers.openi import read_openi
from mmclip.data.readers.openi_copies import read_openi_kaggle, read_openi_r2gen
from mmclip.data.readers.padchest import read_padchest
from mmclip.data.readers.rsna import read_rsna
from mmclip.data.readers.siim import read_siim
from mmclip.data.readers.vindr import read_vindr
from mmclip.data.sample import Excluded, Record, Sample
from mmclip.own_code import load_own

__all__ = [
    "PATIENTS_UNKNOWN",
    "READERS",
    "CsvMapping",
    "DicomOptions",
    "SourceError",
    "check_reader",
    "load_mapping",
    "open_reader",
    "read_csv",
]

logger = logging.getLogger(__name__)

_PUBLISHED: dict[str, Callable[[Path], Iterator[Record]]] = {
    "chestxray14": read_chestxray14,
    "chexpert": read_chexpert,
    "chexpert-plus": read_chexpert_plus,
    "covidx": read_covidx,
    "mimic-cxr": read_mimic_cxr,
    "mimic-cxr-jpg": read_mimic_cxr_jpg,
    "montgomery": read_montgomery,
    "openi": read_openi,
    "openi-kaggle": read_openi_kaggle,
    "openi-r2gen": read_openi_r2gen,
    "padchest": read_padchest,
    "rsna": read_rsna,
    "shenzhen": read_shenzhen,
    "siim": read_siim,
    "vindr": read_vindr,
}

READERS = {
    "csv": "A table of your own, read by a mapping of its columns.",
    "dicom": "A folder of DICOM files, with or without a table of reports.",
    "own": "A reader of your own, in Python.",
    "chestxray14": "ChestX-ray14 of the NIH: 14 findings, text-mined.",
    "chexpert": "CheXpert: 14 observations, text-mined; valid by radiologists.",
    "chexpert-plus": "CheXpert Plus: the images of CheXpert with reports.",
    "covidx": "COVIDx CXR-2, -3 or -4: COVID-19.",
    "mimic-cxr": "MIMIC-CXR as DICOM, with reports.",
    "mimic-cxr-jpg": "MIMIC-CXR-JPG, with reports and 14 observations.",
    "montgomery": "Montgomery of the NLM: tuberculosis.",
    "openi": "Open-I (Indiana University) as the NLM has it: reports.",
    "openi-kaggle": "Open-I as on Kaggle: reports.",
    "openi-r2gen": "Open-I as R2Gen has it: reports and splits.",
    "padchest": "PadChest: 193 labels, by physicians or a network.",
    "rsna": "RSNA Pneumonia Detection Challenge: pneumonia, with boxes.",
    "shenzhen": "Shenzhen of the NLM: tuberculosis.",
    "siim": "SIIM-ACR Pneumothorax Segmentation: pneumothorax.",
    "vindr": "VinDr-CXR: 28 or 15 labels, by three radiologists each.",
}
"""The names that `open_reader` knows, each with a line of what it reads."""

PATIENTS_UNKNOWN = {
    "montgomery": "image",
    "openi": "study",
    "openi-kaggle": "study",
    "openi-r2gen": "study",
    "rsna": "image",
    "shenzhen": "image",
    "siim": "image",
    "vindr": "image",
}
"""Data sets that publish no patient ids, and what counts as a patient instead."""


def check_reader(name: str) -> None:
    """Refuses a name that no reader has.

    Raises:
        SourceError: With the names that there are.
    """
    if name not in READERS:
        raise SourceError(f"there is no reader {name!r}; the readers are {', '.join(READERS)}")


def open_reader(
    name: str,
    root: Path,
    *,
    mapping: Path | None,
    table: Path | None,
    dicom: DicomOptions | None = None,
    own: str | None = None,
) -> Iterator[Record]:
    """The records of a data set.

    Args:
        name: One of READERS.
        root: Its folder as downloaded; for openi also the archive itself.
        mapping: TOML file of a `CsvMapping`, or of a `ReportMapping` for dicom; for no other.
        table: Read in place of the table that the mapping names; csv only.
        dicom: What the reader dicom needs; for it only.
        own: module:name of a function or class that gives the records of a folder; see
            `read_own`. For the reader own only.

    Raises:
        SourceError: When the name is unknown, an argument is missing or has no use here, or a
            piece of the data set is missing.
        ConfigError: When the mapping breaks a rule.
    """
    check_reader(name)
    if not root.exists():
        raise SourceError(f"there is no folder {root}; give the data set's by --root")
    if own is not None and name != "own":
        raise SourceError(
            f"{name} takes no --reader; leave it out, or write own in place of {name}"
        )
    if name == "csv" and dicom is None:
        if mapping is None:
            raise SourceError(
                "csv needs a file that says what the columns mean; write one after "
                "examples/mixed_images.toml and give it by --mapping"
            )
        return read_mapped(root, mapping, table)
    if name == "dicom":
        if not root.is_dir() or not any(root.iterdir()):
            raise SourceError(f"{root} holds no files; give the folder of a PACS export by --root")
        if dicom is None or table is not None:
            raise SourceError("dicom takes --reports in place of --table, and --id-key")
        return read_dicom_folder(root, mapping, dicom)
    if dicom is not None:
        raise SourceError(f"{name} takes no --reports, --id-key or --keep-age-sex; leave them out")
    if mapping is not None or table is not None:
        raise SourceError(f"{name} has a layout of its own; leave --mapping and --table out")
    if name != "openi" and not root.is_dir():
        raise SourceError(f"{root} is a file; give the folder of the data set by --root")
    if name == "own":
        if not any(root.iterdir()):
            raise SourceError(f"{root} holds no files; give the folder of your images by --root")
        if own is None:
            raise SourceError("own needs --reader module:name, such as my_readers:read_hospital")
        return read_own(own, root)
    return _read_published(name, root)


def _read_published(name: str, root: Path) -> Iterator[Record]:
    """The records of a published data set; says what it does not tell of patients."""
    records = _PUBLISHED[name](root)
    if name in PATIENTS_UNKNOWN:
        logger.warning(
            "%s: patients unknown, each %s counts as one; two of one patient can be in two splits",
            name,
            PATIENTS_UNKNOWN[name],
        )
    return records


def read_own(name: str, root: Path) -> Iterator[Record]:
    """The records that code of yours gives; they are checked as those of the readers here.

    Called with the root folder, a function returns the records, and a class makes an object to be
    iterated over. The row of an `Excluded` is counted here.

    Args:
        name: module:name, see `own_code.load_own`.
        root: The folder of the images.

    Raises:
        SourceError: When it gives anything but records.
    """
    records = load_own(name, "reader")(root)
    if not isinstance(records, Iterable):
        raise SourceError(
            f"--reader {name} gave a {type(records).__name__} for {root}; return or yield a record "
            f"for each image"
        )
    return _checked(records, name)


def _checked(records: Iterable[object], name: str) -> Iterator[Record]:
    for row, record in enumerate(records):
        if isinstance(record, Excluded):
            yield replace(record, row=row)
        elif isinstance(record, Sample):
            yield record
        else:
            raise SourceError(
                f"--reader {name}: record {row} is a {type(record).__name__}; yield "
                f"mmclip.data.sample.Sample, or Excluded with the reason"
            )
