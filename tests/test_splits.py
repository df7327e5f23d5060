"""Named splits and subsets of training patients: nothing leaks, nothing moves, hashes tell."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.data.folder import SPLIT_FILE, ManifestError, read_meta
from mmclip.data.leakage.check import find_overlaps
from mmclip.data.leakage.split_lists import list_sha256, match_list
from mmclip.data.leakage.splits import (
    clean_split,
    group_of,
    linked_apart,
    official_with_val,
    read_subset,
    set_split,
    stratified,
    subsets_of,
)
from mmclip.data.manifest import read_manifest, write_manifest
from mmclip.data.sample import RandomSplit, Sample, assign_splits
from mmclip.evaluation.protocols import FineTuning, load_protocol, protocol_names
from tests.commands import mmclip


def sample(number: int, patient: str | None = None, content: int | None = None, **values) -> Sample:
    sha = hashlib.sha256(str(number if content is None else content).encode()).hexdigest()
    known = {
        "image_id": f"f{number}", "study_id": f"s{number}", "patient_id": patient or f"p{number}",
        "source": "made", "image": f"{number}.png", "image_sha256": sha,
    }  # fmt: skip
    return Sample(**{**known, **values})


def folder_of(path: Path, samples: list[Sample], by_source: int = 0) -> Path:
    write_manifest(path, assign_splits(samples), [], None, {}, by_source)
    return path


def splits_of(folder: Path) -> dict[str, str | None]:
    return {sample.image_id: sample.split for sample in read_manifest(folder)}


# Clean.


def test_patients_who_share_an_image_by_themselves_or_through_others_are_one_group():
    samples = [
        sample(0, "b", 7),
        sample(1, "a", 7),
        sample(2, "a", 8),
        sample(3, "c", 8),
        sample(4, "d"),
    ]
    assert group_of(samples) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert group_of(samples, ["near 1", None, None, None, "near 1"])["d"] == "a"


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(0, 5),
)
def test_a_clean_split_keeps_every_image_once_and_puts_no_patient_or_content_into_two(rows, seed):
    samples = [sample(i, patient, content) for i, (patient, content) in enumerate(rows)]
    chosen = clean_split(samples, RandomSplit(seed, 0.3, 0.3))
    ids = [image_id for part in chosen.values() for image_id in part]
    assert sorted(ids) == sorted(f.image_id for f in samples)
    part_of = {image_id: part for part, members in chosen.items() for image_id in members}
    for key in ("patient_id", "image_sha256"):
        held = defaultdict(set)
        for f in samples:
            held[getattr(f, key)].add(part_of[f.image_id])
        assert all(len(parts) == 1 for parts in held.values())


def test_a_clean_split_of_plain_patients_is_the_draw_of_the_build(tmp_path: Path):
    built = folder_of(tmp_path, [sample(i) for i in range(60)])
    before, as_built = splits_of(built), read_meta(built)["data_hash"]
    split = set_split(built, "clean", RandomSplit(seed=0))
    assert splits_of(built) == before and len(set(before.values())) == 3
    assert read_meta(built)["data_hash"] == split["data_hash"] == as_built
    other = set_split(built, "clean", RandomSplit(seed=1))
    assert splits_of(built) != before
    assert read_meta(built)["data_hash"] == other["data_hash"] != as_built
    assert other["split_hash"] != split["split_hash"]
    assert read_meta(built)["split"]["seed"] == 1
    assert set_split(built, "clean", RandomSplit(seed=0)) == split


def test_equal_images_of_two_patients_are_in_one_split(tmp_path: Path):
    samples = [sample(i, content=i % 50) for i in range(100)]
    parts = splits_of(folder_of(tmp_path, samples))
    assert any(parts[f"f{i}"] != parts[f"f{i + 50}"] for i in range(50))
    set_split(tmp_path, "clean")
    parts = splits_of(tmp_path)
    assert all(parts[f"f{i}"] == parts[f"f{i + 50}"] for i in range(50))


def test_splits_of_one_collection_agree_or_it_is_said_why_they_cannot(tmp_path: Path):
    # Patients 20 and 500 share one file of ChestX-ray14; RSNA holds 500 alone.
    nih = [
        sample(0, "20", 7777, source="chestxray14"),
        sample(1, "500", 7777, source="chestxray14"),
    ]
    nih += [sample(i, str(1000 + i), source="chestxray14") for i in range(2, 40)]
    part = [sample(100, "500", source="rsna"), sample(101, "1002", source="rsna")]
    n_apart = 0
    for seed in range(60):
        whole, some = (clean_split(samples, RandomSplit(seed)) for samples in (nih, part))
        first, other = ({i: p for p, ids in c.items() for i in ids} for c in (whole, some))
        is_apart = first["f1"] != other["f100"]
        n_apart += is_apart
        found = linked_apart(nih, RandomSplit(seed))
        assert found in ([], [("20", "500")]) and (not is_apart or found)
        assert first["f2"] == other["f101"]
    assert n_apart
    seed = next(s for s in range(60) if linked_apart(nih, RandomSplit(s)))
    folder = folder_of(tmp_path / "nih", nih)
    (said,) = (
        w
        for w in set_split(folder, "clean", RandomSplit(seed=seed))["warnings"]
        if "one id by" in w
    )
    assert "20 and 500" in said and "rsna" in said and "siim" in said
    table = tmp_path / "patients.csv"
    rows = [f"{f.image_id},{'20' if f.patient_id == '500' else f.patient_id}" for f in nih + part]
    table.write_text("image_id,patient_id\n" + "\n".join(rows) + "\n")
    mapped = set_split(folder, "clean", RandomSplit(seed=seed), patients=table)
    assert not any("one id by" in w for w in mapped["warnings"])
    set_split(folder_of(tmp_path / "rsna", part), "clean", RandomSplit(seed=seed), patients=table)
    assert splits_of(tmp_path / "nih")["f1"] == splits_of(tmp_path / "rsna")["f100"]


def test_near_duplicates_that_link_patients_are_said_too():
    samples = [sample(0, "20", source="chestxray14"), sample(1, "500", source="chestxray14")]
    seeds = [s for s in range(60) if linked_apart(samples, RandomSplit(s), ["near 1", "near 1"])]
    assert seeds and not any(linked_apart(samples, RandomSplit(s)) for s in seeds)


def test_a_mapping_gives_patients_and_two_data_sets_of_them_agree(tmp_path: Path):
    one = folder_of(tmp_path / "one", [sample(i, f"{i // 3 + 1}") for i in range(90)])
    other = folder_of(
        tmp_path / "other", [sample(i, f"x{i}", 1000 + i, source="rsna") for i in range(60)]
    )
    table = tmp_path / "patients.csv"
    table.write_text("image_id,patient_id\n" + "".join(f"f{i},{i // 2 + 1}\n" for i in range(60)))
    assert any("patients unknown" in w for w in set_split(other, "clean")["warnings"])
    mapped = set_split(other, "clean", patients=table)
    assert not mapped["warnings"] and mapped["n_patients"] == read_meta(other)["n_patients"] == 30
    set_split(one, "clean")
    known = {f.patient_id: f.split for f in read_manifest(one)}
    assert all(known[f.patient_id] == f.split for f in read_manifest(other))
    table.write_text("image_id,patient_id\nf0,n0\n")
    with pytest.raises(ManifestError, match="no patient for 59 of 60 images"):
        set_split(other, "clean", patients=table)


def test_a_patient_is_in_one_split_of_two_data_sets_whatever_its_leading_zeros(tmp_path: Path):
    ids = [str(i) for i in range(1, 41)]
    nih = [sample(i, name, source="chestxray14") for i, name in enumerate(ids)]
    one = folder_of(tmp_path / "nih", nih)
    other = of_rsna(tmp_path, ids)
    table = tmp_path / "patients.csv"
    table.write_text("image_id,patient_id\n" + "".join(f"{i},{int(i):08d}\n" for i in ids))
    set_split(one, "clean")
    set_split(other, "clean", patients=table)
    first = {f.patient_id: f.split for f in read_manifest(one)}
    assert first == {f.patient_id: f.split for f in read_manifest(other)}


def of_rsna(tmp_path: Path, ids: Sequence[str]) -> Path:
    samples = [
        replace(sample(i, f"x{i}", source="rsna"), image_id=name) for i, name in enumerate(ids)
    ]
    return folder_of(tmp_path / "rsna", samples)


def test_image_ids_of_a_mapping_are_found_without_their_leading_zeros_too(tmp_path: Path):
    folder = of_rsna(tmp_path, ["0007", "0012", "a"])
    table = tmp_path / "patients.csv"
    table.write_text("image_id,patient_id\n7,00000001\n12,2\n00a,30805\n")
    assert set_split(folder, "clean", patients=table)["patients"] == {
        "0007": "1", "0012": "2", "a": "30805",
    }  # fmt: skip
    twins = of_rsna(tmp_path / "twins", ["07", "007", "8"])
    table.write_text("image_id,patient_id\n7,1\n8,2\n")
    with pytest.raises(ManifestError, match="no patient for 2 of 3 images, such as '07'"):
        set_split(twins, "clean", patients=table)
    table.write_text("image_id,patient_id\nz,1\n")
    with pytest.raises(ManifestError, match="none of its image ids, such as 'z', is one of this"):
        set_split(folder, "clean", patients=table)


@pytest.mark.parametrize(
    ("ids", "n_strange"),
    [
        (["00000001", "30805", "17"], 0),
        (["P1", "17", "30806"], 2),
        (["0", "nih-3", "99999"], 3),
    ],
)
def test_ids_of_a_mapping_that_the_collection_does_not_have_are_said(
    tmp_path: Path, ids: list[str], n_strange: int
):
    folder = of_rsna(tmp_path, ["a", "b", "c"])
    table = tmp_path / "patients.csv"
    rows = "".join(f"{image},{patient}\n" for image, patient in zip("abc", ids, strict=True))
    table.write_text("image_id,patient_id\n" + rows)
    said = [w for w in set_split(folder, "clean", patients=table)["warnings"] if "--patients" in w]
    assert len(said) == (n_strange > 0)
    assert not n_strange or f"gives {n_strange} of 3 images an id that chestxray14" in said[0]


# Official, and lists.


def test_official_is_what_the_source_gave_to_every_image_or_an_error(tmp_path: Path):
    samples = [sample(i, split=part) for i, part in enumerate(("test", "train", "val"))]
    folder_of(tmp_path, samples, by_source=3)
    before = splits_of(tmp_path)
    set_split(tmp_path, "clean", RandomSplit(seed=5))
    set_split(tmp_path, "official")
    assert splits_of(tmp_path) == before
    folder_of(tmp_path / "drawn", samples, by_source=2)
    with pytest.raises(ManifestError, match="the source gives 2 of 3 images"):
        set_split(tmp_path / "drawn", "official")


def test_official_without_val_draws_it_from_train_by_patient_and_content_and_says_so(
    tmp_path: Path,
):
    # Patients of three images; the last image of each of the first 60 is that of the patient
    # before.
    samples = [
        sample(
            i,
            f"p{i // 3}",
            content=i - 3 if i % 3 == 2 and i < 180 else i,
            split="test" if i >= 240 else "train",
        )
        for i in range(300)
    ]
    folder_of(tmp_path, samples, by_source=300)
    split = set_split(tmp_path, "official", RandomSplit(seed=1, val_ratio=0.3))
    assert (split["seed"], split["val_ratio"], "test_ratio" in split) == (1, 0.3, False)
    parts = splits_of(tmp_path)
    n_val = sum(part == "val" for part in parts.values())
    assert 0 < n_val < 240 and f"{n_val} of its 240 train images are val" in split["warnings"][0]
    assert [parts[f.image_id] for f in samples if f.split == "test"] == ["test"] * 60
    assert not list(find_overlaps(samples, [parts[f.image_id] for f in samples]))
    assert (
        set_split(tmp_path, "official", RandomSplit(seed=2, val_ratio=0.3))["images"]
        != split["images"]
    )
    assert not set_split(tmp_path, "official", RandomSplit(val_ratio=0.0))["images"]["val"]
    # The draw is that of clean: a patient whose number is below the ratio.
    alone = [sample(i, f"q{i}", split="train") for i in range(50)]
    chosen = official_with_val(alone, RandomSplit(1, 0.3))
    assert chosen["val"] == clean_split(alone, RandomSplit(1, 0.3, 0.0))["val"]


# What people labelled.


def test_what_people_labelled_is_test_and_no_image_of_its_patients_trains(tmp_path: Path):
    read = {0: "report-reader", 5: "image-reader"}
    origins = {i: read.get(i, "report-program") for i in range(100)}
    # Patients of two images; image 40 of another patient is image 0, and so is no image to train
    # on.
    samples = [
        sample(i, f"p{i // 2}", content=0 if i == 40 else i, label_origin=origins[i])
        for i in range(100)
    ]
    folder_of(tmp_path, samples)
    split = set_split(tmp_path, "physician", RandomSplit(seed=3, val_ratio=0.2))
    parts = splits_of(tmp_path)
    assert [i for i in range(100) if parts[f"f{i}"] == "test"] == [0, 5]
    assert [i for i in range(100) if parts[f"f{i}"] is None] == [1, 4, 40, 41]
    assert (split["seed"], split["n_in_no_split"]) == (3, 4)
    assert split["warnings"] == [
        "4 images that no person labelled are of patients in test, so they are in no split"
    ]
    assert {"train", "val"} <= set(parts.values())
    assert not list(find_overlaps(samples, [parts[f.image_id] for f in samples]))
    folder_of(tmp_path / "none", [sample(0), sample(1, label_origin="report-program")])
    with pytest.raises(ManifestError, match="people labelled no image of this folder"):
        set_split(tmp_path / "none", "physician")
    folder_of(tmp_path / "all", [sample(i, label_origin="image-reader") for i in range(2)])
    with pytest.raises(ManifestError, match="an image of every patient"):
        set_split(tmp_path / "all", "physician")


def write_lists(folder: Path, **lists: str) -> dict:
    for part, text in lists.items():
        (folder / f"{part}.txt").write_text(text)
    return {part: folder / f"{part}.txt" for part in lists}


def test_a_legacy_split_says_what_it_leaks_and_nothing_of_test_trains(tmp_path: Path):
    samples = [
        sample(0, "a"),
        sample(1, "a"),
        sample(2, "b"),
        sample(3, "c"),
        sample(4, "d", 3),
        sample(5),
    ]
    folder_of(tmp_path, samples)
    lists = write_lists(tmp_path, train="f0\nf2\nf2\nf3", test="f1\nf2\nf4")
    split = set_split(tmp_path, "legacy-mavl", lists=lists)
    assert split["images"] == {"train": ["f0", "f2", "f3"], "test": ["f1", "f2", "f4"]}
    assert splits_of(tmp_path) == {
        "f0": "train", "f1": "test", "f2": "test", "f3": "train", "f4": "test", "f5": None,
    }  # fmt: skip
    assert split["n_in_no_split"] == 1 and split["splits"] == {"test": 3, "train": 2}
    first, *leaks = split["warnings"]
    assert "published numbers alone; it leaks" in first
    # Patients a and b; the image f2 itself, and f4, which is f3 under another name and patient.
    assert [leak.partition(", such")[0] for leak in leaks] == [
        "2 patients are in train and in test (2 images of test)",
        "2 images are in train and in test (2 images of test)",
    ]
    assert split["lists"]["train"]["n_rows"] == split["lists"]["train"]["n_rows_found"] == 4
    assert not split["lists"]["train"]["is_known"]


@pytest.mark.parametrize(
    "text",
    [
        "a/f1.png 0 1\nb/f0.jpg 1 0\n",
        "0,x,f1\n1,x,f0\n",
        "ImageId,EncodedPixels\nf1, 1 2\nf0, -1\n",
        "1 f1.dcm positive\r\n0 f0.dcm negative\r\n",
    ],
)
def test_lists_in_every_published_form_name_images(text: str):
    samples = [sample(0), sample(1), sample(2, image_id="0"), sample(3, image_id="f0/deep")]
    assert match_list(text, samples)[0] == ["f1", "f0"]


def test_a_path_names_the_image_whose_id_is_its_end():
    samples = [sample(0, image_id="patient1/study1/view1"), sample(1, image_id="1.2.840.3")]
    text = "v1.0-small/train/patient1/study1/view1.jpg 0\n1.2.840.3 1\n1.2.840 1\n"
    assert match_list(text, samples) == (["patient1/study1/view1", "1.2.840.3"], 3)


def test_a_list_is_held_against_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of(tmp_path, [sample(i) for i in range(4)])
    lists = write_lists(tmp_path, test="f1\nf2\n")
    sha256 = list_sha256(b"f1\r\nf2\r\n")  # line ends do not matter
    known = {sha256[:32]: "benchx made test"}
    monkeypatch.setattr("mmclip.data.leakage.split_lists.KNOWN_LISTS", known)
    split = set_split(tmp_path, "benchx", lists=lists)
    assert split["lists"]["test"]["is_known"] and not split["warnings"]
    with pytest.raises(ManifestError, match="is known as benchx made test"):
        set_split(tmp_path, "benchx", lists={"train": lists["test"]})
    lists["test"].write_text("f1\n")
    with pytest.raises(ManifestError, match=f"the published list has {sha256[:32]}"):
        set_split(tmp_path, "benchx", lists=lists)


def test_a_list_of_another_data_set_is_refused(tmp_path: Path):
    folder_of(tmp_path, [sample(0)])
    lists = write_lists(tmp_path, test="x1\nx2\n")
    with pytest.raises(ManifestError, match="none of its 2 rows names an image"):
        set_split(tmp_path, "benchx", lists=lists)
    with pytest.raises(ManifestError, match="needs no list"):
        set_split(tmp_path, "clean", lists=lists)
    with pytest.raises(ManifestError, match="--list test=FILE"):
        set_split(tmp_path, "legacy-mrm")
    with pytest.raises(ManifestError, match="no split 'mine'"):
        set_split(tmp_path, "mine")
    assert not (tmp_path / SPLIT_FILE).exists()


# On disk.


def test_a_split_that_was_changed_or_is_of_another_build_is_refused(tmp_path: Path):
    samples = [sample(i) for i in range(9)]
    folder_of(tmp_path, samples)
    split = set_split(tmp_path, "clean", RandomSplit(seed=3))
    path = tmp_path / SPLIT_FILE
    whole = path.read_text()
    moved = split | {"images": {**split["images"], "train": [], "test": split["images"]["train"]}}
    for text in (json.dumps(moved), whole[:-20], "[]"):
        path.write_text(text)
        with pytest.raises(ManifestError, match=r"split\.json"):
            read_manifest(tmp_path)
    path.write_text(whole)
    folder_of(tmp_path, samples[:-1])
    with pytest.raises(ManifestError, match="of another build"):
        read_meta(tmp_path)
    set_split(tmp_path, "clean")  # sets it anew, whatever lay there
    assert len(read_manifest(tmp_path)) == 8


# Subsets.


def labelled(number: int, **values) -> Sample:
    """Two images a patient; a rare finding, two common ones that go together, and none."""
    patient = number // 2
    labels = {
        "rare": int(patient % 50 == 0), "common": int(patient % 3 == 0),
        "both": int(patient % 6 == 0), "uncertain": -1,
    }  # fmt: skip
    return sample(number, f"p{patient}", labels=labels, **values)


def test_subsets_are_nested_whole_patients_and_hold_each_finding_at_its_share():
    train = [labelled(i) for i in range(4000)]
    patients = {f.image_id: f.patient_id for f in train}
    saved = subsets_of(train, 0)
    assert {p: s["n_patients"] for p, s in saved.items()} == {"100": 2000, "10": 200, "1": 20}
    one, ten = set(saved["1"]["image_ids"]), set(saved["10"]["image_ids"])
    assert one < ten and (len(one), len(ten)) == (40, 400)
    for ids in (one, ten):
        assert set(Counter(patients[i] for i in ids).values()) == {2}
    has = Counter(
        finding for f in train if f.image_id in ten for finding, v in f.labels.items() if v
    )
    # A tenth of the 40, 667 and 334 patients, times two images; random draws stray by 12 and more.
    assert has["rare"] == 8 and abs(has["common"] - 133) <= 4 and abs(has["both"] - 67) <= 4
    assert subsets_of(train[::-1], 0) == saved
    other = subsets_of(train, 1)
    assert other["10"]["hash"] != saved["10"]["hash"] and other["100"] == saved["100"]


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=4), st.sets(st.sampled_from("xyz")), max_size=25
    ),
    st.integers(0, 25),
)
def test_exactly_as_many_patients_stay_as_asked_for(findings, n_kept):
    n_kept = min(n_kept, len(findings))
    kept = stratified(findings, n_kept, 0)
    assert len(kept) == n_kept and kept <= findings.keys()


def test_a_split_saves_the_subsets_that_protocols_ask_for(tmp_path: Path):
    folder_of(tmp_path, [labelled(i) for i in range(60)])
    split = set_split(tmp_path, "clean")
    for name in protocol_names():
        rules = load_protocol(name).finetune
        seeds = rules.seeds if rules else FineTuning().seeds
        assert [str(seed) for seed in seeds] == list(split["subsets"])
        for seed in seeds:
            assert read_subset(tmp_path, 10, seed)


def test_a_saved_subset_is_read_back_and_a_missing_one_names_those_there_are(tmp_path: Path):
    folder_of(tmp_path, [labelled(i) for i in range(600)])
    set_split(tmp_path, "clean", subset_seeds=(4,))
    parts = splits_of(tmp_path)
    train = {image_id for image_id, part in parts.items() if part == "train"}
    assert read_subset(tmp_path, 1, 4) < read_subset(tmp_path, 10, 4) < train
    assert read_subset(tmp_path, 100, 4) == train
    with pytest.raises(ManifestError, match="with seeds 4;"):
        read_subset(tmp_path, 10, 0)


# The command.


def test_the_command_sets_a_split_and_says_its_hashes(tmp_path: Path):
    data = folder_of(tmp_path / "data", [sample(i, content=i % 30) for i in range(60)])
    ended = mmclip(tmp_path, "data", "split", data, "--name", "clean", "--seed", "2")
    assert (ended.code, ended.out) == (0, f"{data}\n")
    meta = read_meta(data)
    assert meta["data_hash"][:16] in ended.err and meta["split"]["split_hash"][:16] in ended.err
    assert "training patients, seed 2: 100 %" in ended.err
    (tmp_path / "l.txt").write_text("f1\nf2\n")
    ended = mmclip(
        tmp_path, "data", "split", data, "--name", "legacy-mrm", "--list",
        f"test={tmp_path / 'l.txt'}",
    )  # fmt: skip
    assert ended.code == 0 and "not known" in ended.err and "in none 58" in ended.err
    assert "no SPLIT=FILE" in mmclip(tmp_path, "data", "split", data, "--list", "l.txt").error()


def test_images_may_have_no_split_in_a_named_split_and_are_read_in_place(tmp_path: Path):
    samples = [replace(sample(i), report="Clear.") for i in range(3)]
    folder_of(tmp_path, samples)
    set_split(tmp_path, "benchx", lists=write_lists(tmp_path, train="f1\n"))
    assert [f.split for f in read_manifest(tmp_path)] == [None, "train", None]
