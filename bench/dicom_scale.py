"""How time and memory of reading a PACS export grow with its number of files.

    python bench/dicom_scale.py --files 12500 50000 200000

For each number, draws that many small DICOM files (8 x 8 px, 500 a folder, two a study) and a table
with a report per study, and reads them with the reader `dicom` in a process of its own. Prints
seconds of CPU time and the most memory of each, and the ratios to the first: linear time keeps the
time per file; what is held is one record per image and the reports. The last line is one JSON
object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from mmclip.data.ingest.dicom_folder import DicomOptions
from mmclip.data.ingest.sources import open_reader
from mmclip.data.sample import Sample

PER_FOLDER = 500
MAPPING = '[columns]\naccession = "accession"\nreport = "report"\n'


def template() -> bytes:
    """A file whose ids are runs of zeros, to be replaced by others of that length."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPInstanceUID, data.StudyInstanceUID = "1.2.11111111", "1.3.22222222"
    data.AccessionNumber, data.PatientID = "A22222222", "P33333333"
    data.Modality, data.BodyPartExamined, data.ViewPosition = "DX", "CHEST", "PA"
    data.Rows = data.Columns = 8
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = bytes(range(64))
    data["PixelData"].VR = "OW"
    file = pydicom.filebase.DicomBytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def write_export(root: Path, n_files: int) -> None:
    """Files, and root/reports.csv with its mapping."""
    content = template()
    for i in range(n_files):
        folder = root / "PACS" / f"{i // PER_FOLDER:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        ids = ((b"11111111", i), (b"22222222", i // 2), (b"33333333", i // 3))
        named = content
        for old, number in ids:
            named = named.replace(old, f"{number:08d}".encode())
        (folder / f"IM{i}").write_bytes(named)
    rows = (f"A{k:08d},No effusion. Normal heart.\n" for k in range(-(-n_files // 2)))
    (root / "reports.csv").write_text("accession,report\n" + "".join(rows))
    (root / "reports.toml").write_text(MAPPING)


def read(root: Path) -> dict[str, float]:
    """Reads an export, and says what it took."""
    began = time.process_time()
    options = DicomOptions(root / "id.key", root / "reports.csv")
    records = open_reader(
        "dicom", root / "PACS", mapping=root / "reports.toml", table=None, dicom=options
    )
    found = [record for record in records if isinstance(record, Sample)]
    cpu_s = time.process_time() - began
    return {
        "n_samples": len(found),
        "with_report": sum(sample.report is not None for sample in found),
        "cpu_s": round(cpu_s, 2),
        "ms_per_file": round(1000 * cpu_s / len(found), 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def main() -> None:
    """Prints a line per number of files, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.read:
        print(json.dumps(read(args.read)))
        return
    rows = {}
    for n_files in args.files:
        with tempfile.TemporaryDirectory() as folder:
            write_export(Path(folder), n_files)
            said = subprocess.run(
                [sys.executable, __file__, "--read", folder],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        rows[n_files] = json.loads(said.stdout.splitlines()[-1])
        print(f"{n_files:8,} files: " + ", ".join(f"{k} {v}" for k, v in rows[n_files].items()))
    first = rows[args.files[0]]
    ratios = {n: round(row["ms_per_file"] / first["ms_per_file"], 3) for n, row in rows.items()}
    print(json.dumps({"rows": rows, "time_per_file_to_first": ratios}))


if __name__ == "__main__":
    main()
