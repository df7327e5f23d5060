from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmclip.data.build import build_data
from mmclip.data.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.padchest import read_padchest
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, Reason, Sample
from mmclip.data.splits import physician_split
from tests.made_files import encoded, ramp
from tests.published import lay_out, parted, real_table, tally

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = (
    "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth",
    "PatientSex_DICOM", "Projection", "Pediatric", "MethodLabel", "Labels", "Localizations",
    "Report",
)  # fmt: skip
IMAGE = encoded(ramp().astype(np.uint16) * 100)  # 16 bits
CLOSED = set(load_words("padchest").closed)


def table(*rows: dict[str, str]) -> str:
    """A table with a first column without a name, as the published one."""
    usual = {
        "ImageDir": "0", "StudyDate_DICOM": "20140915", "StudyID": "s1", "PatientID": "p1",
        "PatientBirth": "1930.0", "PatientSex_DICOM": "F", "Projection": "PA", "Pediatric": "No",
        "MethodLabel": "Physician", "Labels": "['normal']", "Localizations": "['loc right']",
        "Report": " sin hallazg patolog . ",
    }  # fmt: skip
    lines = ["," + ",".join(COLUMNS)]
    for i, row in enumerate(rows):
        cells = {**usual, "ImageID": f"{i}.png", **row}
        lines.append(f"{i}," + ",".join(f'"{cells[name]}"' for name in COLUMNS))
    return "\n".join(lines) + "\n"


def read_one(root: Path, **row: str):
    (record,) = read_padchest(lay_out(root, {TABLE: table(row), "0/0.png": IMAGE}))
    return record


def test_images_of_16_bits_labels_and_facts_come_together(tmp_path: Path):
    text = table(
        {"Labels": "[' pneumonia', 'loculated pleural effusion', '', ' pneumonia']"},
        {"ImageDir": "54", "MethodLabel": "RNN_model", "Projection": "AP_horizontal"},
        {"Projection": "L", "PatientBirth": "", "PatientSex_DICOM": "O", "Report": "nan"},
        {"Projection": "COSTAL", "Labels": "nan", "Report": " . . ."},
    )
    samples = {f"{folder}/{i}.png": IMAGE for i, folder in enumerate((0, 54, 0, 0))}
    root = lay_out(tmp_path / "raw", {TABLE: text, **samples})
    meta = build_data(read_padchest(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_samples"], meta["n_with_report"], meta["n_patients"]) == (4, 0, 1)
    one, two, three, four = read_manifest(tmp_path / "out")
    assert one.source_labels == ("pneumonia", "loculated pleural effusion")
    present = {"pneumonia", "pleural effusion"}
    assert one.labels == {f: int(f in present) for f in sorted(CLOSED)}
    assert (one.age_years, one.sex, one.view, one.source) == (84, "F", "PA", "padchest-physician")
    assert (two.source, one.label_origin, two.label_origin) == (
        "padchest",
        "report-reader",
        "report-program",
    )
    assert (two.image, two.view, two.source) == ("54/1.png", "AP", "padchest")
    assert two.labels == {f: int(f == "no finding") for f in sorted(CLOSED)}
    assert (three.view, three.age_years, three.sex) == ("L", None, None)
    assert (four.view, four.labels, four.source_labels) == ("unknown", {}, ())
    # Spanish, as it was published, and not what a text encoder reads.
    assert [sample.findings for sample in (one, three, four)] == [
        "sin hallazg patolog .",
        None,
        None,
    ]
    assert one.report is None


@pytest.mark.parametrize("word", ["unchanged", "suboptimal study"])
def test_a_word_that_leaves_the_rest_open_makes_nothing_absent(tmp_path: Path, word: str):
    sample = read_one(tmp_path, Labels=f"['{word}', ' kyphosis']")
    assert isinstance(sample, Sample) and sample.labels == {"kyphosis": PRESENT}
    assert sample.source_labels == (word, "kyphosis")


def test_normal_beside_a_finding_is_uncertain(tmp_path: Path):
    sample = read_one(tmp_path, Labels="['normal', 'nodule']")
    assert isinstance(sample, Sample)
    assert (sample.labels["no finding"], sample.labels["nodule"]) == (UNCERTAIN, PRESENT)


@pytest.mark.parametrize(
    "row", [{"Labels": "['nodule', ' exclude']"}, {"Projection": "EXCLUDE"}], ids=str
)
def test_what_the_source_excludes_is_left_out_as_such(tmp_path: Path, row: dict[str, str]):
    assert read_one(tmp_path, **row).reason == Reason.NOT_FOR_USE


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"Labels": "['gout']"}, "'gout' is not among the words of padchest"),
        ({"Labels": "['nodule"}, "no list of words"),
        ({"Labels": "[1]"}, "no list of words"),
        ({"Labels": "__import__('os')"}, "no list of words"),
        ({"Projection": "OBLIQUE"}, "Projection is 'OBLIQUE', none of PA"),
        ({"MethodLabel": "Robot"}, "MethodLabel is 'Robot'"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(tmp_path: Path, row: dict[str, str], detail: str):
    record = read_one(tmp_path, **row)
    assert record.reason == Reason.BAD_VALUE and detail in record.detail


def test_an_age_before_birth_or_beyond_all_measure_is_unknown(tmp_path: Path):
    for name, born in (("a", "2020.0"), ("b", "1850")):
        assert read_one(tmp_path / name, PatientBirth=born).age_years is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0/0.png": IMAGE}, rf"no {TABLE}; it comes from https"),
        ({TABLE: table({})}, "0.zip to 54"),
    ],
)
def test_a_missing_piece_is_one_line(tmp_path: Path, files: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read_padchest(lay_out(tmp_path, files))


# The real table.


def test_every_row_of_the_real_table_is_accounted_for(tmp_path: Path):
    path = real_table(f"{TABLE}.gz")
    name = "20536686640136348236148679891455886468_k6ga29.png"
    samples, excluded = parted(
        read_padchest(lay_out(tmp_path, {f"{TABLE}.gz": path, f"0/{name}": IMAGE}))
    )
    assert len(samples) + len(excluded) == 160_861
    assert Counter(e.reason for e in excluded) == {Reason.NOT_FOR_USE: 1_323}
    origins = Counter((sample.source, sample.label_origin) for sample in samples)
    assert origins == {
        ("padchest", "report-program"): 120_567, ("padchest-physician", "report-reader"): 38_971,
    }  # fmt: skip
    chosen = physician_split(samples, 0, 0.1)
    patients = {sample.image_id: sample.patient_id for sample in samples}
    tested = {patients[i] for i in chosen["test"]}
    assert (len(chosen["test"]), len(tested)) == (38_971, 24_437)
    others = [patients[i] for part in ("train", "val") for i in chosen[part]]
    assert not tested & set(others) and len(tested | set(others)) == 67_235
    assert len(samples) - 38_971 - len(others) == 24_411
    views = Counter(sample.view for sample in samples)
    assert views == {"PA": 90_915, "L": 49_251, "AP": 18_745, "unknown": 627}
    assert len({sample.patient_id for sample in samples}) == 67_235
    assert len({sample.image_id for sample in samples}) == len(samples)
    # Counted by another program, from the table's words.
    found = tally(samples)
    assert found["cardiomegaly", PRESENT] == 15_005
    assert found["pneumonia", PRESENT] == 8_174  # with "atypical pneumonia"
    assert found["pneumothorax", PRESENT] == 573  # with "hydropneumothorax"
    assert found["scoliosis", PRESENT] == 8_333 and found["scoliosis", ABSENT] == 0
    assert found["no finding", PRESENT] == 50_616 - 221
    assert found["no finding", UNCERTAIN] == 221
    n_open = 0
    for sample in samples:
        if not sample.source_labels or {"unchanged", "suboptimal study"} & set(
            sample.source_labels
        ):
            n_open += 1
            assert ABSENT not in sample.labels.values()
        else:
            assert sample.labels.keys() >= CLOSED
    assert n_open == 16_001 + 880
    assert sum(sample.findings is None for sample in samples) == 133
    assert samples[0].image == f"0/{name}"
