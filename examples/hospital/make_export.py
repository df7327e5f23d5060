"""Writes a folder as a PACS exports it, and a table of reports as Excel saves it, from any images.

    python examples/hospital/make_export.py IMAGES OUT [--images 60]

OUT/PACS holds one DICOM file per image, in the ways that archives mix: nine transfer syntaxes,
MONOCHROME1, nested series, names with umlauts, spaces and no suffix, laterals, a study of the
knee, a CT slice and a DICOMDIR. OUT/reports.csv is semicolon-separated Latin-1 with German dates;
some studies have two reports, one has none, and one report has no image. OUT/reports.toml says what
its columns mean.

The reports are stock sentences dealt at random: they let every command run, and teach nothing.
"""

import argparse
import csv
import io
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

NAMES = ("Müller^Änne", "Groß^Jörg", "Škoda^Jiří", "O'Neil^Mary Ann", "Yılmaz^Ayşe", "Weiß^Zoë")

REPORTS = (
    "FINDINGS: The lungs are clear. No pleural effusion or pneumothorax.\n"
    "IMPRESSION: Normal chest.",
    "FINDINGS: Moderate left pleural effusion. No pneumothorax.\nIMPRESSION: Pleural effusion.",
    "FINDINGS: The heart is enlarged. No pleural effusion.\nIMPRESSION: Cardiomegaly.",
    "FINDINGS: Right lower lobe consolidation, suspicious for pneumonia. Small right pleural "
    "effusion.\nIMPRESSION: Pneumonia with effusion.",
)

MAPPING = """\
table = "reports.csv"
delimiter = ";"
encoding = "cp1252"
date_format = "%d.%m.%Y"
source = "hospital"

[columns]
accession = "Auftragsnummer"
report = "Befund"
date = "Befunddatum"

[views]
"Thorax Liegendaufnahme" = "AP"
"""

WAYS = (
    "explicit", "implicit", "deflated", "rle", "jpeg", "jpeg-lossless", "jpeg-ls", "jpeg-2000",
    "no preamble",
)  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """One image of an export.

    Attributes:
        number: Of the image, from 0; it chooses syntax and photometric interpretation.
        patient: Number of the patient.
        study: Number of the study, over all patients.
        series: Number of the series within the study.
        day: Of the study.
    """

    number: int
    patient: int
    study: int
    series: int
    day: date

    @property
    def accession(self) -> str:
        """AccessionNumber, with leading zeros."""
        return f"{self.study + 1507:08d}"

    @property
    def path(self) -> Path:
        """Below PACS."""
        name = NAMES[self.patient % len(NAMES)].replace("^", " ")
        study = f"{self.day:%Y%m%d} Thorax p.a. & seitl."
        suffix = ".dcm" if self.number % 3 == 0 else ""
        return Path(f"{name} {self.patient}", study, f"{self.series}", f"IM {self.number}{suffix}")


def shots(n_images: int, seed: int) -> Iterator[Shot]:
    """One or two studies a patient, one or two images a study."""
    rng = random.Random(seed)
    number = patient = study = 0
    while number < n_images:
        day = date(2024, 1, 2) + timedelta(days=rng.randrange(300))
        for _ in range(rng.choice((1, 1, 2))):
            for series in range(rng.choice((1, 1, 2))):
                if number < n_images:
                    yield Shot(number, patient, study, series, day)
                    number += 1
            study += 1
            day += timedelta(days=rng.randrange(1, 60))
        patient += 1


def header(shot: Shot) -> Dataset:
    """What the file says beside its pixels: the series that is second is a lateral."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID = DigitalXRayImageStorageForPresentation
    data.SOPInstanceUID = f"1.2.826.0.1.{shot.study}.{shot.series}.{shot.number}"
    data.StudyInstanceUID = f"1.2.826.0.1.{shot.study}"
    data.SeriesInstanceUID = f"1.2.826.0.1.{shot.study}.{shot.series}"
    data.AccessionNumber = shot.accession
    data.PatientName = NAMES[shot.patient % len(NAMES)]
    data.PatientID = f"P-{4711 + shot.patient}"
    data.PatientAge = f"{30 + shot.patient % 60:03d}Y"
    data.PatientSex = "FM"[shot.patient % 2]
    data.StudyDate = f"{shot.day:%Y%m%d}"
    data.Modality = ("DX", "CR")[shot.number % 2]
    data.BodyPartExamined = "CHEST"
    if shot.series:
        data.ViewPosition, data.SeriesDescription = "LL", "Thorax seitlich"
    elif shot.study % 3:
        data.ViewPosition, data.SeriesDescription = "PA", "Thorax p.a."
    else:
        data.SeriesDescription = "Thorax Liegendaufnahme"
    return data


def with_pixels(data: Dataset, grey: np.ndarray, *, is_inverted: bool, is_8_bit: bool) -> Dataset:
    """The header with pixels of 8 or 12 bits, air dark, or bright where they are inverted."""
    bits = 8 if is_8_bit else 12
    pixels = grey if is_8_bit else grey.astype(np.uint16) << 4
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.PhotometricInterpretation = "MONOCHROME1" if is_inverted else "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * pixels.itemsize, bits, bits - 1
    data.PixelData = ((1 << bits) - 1 - pixels if is_inverted else pixels).tobytes()
    data["PixelData"].VR = "OW"
    return data


def write_dicom(path: Path, data: Dataset, way: str) -> None:
    """Writes a file in one of WAYS."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = data.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    meta.TransferSyntaxUID = {
        "implicit": ImplicitVRLittleEndian,
        "no preamble": ImplicitVRLittleEndian,
        "deflated": DeflatedExplicitVRLittleEndian,
    }.get(way, ExplicitVRLittleEndian)
    file = FileDataset("", data, file_meta=meta, preamble=b"\0" * 128)
    compressed = {"rle": RLELossless, "jpeg-ls": JPEGLSLossless, "jpeg-2000": JPEG2000Lossless}
    if way in compressed:
        file.compress(compressed[way], generate_instance_uid=False)
    elif way == "jpeg":
        content = io.BytesIO()
        Image.fromarray(file.pixel_array).save(content, "JPEG", quality=92)
        file.PixelData = encapsulate([content.getvalue()])
        file["PixelData"].VR = "OB"
        file.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    path.parent.mkdir(parents=True, exist_ok=True)
    if way == "no preamble":
        with path.open("wb") as out:
            pydicom.filewriter.write_dataset(
                pydicom.filebase.DicomFileLike(out), _implicit(Dataset(data))
            )
        return
    file.save_as(path, enforce_file_format=True)
    if way == "jpeg-lossless":
        _to_jpeg_lossless(path)


def _implicit(data: Dataset) -> Dataset:
    data.set_original_encoding(True, True)
    return data


def _to_jpeg_lossless(path: Path) -> None:
    """Rewrites a file with JPEG Lossless, which GDCM encodes."""
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain.dcm"), Path(folder, "packed.dcm")
        plain.write_bytes(path.read_bytes())
        reader = gdcm.ImageReader()
        reader.SetFileName(str(plain))
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        if not reader.Read():
            raise OSError(f"GDCM cannot read {path}")
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise OSError(f"GDCM cannot compress {path}")
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(packed))
        if not writer.Write():
            raise OSError(f"GDCM cannot write {packed}")
        path.write_bytes(packed.read_bytes())


def read_grey(path: Path) -> np.ndarray | None:
    """uint8 [h, w], at most 512 px a side; None for a file that is no image."""
    try:
        with Image.open(path) as image:
            image.thumbnail((512, 512))
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError):
        return None


def write_others(pacs: Path, grey: np.ndarray, like: Shot) -> None:
    """What an export holds beside chest radiographs: a CT slice, a knee, a DICOMDIR, a note."""
    for name, tags in (
        ("CT", {"Modality": "CT", "SOPClassUID": CTImageStorage}),
        ("Knie", {"BodyPartExamined": "KNEE", "SeriesDescription": "Knie a.p."}),
    ):
        data = with_pixels(header(like), grey, is_inverted=False, is_8_bit=False)
        data.SOPInstanceUID += f".{len(name)}"
        for keyword, value in tags.items():
            setattr(data, keyword, value)
        write_dicom(pacs / f"{name} 1" / "IM 1", data, "explicit")
    (pacs / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (pacs / "liesmich.txt").write_text("Export für die Forschung", "cp1252")


def write_reports(out: Path, taken: list[Shot], seed: int) -> None:
    """A report per study but the last; every fourth has an addendum, every fifth a call."""
    rng = random.Random(seed)
    studies = {shot.study: shot for shot in taken}
    with (out / "reports.csv").open("w", encoding="cp1252", newline="") as file:
        rows = csv.writer(file, delimiter=";", lineterminator="\r\n")
        rows.writerow(["Auftragsnummer", "Befunddatum", "Befund", "Befunder"])

        def write(accession: str, day: date, text: str) -> None:
            rows.writerow([accession, f"{day:%d.%m.%Y}", text, "Dr. Grünwald"])

        for number, shot in list(studies.items())[:-1] or studies.items():
            write(shot.accession, shot.day, rng.choice(REPORTS))
            later = shot.day + timedelta(days=1)
            if number % 4 == 1:
                write(shot.accession, later, "ADDENDUM: There is also a small left effusion.")
            if number % 5 == 2:
                write(shot.accession, later, "ADDENDUM: Told Dr. Weber at 9:12 a.m.")
        write("00000001", date(2024, 1, 1), REPORTS[0])
    (out / "reports.toml").write_text(MAPPING, "utf-8")


def write_export(images: Path, out: Path, n_images: int = 60, seed: int = 0) -> int:
    """Writes the export; gives the number of radiographs of the chest in it.

    Raises:
        ValueError: When the folder holds no image, or `out` is there.
    """
    if (out / "PACS").exists():
        raise ValueError(f"{out / 'PACS'} is there; name another folder, or remove it")
    found = (path for path in sorted(images.rglob("*")) if path.is_file())
    greys = (grey for path in found if (grey := read_grey(path)) is not None)
    taken: list[Shot] = []
    last = None
    for shot, grey in zip(shots(n_images, seed), greys, strict=False):
        way = WAYS[shot.number % len(WAYS)]
        data = with_pixels(
            header(shot), grey, is_inverted=shot.number % 4 == 3, is_8_bit=way == "jpeg"
        )
        write_dicom(out / "PACS" / shot.path, data, way)
        taken.append(shot)
        last = grey
    if last is None:
        raise ValueError(f"{images} holds no image; name a folder of PNG or JPEG files")
    write_others(out / "PACS", last, taken[-1])
    write_reports(out, taken, seed)
    return len(taken)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="any folder of PNG or JPEG files")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--images", dest="n_images", type=int, default=60, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of names that the character set holds
        n = write_export(args.images, args.out, args.n_images, args.seed)
    print(f"{n} radiographs in {args.out / 'PACS'}, reports in {args.out / 'reports.csv'}")


if __name__ == "__main__":
    main()
