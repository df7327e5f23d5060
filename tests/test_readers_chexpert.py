import json
from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.chexpert import read_chexpert, read_chexpert_plus
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Reason, Sample
from tests.made_files import dicom, encoded, ramp
from tests.published import lay_out, parted, real_table, tally

FINDINGS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
    "Support Devices"
)
HEADER = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FINDINGS}\n"
IMAGE = encoded(ramp(), "JPEG")


def train(prefix: str) -> str:
    """A table whose rows have what the real one has: all four values, both sides, odd facts."""
    return (
        HEADER
        + f"{prefix}patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,"
        + "1\n"
        + f"{prefix}patient00002/study2/view1_frontal.jpg,Male,0,Frontal,LL,,,-1.0,,,,,,,,,,,\n"
        + f"{prefix}patient00002/study2/view2_lateral.jpg,Unknown,90,Lateral,,,,-1.0,,,,,,,,,,,\n"
        + f"{prefix}patient00003/study1/view1_frontal.jpg,Male,40,Frontal,PA,,,2,,,,,,,,,,,\n"
    )


def valid(prefix: str) -> str:
    values = ",".join(["0.0"] * 13 + ["1.0"])
    return HEADER + f"{prefix}patient64541/study1/view1_frontal.jpg,Male,73,Frontal,PA,{values}\n"


VIEWS = (
    "patient00001/study1/view1_frontal.jpg",
    "patient00002/study2/view1_frontal.jpg",
    "patient00002/study2/view2_lateral.jpg",
)
LAST = "patient64541/study1/view1_frontal.jpg"

LAYOUTS = {
    "small, in its folder": {
        "train.csv": train("CheXpert-v1.0-small/train/"),
        "valid.csv": valid("CheXpert-v1.0-small/valid/"),
        **dict.fromkeys([f"train/{view}" for view in VIEWS], IMAGE),
        f"valid/{LAST}": IMAGE,
    },
    "small, above its folder": {
        "CheXpert-v1.0-small/train.csv": train("CheXpert-v1.0-small/train/"),
        "CheXpert-v1.0-small/valid.csv": valid("CheXpert-v1.0-small/valid/"),
        **dict.fromkeys([f"CheXpert-v1.0-small/train/{view}" for view in VIEWS], IMAGE),
        f"CheXpert-v1.0-small/valid/{LAST}": IMAGE,
    },
    "the four archives": {
        "CheXpert-v1.0 batch 1 (validate & csv)/train.csv": train("CheXpert-v1.0/train/"),
        "CheXpert-v1.0 batch 1 (validate & csv)/valid.csv": valid("CheXpert-v1.0/valid/"),
        f"CheXpert-v1.0 batch 1 (validate & csv)/valid/{LAST}": IMAGE,
        f"CheXpert-v1.0 batch 2 (train 1)/{VIEWS[0]}": IMAGE,
        f"CheXpert-v1.0 batch 3 (train 2)/{VIEWS[1]}": IMAGE,
        f"CheXpert-v1.0 batch 3 (train 2)/{VIEWS[2]}": IMAGE,
    },
}


def known(sample: Sample) -> tuple:
    """All of an image but where it lies."""
    return (
        sample.image_id, sample.study_id, sample.patient_id, sample.split, sample.view,
        sample.age_years, sample.sex, sample.labels, sample.source_labels,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(tmp_path: Path, layout: str):
    root = lay_out(tmp_path / "raw", LAYOUTS[layout])
    meta = build_data(read_chexpert(root), root, tmp_path / "out", image_size=16)
    assert meta["excluded"] == {str(Reason.BAD_VALUE): 1}
    assert [known(sample) for sample in read_manifest(tmp_path / "out")] == [
        (
            "patient00001/study1/view1_frontal", "patient00001/study1", "patient00001", "train",
            "AP", 68.0, "F", {"no finding": 1, "pneumothorax": 0, "support devices": 1},
            ("No Finding=1", "Pneumothorax=0", "Support Devices=1"),
        ),
        (
            "patient00002/study2/view1_frontal", "patient00002/study2", "patient00002", "train",
            "unknown", None, "M", {"cardiomegaly": UNCERTAIN}, ("Cardiomegaly=-1",),
        ),
        (
            "patient00002/study2/view2_lateral", "patient00002/study2", "patient00002", "train",
            "L", 90.0, None, {"cardiomegaly": UNCERTAIN}, ("Cardiomegaly=-1",),
        ),
        (
            "patient64541/study1/view1_frontal", "patient64541/study1", "patient64541", "val",
            "PA", 73.0, "M",
            {name.lower(): int(name == "Support Devices") for name in FINDINGS.split(",")},
            tuple(f"{name}={int(name == 'Support Devices')}" for name in FINDINGS.split(",")),
        ),
    ]  # fmt: skip


def test_train_labels_are_a_programs_and_the_others_those_of_people_who_read_the_image(
    tmp_path: Path,
):
    samples, _ = parted(read_chexpert(lay_out(tmp_path, LAYOUTS["small, in its folder"])))
    known = [(sample.split, sample.label_origin) for sample in samples]
    assert set(known) == {("train", "report-program"), ("val", "image-reader")}


def test_a_value_that_is_none_of_the_four_is_left_out_with_its_column(tmp_path: Path):
    _, (out,) = parted(read_chexpert(lay_out(tmp_path, LAYOUTS["small, in its folder"])))
    assert (out.row, out.image_id) == (3, "patient00003/study1/view1_frontal")
    assert out.detail == "Cardiomegaly is '2', not 1, 0, -1 or blank"


# The labels of the test images, as they are published.

TEST_IMAGES = {
    "test/patient64741/study1/view1_frontal.jpg": IMAGE,
    "test/patient64741/study1/view2_lateral.jpg": IMAGE,
    "test/patient64742/study1/view1_frontal.jpg": IMAGE,
}
ZEROS = ",".join(["0"] * 13)


@pytest.mark.parametrize("name", ["test_labels.csv", "CheXpert/test_labels.csv", "test.csv"])
def test_test_images_come_with_labels_alone(tmp_path: Path, name: str):
    rows = "".join(f"{path},{ZEROS},1.0\n" for path in TEST_IMAGES)
    lay_out(tmp_path, {name: f"Path,{FINDINGS}\n{rows}", **TEST_IMAGES})
    samples, excluded = parted(read_chexpert(tmp_path))
    assert [sample.image for sample in samples] == list(TEST_IMAGES) and not excluded
    assert [sample.view for sample in samples] == ["unknown", "L", "unknown"]
    assert {(sample.split, sample.label_origin) for sample in samples} == {("test", "image-reader")}
    assert all(len(sample.labels) == 14 and sample.age_years is None for sample in samples)


def test_labels_of_a_study_go_to_each_of_its_images(tmp_path: Path):
    lines = [f"CheXpert-v1.0/test/patient6474{n}/study1,{ZEROS},1" for n in (1, 2, 3)]
    table = f"Study,{FINDINGS}\n" + "\n".join(lines)
    root = lay_out(tmp_path / "raw", {"groundtruth.csv": table, **TEST_IMAGES})
    meta = build_data(read_chexpert(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_samples"], meta["n_studies"]) == (3, 2)
    assert meta["excluded"] == {str(Reason.IMAGE_MISSING): 1}  # patient64743
    assert all(sample.labels["support devices"] == 1 for sample in read_manifest(tmp_path / "out"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (TEST_IMAGES, r"none of train\.csv, valid\.csv and test_labels\.csv; .*https.*https"),
        (
            {"train.csv": train("")},
            r"no image \(patient00001/study1/\.\.\.\); images come from https",
        ),
        ({"train.csv": "Path,Gout\n", **TEST_IMAGES}, "the columns 'Gout', which CheXpert has not"),
        ({"train.csv": "Path,Sex\n", **TEST_IMAGES}, "no label column"),
        ({"train.csv": "Sex,Edema\n", **TEST_IMAGES}, "no column 'Path'"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        list(read_chexpert(lay_out(tmp_path, files)))


# Reports.

PLUS = {
    "df_chexpert_plus_240401.csv": (
        "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,report,section_findings,"
        "section_impression,age,sex,split\n"
        'train/patient00001/study1/view1_frontal.jpg,,Frontal,AP,patient00001,"NARRATIVE: x",'
        '"Lungs are clear.","1. No acute disease.",68,Female,train\n'
        'train/patient00002/study2/view2_lateral.jpg,,Lateral,,patient00002,"IMPRESSION: Mass.",'
        ",,30,Male,train\n"
        "valid/patient64541/study1/view1_frontal.jpg,,Frontal,PA,patient64541,,,,73,Male,valid\n"
        "train/patient00003/study1/view1_frontal.jpg,,Frontal,PA,patient00003,,,,73,Male,dev\n"
    ),
    "PNG/PNG/train/patient00001/study1/view1_frontal.png": encoded(ramp()),
    "DICOM/train/patient00002/study2/view2_lateral.dcm": dicom(ramp()),
    f"CheXpert-v1.0/valid/{LAST}": IMAGE,
}


def test_plus_images_have_their_reports_whatever_kind_of_file_they_are(tmp_path: Path):
    root = lay_out(tmp_path / "raw", PLUS)
    meta = build_data(read_chexpert_plus(root), root, tmp_path / "out", image_size=16)
    assert meta["excluded"] == {str(Reason.BAD_VALUE): 1}
    one, two, three = read_manifest(tmp_path / "out")
    assert (one.findings, one.impression) == ("Lungs are clear.", "No acute disease.")
    assert (two.report, two.view, two.split) == ("Mass.", "L", "train")
    assert (three.report, three.split, three.age_years) == (None, "val", 73.0)
    assert [sample.labels for sample in (one, two, three)] == [{}, {}, {}]


def test_plus_labels_come_from_the_impressions_where_they_are_there(tmp_path: Path):
    path = "train/patient00001/study1/view1_frontal.jpg"
    line = {"path_to_image": path, "Edema": -1.0, "Fracture": None, "No Finding": 1.0}
    name = "chexbert_labels/impression_fixed.json"
    lay_out(tmp_path, {**PLUS, name: json.dumps(line) + "\n"})
    sample = next(read_chexpert_plus(tmp_path))
    assert isinstance(sample, Sample)
    assert sample.labels == {"edema": UNCERTAIN, "no finding": PRESENT}
    for wrong in ({**line, "Edema": 3}, {**line, "Gout": 1}, {"Edema": 1}, []):
        (tmp_path / name).write_text(json.dumps(wrong))
        with pytest.raises(SourceError, match=r"impression_fixed\.json, line 1: .*download"):
            read_chexpert_plus(tmp_path)


def test_plus_without_its_table_is_one_line(tmp_path: Path):
    with pytest.raises(SourceError, match=r"no df_chexpert_plus_240401\.csv; it comes from https"):
        read_chexpert_plus(lay_out(tmp_path, {f"train/{LAST}": IMAGE}))


# The real table.

PUBLISHED = {  # present, uncertain, absent
    "no finding": (22381, 0, 0),
    "enlarged cardiomediastinum": (10798, 12403, 21638),
    "cardiomegaly": (27000, 8087, 11116),
    "lung opacity": (105581, 5598, 6599),
    "lung lesion": (9186, 1488, 1270),
    "edema": (52246, 12984, 20726),
    "consolidation": (14783, 27742, 28097),
    "pneumonia": (6039, 18770, 2799),
    "atelectasis": (33376, 33739, 1328),
    "pneumothorax": (19448, 3145, 56341),
    "pleural effusion": (86187, 11628, 35396),
    "pleural other": (3523, 2653, 316),
    "fracture": (9040, 642, 2512),
    "support devices": (116001, 1079, 6137),
}
"""Values a column of train.csv, counted by another program (csv and Counter alone)."""


def test_every_row_of_the_real_table_is_kept_and_the_four_values_stay_apart(tmp_path: Path):
    table = real_table("chexpert_train.csv.gz")
    lay_out(tmp_path, {"train.csv.gz": table, f"train/{VIEWS[0]}": IMAGE})
    samples, excluded = parted(read_chexpert(tmp_path))
    assert (len(samples), len(excluded)) == (223_414, 0)
    assert len({sample.patient_id for sample in samples}) == 64_540
    assert len({sample.study_id for sample in samples}) == 187_641
    found = tally(samples)
    assert {
        f: (found[f, PRESENT], found[f, UNCERTAIN], found[f, ABSENT]) for f in PUBLISHED
    } == PUBLISHED
    assert found.total() == sum(map(sum, PUBLISHED.values()))
    views = Counter(sample.view for sample in samples)
    assert views == {"AP": 161_590, "PA": 29_420, "L": 32_387, "unknown": 17}
    assert Counter(sample.sex for sample in samples) == {"M": 132_636, "F": 90_777, None: 1}
    assert sum(sample.age_years is None for sample in samples) == 3
    assert samples[0].image == f"train/{VIEWS[0]}"
    assert len({sample.image_id for sample in samples}) == len(samples)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".dcm"])
def test_a_copy_in_another_format_is_found(tmp_path: Path, suffix: str):
    files = {f"train/{view.replace('.jpg', suffix)}": IMAGE for view in VIEWS}
    root = lay_out(tmp_path, {"train.csv": train("CheXpert-v1.0/train/"), **files})
    samples, _ = parted(read_chexpert(root))
    assert [sample.image for sample in samples] == list(files)


def test_a_table_that_pandas_saved_again_on_windows_is_the_same_table(tmp_path: Path):
    files = {f"train/{view}": IMAGE for view in VIEWS}
    published = lay_out(tmp_path / "a", {"train.csv": train("CheXpert-v1.0/train/"), **files})
    lines = train("CheXpert-v1.0\\train\\").replace("/", "\\").splitlines()
    lines = [line.replace("Frontal\\Lateral", "Frontal/Lateral").replace("AP\\PA", "AP/PA")
             for line in lines]  # fmt: skip
    for name in ("", "Unnamed: 0"):
        again = "\n".join(f"{n},{line}" for n, line in zip((name, 0, 1, 2, 3), lines, strict=True))
        again = again.replace(",,,", ",nan,,").replace("Frontal,AP,1.0,,", "Frontal,AP,1.0,NaN,")
        root = lay_out(tmp_path / f"b{len(name)}", {"train.csv": again, **files})
        assert parted(read_chexpert(root))[0] == parted(read_chexpert(published))[0]
