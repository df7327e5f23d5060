from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.files import Box
from mmclip.data.readers.rsna import read_rsna, read_rsna_boxes
from mmclip.data.sample import ABSENT, PRESENT, Reason, Sample
from tests.made_files import NAME, NUMBER, dicom, encoded, ramp
from tests.published import lay_out, parted, real_table, tally

LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
IMAGE = dicom(ramp(), ViewPosition="AP", PatientAge="063Y", PatientSex="F")
FILES = {
    LABELS: (
        "patientId,x,y,width,height,Target\na,,,,,0\nb,264.0,152.0,213.0,379.0,1\n"
        "b,562.0,152.0,256.0,453.0,1\nc,,,,,0\n"
    ),
    CLASSES: (
        "patientId,class\na,No Lung Opacity / Not Normal\nb,Lung Opacity\nb,Lung Opacity\n"
        "c,Normal\n"
    ),
    "stage_2_train_images/a.dcm": IMAGE,
    "stage_2_train_images/b.dcm": IMAGE,
    "stage_2_train_images/c.dcm": IMAGE,
}


def test_rows_of_one_image_are_one_image_with_all_its_boxes(tmp_path: Path):
    root = lay_out(tmp_path / "raw", FILES)
    meta = build_data(read_rsna(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"], meta["n_patients"]) == (3, 3, 3)
    assert [
        (sample.image_id, sample.labels, sample.source_labels)
        for sample in read_manifest(tmp_path / "out")
    ] == [
        ("a", {"no finding": 0, "pneumonia": 0}, ("No Lung Opacity / Not Normal",)),
        ("b", {"lung opacity": 1, "no finding": 0, "pneumonia": 1}, ("Lung Opacity",)),
        ("c", {"lung opacity": 0, "no finding": 1, "pneumonia": 0}, ("Normal",)),
    ]
    assert list(read_rsna_boxes(root)) == [
        Box("b", "pneumonia", 264.0, 152.0, 213.0, 379.0),
        Box("b", "pneumonia", 562.0, 152.0, 256.0, 453.0),
    ]


def test_view_age_and_sex_come_from_the_header_and_nothing_else_does(tmp_path: Path):
    samples, _ = parted(read_rsna(lay_out(tmp_path, FILES)))
    assert {(sample.view, sample.age_years, sample.sex) for sample in samples} == {
        ("AP", 63.0, "F")
    }
    assert NAME not in repr(samples) and NUMBER not in repr(samples)


@pytest.mark.parametrize(
    ("age", "years"), [("000Y", None), ("058Y", 58.0), ("012M", 1.0), ("411Y", None), ("", None)]
)
def test_an_age_of_a_header_that_is_none_is_unknown(tmp_path: Path, age: str, years: float | None):
    sample = dicom(ramp(), ViewPosition="AP", PatientAge=age, PatientSex="F")
    samples, _ = parted(
        read_rsna(lay_out(tmp_path, {**FILES, "stage_2_train_images/a.dcm": sample}))
    )
    assert samples[0].age_years == years


def test_without_classes_an_image_without_a_box_is_only_known_to_have_no_pneumonia(tmp_path: Path):
    files = {name: content for name, content in FILES.items() if name != CLASSES}
    samples, _ = parted(read_rsna(lay_out(tmp_path, files)))
    assert [sample.labels for sample in samples] == [
        {"pneumonia": 0}, {"lung opacity": 1, "no finding": 0, "pneumonia": 1}, {"pneumonia": 0},
    ]  # fmt: skip


def test_images_that_were_converted_are_found_by_name(tmp_path: Path):
    files = {LABELS: FILES[LABELS], "png/a.png": encoded(ramp())}
    first = next(read_rsna(lay_out(tmp_path, files)))
    assert isinstance(first, Sample)
    assert (first.image, first.view) == ("png/a.png", "unknown")


@pytest.mark.parametrize(
    ("name", "old", "new", "detail"),
    [
        (CLASSES, "a,No Lung Opacity / Not Normal", "a,Lung Opacity", "Target=0, but its class is"),
        (CLASSES, "c,Normal", "c,Lovely", "'Lovely' is not among the words of rsna"),
        (LABELS, "a,,,,,0", "a,,,,,1", "Target=1, but its class is"),
        (LABELS, "b,264.0,", "b,,", "Target=1 without a whole box"),
        (LABELS, "b,264.0,", "b,", "the row has 5 fields, the header 6"),
        (LABELS, "a,,,,,0", "a,,,,,maybe", "Target is 'maybe', not 0 or 1"),
    ],
)
def test_an_image_whose_rows_do_not_agree_is_left_out(
    tmp_path: Path, name: str, old: str, new: str, detail: str
):
    assert old in FILES[name]
    _, (out,) = parted(
        read_rsna(lay_out(tmp_path, {**FILES, name: FILES[name].replace(old, new, 1)}))
    )
    assert out.reason == Reason.BAD_VALUE and detail in out.detail


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.dcm": IMAGE}, r"no stage_2_train_labels\.csv; it comes from https"),
        ({LABELS: FILES[LABELS]}, r"no image .*; images come from https"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read_rsna(lay_out(tmp_path, files))


# The real table.


def test_every_row_of_the_real_table_is_in_an_image(tmp_path: Path):
    table = real_table("kaggle_stage_2_train_labels.csv.zip")
    name = "0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm"
    lay_out(tmp_path, {f"{LABELS}.zip": table, f"stage_2_train_images/{name}": IMAGE})
    samples, excluded = parted(read_rsna(tmp_path))
    assert (len(samples), len(excluded)) == (26_684, 0)
    found = tally(samples)
    assert (found["pneumonia", PRESENT], found["pneumonia", ABSENT]) == (6_012, 20_672)
    boxes = list(read_rsna_boxes(tmp_path))
    assert len(boxes) + found["pneumonia", ABSENT] == 30_227  # the rows
    assert Counter(Counter(box.image_id for box in boxes).values()) == {
        1: 2614, 2: 3266, 3: 119, 4: 13,
    }  # fmt: skip
    assert all(
        box.left_px + box.width_px <= 1024 and box.top_px + box.height_px <= 1024 for box in boxes
    )
    assert samples[0].view == "AP" and samples[1].view == "unknown"


def test_a_table_that_was_saved_again_as_numbers_says_the_same(tmp_path: Path):
    again = {name: text.replace(",1\n", ",1.0\n").replace(",0\n", ",0.0\n")
             if isinstance(text, str) and "Target" in text else text
             for name, text in FILES.items()}  # fmt: skip
    assert again != FILES
    one, two = (list(read_rsna(lay_out(tmp_path / n, f))) for n, f in (("a", FILES), ("b", again)))
    assert one == two
