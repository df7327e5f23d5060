from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.chestxray14 import read_chestxray14, read_chestxray14_boxes
from mmclip.data.readers.files import Box
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import ABSENT, PRESENT, Reason
from tests.made_files import encoded, ramp
from tests.published import lay_out, parted, real_table, tally

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NEW = f"""{HEADER}
00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143
00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143
00000002_000.png,Pleural_Thickening,0,2,414,F,PA,2500,2048,0.168,0.168
00000003_000.png,Gout,0,3,30,F,PA,2500,2048,0.168,0.168
00000004_000.png,Mass,0,4,30,F,PA,2500,2048,0.168
"""
OLD = f"{HEADER},\n00000009_000.png,Hernia,0,9,013M,F,PA,2500,2048,0.168,0.168,\n"
IMAGE = encoded(ramp())
IMAGES = {
    "images_001/images/00000001_000.png": IMAGE,
    "images_001/images/00000001_001.png": IMAGE,
    "images_002/images/00000002_000.png": IMAGE,
}
TABLE = "Data_Entry_2017_v2020.csv"


def test_the_table_the_images_and_the_labels_come_together(tmp_path: Path):
    root = lay_out(tmp_path / "raw", {TABLE: NEW, **IMAGES})
    meta = build_data(read_chestxray14(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (5, 3)
    assert meta["excluded"] == {str(Reason.BAD_VALUE): 2}
    one, two, three = read_manifest(tmp_path / "out")
    assert one.source_labels == ("Cardiomegaly", "Effusion")
    assert {f for f, label in one.labels.items() if label == PRESENT} == {
        "cardiomegaly", "pleural effusion",
    }  # fmt: skip
    assert set(one.labels) == set(load_words("chestxray14").closed)
    assert {f for f, label in two.labels.items() if label == PRESENT} == {"no finding"}
    assert (one.patient_id, one.view, one.age_years, one.sex) == ("1", "PA", 57.0, "M")
    assert (two.patient_id, two.view, two.label_origin) == ("1", "AP", "report-program")
    assert (three.age_years, three.sex) == (None, "F")
    assert three.image == "images_002/images/00000002_000.png"


def test_a_row_with_an_unknown_word_or_a_missing_field_says_so(tmp_path: Path):
    _, excluded = parted(read_chestxray14(lay_out(tmp_path, {TABLE: NEW, **IMAGES})))
    assert [(e.row, e.image_id) for e in excluded] == [
        (3, "00000003_000.png"), (4, "00000004_000.png"),
    ]  # fmt: skip
    assert "'Gout' is not among the words of chestxray14" in excluded[0].detail
    assert excluded[1].detail == "the row has 10 fields, the header 11"


def test_the_older_table_serves_where_the_newer_is_not_there(tmp_path: Path):
    lay_out(tmp_path, {"Data_Entry_2017.csv": OLD, **IMAGES})
    (sample,), _ = parted(read_chestxray14(tmp_path))
    assert sample.age_years == pytest.approx(13 / 12)
    assert sample.labels["hernia"] == PRESENT and sample.split is None
    lay_out(tmp_path, {TABLE: NEW})
    assert len(list(read_chestxray14(tmp_path))) == 5


def test_the_official_lists_give_the_splits_and_an_image_in_none_is_left_out(tmp_path: Path):
    lists = {
        "train_val_list.txt": "00000001_000.png\n00000001_001.png\n",
        "test_list.txt": "00000003_000.png",
    }
    samples, excluded = parted(read_chestxray14(lay_out(tmp_path, {TABLE: NEW, **IMAGES, **lists})))
    assert [sample.split for sample in samples] == ["train", "train"]
    assert excluded[0].image_id == "00000002_000.png"
    assert excluded[0].detail == "the image is neither in train_val_list.txt nor in test_list.txt"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (IMAGES, r"no Data_Entry_2017_v2020\.csv or Data_Entry_2017\.csv; it comes from https"),
        ({TABLE: NEW}, r"no image \(\*\.jpg, \*\.png\); images come from https.*images_001"),
        ({TABLE: NEW, **IMAGES, "test_list.txt": ""}, r"test_list\.txt but no train_val_list\.txt"),
        (
            {TABLE: NEW, **IMAGES, "test_list.txt": "a", "train_val_list.txt": "a"},
            "a is in both lists",
        ),
        ({TABLE: "Image Index\n", **IMAGES}, "has no column 'Finding Labels'"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict[str, str], message: str):
    with pytest.raises(SourceError, match=message):
        list(read_chestxray14(lay_out(tmp_path, files)))


def test_boxes_are_read_from_the_odd_table(tmp_path: Path):
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    lay_out(
        tmp_path,
        {"BBox_List_2017.csv": header + "a.png,Infiltrate,1.5,2,3,4,,,\nb.png,Mass,1,2,3,4\n"},
    )
    assert list(read_chestxray14_boxes(tmp_path)) == [
        Box("a.png", "infiltration", 1.5, 2.0, 3.0, 4.0), Box("b.png", "mass", 1.0, 2.0, 3.0, 4.0)
    ]  # fmt: skip
    (tmp_path / "BBox_List_2017.csv").write_text(header + "a.png,Gout,1.5,2,3,4,,,\n")
    with pytest.raises(SourceError, match=r"a\.png: the label 'Gout'"):
        list(read_chestxray14_boxes(tmp_path))


# The real tables.

COUNTED = {
    "atelectasis": 11559, "cardiomegaly": 2776, "consolidation": 4667, "edema": 2303,
    "emphysema": 2516, "fibrosis": 1686, "hernia": 227, "infiltration": 19894, "mass": 5782,
    "no finding": 60361, "nodule": 6331, "pleural effusion": 13317, "pleural thickening": 3385,
    "pneumonia": 1431, "pneumothorax": 5302,
}  # fmt: skip
"""Images a finding, counted by another program (csv and Counter alone)."""


def test_every_row_of_the_real_table_is_kept_with_the_published_counts(tmp_path: Path):
    table = real_table(f"{TABLE}.gz")
    samples, excluded = parted(
        read_chestxray14(lay_out(tmp_path, {f"{TABLE}.gz": table, **IMAGES}))
    )
    assert (len(samples), len(excluded)) == (112_120, 0)
    assert len({sample.patient_id for sample in samples}) == 30_805
    found = tally(samples)
    assert {f: found[f, PRESENT] for f in COUNTED} == COUNTED
    assert {f: found[f, ABSENT] for f in COUNTED} == {f: 112_120 - n for f, n in COUNTED.items()}
    assert found.total() == 112_120 * 15
    assert Counter(sample.view for sample in samples) == {"PA": 67_310, "AP": 44_810}
    assert Counter(sample.sex for sample in samples) == {"M": 63_340, "F": 48_780}
    ages = [sample.age_years for sample in samples]
    assert ages.count(None) == 14  # the table says 0
    assert all(0 < age <= 95 for age in ages if age is not None)
    assert {sample.image for sample in samples} >= set(IMAGES)
    assert sum(len(sample.source_labels) for sample in samples) == sum(COUNTED.values())


def test_every_real_box_is_read(tmp_path: Path):
    name = "BBox_List_2017.csv.gz"
    boxes = list(read_chestxray14_boxes(lay_out(tmp_path, {name: real_table(name)})))
    assert (len(boxes), len({box.image_id for box in boxes})) == (984, 880)
    assert Counter(box.finding for box in boxes) == {
        "atelectasis": 180, "pleural effusion": 153, "cardiomegaly": 146, "infiltration": 123,
        "pneumonia": 120, "pneumothorax": 98, "mass": 85, "nodule": 79,
    }  # fmt: skip
    assert all(box.left_px + box.width_px <= 1024.01 for box in boxes)
    assert all(box.top_px + box.height_px <= 1024.01 for box in boxes)


def test_table_and_lists_in_a_folder_of_the_root_are_found(tmp_path: Path):
    lists = {"meta/train_val_list.txt": "00000001_000.png\n00000002_000.png\n",
             "lists/test_list.txt": "00000001_001.png\n"}  # fmt: skip
    samples, _ = parted(
        read_chestxray14(lay_out(tmp_path, {f"meta/{TABLE}": NEW, **lists, **IMAGES}))
    )
    assert [sample.split for sample in samples] == ["train", "test", "train"]
    (tmp_path / "lists" / "test_list.txt").unlink()
    with pytest.raises(SourceError, match=r"holds train_val_list.txt but no test_list.txt"):
        read_chestxray14(tmp_path)
