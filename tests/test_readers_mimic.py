import gzip
import io
import logging
import zipfile
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.mimic import read_mimic_cxr, read_mimic_cxr_jpg
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Reason, Sample
from mmclip.data.text import parse_report
from tests.made_files import dicom, encoded, ramp
from tests.published import lay_out, parted

ONE, TWO, THREE, FOUR, FIVE = (f"{i:08x}-0000-1111-2222-333333333333" for i in range(1, 6))
FOLDERS = {
    ONE: "p10/p10000032/s50414267",
    TWO: "p10/p10000032/s50414267",
    THREE: "p10/p10000032/s53189527",
    FOUR: "p10/p10000764/s57375967",
    FIVE: "p19/p19999987/s55368167",
}
VIEWS = {ONE: "PA", TWO: "LATERAL", THREE: "AP", FOUR: "", FIVE: "LL"}
SPLITS = {ONE: "train", TWO: "train", THREE: "train", FOUR: "validate", FIVE: "test"}

METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning\n"
    + "".join(
        f"{sample},{folder[5:13]},{folder[15:]},CHEST (PA AND "
        f"LAT),{VIEWS[sample]},3056,2544,21800506,213014.531,CHEST (PA AND "
        f"LAT),postero-anterior,Erect\n"
        for sample, folder in FOLDERS.items()
    )
)
SPLIT = "dicom_id,study_id,subject_id,split\n" + "".join(
    f"{sample},{folder[15:]},{folder[5:13]},{SPLITS[sample]}\n"
    for sample, folder in FOLDERS.items()
)
LABELS = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,"
    "Fracture,Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,"
    "Pneumothorax,Support Devices\n"
    "10000032,50414267,,,,,,,,,1.0,,,,,\n"
    "10000764,57375967,-1.0,,0.0,,,,,,,1.0,,,,\n"
)
# The 15 columns of 2.1.0, as its description and those who read it name them.
BY_RADIOLOGIST = (
    "study_id,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Lesion,Airspace Opacity,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
    "Fracture,Support Devices\n"
    "55368167,,,-1.0,,1.0,,,,,0.0,,,,1.0\n"
    "55999999,1.0,,,,,,,,,,,,,\n"
)
RECORDS = "subject_id,study_id,dicom_id,path\n" + "".join(
    f"{folder[5:13]},{folder[15:]},{sample},files/{folder}/{sample}.dcm\n"
    for sample, folder in FOLDERS.items()
)

# The forms that reports have, after MIMIC-CXR's own description of them.
WITH_HEADINGS = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with ?pleural effusion  // ?pleural effusion

 COMPARISON:  ___

 FINDINGS:

 Large left pleural effusion is new.  There is no
 pneumothorax.

 IMPRESSION:

 Large left pleural effusion
"""
WITHOUT_HEADINGS = """\
                                 FINAL REPORT
 The lungs are clear.  No pneumothorax.
"""
WITH_ADDENDUM = """\
                                 FINAL ADDENDUM
 ADDENDUM:  Dr. ___ was called with a right pneumothorax at 9 p.m.

 IMPRESSION:  Right-sided.
 ______________________________________________________________________________
                                 WET READ: ___ ___ ___ 9:22 PM
 No acute process.
 ______________________________________________________________________________
                                 FINAL REPORT
 PORTABLE CHEST

 COMPARISON:  ___.

 FINDINGS:  Moderate cardiomegaly.
"""
REPORTS = {
    "p10/p10000032/s50414267": WITH_HEADINGS,
    "p10/p10000032/s53189527": WITHOUT_HEADINGS,
    "p10/p10000764/s57375967": WITH_ADDENDUM,  # and none for p19/p19999987/s55368167
}
SECTIONS = (
    "study,impression,findings,last_paragraph,comparison\n"
    's50414267,Large left pleural effusion,"Large left pleural effusion is new.  There is no\n'
    ' pneumothorax.",,___\n'
    "s53189527,,,The lungs are clear.  No pneumothorax.,\n"
    "s57375967,,Moderate cardiomegaly.,,___.\n"
)


def zipped(files: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return file.getvalue()


JPG = encoded(ramp(), "JPEG")
TABLES = {
    "mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(METADATA.encode()),
    "mimic-cxr-2.0.0-split.csv.gz": gzip.compress(SPLIT.encode()),
    "mimic-cxr-2.0.0-chexpert.csv.gz": gzip.compress(LABELS.encode()),
    # NegBio differs; CheXpert's labels are read where both are there.
    "mimic-cxr-2.0.0-negbio.csv.gz": gzip.compress(LABELS.replace("1.0", "0.0").encode()),
}
IMAGES = {f"files/{folder}/{sample}.jpg": JPG for sample, folder in FOLDERS.items()}
BESIDE = {f"files/{folder}.txt": text for folder, text in REPORTS.items()}
ZIP = {"mimic-cxr-reports.zip": zipped(BESIDE)}
LAYOUTS = {
    "reports as a zip": {**TABLES, **IMAGES, **ZIP},
    "reports beside the images": {**TABLES, **IMAGES, **BESIDE},
    "reports unpacked": {
        **TABLES,
        **IMAGES,
        **{f"mimic-cxr-reports/{name}": text for name, text in BESIDE.items()},
    },
    "reports in sections": {**TABLES, **IMAGES, "mimic_cxr_sectioned.csv": SECTIONS},
    "two downloads": {
        **{f"mimic-cxr-jpg/2.0.0/{name}": data for name, data in {**TABLES, **IMAGES}.items()},
        **{f"mimic-cxr/2.0.0/{name}": data for name, data in BESIDE.items()},
    },
}


def known(sample: Sample) -> tuple:
    """All of an image but where it lies."""
    return (
        sample.image_id,
        sample.study_id,
        sample.patient_id,
        sample.split,
        sample.view,
        sample.report,
    )


CLEAR = "The lungs are clear. No pneumothorax."
EFFUSION = (
    "Large left pleural effusion is new. There is no pneumothorax. Large left pleural effusion"
)
EXPECTED = [
    (ONE, "s50414267", "p10000032", "train", "PA", EFFUSION),
    (TWO, "s50414267", "p10000032", "train", "L", EFFUSION),
    (THREE, "s53189527", "p10000032", "train", "AP", CLEAR),
    (FOUR, "s57375967", "p10000764", "val", "unknown", "Moderate cardiomegaly."),
    (FIVE, "s55368167", "p19999987", "test", "L", None),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_jpg_release_gives_the_same_images(tmp_path: Path, layout: str):
    root = lay_out(tmp_path / "raw", LAYOUTS[layout])
    meta = build_data(read_mimic_cxr_jpg(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (5, 5)
    samples = read_manifest(tmp_path / "out")
    assert [known(sample) for sample in samples] == EXPECTED
    assert {sample.source for sample in samples} == {"mimic-cxr"}


def test_labels_are_those_of_chexpert_with_its_four_values_for_each_image_of_a_study(
    tmp_path: Path,
):
    samples, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path, LAYOUTS["reports as a zip"])))
    assert samples[0].labels == samples[1].labels == {"no finding": PRESENT}
    assert samples[3].labels == {
        "atelectasis": UNCERTAIN, "consolidation": ABSENT, "pleural effusion": PRESENT,
    }  # fmt: skip
    assert samples[3].source_labels == ("Atelectasis=-1", "Consolidation=0", "Pleural Effusion=1")
    assert samples[2].labels == samples[4].labels == {}  # not in the table
    assert (samples[0].findings, samples[0].impression) == (
        "Large left pleural effusion is new. There is no pneumothorax.",
        "Large left pleural effusion",
    )


@pytest.mark.parametrize("chexpert", [True, False], ids=["beside CheXpert", "alone"])
def test_what_a_radiologist_read_comes_before_what_a_program_read(tmp_path: Path, chexpert: bool):
    mined = LABELS + "19999987,55368167,1.0,,,,,,,,,,,,,\n"
    files = {
        **LAYOUTS["reports as a zip"],
        "mimic-cxr-2.0.0-chexpert.csv.gz": gzip.compress(mined.encode()),
        "mimic-cxr-2.1.0-test-set-labeled.csv": BY_RADIOLOGIST,
    }
    if not chexpert:
        del files["mimic-cxr-2.0.0-chexpert.csv.gz"], files["mimic-cxr-2.0.0-negbio.csv.gz"]
    samples, excluded = parted(read_mimic_cxr_jpg(lay_out(tmp_path, files)))
    assert not excluded
    five = samples[4]
    assert five.labels == {
        "cardiomegaly": UNCERTAIN, "lung opacity": PRESENT, "pneumothorax": ABSENT,
        "support devices": PRESENT,
    }  # fmt: skip
    assert set(five.source_labels) == {
        "Cardiomegaly=-1", "Airspace Opacity=1", "Pneumothorax=0", "Support Devices=1",
    }  # fmt: skip
    origins = [sample.label_origin for sample in samples]
    program = "report-program" if chexpert else None
    assert origins == [program, program, None, program, "report-reader"]


def test_negbio_is_read_where_chexpert_is_not(tmp_path: Path):
    files = dict(LAYOUTS["reports as a zip"])
    del files["mimic-cxr-2.0.0-chexpert.csv.gz"]
    samples, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path, files)))
    assert samples[0].labels == {"no finding": ABSENT}


def test_images_with_labels_alone_are_read_too(tmp_path: Path):
    samples, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path, {**TABLES, **IMAGES})))
    assert [sample.report for sample in samples] == [None] * 5
    assert samples[0].labels


@pytest.mark.parametrize(
    ("view", "expected"),
    [("XTABLE LATERAL", "L"), ("AP LLD", "unknown"), ("AP AXIAL", "unknown"), ("LAO", "unknown")],
)
def test_other_views_of_the_table(tmp_path: Path, view: str, expected: str):
    table = METADATA.replace(",PA,", f",{view},")
    files = {**TABLES, **IMAGES, "mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(table.encode())}
    assert parted(read_mimic_cxr_jpg(lay_out(tmp_path, files)))[0][0].view == expected


def test_an_image_without_a_split_or_with_a_broken_number_or_label_is_left_out(tmp_path: Path):
    files = {
        **IMAGES,
        "mimic-cxr-2.0.0-metadata.csv": METADATA.replace("10000032,53189527", "10000032,s1"),
        "mimic-cxr-2.0.0-split.csv": SPLIT.replace(FIVE, "another"),
        "mimic-cxr-2.0.0-chexpert.csv": LABELS.replace("-1.0", "2.0"),
    }
    samples, excluded = parted(read_mimic_cxr_jpg(lay_out(tmp_path, files)))
    assert [sample.image_id for sample in samples] == [ONE, TWO]
    assert [(out.row, out.image_id, out.detail) for out in excluded] == [
        (2, THREE, "subject_id is '10000032' and study_id 's1'; both must be numbers"),
        (3, FOUR, "Atelectasis is '2.0', not 1, 0, -1 or blank"),
        (4, FIVE, "the image is not in mimic-cxr-2.0.0-split.csv"),
    ]
    assert {out.reason for out in excluded} == {Reason.BAD_VALUE}


def test_an_image_that_the_disk_has_not_is_listed(tmp_path: Path):
    files = {name: data for name, data in LAYOUTS["reports as a zip"].items() if THREE not in name}
    root = lay_out(tmp_path / "raw", files)
    meta = build_data(read_mimic_cxr_jpg(root), root, tmp_path / "out", image_size=16)
    assert meta["excluded"] == {str(Reason.IMAGE_MISSING): 1} and meta["n_samples"] == 4


# Addenda.


def test_what_stands_above_the_last_line_of_underscores_is_left_out():
    assert parse_report(WITH_ADDENDUM).text == "Moderate cardiomegaly."
    assert parse_report(WITH_HEADINGS).impression == "Large left pleural effusion"
    only_above = f"FINAL REPORT\n Clear lungs.\n {'_' * 78}\n ___ 12:30\n"
    assert parse_report(only_above).text == "Clear lungs."


# DICOM.

HEADERS = {ONE: "PA", TWO: "LL", THREE: "AP", FOUR: "", FIVE: "LL"}
DICOMS = {
    f"files/{folder}/{sample}.dcm": dicom(ramp(), ViewPosition=HEADERS[sample], PatientSex="F")
    for sample, folder in FOLDERS.items()
}
STUDIES = "subject_id,study_id,path\n" + "".join(
    f"{folder[5:13]},{folder[15:]},files/{folder}.txt\n" for folder in REPORTS
)
LISTS = {
    "cxr-record-list.csv.gz": gzip.compress(RECORDS.encode()),
    "cxr-study-list.csv.gz": gzip.compress(STUDIES.encode()),
}


def test_dicom_images_get_their_view_from_the_header_and_no_split_without_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "mmclip")
    root = lay_out(tmp_path / "raw", {**LISTS, **DICOMS, **ZIP})
    samples, excluded = parted(read_mimic_cxr(root))
    assert not excluded
    assert [known(sample) for sample in samples] == [(*e[:3], None, *e[4:]) for e in EXPECTED]
    assert {sample.sex for sample in samples} == {"F"}
    assert "no mimic-cxr-2.0.0-split.csv: patients are dealt anew" in caplog.text
    assert build_data(samples, root, tmp_path / "out", image_size=16)["n_samples"] == 5


def test_dicom_images_take_splits_views_and_labels_of_the_jpg_release_where_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "mmclip")
    tables = {
        **TABLES,
        "mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(METADATA.replace(",PA,", ",,").encode()),
    }
    samples, _ = parted(read_mimic_cxr(lay_out(tmp_path, {**LISTS, **DICOMS, **BESIDE, **tables})))
    assert [sample.split for sample in samples] == ["train", "train", "train", "val", "test"]
    assert [sample.view for sample in samples] == ["unknown", "L", "AP", "unknown", "L"]
    assert samples[0].labels == {"no finding": PRESENT}
    assert not caplog.records


# What is missing.

META, SPLIT_NAME = "mimic-cxr-2.0.0-metadata.csv", "mimic-cxr-2.0.0-split.csv"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**IMAGES}, r"hold no mimic-cxr-2\.0\.0-metadata\.csv\(\.gz\); from https"),
        ({META: METADATA, **IMAGES}, r"hold no mimic-cxr-2\.0\.0-split\.csv"),
        ({META: METADATA, SPLIT_NAME: SPLIT}, r"hold no image .*\.jpg\); images come from https"),
        ({META: METADATA, SPLIT_NAME: SPLIT, **IMAGES}, "hold neither reports .* nor labels"),
        (
            {META: METADATA, SPLIT_NAME: SPLIT.replace("validate", "val"), **IMAGES, **ZIP},
            f"{FOUR}: the split 'val' is none of train, validate, test",
        ),
        (
            {META: METADATA, SPLIT_NAME: SPLIT, **IMAGES, "mimic-cxr-reports.zip": b"<html>"},
            "no whole archive .*; download it again",
        ),
        (
            {**TABLES, **IMAGES, "mimic-cxr-2.0.0-chexpert.csv": "study_id,Gout\n"},
            "has the columns Gout; download it again",
        ),
        (
            {**TABLES, **IMAGES, "mimic-cxr-2.1.0-test-set-labeled.csv": LABELS},
            "test-set-labeled.csv has the columns Lung Opacity; download it again",
        ),
    ],
)
def test_a_missing_or_damaged_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message) as caught:
        read_mimic_cxr_jpg(lay_out(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_tables_that_pandas_saved_again_keep_their_labels(tmp_path: Path):
    files = LAYOUTS["reports as a zip"]
    rows = LABELS.splitlines()
    again = [f",{rows[0]}", *(f"{n},{row}" for n, row in enumerate(rows[1:]))]
    text = "\n".join(again).replace("10000032,50414267", "10000032.0,50414267.0") + "\n"
    packed = {"mimic-cxr-2.0.0-chexpert.csv.gz": gzip.compress(text.encode())}
    one, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path / "a", files)))
    two, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path / "b", files | packed)))
    assert one == two and two[0].labels


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
def test_copies_in_another_format_are_found(tmp_path: Path, suffix: str):
    files = LAYOUTS["reports as a zip"]
    copies = {name.replace(".jpg", suffix): content for name, content in files.items()}
    samples, _ = parted(read_mimic_cxr_jpg(lay_out(tmp_path, copies)))
    assert all((tmp_path / sample.image).is_file() for sample in samples)
    assert samples[0].image.endswith(suffix)
