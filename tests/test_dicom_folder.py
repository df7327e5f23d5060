"""A hospital's tree of DICOM files and its table of reports, as one data folder."""

import datetime
import gzip
import io
import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from mmclip.config_io import ConfigError
from mmclip.data.image_files import find_image_files
from mmclip.data.ingest.build import BuildOptions, build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.ingest.dicom_folder import DicomOptions
from mmclip.data.ingest.report_table import ReportMapping, read_reports
from mmclip.data.ingest.sources import open_reader
from mmclip.data.manifest import read_manifest
from mmclip.data.radiograph import view_of, why_no_chest
from mmclip.data.readers.files import index_images
from mmclip.data.sample import Excluded, Reason, Sample
from tests.commands import mmclip
from tests.made_files import dicom

MAPPING = """
source = "our hospital"
delimiter = ";"
encoding = "cp1252"
date_format = "%d.%m.%Y"
[columns]
accession = "Auftragsnummer"
study_id = "StudyUID"
report = "Befund"
date = "Datum"
[views]
"Thorax Liegendaufnahme" = "AP"
"""
REPORTS = """Auftragsnummer;StudyUID;Befund;Datum
00081507;;"FINDINGS: Small left effusion. IMPRESSION: Effusion.";02.01.2024
00081507;;"FINDINGS: Effusion is larger. IMPRESSION: Progress.";10.12.2023
;1.2.20;"FINDINGS: Clear lungs. IMPRESSION: Normal, Müller.";
0009;;"FINDINGS: Nodule.";01.01.2024
"""


def image(i: int, **tags) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 4096, (24, 32), dtype=np.uint16)
    facts = {
        "SOPInstanceUID": f"1.2.3.{i}", "Modality": "DX", "PatientID": "P-4711",
        "PatientName": "Müller^Änne", "StudyInstanceUID": "1.2.10", "AccessionNumber": "00081507",
        "PatientAge": "097Y", "PatientSex": "F", "SpecificCharacterSet": "ISO_IR 100",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dicom(pixels, **(facts | tags))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight files in folders that name a patient, one of them without a suffix."""
    files = {
        "Müller Änne/1/IM 1": image(1, ViewPosition="PA"),
        "Müller Änne/1/IM 2.dcm": image(2, ViewPosition="LL"),
        "Müller Änne/2/a.dcm": image(3, StudyInstanceUID="1.2.20", AccessionNumber="",
                                    SeriesDescription="Thorax Liegendaufnahme"),
        "x/ct": image(4, Modality="CT"),
        "x/knee": image(5, BodyPartExamined="KNEE"),
        "x/note.txt": b"Mueller, 4711",
        "y/none": image(6, PatientID="P-2", StudyInstanceUID="1.2.30", AccessionNumber="0003"),
        "y/twice": image(1),
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / "PACS" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "m.toml").write_text(MAPPING, "utf-8")
    (tmp_path / "reports.csv").write_text(REPORTS, "cp1252")
    (tmp_path / "id.key").write_text("0123456789abcdef" * 2)
    return tmp_path / "PACS"


def records(root: Path, **options) -> list:
    options = {"id_key": root.parent / "id.key", "reports": root.parent / "reports.csv"} | options
    return list(
        open_reader(
            "dicom", root, mapping=root.parent / "m.toml", table=None, dicom=DicomOptions(**options)
        )
    )


def test_images_find_their_reports_and_everything_else_its_reason(root: Path):
    found = records(root)
    samples = {f.image: f for f in found if isinstance(f, Sample)}
    pa, lateral = samples["Müller Änne/1/IM 1"], samples["Müller Änne/1/IM 2.dcm"]
    assert (pa.view, lateral.view) == ("PA", "L")
    assert pa.study_id == lateral.study_id and pa.report == lateral.report
    assert pa.findings == "Effusion is larger. Small left effusion."  # in order of date
    assert pa.impression == "Progress. Effusion."
    by_uid = samples["Müller Änne/2/a.dcm"]
    assert (by_uid.view, by_uid.impression) == ("AP", "Normal, Müller.")
    assert by_uid.patient_id == pa.patient_id and by_uid.study_id != pa.study_id
    assert samples["y/none"].report is None
    assert samples["y/none"].patient_id != pa.patient_id
    assert [(e.row, e.reason, e.detail) for e in found if isinstance(e, Excluded)] == [
        (3, Reason.OTHER_MODALITY, "modality CT"),
        (4, Reason.OTHER_BODY_PART, "knee"),
        (5, Reason.IMAGE_UNREADABLE, "no DICOM file"),
        (8, Reason.REPORT_WITHOUT_IMAGE, ""),
    ]
    assert pa.age_years is None and pa.sex is None
    kept = records(root, keep_age_and_sex=True)[0]
    assert (kept.age_years, kept.sex) == (90.0, "F")


def test_the_same_key_gives_the_same_ids_and_another_one_others(root: Path):
    first, again = records(root), records(root)
    assert first == again
    (root.parent / "other.key").write_text("f" * 32)
    other = records(root, id_key=root.parent / "other.key")
    ids = [
        {(f.image_id, f.patient_id) for f in some if isinstance(f, Sample)}
        for some in (first, other)
    ]
    assert not ids[0] & ids[1]


def test_a_key_is_made_for_its_owner_alone_and_a_short_one_is_refused(root: Path):
    key = root.parent / "new.key"
    first = records(root, id_key=key)
    assert key.stat().st_mode & 0o777 == 0o600
    assert records(root, id_key=key) == first
    key.write_text("short")
    with pytest.raises(SourceError, match="has 5 bytes; give 16 or more"):
        records(root, id_key=key)


def test_no_identifier_is_in_anything_that_a_build_leaves_or_says(root: Path):
    out = root.parent / "out"
    ended = mmclip(
        root.parent,
        "data", "build", "dicom", "--root", root, "--reports", root.parent / "reports.csv",
        "--mapping", str(root.parent / "m.toml"), "--image-size", "16", "--out", str(out),
        "--workers", "1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["n_rows"], meta["n_samples"], meta["n_paired"]) == (9, 4, 3)
    assert meta["excluded"][str(Reason.DUPLICATE_ID)] == 1
    left = b"".join(p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file())
    left = left.replace(str(root.parent).encode(), b"").replace(b"Normal, M\xc3\xbcller", b"")
    said = (ended.out + ended.err).encode()
    said_in_one_line = " ".join(ended.err.split())
    for secret in ("4711", "Müller", "Änne", "1.2.10", "1.2.3.1", "00081507", "IM 1"):
        assert secret.encode() not in left, secret
        assert secret.encode() not in said.replace(str(root.parent).encode(), b""), secret
    assert "1 of 5 images have no report; 1 of 4 reports have no image" in said_in_one_line
    assert (root.parent / "out.id-key").is_file()
    assert {sample.image for sample in read_manifest(out)} == {
        f"{sample.image_id}.dcm" for sample in read_manifest(out)
    }


@pytest.mark.parametrize(
    "tags",
    [
        {"StudyInstanceUID": "1.2.Huber"}, {"PatientAge": "Huber"}, {"PatientSex": "Huberin"},
        {"AccessionNumber": "Huber, Anna, 4711, 0815"}, {"ViewPosition": "huber"},
        {"PatientID": "Huber" * 20}, {"BodyPartExamined": "chest of huber"},
    ],
    ids=lambda tags: next(iter(tags)),
)  # fmt: skip
def test_a_value_that_breaks_dicoms_rules_is_not_quoted(root: Path, caplog, tags: dict):
    (root / "z").write_bytes(image(9, **tags))
    caplog.clear()  # of what writing it said
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = records(root, keep_age_and_sex=True)
    said = caplog.text + " ".join(str(each.message) for each in warned)
    assert len(found) == 10  # nine files, and a report without one
    assert "huber" not in said.lower()
    hidden = [r for r in found if isinstance(r, Excluded)]
    assert not any("huber" in f"{r.image_id} {r.detail}".lower() for r in hidden)


def test_a_build_that_was_cut_off_goes_on_to_the_same_bytes(root: Path):
    outs = [root.parent / "a", root.parent / "b"]
    for out in outs:
        build_data(records(root), root, out, image_size=16, options=BuildOptions(hides_paths=True))
    assert (outs[0] / "samples.parquet").read_bytes() == (outs[1] / "samples.parquet").read_bytes()


def test_accession_numbers_keep_their_zeros_and_lost_ones_are_told(root: Path, caplog):
    (root.parent / "reports.csv").write_text(REPORTS.replace("00081507", "81507"), "cp1252")
    samples = [f for f in records(root) if isinstance(f, Sample)]
    assert samples[0].report is None  # 00081507 is not 1
    only = "Auftragsnummer;StudyUID;Befund;Datum\n1;;Clear.;\n"
    (root.parent / "reports.csv").write_text(only, "cp1252")
    with caplog.at_level(logging.WARNING):
        records(root)
    assert "none of 1 accession numbers is in the files; compare one" in caplog.text


@pytest.mark.parametrize("written", ["81507", "00081507.0", "81507.0", "000-815-07"])
def test_accession_numbers_that_differ_in_how_they_are_written_are_told(root, caplog, written):
    found = REPORTS.replace('00081507;;"FINDINGS: Small', f'{written};;"FINDINGS: Small')
    (root.parent / "reports.csv").write_text(found, "cp1252")
    with caplog.at_level(logging.WARNING):
        records(root)
    assert "of 3 accession numbers of the table would be those of files" not in caplog.text
    (root.parent / "reports.csv").write_text(REPORTS.replace("00081507", written), "cp1252")
    with caplog.at_level(logging.WARNING):
        records(root)
    assert "1 of 2 accession numbers of the table would be those of files but for" in caplog.text
    assert written not in caplog.text


def test_accession_numbers_that_excel_cut_are_told(root: Path, caplog):
    (root.parent / "reports.csv").write_text(REPORTS.replace("0009", "2,024E+13"), "cp1252")
    with caplog.at_level(logging.WARNING):
        records(root)
    assert "1 rows have an accession number that Excel cut" in caplog.text
    assert "024E" not in caplog.text


def test_dates_of_any_iso_form_order_reports(tmp_path: Path, caplog):
    dates = (
        "2024-01-02T09:00:00Z",
        "2024-01-02 08:30",
        "2024-01-02T11:15:00.5+02:00",
        "2024-01-01",
    )
    rows = "".join(f"7,Text {i}.,{date}\n" for i, date in enumerate(dates))
    (tmp_path / "r.csv").write_text("a,r,d\n" + rows)
    columns = {"accession": "a", "report": "r", "date": "d"}
    found = read_reports(tmp_path / "r.csv", ReportMapping.model_validate({"columns": columns}))
    assert found.of("7", "") == [3, 1, 0, 2]
    assert not caplog.text


def test_what_a_table_of_reports_lacks_is_counted(root: Path, caplog):
    text = REPORTS + '00081507;;"Third.";31/12/23\n;;"Whose?";\n00081507;;;\n00081507;;x;y;z\n'
    (root.parent / "reports.csv").write_text(text, "cp1252")
    with caplog.at_level(logging.WARNING):
        first = records(root)[0]
    assert first.report.endswith("Third.") or "Third." in first.report
    for said in ("1 rows name no study", "1 rows hold no report", "1 rows have a date that is not",
                 "1 rows have another number of fields"):  # fmt: skip
        assert said in caplog.text


def test_a_mapping_of_reports_says_what_it_lacks(root: Path):
    mapping = root.parent / "m.toml"
    for toml, message in (
        ('[columns]\nreport = "r"\n', "name accession or study_id"),
        ('[columns]\naccession = "a"\n', "name either report, or findings and impression"),
        ('encoding = "utf9"\n[columns]\naccession = "a"\nreport = "r"\n', "no encoding 'utf9'"),
        ('[columns]\naccesion = "a"\nreport = "r"\n', "accesion"),
    ):
        mapping.write_text(toml)
        with pytest.raises(ConfigError, match=message):
            records(root)
    mapping.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        records(root)


def test_without_a_table_images_are_read_alone(root: Path):
    options = DicomOptions(root.parent / "id.key")
    found = open_reader("dicom", root, mapping=None, table=None, dicom=options)
    assert sum(isinstance(f, Sample) and f.report is None for f in found) == 5  # with its double


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"), ({"ViewPosition": "AP"}, "AP"),
        ({"ViewPosition": "LL"}, "L"),
        ({"ViewPosition": "LATERAL"}, "L"), ({"ViewPosition": "rl"}, "L"),
        ({"SeriesDescription": "Thorax p.a."}, "PA"), ({"SeriesDescription": "W Chest Lat."}, "L"),
        ({"SeriesDescription": "Thorax seitlich"}, "L"),
        ({"SeriesDescription": "CHEST_AP_PORT"}, "AP"),
        ({"SeriesDescription": "PA and lateral"}, "unknown"),
        ({"SeriesDescription": "Patient"}, "unknown"),
        ({"SeriesDescription": "Chapel lateralisation"}, "L"),
        ({"PatientOrientation": ["A", "F"]}, "L"),
        ({"PatientOrientation": ["L", "F"]}, "unknown"), ({}, "unknown"),
        ({"ViewPosition": "unbekannt", "SeriesDescription": "Liegend"}, "AP"),
        ({"ViewPosition": "RLAT"}, "L"), ({"SeriesDescription": "Tórax perfil"}, "L"),
        ({"SeriesDescription": "Thorax seitl."}, "L"), ({"SeriesDescription": "胸部侧位"}, "L"),
        ({"SeriesDescription": "Tórax póstero-anterior"}, "PA"),
        ({"SeriesDescription": "Torace postero-anteriore"}, "PA"),
        ({"SeriesDescription": "Chest posterior to anterior"}, "PA"),
        ({"SeriesDescription": "Thorax dorsoventral"}, "PA"),
        ({"SeriesDescription": "Thorax p. a."}, "PA"), ({"SeriesDescription": "Chest A-P"}, "AP"),
        ({"SeriesDescription": "Chest anterior-posterior"}, "AP"),
        ({"ViewPosition": "POSTERO_ANTERIOR"}, "PA"), ({"ViewPosition": "ANTERO_POSTERIOR"}, "AP"),
        ({"SeriesDescription": "Thorax links anliegend"}, "L"),
        ({"SeriesDescription": "Tórax AP en decúbito supino"}, "AP"),
        ({"SeriesDescription": "Thorax AP, décubitus dorsal"}, "AP"),
        ({"SeriesDescription": "Torace AP decubito supino"}, "AP"),
    ],
)  # fmt: skip
def test_a_view_is_told_by_position_description_or_orientation(tags, view):
    data = Dataset()
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    assert view_of(data, {"liegend": "AP"}) == view


@pytest.mark.parametrize(
    ("value", "meaning", "view"),
    [("R-10214", "", "PA"), ("R-10206", "", "AP"), ("x", "left lateral", "L"),
     ("399348003", "antero-posterior", "AP"), ("x", "postero-anterior", "PA"),
     ("399348003", "", "AP"), ("272479007", "", "PA"), ("399198007", "", "L"),
     ("R-10208", "antero-posterior oblique", "unknown")],
)  # fmt: skip
def test_a_view_is_told_by_dicoms_codes(value, meaning, view):
    item, data = Dataset(), Dataset()
    item.CodeValue, item.CodeMeaning = value, meaning
    data.ViewCodeSequence = [item]
    assert view_of(data, {}) == view


@pytest.mark.parametrize(
    "tags",
    [
        {"ViewPosition": "LLD"}, {"ViewPosition": "AP RLD"}, {"ViewPosition": "LAO"},
        {"ProtocolName": "Chest left lateral decubitus"}, {"ProtocolName": "PA oblique"},
        {"ProtocolName": "Thorax schräg ap"}, {"ProtocolName": "Chest PA obl"},
        {"ProtocolName": "Tórax AP decúbito lateral"}, {"ProtocolName": "Thorax, decubitus"},
    ],
)  # fmt: skip
def test_a_turned_patient_has_no_standard_view_whatever_else_is_said(tags: dict):
    data = Dataset()
    for keyword, value in ({"PatientOrientation": ["A", "F"]} | tags).items():
        setattr(data, keyword, value)
    assert view_of(data, {}) == "unknown"


def test_a_view_code_sequence_that_is_no_sequence_is_passed_over():
    data = pydicom.dcmread(io.BytesIO(image(1, SeriesDescription="Chest PA")))
    data.add_new("ViewCodeSequence", "LO", "R-10206")
    assert view_of(data, {}) == "PA"


@pytest.mark.parametrize(
    ("part", "series", "is_chest"),
    [
        ("UNKNOWN", "Chest PA", True), ("*", "", True), ("N/A", "Thorax", True),
        ("UNSPECIFIED", "Knee", False), ("TORACE", "", True), ("胸部", "", True),
        ("Poumon", "", True), ("грудная клетка", "", True), ("CHEST_TO_ABDOMEN", "", True),
        ("THORACIC SPINE", "", False), ("", "Brustwirbelsäule seitlich", False),
        ("", "Columna dorsal AP", False), ("", "Thorax und Brustwirbelsäule", True),
        ("", "Overhead portable", True), ("", "Rx mano", False), ("腹部", "", False),
        ("", "Huftgelenk", False), ("", "Hu\u0308ftgelenk", False), ("CLAVICLE", "", False),
        ("PECHO", "", True), ("", "Hombro AP", False), ("", "Genou face", False),
        ("", "Bacino AP", False), ("", "Main droite", False), ("", "Main building, PA", True),
        ("", "Crâne profil", False), ("", "Cadera", False), ("", "Pied gauche", False),
        ("", "PA de pie", True), ("", "Rachis cervical", False), ("", "Épaule gauche", False),
        ("", "Joelho esquerdo", False), ("", "Tórax y hombro", True), ("", "Coluna lombar", False),
    ],
)  # fmt: skip
def test_the_chest_is_told_in_the_words_of_many_hospitals(part: str, series: str, is_chest: bool):
    data = Dataset()
    data.Modality = "DX"
    data.add_new("BodyPartExamined", "LO", part)
    data.add_new("SeriesDescription", "LT", series)
    assert (why_no_chest(data) is None) == is_chest


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPClassUID": uid.DigitalXRayImageStorageForPresentation}, None),
        ({"SOPClassUID": uid.ComputedRadiographyImageStorage, "Modality": ""}, None),
        ({"SOPClassUID": uid.CTImageStorage}, Reason.OTHER_MODALITY),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, Reason.OTHER_MODALITY),
        ({}, Reason.OTHER_MODALITY),
        ({"Modality": "DX", "PresentationIntentType": "FOR PRESENTATION"}, None),
        ({"Modality": "DX", "PresentationIntentType": "FOR PROCESSING"}, Reason.NOT_FOR_USE),
        ({"SOPClassUID": uid.DigitalXRayImageStorageForProcessing}, Reason.NOT_FOR_USE),
    ],
)  # fmt: skip
def test_the_class_tells_the_modality_and_raw_values_are_no_image(tags: dict, reason):
    data = Dataset()
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    why = why_no_chest(data)
    assert (why[0] if why else None) == reason


def test_a_later_report_that_only_tells_who_was_called_is_counted(root: Path, caplog):
    text = REPORTS + '00081507;;"ADDENDUM: Told Dr. Meier at 9:12 p.m.";03.01.2024\n'
    (root.parent / "reports.csv").write_text(text, "cp1252")
    with caplog.at_level(logging.WARNING):
        first = records(root)[0]
    assert first.impression == "Progress. Effusion." and "Meier" not in first.report
    assert "1 reports add nothing to others of their study" in caplog.text


def test_a_real_radiograph_without_a_preamble_is_found(tmp_path: Path):
    real = Path(__file__).parents[2] / "shared" / "data" / "cxr2" / "dicom"
    if not real.is_dir():
        pytest.skip("needs the four DICOM files of shared/data/cxr2/dicom")
    options = DicomOptions(tmp_path / "key")
    found = list(open_reader("dicom", real, mapping=None, table=None, dicom=options))
    assert len(found) == 4 and all(isinstance(record, Sample) for record in found), found


def test_headers_are_read_without_the_pixels(root: Path):
    path = next(root.rglob("IM 1"))
    data = pydicom.dcmread(path)
    shutil.copy(path, root / "cut")
    content = path.read_bytes()
    (root / "cut").write_bytes(content[: len(content) - len(data.PixelData) + 8])
    assert sum(isinstance(record, Sample) for record in records(root)) == 6


@pytest.mark.parametrize(
    ("written", "form"),
    [
        (("03.05.2024", "02.05.2024"), "%d.%m.%Y"),
        (("3.5.2024 9:05", "2.5.2024 17:40"), "%d.%m.%Y %H:%M"),
        (("20240503", "20240502"), "%Y%m%d"),
        (("05/31/2024", "05/13/2024"), "%m/%d/%Y"),
        (("31/05/2024", "13/05/2024"), "%d/%m/%Y"),
        (("03.05.24", "02.05.24"), "%d.%m.%y"),
        (("20240503101500", "20240502101500"), "%Y%m%d%H%M%S"),
    ],
)
def test_dates_of_another_format_are_told_with_the_one_that_reads_them(
    tmp_path: Path, caplog, written: tuple[str, str], form: str
):
    table = tmp_path / "r.csv"
    table.write_text(f"a,r,d\n7,Second.,{written[0]}\n7,First.,{written[1]}\n")
    columns = {"accession": "a", "report": "r", "date": "d"}

    def order(**given: str) -> list[int]:
        return read_reports(table, ReportMapping.model_validate({"columns": columns} | given)).of(
            "7", ""
        )

    with caplog.at_level(logging.WARNING):
        assert order() == [0, 1]  # of the table: no date is known
    assert (
        f"2 rows have a date that is not '%Y-%m-%d', and stand last; date_format = \"{form}\""
        in (caplog.text)
    )
    assert written[0] not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert order(date_format=form) == [1, 0]
    assert not caplog.text


def test_reports_of_an_excel_file_keep_zeros_and_are_joined_by_its_dates(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["a", "r", "d"])
    book.active.append([7, "Second.\nline", datetime.datetime(2024, 5, 3, 10, 15)])
    book.active.append([7, "First.", datetime.date(2024, 5, 3)])
    for row in (2, 3):
        book.active.cell(row, 1).number_format = "00000000"
    book.save(tmp_path / "r.xlsx")
    mapping = {"columns": {"accession": "a", "report": "r", "date": "d"}}
    found = read_reports(tmp_path / "r.xlsx", ReportMapping.model_validate(mapping))
    assert found.of("00000007", "") == [1, 0] and found.texts[0][1] == "Second.\nline"


def test_a_table_of_reports_with_another_delimiter_is_told_with_the_right_one(tmp_path: Path):
    table = tmp_path / "r.csv"
    table.write_text("a;r\n7;Clear.\n")
    mapping = ReportMapping.model_validate({"columns": {"accession": "a", "report": "r"}})
    with pytest.raises(SourceError, match=r'parted by semicolons.*say delimiter = ";"'):
        read_reports(table, mapping)


# What a disk holds beside files.


def test_a_link_to_a_folder_is_followed_and_a_folder_is_read_once(root: Path):
    kept, aside = root / "x", root.parent / "elsewhere"
    (root / "link to y").symlink_to(root / "y", target_is_directory=True)
    (kept / "loop").symlink_to(root, target_is_directory=True)
    aside.mkdir()
    (aside / "IM").write_bytes(image(9))
    (root / "z").symlink_to(aside, target_is_directory=True)
    found = {f.image for f in records(root) if isinstance(f, Sample)}
    assert {"z/IM", "link to y/none"} <= found and "y/none" not in found
    assert len(found) == 6
    out = root.parent / "out"
    build_data(records(root), root, out, image_size=16, options=BuildOptions(hides_paths=True))
    said = [json.loads(line) for line in (out / "excluded.jsonl").read_text("utf-8").splitlines()]
    assert sum(one["reason"] == Reason.IMAGE_OUTSIDE_ROOT for one in said) == 1  # told, not lost


def test_a_folder_that_cannot_be_read_is_counted(root: Path, monkeypatch, caplog):
    scandir = os.scandir

    def barred(path):
        if str(path).endswith("2"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", barred)
    said = [(f.reason, f.detail) for f in records(root) if isinstance(f, Excluded)]
    assert (Reason.IMAGE_UNREADABLE, "a folder that cannot be read: Permission denied") in said
    assert "1 folders cannot be read, and what they hold is left out" in caplog.text
    assert "Müller" not in caplog.text
    with pytest.raises(ValueError, match=r"folder .*2 cannot be read: Permission denied; change"):
        find_image_files([root])
    with pytest.raises(ValueError, match=r"folder .*2 cannot be read: Permission denied; change"):
        index_images(root, {".dcm"}, "the shop")


def test_pipes_dead_links_and_names_that_are_no_text_are_reasons(root: Path):
    folder = root / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "dead").symlink_to(folder / "nowhere")
    (folder / os.fsdecode(b"caf\xe9.dcm")).write_bytes(image(7))
    (folder / "empty").write_bytes(b"")
    (folder / "study.zip").write_bytes(b"PK\x03\x04" + bytes(99))
    (folder / "IM.dcm.gz").write_bytes(gzip.compress(image(8)))
    found = [(f.reason, f.detail) for f in records(root) if isinstance(f, Excluded)]
    assert found[:6] == [
        (Reason.IMAGE_UNREADABLE, "no DICOM file, but a gzip archive; unpack it"),
        (Reason.IMAGE_UNREADABLE, "its path is not UTF-8; rename it"),
        (Reason.IMAGE_MISSING, ""),
        (Reason.IMAGE_EMPTY, ""),
        (Reason.IMAGE_UNREADABLE, "a pipe or device, not a file"),
        (Reason.IMAGE_UNREADABLE, "no DICOM file, but a zip archive; unpack it"),
    ]
