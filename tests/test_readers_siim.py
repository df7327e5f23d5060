from pathlib import Path

import numpy as np
import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.siim import decode_mask, read_siim, read_siim_masks
from mmclip.data.sample import ABSENT, PRESENT, Reason
from tests.made_files import dicom, encoded, ramp
from tests.published import lay_out, parted, real_table, tally

ROWS = "1.2.826.1,-1\n1.2.826.2,2 3 1020 2\n1.2.826.3, -1\n1.2.826.2,5000 1\n"
STAGE_1 = f"ImageId, EncodedPixels\n{ROWS}"
STAGE_2 = f"ImageId,EncodedPixels\n{ROWS}"
IMAGE = dicom(ramp(), ViewPosition="PA", PatientAge="028Y", PatientSex="M")
LAYOUTS = {
    "stage 1": {
        "train-rle.csv": STAGE_1,
        **{f"dicom-images-train/1.9.{i}/1.8.{i}/1.2.826.{i}.dcm": IMAGE for i in (1, 2, 3, 4)},
    },
    "stage 2": {
        "stage_2_train.csv": STAGE_2,
        "train-rle.csv": "ImageId, EncodedPixels\n1.2.826.4,-1\n",
        **{f"stage_2_images/1.2.826.{i}.dcm": IMAGE for i in (1, 2, 3)},
    },
    "a re-upload": {
        "siim/train-rle.csv": STAGE_1,
        **{f"siim/dicom-images-train/1.9.{i}/1.8/1.2.826.{i}.dcm": IMAGE for i in (1, 2, 3)},
    },
    "a re-upload as PNG": {
        "train-rle.csv": STAGE_1,
        **{f"train_png/1.2.826.{i}.png": encoded(ramp()) for i in (1, 2, 3)},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_one_image_whatever_its_masks(tmp_path: Path, layout: str):
    root = lay_out(tmp_path / "raw", LAYOUTS[layout])
    meta = build_data(read_siim(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (3, 3)
    samples = read_manifest(tmp_path / "out")
    assert [(sample.image_id, sample.labels, sample.source_labels) for sample in samples] == [
        ("1.2.826.1", {"pneumothorax": ABSENT}, ("-1",)),
        ("1.2.826.2", {"pneumothorax": PRESENT}, ("mask", "mask")),
        ("1.2.826.3", {"pneumothorax": ABSENT}, ("-1",)),
    ]
    is_dicom = "PNG" not in layout
    facts = ("PA", 28.0, "M") if is_dicom else ("unknown", None, None)
    assert {(sample.view, sample.age_years, sample.sex) for sample in samples} == {facts}


def test_masks_of_one_image_are_joined(tmp_path: Path):
    ((image_id, is_there),) = read_siim_masks(lay_out(tmp_path, LAYOUTS["stage 1"]))
    assert image_id == "1.2.826.2"
    # Pixels 2, 3, 4 of the first column; 1,020 on, 1025 and 1026, so 1 and 2 of the second;
    # 5000 of the image, so 904 of the fifth.
    assert sorted(zip(*np.nonzero(is_there.T), strict=True)) == [
        (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (4, 904),
    ]  # fmt: skip


def test_a_mask_is_decoded_as_the_slow_loop_does():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels = rng.random((8, 8)) < 0.4
        flat, code, at = pixels.T.ravel(), [], 0
        while flat[at:].any():
            begin = at + int(np.argmax(flat[at:]))
            end = begin
            while end < 64 and flat[end]:
                end += 1
            code += [begin - at, end - begin]
            at = end
        assert (decode_mask(" ".join(map(str, code)), 8) == pixels).all()


@pytest.mark.parametrize("code", ["1 2 3", "a 1", "-1 2", "0 65", "60 5", " "])
def test_a_code_that_is_no_mask_is_refused(code: str):
    with pytest.raises(ValueError, match="the mask"):
        decode_mask(code, 8)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ("1.2.826.1,1 2 3", "no list of runs"),
        ("1.2.826.1,1048576 1", "within 1048576 pixels"),
        ("1.2.826.1,5 1\n1.2.826.1,-1", "contradict one another on pneumothorax"),
    ],
)
def test_an_image_with_a_damaged_or_contradictory_mask_is_left_out(
    tmp_path: Path, row: str, detail: str
):
    lay_out(tmp_path, {**LAYOUTS["stage 1"], "train-rle.csv": f"ImageId,EncodedPixels\n{row}\n"})
    (out,) = parted(read_siim(tmp_path))[1]
    assert (out.image_id, out.reason) == ("1.2.826.1", Reason.BAD_VALUE) and detail in out.detail


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.dcm": IMAGE}, r"no stage_2_train\.csv or train-rle\.csv; it comes from https"),
        ({"train-rle.csv": STAGE_1}, r"no image .*; images come from https"),
        ({"train-rle.csv": "ImageId\n", "a.dcm": IMAGE}, "has no column 'EncodedPixels'"),
        (
            {"train-rle.csv": "ImageId,EncodedPixels\n1.2\n", "a.dcm": IMAGE},
            "1.2: the row has 1 fi",
        ),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read_siim(lay_out(tmp_path, files))


# The real table.


def test_every_row_of_the_real_table_is_in_an_image(tmp_path: Path):
    table = real_table("siim-pneumothorax-train-rle.csv.gz")
    first = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"
    lay_out(tmp_path, {"stage_2_train.csv.gz": table, f"dicom/a/b/{first}.dcm": IMAGE})
    samples, excluded = parted(read_siim(tmp_path))
    assert (len(samples), len(excluded)) == (12_047, 0)
    assert sum(len(sample.source_labels) for sample in samples) == 12_954  # the rows
    found = tally(samples)
    assert (found["pneumothorax", PRESENT], found["pneumothorax", ABSENT]) == (2_669, 9_378)
    assert sum(len(sample.source_labels) > 1 for sample in samples) == 624
    assert samples[0].image == f"dicom/a/b/{first}.dcm"
    n_masks = 0
    for _, is_there in read_siim_masks(tmp_path):
        assert 0 < is_there.mean() < 0.5
        n_masks += 1
    assert n_masks == 2_669


def test_a_table_that_was_saved_again_as_numbers_says_the_same(tmp_path: Path):
    table = "ImageId,EncodedPixels\n1.2.826.1,-1.0\n1.2.826.2,2 3\n"
    files = {f"x/1.2.826.{i}.dcm": IMAGE for i in (1, 2)}
    samples, _ = parted(read_siim(lay_out(tmp_path, {"stage_2_train.csv": table, **files})))
    assert [sample.labels["pneumothorax"] for sample in samples] == [ABSENT, PRESENT]
