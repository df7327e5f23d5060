from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.files import Box
from mmclip.data.readers.vindr import read_vindr, read_vindr_boxes
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Reason, Sample
from tests.made_files import dicom, ramp
from tests.published import lay_out, parted, real_table, tally

IMAGE = dicom(ramp(), PatientAge="051Y", PatientSex="F")
KAGGLE = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
a,No finding,14,R1,,,,
b,Cardiomegaly,3,R9,691.0,1375.0,1653.0,1831.0
a,No finding,14,R2,,,,
a,No finding,14,R3,,,,
b,Cardiomegaly,3,R10,690,1375,1653,1831
b,Nodule/Mass,8,R10,1,2,4,8
b,Nodule/Mass,8,R10,10,20,40,80
b,Aortic enlargement,0,R8,1,2,4,8
"""
IMAGES = {"train/a.dicom": IMAGE, "train/b.dicom": IMAGE}
WIDE = "Cardiomegaly,Lung cavity,Pneumonia,Other diseases,No finding"
PHYSIONET = {
    "annotations/image_labels_train.csv": (
        f"image_id,rad_id,{WIDE}\na,R1,1.0,0,0,0,0\na,R2,1,0,1,0,0\na,R3,0,0,0,0,0\n"
        "b,R1,0,0,0,0,1\nb,R2,0,0,0,0,1\nb,R3,0,0,0,0,1\n"
    ),
    "annotations/image_labels_test.csv": f"image_id,{WIDE}\nc,0,1,0,0,0\n",
    "annotations/annotations_train.csv": (
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\na,R1,Cardiomegaly,1,2,3,5\n"
        "b,R1,No finding,,,,\n"
    ),
    "annotations/annotations_test.csv": (
        "image_id,class_name,x_min,y_min,x_max,y_max\nc,Lung cavity,10,20,30,50\n"
    ),
    **IMAGES,
    "test/c.dicom": IMAGE,
}


def test_kaggles_votes_become_labels_and_their_authors_are_kept(tmp_path: Path):
    root = lay_out(tmp_path / "raw", {"train.csv": KAGGLE, **IMAGES})
    meta = build_data(read_vindr(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (2, 2)
    one, two = read_manifest(tmp_path / "out")
    closed = sorted(load_words("vindr").closed)
    assert one.labels == {f: int(f == "no finding") for f in closed}
    votes = {"cardiomegaly": PRESENT, "nodule or mass": UNCERTAIN, "aortic enlargement": UNCERTAIN}
    assert two.labels == {f: votes.get(f, ABSENT) for f in closed}
    assert two.source_labels == (
        "R10: Cardiomegaly", "R10: Nodule/Mass", "R8: Aortic enlargement", "R9: Cardiomegaly",
    )  # fmt: skip
    assert (two.view, two.age_years, two.sex) == ("PA", 51.0, "F")
    assert two.label_origin == "image-reader"


def test_physionets_tables_have_more_labels_and_the_official_splits(tmp_path: Path):
    root = lay_out(tmp_path, {**PHYSIONET, "train.csv": KAGGLE})
    samples, excluded = parted(read_vindr(root))
    assert not excluded
    none = dict.fromkeys(
        ["cardiomegaly", "cavity", "no finding", "other disease", "pneumonia"], ABSENT
    )
    assert [(sample.image_id, sample.split, sample.labels) for sample in samples] == [
        ("a", "train", {**none, "cardiomegaly": PRESENT, "pneumonia": UNCERTAIN}),
        ("b", "train", {**none, "no finding": PRESENT}),
        ("c", "test", {**none, "cavity": PRESENT}),
    ]
    assert samples[2].source_labels == ("consensus: Lung cavity",)


def test_boxes_are_those_of_every_radiologist(tmp_path: Path):
    lay_out(tmp_path / "k", {"train.csv": KAGGLE})
    assert list(read_vindr_boxes(tmp_path / "k")) == [
        Box("b", "cardiomegaly", 691.0, 1375.0, 962.0, 456.0),
        Box("b", "cardiomegaly", 690.0, 1375.0, 963.0, 456.0),
        Box("b", "nodule or mass", 1.0, 2.0, 3.0, 6.0),
        Box("b", "nodule or mass", 10.0, 20.0, 30.0, 60.0),
        Box("b", "aortic enlargement", 1.0, 2.0, 3.0, 6.0),
    ]
    assert list(read_vindr_boxes(lay_out(tmp_path / "p", PHYSIONET))) == [
        Box("a", "cardiomegaly", 1.0, 2.0, 2.0, 3.0), Box("c", "cavity", 10.0, 20.0, 20.0, 30.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "image_id", "detail"),
    [
        ({"train.csv": KAGGLE + "c,Gout,1,R1,,,,\n", **IMAGES}, "c", "'Gout' is not among"),
        ({"train.csv": KAGGLE + "a,Mass\n", **IMAGES}, "a", "the row has 2 fields"),
        (
            {**IMAGES, "image_labels_train.csv": "image_id,rad_id,Edema\na,R1,2\n"},
            "a",
            "Edema is '2', not 0 or 1",
        ),
        (
            {**PHYSIONET, "annotations/image_labels_test.csv": f"image_id,{WIDE}\na,0,1,0,0,0\n"},
            "a",
            "in the tables of train and of test",
        ),
    ],
)
def test_an_image_that_cannot_be_read_is_left_out(
    tmp_path: Path, files: dict, image_id: str, detail: str
):
    (out,) = parted(read_vindr(lay_out(tmp_path, files)))[1]
    assert (out.image_id, out.reason) == (image_id, Reason.BAD_VALUE) and detail in out.detail


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (IMAGES, r"no train\.csv or image_labels_train\.csv; it comes from https"),
        ({"train.csv": KAGGLE}, r"no image .*; images come from https"),
        ({"image_labels_train.csv": "image_id,Gout\na,1\n", **IMAGES}, "the columns 'Gout'"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read_vindr(lay_out(tmp_path, files))


# The real table.


def test_every_row_of_the_real_table_is_in_an_image(tmp_path: Path):
    table = real_table("vinbigdata-train.csv.gz")
    name = "50a418190bc3fb1ef1633bf9678929b3"
    lay_out(tmp_path, {"train.csv.gz": table, f"train/{name}.dicom": IMAGE})
    samples, excluded = parted(read_vindr(tmp_path))
    assert (len(samples), len(excluded)) == (15_000, 0)
    found = tally(samples)
    assert found["no finding", PRESENT] * 3 == 31_818  # rows: three radiologists each
    assert found["no finding", UNCERTAIN] == 0
    assert found.total() == 15_000 * 15
    for sample in samples:
        assert isinstance(sample, Sample)
        assert len({said.partition(":")[0] for said in sample.source_labels}) <= 3
    boxes = list(read_vindr_boxes(tmp_path))
    assert len(boxes) + 31_818 == 67_914  # the rows
    assert Counter(box.finding for box in boxes)["cardiomegaly"] == 5_427
    assert all(box.width_px > 0 and box.height_px > 0 for box in boxes)
    marked = {(box.image_id, box.finding) for box in boxes}
    given = {
        (sample.image_id, f) for sample in samples for f, label in sample.labels.items() if label
    }
    assert given - marked == {
        (sample.image_id, "no finding") for sample in samples if sample.labels["no finding"]
    }
    assert marked <= given
