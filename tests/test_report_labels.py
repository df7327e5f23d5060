"""Labels that reports give, and how they are checked against labels of people."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmclip.data.entities import find_entities
from mmclip.data.folder import ManifestError, read_meta
from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.lexicon import read_lexicon
from mmclip.data.manifest import read_manifest, write_manifest
from mmclip.data.readers.vocabulary import load_vocabulary
from mmclip.data.report_labels import (
    Agreement,
    check_labels,
    derive_labels,
    label_folder,
    read_label_rules,
)
from mmclip.data.sample import Sample
from tests.commands import mmclip

RULES = read_label_rules("chexpert")
REPORTS = {
    "a": "Small effusion. No pneumothorax. Possible pneumonia.",
    "b": "No effusion or pneumothorax. The lungs are clear.",
    "c": None,
    "d": "Effusion.",
}


def samples() -> Iterator[Sample]:
    for image_id, report in REPORTS.items():
        yield Sample(
            image_id=image_id, study_id=image_id, patient_id=image_id, source="x", split="train",
            image=None if report else "x.png", report=report,
            labels={"edema": 1} if image_id == "d" else {},
            label_origin="image-reader" if image_id == "d" else None,
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_manifest(tmp_path / "data", list(samples()), [], None, {"reader": "csv"})
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("report", "labels"),
    [
        ("Small effusion.", {"pleural effusion": 1, "no finding": 0}),
        ("No effusion.", {"pleural effusion": 0, "no finding": 1}),
        ("Possible effusion.", {"pleural effusion": -1, "no finding": 0}),
        ("No left effusion. Possible right effusion.", {"pleural effusion": -1, "no finding": 0}),
        ("Possible effusion. Effusion.", {"pleural effusion": 1, "no finding": 0}),
        ("Rib fracture, no other fracture.", {"fracture": 1, "no finding": 0}),
        ("PICC line. Clear lungs.", {"support devices": 1, "no finding": 1}),
        ("Clear lungs.", {"no finding": 1}),
    ],
)
def test_the_surest_mention_makes_the_label(report, labels):
    (entities,) = find_entities([report])
    assert RULES.labels(entities) == labels


@pytest.mark.parametrize(
    ("report", "labels"),
    [
        ("The heart size is normal.", {"cardiomegaly": 0}),
        ("Heart: Normal.", {"cardiomegaly": 0}),
        ("Heart size - within normal limits", {"cardiomegaly": 0}),
        ("NORMAL HEART SIZE. LUNGS CLEAR.", {"cardiomegaly": 0}),
        ("Cardiac silhouette is unremarkable.", {"cardiomegaly": 0}),
        ("Heart size is at the upper limits of normal.", {"cardiomegaly": 0}),
        ("The heart is top normal in size.", {"cardiomegaly": 0}),
        ("Heart and lungs are normal.", {"cardiomegaly": 0}),
        ("Normal cardiac silhouette and hila.", {"cardiomegaly": 0}),
        (
            "Heart size and mediastinal contours are within normal limits.",
            {"cardiomegaly": 0, "enlarged cardiomediastinum": 0},
        ),
        (
            "Cardiomediastinal silhouette is normal.",
            {"cardiomegaly": 0, "enlarged cardiomediastinum": 0},
        ),
        ("Normal mediastinum.", {"enlarged cardiomediastinum": 0}),
        ("Heart/Mediastinum: Normal.", {"cardiomegaly": 0, "enlarged cardiomediastinum": 0}),
        ("The shadow overlies the heart, in normal position.", {}),
        ("Hilar and mediastinal contours: normal", {"enlarged cardiomediastinum": 0}),
        ("The heart is not normal.", {}),
        ("Heart size is probably normal.", {"cardiomegaly": -1}),
        ("Heart unchanged. Normal lungs.", {}),
        ("Heart is stable, lungs are normal.", {}),
        ("Heart partly obscured. Bones are normal.", {}),
        ("Heart size is normal, but there was cardiomegaly.", {"cardiomegaly": 1}),
        ("No cardiomegaly.", {"cardiomegaly": 0}),
    ],
)
def test_what_is_called_normal_is_not_enlarged(report, labels):
    sample = Sample(image_id="a", study_id="a", patient_id="a", source="x", report=report)
    (derived,) = derive_labels([sample], RULES)
    assert derived == {**labels, "no finding": int(set(labels.values()) <= {0})}


@pytest.mark.parametrize(
    ("uncertain_as", "label"), [("uncertain", -1), ("present", 1), ("absent", 0), ("unknown", None)]
)
def test_uncertain_mentions_count_as_they_are_asked_to(uncertain_as, label):
    (entities,) = find_entities(["Possible pneumonia."])
    labels = RULES.labels(entities, uncertain_as=uncertain_as)
    assert labels.get("pneumonia") == label and labels["no finding"] == 0


def test_every_finding_and_concept_of_the_rules_is_known():
    assert set(RULES.findings) <= set(load_vocabulary().findings)
    assert {c for some in RULES.findings.values() for c in some} <= read_lexicon().concepts


def test_a_folder_is_labelled_by_its_reports_and_labels_of_people_stay(folder: Path):
    before = read_meta(folder)
    done = label_folder(folder, RULES)
    assert (done.n_labelled, done.n_kept, done.n_without_report) == (2, 1, 1)
    a, b, c, d = read_manifest(folder)
    assert a.labels == {"no finding": 0, "pleural effusion": 1, "pneumonia": -1, "pneumothorax": 0}
    assert b.labels["no finding"] == 1 and b.label_origin == a.label_origin == "report-program"
    assert (c.labels, c.label_origin) == ({}, None)
    assert (d.labels, d.label_origin) == ({"edema": 1}, "image-reader")
    after = read_meta(folder)
    assert after["data_hash"] == done.data_hash != before["data_hash"]
    label_folder(folder, RULES, "absent")  # again, and otherwise
    assert read_manifest(folder)[0].labels["pneumonia"] == 0
    label_folder(folder, RULES)
    assert read_meta(folder)["data_hash"] == done.data_hash


def test_a_folder_without_anything_to_label_is_refused(tmp_path: Path):
    write_manifest(tmp_path / "x", [f for f in samples() if f.image_id in "cd"], [], None, {})
    with pytest.raises(ManifestError, match=r"no image of .* 1 of 2 have labels"):
        label_folder(tmp_path / "x", RULES)


def test_agreement_by_hand(folder: Path, tmp_path: Path):
    gold = tmp_path / "gold.csv"
    gold.write_text(
        "image_id,Pleural Effusion,pneumonia,Pneumothorax,reader\na,1,0,0,x\nb,0,,1,x\nz,1,1,1,x\n"
    )
    check = check_labels(folder, RULES, gold)
    assert (check.n_rows, check.n_not_here, check.ignored) == (2, 1, ("reader",))
    assert check.agreement["mention"]["micro"] == Agreement(5, 5, 5)
    assert check.agreement["negated"]["micro"] == Agreement(3, 3, 2)
    assert check.agreement["uncertain"]["pneumonia"] == Agreement(0, 1, 0)
    assert check.agreement["negated"]["pneumothorax"].precision == 0.5
    assert check.agreement["uncertain"]["pneumothorax"].f1 is None
    assert read_manifest(folder) == list(samples())  # nothing was changed


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("image_id,Edema\na,2\n", "row 0: Edema is '2'"),
        ("image_id,Foo\na,1\n", "no column names a finding"),
        ("image_id,Edema\nq,1\n", "none of its image_id"),
    ],
)
def test_a_gold_table_that_cannot_be_compared_says_why(folder: Path, tmp_path: Path, table, why):
    gold = tmp_path / "gold.csv"
    gold.write_text(table)
    with pytest.raises(SourceError, match=why):
        check_labels(folder, RULES, gold)


def test_a_gold_table_that_is_not_there_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=r"--check .*gold.csv: there is no such file; give a CSV"):
        check_labels(folder, RULES, tmp_path / "gold.csv")


def test_the_command_labels_checks_and_prints_json(folder: Path, tmp_path: Path):
    gold = tmp_path / "gold.csv"
    gold.write_text("image_id,Pleural Effusion\na,1\nb,0\n")
    ended = mmclip(tmp_path, "data", "labels", folder, "--check", gold)
    assert ended.code == 0
    assert json.loads(ended.out)["agreement"]["mention"]["micro"]["f1"] == 1.0
    ended = mmclip(tmp_path, "data", "labels", folder, "--uncertain-as", "unknown")
    assert ended.code == 0 and json.loads(ended.out)["labelled"] == 2
    assert "pneumonia" not in read_manifest(folder)[0].labels
    ended = mmclip(tmp_path, "data", "labels", folder, "--uncertain-as", "maybe")
    assert ended.code != 0 and "maybe is none of uncertain, present" in ended.err


def test_images_without_reports_get_no_labels():
    assert derive_labels([f for f in samples() if f.report is None], RULES) == [{}]
