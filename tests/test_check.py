"""What splits and data sets share: patients, equal files, near-duplicates; labels side by side."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmclip.data.folder import ManifestError
from mmclip.data.ingest.build import build_data
from mmclip.data.leakage.check import (
    check_data,
    find_overlaps,
    refuse_leaks,
)
from mmclip.data.leakage.splits import set_split
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import RandomSplit, Sample, Split
from tests.commands import mmclip
from tests.made_files import encoded
from tests.test_duplicates import blurred

LOOKS = blurred(12)


def sample(number: int, split: Split, **values) -> Sample:
    known = {
        "image_id": f"f{number}", "study_id": f"s{number}", "patient_id": f"p{number}",
        "source": "made", "image": f"{number}.png", "view": "PA",
    }  # fmt: skip
    return Sample(**{**known, "split": split, **values})


def build(root: Path, samples: list[tuple[Sample, bytes]]) -> Path:
    """A data folder of images with the bytes of their files."""
    root.mkdir(parents=True)
    for record, content in samples:
        (root / str(record.image)).write_bytes(content)
    build_data([record for record, _ in samples], root, root / "data", image_size=32)
    return root / "data"


def softer(look: np.ndarray) -> bytes:
    """The same image as another hospital would pass it on: smaller, paler, compressed."""
    return encoded((look[::1, ::1] * 0.7 + 40).astype(np.uint8), "JPEG", quality=70)


# By hand.


def test_overlaps_name_what_is_shared_where_and_how_often():
    samples = [
        sample(0, "train", patient_id="a"), sample(1, "test", patient_id="a"),
        sample(2, "test", patient_id="a"), sample(3, "val", image_sha256="x"),
        sample(4, "test", image_sha256="x"), sample(5, "train", patient_id="b"),
    ]  # fmt: skip
    patients, equal = find_overlaps(samples, [f.split for f in samples])
    assert (patients.what, patients.places) == ("patients", ("train", "test"))
    assert (patients.n_shared, patients.n_images, patients.examples) == (1, 2, (("f0", "f1"),))
    assert (equal.what, equal.places, equal.n_shared) == ("images", ("val", "test"), 1)
    assert (
        "1 patients are in train and in test (2 images of test), such as images f0 and f1"
        in str(patients)
    )
    assert find_overlaps(samples, [None] * 6) == []


def test_patients_are_compared_within_a_collection_alone():
    one, other = sample(0, "train", patient_id="7"), sample(1, "test", patient_id="7")
    assert not find_overlaps([one, replace(other, source="elsewhere")], ["train", "test"])
    nih = replace(one, source="chestxray14")
    assert find_overlaps([nih, replace(other, source="rsna")], ["train", "test"])


def test_what_val_and_test_share_stops_no_training_and_what_train_and_test_share_does():
    refuse_leaks([sample(0, "val", patient_id="a"), sample(1, "test", patient_id="a")])
    with pytest.raises(ManifestError, match=r"1 patients .* such as images f0 and f1.*data split"):
        refuse_leaks([sample(0, "train", patient_id="a"), sample(1, "test", patient_id="a")])


# On data folders.


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """An image that test has again as other bytes, one that it has as equal ones, and four odd."""
    return build(
        tmp_path / "leaky",
        [
            (sample(0, "train"), encoded(LOOKS[0])),
            (sample(1, "test"), softer(LOOKS[0])),
            (sample(2, "train"), encoded(LOOKS[1])),
            (sample(3, "test", view="AP"), encoded(LOOKS[1])),
            (sample(4, "train", view="unknown", age_years=414.0), encoded(LOOKS[2])),
            (sample(5, "train", patient_id="q", sex="F"), encoded(LOOKS[3])),
            (sample(6, "train", patient_id="q", sex="M"), encoded(LOOKS[4])),
            (sample(7, "train", view="L", labels={"mass": 1}), encoded(LOOKS[5][:, :20])),
        ],
    )


def test_equal_and_near_images_of_two_splits_are_leaks(leaky: Path):
    found = check_data([leaky])
    assert [(leak.what, leak.places, leak.examples) for leak in found.leaks] == [
        ("images", ("train", "test"), (("f2", "f3"),)),
        ("near-duplicates", ("train", "test"), (("f0", "f1"),)),
    ]
    assert found.n_hashed == 8 and found.shared == []
    assert found.counts == {str(leaky): {"images": 8, "patients": 7, "train": 6, "test": 2}}
    cheap = check_data([leaky], near_duplicates=False)
    assert [leak.what for leak in cheap.leaks] == ["images"] and cheap.n_hashed == 0


def test_odd_views_ages_sexes_and_sides_are_named(leaky: Path):
    odd = {o.what: o.examples for o in check_data([leaky], near_duplicates=False).oddities}
    assert odd == {
        "have no known view": ("f4",),
        "are lateral and labelled; they are never scored": ("f7",),
        "are equal to another of another view": ("f2", "f3"),
        "are of people under 0 or over 110 years": ("f4",),
        "are of a patient with two sexes": ("f5", "f6"),
        "are more than 2 times as long as wide, or as wide as long": ("f7",),
    }


def test_two_folders_are_held_against_each_other(tmp_path: Path):
    one = build(
        tmp_path / "one",
        [
            (sample(0, "train", labels={"mass": 1, "edema": 0, "nodule": -1}), encoded(LOOKS[0])),
            (sample(1, "train", labels={"mass": 0}), encoded(LOOKS[1])),
            (sample(2, "val"), encoded(LOOKS[2])),
        ],
    )
    other = build(
        tmp_path / "other",
        [
            (
                sample(8, "train", source="b", labels={"mass": 0, "edema": 0, "nodule": 1}),
                softer(LOOKS[0]),
            ),
            (sample(9, "test", source="b", labels={"mass": 0}), encoded(LOOKS[1])),
        ],
    )
    found = check_data([one, other])
    assert [(leak.what, leak.examples) for leak in found.leaks] == [("images", (("f1", "f9"),))]
    assert {(s.what, s.places, s.examples) for s in found.shared} == {
        ("images", (str(one), str(other)), (("f1", "f9"),)),
        ("near-duplicates", (str(one), str(other)), (("f0", "f8"),)),
    }
    assert [(d.finding, d.n_both, d.n_differ, d.examples) for d in found.disagreements] == [
        ("edema", 1, 0, ()),
        ("mass", 2, 1, (("f0", "f8"),)),
    ]
    with pytest.raises(ManifestError, match="named twice"):
        check_data([one, one / "../data"])


# The command.


def test_the_command_reports_in_json_and_ends_with_1_on_a_leak_alone(leaky: Path, tmp_path: Path):
    ended = mmclip(tmp_path, "data", "check", leaky)
    assert ended.code == 1
    report = json.loads(ended.out)
    assert [leak["what"] for leak in report["leaks"]] == ["images", "near-duplicates"]
    assert "1 near-duplicates are in train and in test" in ended.err
    assert mmclip(tmp_path, "data", "split", leaky, "--near-duplicates").code == 0
    ended = mmclip(tmp_path, "data", "check", leaky)
    assert ended.code == 0 and json.loads(ended.out)["leaks"] == []
    assert "shared between splits: none" in ended.err


def test_pretrain_does_not_start_on_images_that_would_be_scored(leaky: Path, tmp_path: Path):
    given = ("--data", leaky, "--out", tmp_path / "run", "--set", "data.image_size=32")
    error = mmclip(tmp_path, "pretrain", *given).error()
    assert "what trains would be scored: 1 images are in train and in test" in error
    assert not (tmp_path / "run").exists()


def test_zeroshot_does_not_score_what_has_trained_from_whichever_folder(
    made_run: Path, made_data: Path, tmp_path: Path
):
    other = shutil.copytree(made_data, tmp_path / "other")
    set_split(other, "clean", RandomSplit(seed=9))
    trained = {f.patient_id for f in read_manifest(made_data) if f.split == "train"}
    scored = [f for f in read_manifest(other) if f.split == "test"]
    n_seen = sum(f.patient_id in trained for f in scored if f.view != "L" and f.labels)
    assert 0 < n_seen < len(scored)
    given = ("--model", made_run, "--out", tmp_path / "out", "--n-resamples", "5")
    error = mmclip(tmp_path, "zeroshot", *given, "--data", other).error()
    assert f"on patients of {n_seen}, such as" in error
    assert not (tmp_path / "out").exists()
    few = ("--finding", "nodule")  # whose page is soon drawn
    ended = mmclip(tmp_path, "zeroshot", *given, "--data", made_data, "--split", "train", *few)
    assert ended.code == 0 and "split train: the run was trained on" in ended.err
