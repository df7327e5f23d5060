from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.nlm_tb import read_montgomery, read_shenzhen
from mmclip.data.sample import ABSENT, PRESENT, Reason
from tests.made_files import encoded, ramp
from tests.published import lay_out, parted

IMAGE = encoded(ramp())
MASK = encoded(ramp()[::-1].copy())
SHENZHEN_READINGS = {
    "CHNCXR_0001_0": "male 45yrs\nnormal\n",
    "CHNCXR_0340_1": "Female, 28yrs\r\n\r\nsecondary PTB  in the right upper field\n",
    "CHNCXR_0400_1": "femal 32yrs\nbilateral PTB",
    "CHNCXR_0401_1": "male 18month\nTB of the right lung",
    "CHNCXR_0402_1": "female 64days\nmiliary TB\n\n",
}
NORMAL = {"no finding": PRESENT, "tuberculosis": ABSENT}
SICK = {"no finding": ABSENT, "tuberculosis": PRESENT}


def shenzhen(samples: str, readings: str) -> dict[str, bytes | str]:
    return {
        **{f"{samples}/{name}.png": IMAGE for name in SHENZHEN_READINGS},
        **{f"{readings}/{name}.txt": text for name, text in SHENZHEN_READINGS.items()},
    }


@pytest.mark.parametrize(
    "files",
    [
        shenzhen("CXR_png", "ClinicalReadings"),
        shenzhen("ChinaSet_AllFiles/CXR_png", "ChinaSet_AllFiles/ClinicalReadings"),
        {
            **shenzhen("b/images", "b/readings"),
            "a/masks/CHNCXR_0001_0.png": MASK,  # as re-uploads lay lung masks beside the images
            "a/CHNCXR_0001_0_mask.png": MASK,
        },
    ],
    ids=["in the root", "in its folder", "beside masks"],
)
def test_shenzhen_images_have_the_label_of_their_name_and_the_facts_of_their_reading(
    tmp_path: Path, files: dict
):
    root = lay_out(tmp_path / "raw", files)
    meta = build_data(read_shenzhen(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (5, 5)
    samples = read_manifest(tmp_path / "out")
    assert [(f.image_id, f.labels, f.sex, f.source_labels) for f in samples] == [
        ("CHNCXR_0001_0", NORMAL, "M", ("normal",)),
        ("CHNCXR_0340_1", SICK, "F", ("secondary PTB in the right upper field",)),
        ("CHNCXR_0400_1", SICK, "F", ("bilateral PTB",)),
        ("CHNCXR_0401_1", SICK, "M", ("TB of the right lung",)),
        ("CHNCXR_0402_1", SICK, "F", ("miliary TB",)),
    ]
    ages = [sample.age_years for sample in samples]
    assert ages == pytest.approx([45, 28, 32, 1.5, 64 / 365.25])
    assert {sample.view for sample in samples} == {"PA"}
    assert {sample.report for sample in samples} == {None}  # a reading is the label in words


MONTGOMERY = {
    "MontgomerySet/CXR_png/MCUCXR_0001_0.png": IMAGE,
    "MontgomerySet/CXR_png/MCUCXR_0104_1.png": IMAGE,
    "MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png": MASK,
    "MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png": MASK,
    "MontgomerySet/ClinicalReadings/MCUCXR_0001_0.txt": (
        "Patient's Sex: F \nPatient's Age: 027Y\nnormal\n"
    ),
    "MontgomerySet/ClinicalReadings/MCUCXR_0104_1.txt": (
        "Patient's Sex: M\r\nPatient's Age: 040Y\r\ncavitary infiltrate LUL;\r\n small effusion\r\n"
    ),
}


def test_montgomery_images_are_told_from_their_masks(tmp_path: Path):
    samples, excluded = parted(read_montgomery(lay_out(tmp_path, MONTGOMERY)))
    assert not excluded
    assert [(f.image_id, f.labels, f.age_years, f.sex, f.source_labels) for f in samples] == [
        ("MCUCXR_0001_0", NORMAL, 27.0, "F", ("normal",)),
        ("MCUCXR_0104_1", SICK, 40.0, "M", ("cavitary infiltrate LUL; small effusion",)),
    ]
    assert [sample.image for sample in samples] == [
        "MontgomerySet/CXR_png/MCUCXR_0001_0.png", "MontgomerySet/CXR_png/MCUCXR_0104_1.png",
    ]  # fmt: skip
    assert {sample.source for sample in samples} == {"montgomery"}


def test_an_image_without_a_reading_and_a_reading_without_an_image_are_both_there(tmp_path: Path):
    files = shenzhen("CXR_png", "ClinicalReadings")
    del files["ClinicalReadings/CHNCXR_0001_0.txt"], files["CXR_png/CHNCXR_0340_1.png"]
    files["CXR_png/CHNCXR_0500_2.png"] = IMAGE
    root = lay_out(tmp_path / "raw", files)
    meta = build_data(read_shenzhen(root), root, tmp_path / "out", image_size=16)
    assert meta["excluded"] == {str(Reason.IMAGE_MISSING): 1, str(Reason.BAD_VALUE): 1}
    first = read_manifest(tmp_path / "out")[0]
    assert (first.image_id, first.labels, first.source_labels) == ("CHNCXR_0001_0", NORMAL, ())
    assert (first.age_years, first.sex) == (None, None)
    _, (out,) = parted(read_shenzhen(root))
    assert out.image_id == "CHNCXR_0500_2" and "the label '2' is not among" in out.detail


def test_a_reading_without_facts_is_kept_whole(tmp_path: Path):
    files = {"CHNCXR_0001_0.png": IMAGE, "CHNCXR_0001_0.txt": "normal lungs\n"}
    (sample,), _ = parted(read_shenzhen(lay_out(tmp_path, files)))
    assert (sample.source_labels, sample.age_years, sample.sex) == (("normal lungs",), None, None)


def test_files_are_found_behind_links_and_with_suffixes_in_capitals(tmp_path: Path):
    """As the other readers find theirs: a link to a folder of another disk is followed."""
    disk = lay_out(
        tmp_path / "disk", {"CHNCXR_0001_0.PNG": IMAGE, "CHNCXR_0001_0.TXT": "male 4yrs"}
    )
    root = tmp_path / "raw"
    root.mkdir()
    (root / "CXR_png").symlink_to(disk)
    (sample,), _ = parted(read_shenzhen(root))
    assert (sample.image, sample.sex) == ("CXR_png/CHNCXR_0001_0.PNG", "M")


def test_no_image_is_one_line(tmp_path: Path):
    with pytest.raises(
        SourceError, match=r"hold no image \(MCUCXR_0001_0\.png\); images come from"
    ):
        read_montgomery(lay_out(tmp_path, shenzhen("CXR_png", "ClinicalReadings")))
