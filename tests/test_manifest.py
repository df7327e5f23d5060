import gc
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.data.folder import ManifestError, is_built, read_meta, write_meta
from mmclip.data.manifest import (
    SCHEMA,
    data_hash,
    from_table,
    read_manifest,
    to_table,
    write_manifest,
)
from mmclip.data.sample import (
    Entity,
    Excluded,
    RandomSplit,
    Reason,
    Sample,
    assign_splits,
    validate,
)

FULL = Sample(
    image_id="a.png",
    study_id="s",
    patient_id="p",
    source="made",
    split="train",
    image="folder/a.png",
    view="PA",
    findings="Clear — no “effusion”.",
    impression="Normal.",
    report="Clear — no “effusion”. Normal.",
    labels={"mass": 1, "edema": 0, "nodule": -1},
    source_labels=("Mass", "COVID-19, ARDS"),
    age_years=54.5,
    sex="F",
    width_px=2000,
    height_px=1500,
    image_sha256="0" * 64,
)
BARE = Sample(
    image_id="b", study_id="b", patient_id="q", source="made", split="val", report="Clear."
)


def sample(number: int, patient: str = "p", **values) -> Sample:
    known = {"image_id": f"f{number}", "study_id": f"s{number}", "patient_id": patient}
    return Sample(**{**known, "source": "made", "report": "Clear.", **values})


def unchecked(record: Sample, **values) -> Sample:
    """A record with values of other types, as a caller can make one where nothing checks."""
    record = replace(record)
    for name, value in values.items():
        object.__setattr__(record, name, value)
    return record


def write(folder: Path, samples: list[Sample], excluded: list[Excluded] | None = None) -> dict:
    return write_manifest(folder, samples, excluded or [], 64, {"reader": "made"})


# On disk.


def test_records_come_back_from_disk_as_they_were(tmp_path: Path):
    write(tmp_path, [FULL, BARE])
    assert read_manifest(tmp_path) == [FULL, BARE]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
entities = st.builds(
    Entity, st.integers(0, 9), st.integers(10, 99), st.sampled_from(["finding", "anatomy"]), texts,
    st.sampled_from(["present", "negated"]), st.none() | st.tuples(st.just(3), st.integers(4, 9)),
)  # fmt: skip
# Values, not images: beartype checks an image by random draws, which no strategy may make.
samples = st.fixed_dictionaries(
    {
        "image_id": texts,
        "study_id": texts,
        "patient_id": texts,
        "source": texts,
        "split": st.sampled_from(["train", "val", "test"]),
        "image": st.none() | texts,
        "view": st.sampled_from(["PA", "AP", "L", "unknown"]),
        "findings": st.none() | texts,
        "impression": st.none() | texts,
        "report": st.none() | texts,
        "entities": st.lists(entities, max_size=3).map(tuple),
        "labels": st.dictionaries(texts, st.sampled_from([1, 0, -1]), max_size=4),
        "source_labels": st.lists(texts, max_size=3).map(tuple),
        "label_origin": st.sampled_from([None, "image-reader", "report-program"]),
        "age_years": st.none() | st.floats(0, 120),
        "sex": st.sampled_from([None, "F", "M"]),
        "width_px": st.none() | st.integers(1, 100_000),
        "height_px": st.none() | st.integers(1, 100_000),
        "image_sha256": st.none() | texts,
    }
)


@given(st.lists(samples, max_size=4))
def test_any_record_survives_the_table_and_keeps_its_hash(drawn):
    records = [Sample(**values) for values in drawn]
    table = to_table(records)
    assert table.schema == SCHEMA
    again = list(from_table(table))
    assert again == records
    assert data_hash(again, 64) == data_hash(records, 64)
    assert list(from_table(table.slice(1, 2))) == records[1:3]


def test_entities_beyond_those_at_hand_are_read_as_the_others(monkeypatch):
    monkeypatch.setattr("mmclip.data.manifest.MAX_ENTITIES", 2)
    spans = [tuple(Entity(i % 3, 5 + i, "finding", "mass") for i in range(n)) for n in (4, 0, 5)]
    records = [replace(sample(n), split="train", entities=some) for n, some in enumerate(spans)]
    assert list(from_table(to_table(records))) == records


def test_a_whole_number_of_years_does_not_break_the_hash(tmp_path: Path):
    write(tmp_path, [unchecked(FULL, age_years=54)])
    assert read_manifest(tmp_path)[0].age_years == 54.0


def test_equal_records_give_equal_bytes(tmp_path: Path):
    for name in ("one", "two"):
        write(tmp_path / name, [FULL, BARE], [Excluded(row=1, image_id="c", reason=Reason.NO_ID)])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["excluded.jsonl", "meta.json", "samples.parquet"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_every_field_the_order_and_the_image_size_are_in_the_hash():
    known = {data_hash([FULL, BARE], 64), data_hash([BARE, FULL], 64), data_hash([FULL, BARE], 32)}
    changes = {
        "view": "AP", "labels": {"mass": 1}, "source_labels": ("Mass",), "age_years": 54.0,
        "sex": "M", "split": "val", "label_origin": "report-reader",
        "entities": (Entity(0, 5, "finding", "clear"),), "width_px": 1, "height_px": 1,
    }  # fmt: skip
    for name in SCHEMA.names:
        known.add(data_hash([replace(FULL, **{name: changes.get(name, "other")}), BARE], 64))
    assert len(known) == 3 + len(SCHEMA.names)


def test_the_order_of_labels_is_not_in_the_hash():
    turned = replace(FULL, labels=dict(reversed(FULL.labels.items())))
    assert data_hash([turned], 64) == data_hash([FULL], 64)


def test_the_hash_is_over_every_field_by_its_name():
    known = asdict(BARE)
    text = "mmclip-manifest-2 image_size=64\n" + json.dumps(known, sort_keys=True) + "\n"
    assert data_hash([BARE], 64) == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_of_another_format_is_refused_with_the_next_step(tmp_path: Path):
    meta = write(tmp_path, [BARE])
    for old, step in (({"format": 3}, "--overwrite"), ({"format": 5}, "install"), ({}, "--over")):
        rest = {key: value for key, value in meta.items() if key != "format"}
        (tmp_path / "meta.json").write_text(json.dumps({**rest, **old}))
        for read in (read_manifest, read_meta):
            with pytest.raises(ManifestError, match=f"format {old.get('format')}, .*{step}"):
                read(tmp_path)
        assert not is_built(tmp_path)


def test_a_changed_manifest_is_noticed(tmp_path: Path):
    write(tmp_path, [FULL, BARE])
    path = tmp_path / "samples.parquet"
    samples = [replace(sample, split="test") for sample in from_table(pq.read_table(path))]
    pq.write_table(to_table(samples), path)
    with pytest.raises(ManifestError, match="the data hash differs"):
        read_manifest(tmp_path)


def test_equal_records_in_other_bytes_are_read_as_those_of_older_builds_are(tmp_path: Path):
    meta = write(tmp_path, [FULL, BARE])
    path = tmp_path / "samples.parquet"
    assert meta["manifest_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    pq.write_table(pq.read_table(path), path, compression="none")
    assert meta["manifest_sha256"] != hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_manifest(tmp_path) == [FULL, BARE]
    write_meta(tmp_path, {k: v for k, v in meta.items() if k != "manifest_sha256"})
    assert read_manifest(tmp_path) == [FULL, BARE]


def test_records_of_equal_bytes_are_not_hashed_again(tmp_path: Path, monkeypatch):
    write(tmp_path, [FULL, BARE])
    monkeypatch.delattr("mmclip.data.manifest.data_hash")
    assert read_manifest(tmp_path) == [FULL, BARE]


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was_after_a_reading_and_after_an_error(
    tmp_path: Path, was_on: bool
):
    write(tmp_path, [FULL])
    try:
        if not was_on:
            gc.disable()
        read_manifest(tmp_path)
        assert gc.isenabled() == was_on
        (tmp_path / "samples.parquet").write_bytes(b"")
        with pytest.raises(ManifestError, match="damaged"):
            read_manifest(tmp_path)
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


def test_other_columns_are_named(tmp_path: Path):
    write(tmp_path, [FULL])
    path = tmp_path / "samples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("sex").append_column("gender", table["sex"]), path)
    with pytest.raises(ManifestError, match=r"missing \['sex'\], unknown \['gender'\]"):
        read_manifest(tmp_path)


def test_a_folder_without_meta_is_unfinished(tmp_path: Path):
    with pytest.raises(ManifestError, match="no finished data folder"):
        read_meta(tmp_path)


def test_meta_counts_add_up(tmp_path: Path):
    left_out = [
        Excluded(row=1, image_id="c", reason=Reason.IMAGE_BLANK),
        Excluded(row=2, image_id="é", reason=Reason.IMAGE_BLANK, detail="grey levels 0 to 0"),
        Excluded(row=4, image_id="", reason=Reason.NO_ID),
    ]
    meta = write(tmp_path, [FULL, BARE, replace(FULL, image_id="d", report=None)], left_out)
    assert meta == read_meta(tmp_path)
    counts = {key: value for key, value in meta.items() if key.startswith("n_")}
    assert counts == {
        "n_rows": 6, "n_samples": 3, "n_excluded": 3, "n_with_image": 2, "n_with_report": 2,
        "n_paired": 1, "n_studies": 2, "n_patients": 2, "n_split_by_source": 0,
    }  # fmt: skip
    assert meta["excluded"] == {str(Reason.IMAGE_BLANK): 2, str(Reason.NO_ID): 1}
    assert meta["splits"] == {"train": 2, "val": 1}
    lines = (tmp_path / "excluded.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [asdict(out) for out in left_out]


def test_no_manifest_is_written_without_splits_or_with_a_patient_in_two(tmp_path: Path):
    with pytest.raises(ManifestError, match="f1 has no split"):
        write(tmp_path, [sample(1)])
    with pytest.raises(ManifestError, match="patient p is in the splits train and val"):
        write(tmp_path, [sample(1, split="train"), sample(2, split="val")])
    assert not list(tmp_path.iterdir())


# Rules.


@pytest.mark.parametrize(
    ("broken", "reason", "detail"),
    [
        ({"image_id": " "}, Reason.NO_ID, ""),
        ({"patient_id": ""}, Reason.NO_PATIENT, ""),
        ({"report": None}, Reason.NOTHING_TO_LEARN, ""),
        ({"report": " "}, Reason.BAD_VALUE, "report=None"),
        ({"image": "a\0.png"}, Reason.BAD_VALUE, "NUL"),
        ({"split": "dev"}, Reason.BAD_VALUE, "'dev' is none of train, val, test"),
        ({"view": "lateral"}, Reason.BAD_VALUE, "'lateral' is none of PA"),
        ({"label_origin": "guess"}, Reason.BAD_VALUE, "'guess' is none of image-reader"),
        ({"labels": {"mass": 2}}, Reason.BAD_VALUE, "{'mass': 2}"),
    ],
)
def test_a_record_that_breaks_a_rule_is_excluded_and_says_which(broken, reason, detail):
    kept, (out,) = validate([sample(0), unchecked(sample(1), **broken), sample(2)])
    assert [row for row, _ in kept] == [0, 2]
    assert (out.row, out.reason) == (1, reason)
    assert detail in out.detail


def test_of_two_images_with_one_id_the_first_stays():
    kept, (out,) = validate([sample(1, report="A."), sample(1, report="B.")])
    assert [record.report for _, record in kept] == ["A."]
    assert (out.row, out.reason) == (1, Reason.DUPLICATE_ID)


def test_a_patient_in_two_splits_stays_in_the_one_used_last():
    records = [
        sample(0, "p", split="train"),
        sample(1, "p", split="test"),
        sample(2, "p", split="val"),
        sample(3, "p"),  # no split of its own: it follows
        sample(4, "q", split="train"),
    ]
    kept, excluded = validate(records)
    assert [row for row, _ in kept] == [1, 3, 4]
    assert [(out.row, out.reason) for out in excluded] == [
        (0, Reason.PATIENT_IN_TWO_SPLITS),
        (2, Reason.PATIENT_IN_TWO_SPLITS),
    ]
    splits = [record.split for record in assign_splits([record for _, record in kept])]
    assert splits == ["test", "test", "train"]


patients = st.sampled_from("abcdef")
given_splits = st.sampled_from([None, None, "train", "val", "test"])


@given(st.lists(st.tuples(patients, given_splits, st.booleans()), max_size=30), st.integers(0, 9))
def test_no_patient_is_ever_in_two_splits_and_no_row_is_lost(rows, seed):
    records = [
        Excluded(row=i, image_id=f"f{i}", reason=Reason.BAD_VALUE)
        if is_bad
        else sample(i, patient, split=split)
        for i, (patient, split, is_bad) in enumerate(rows)
    ]
    kept, excluded = validate(records)
    assert sorted([row for row, _ in kept] + [out.row for out in excluded]) == [*range(len(rows))]
    assert all(kept_image is records[row] for row, kept_image in kept)
    split_of: dict[str, set] = {}
    for record in assign_splits([record for _, record in kept], RandomSplit(seed)):
        split_of.setdefault(record.patient_id, set()).add(record.split)
    assert all(len(splits) == 1 and None not in splits for splits in split_of.values())
    for patient, splits in split_of.items():
        named = {split for p, split, is_bad in rows if p == patient and not is_bad} - {None}
        if named:
            assert splits == {max(named, key=["train", "val", "test"].index)}


# The draw of splits.


def drawn(patients: list[str], **options) -> dict[str, str | None]:
    records = assign_splits([sample(i, p) for i, p in enumerate(patients)], RandomSplit(**options))
    return {record.patient_id: record.split for record in records}


def test_the_draw_depends_on_the_patient_and_the_seed_alone():
    people = [f"p{i}" for i in range(200)]
    whole = drawn(people)
    assert drawn(people[::-1]) == whole
    some = people[3::7]
    assert drawn([*some, *some]) == {p: whole[p] for p in some}
    assert drawn(people, seed=1) != whole


# python -c "from hashlib import sha256; print([int.from_bytes(sha256(f'0/p{i}'.encode())
#   .digest()[:8], 'big') / 2**64 for i in range(8)])": below 0.1 is test, below 0.2 val.
GOLDEN_UNIFORMS = [0.0243, 0.5779, 0.1737, 0.1075, 0.8121, 0.3719, 0.0030, 0.7500]


def test_the_draw_is_this_one_for_ever():
    expected = ["test" if u < 0.1 else "val" if u < 0.2 else "train" for u in GOLDEN_UNIFORMS]
    assert list(drawn([f"p{i}" for i in range(8)]).values()) == expected


def test_the_ratios_are_those_asked_for():
    n = 5_000
    splits = list(drawn([f"p{i}" for i in range(n)], val_ratio=0.1, test_ratio=0.2).values())
    for name, ratio in (("val", 0.1), ("test", 0.2)):
        assert abs(splits.count(name) - n * ratio) < 4 * (n * ratio * (1 - ratio)) ** 0.5
    assert set(drawn(["a", "b", "c"], val_ratio=0.0, test_ratio=0.0).values()) == {"train"}


@pytest.mark.parametrize("ratios", [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5)])
def test_ratios_that_leave_nothing_to_train_on_are_refused(ratios):
    with pytest.raises(ValueError, match="less than 1"):
        assign_splits([sample(0)], RandomSplit(0, *ratios))


def test_images_resized_otherwise_are_other_data():
    assert data_hash([FULL], 64, "squash") == data_hash([FULL], 64)
    assert len({data_hash([FULL], 64, how) for how in ("squash", "pad", "crop")}) == 3
