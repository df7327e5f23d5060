import json
from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.openi_copies import read_openi_kaggle, read_openi_r2gen
from mmclip.data.sample import Reason
from tests.made_files import encoded, ramp
from tests.published import lay_out, parted

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi"
IMAGE = encoded(ramp())

# Kaggle's form.

REPORTS = (
    "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
    '1,normal,normal,Xray Chest PA and Lateral,Positive TB test,None.,"Lungs, heart: normal.",'
    "Normal chest x-XXXX.\n"
    "2,Cardiomegaly/mild;Opacity/lung,Cardiomegaly;Opacity,Chest,Cough.,None.,,Mild cardiomegaly.\n"
    "3,No Indexing,No Indexing,Chest,Cough.,None.,,\n"
)
PROJECTIONS = (
    "uid,filename,projection\n"
    "1,1_IM-0001-4001.dcm.png,Frontal\n"
    "1,1_IM-0001-3001.dcm.png,Lateral\n"
    "2,2_IM-0652-1001-0001.dcm.png,Frontal\n"
    "3,3_IM-1384-1001.dcm.png,Frontal\n"
)
NAMES = [line.split(",")[1] for line in PROJECTIONS.splitlines()[1:]]
KAGGLE = {"indiana_reports.csv": REPORTS, "indiana_projections.csv": PROJECTIONS}


def kaggle(folder: str) -> dict[str, bytes | str]:
    return {**KAGGLE, **{f"{folder}/{name}": IMAGE for name in NAMES}}


@pytest.mark.parametrize("folder", ["images/images_normalized", "images_normalized", "x"])
def test_kaggle_images_share_the_report_of_their_study(tmp_path: Path, folder: str):
    root = lay_out(tmp_path / "raw", kaggle(folder))
    meta = build_data(read_openi_kaggle(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (4, 4)
    normal, tags = (
        "Lungs, heart: normal. Normal chest x-ray.",
        ("Cardiomegaly/mild", "Opacity/lung"),
    )
    samples = read_manifest(tmp_path / "out")
    assert [(f.image_id, f.study_id, f.view, f.report, f.source_labels) for f in samples] == [
        ("CXR1_IM-0001-4001", "CXR1", "unknown", normal, ("normal",)),
        ("CXR1_IM-0001-3001", "CXR1", "L", normal, ("normal",)),
        ("CXR2_IM-0652-1001-0001", "CXR2", "unknown", "Mild cardiomegaly.", tags),
        ("CXR3_IM-1384-1001", "CXR3", "unknown", None, ("No Indexing",)),
    ]
    assert {(sample.source, sample.patient_id == sample.study_id) for sample in samples} == {
        ("openi", True)
    }


def test_kaggle_without_images_is_one_text_only_record_a_report(tmp_path: Path):
    samples, (out,) = parted(read_openi_kaggle(lay_out(tmp_path, KAGGLE)))
    assert [(sample.image_id, sample.image) for sample in samples] == [
        ("CXR1", None),
        ("CXR2", None),
    ]
    assert (out.row, out.image_id, out.reason) == (2, "CXR3", Reason.NOTHING_TO_LEARN)


def test_a_projection_that_is_unknown_or_of_no_report_is_left_out(tmp_path: Path):
    rows = PROJECTIONS.replace("4001.dcm.png,Frontal", "4001.dcm.png,Oblique").replace("3,3", "9,3")
    files = {**kaggle("images"), "indiana_projections.csv": rows}
    samples, excluded = parted(read_openi_kaggle(lay_out(tmp_path, files)))
    assert len(samples) == 2
    assert [(out.row, out.image_id, out.detail) for out in excluded] == [
        (0, "CXR1_IM-0001-4001", "projection is 'Oblique', not Lateral or Frontal"),
        (3, "CXR3_IM-1384-1001", "uid '9' is not in indiana_reports.csv"),
    ]


# R2Gen's form.

STUDIES = {
    "train": [("CXR2384_IM-0942", "Lungs are clear.", "train")],
    "val": [("CXR1_1_IM-0001", "A large XXXX effusion.", "val")],
    "    ": [("CXR7_IM-2-1001", "1. Cardiomegaly.", "test")],  # the third key of a real copy
}


def annotations(studies: dict[str, list[tuple[str, str, str]]]) -> str:
    return json.dumps(
        {
            key: [
                {
                    "id": name,
                    "report": report,
                    "image_path": [f"{name}/0.png", f"{name}/1.png"],
                    "split": split,
                }
                for name, report, split in listed
            ]
            for key, listed in studies.items()
        }
    )


def names() -> list[str]:
    return [name for listed in STUDIES.values() for name, *_ in listed]


@pytest.mark.parametrize("file", ["annotation.json", "iu_xray_annotation.json"])
def test_r2gen_studies_have_two_images_and_the_split_of_their_own_field(tmp_path: Path, file: str):
    samples = {f"images/{name}/{i}.png": IMAGE for name in names() for i in (0, 1)}
    root = lay_out(tmp_path / "raw", {file: annotations(STUDIES), **samples})
    meta = build_data(read_openi_r2gen(root), root, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_samples"]) == (6, 6)
    assert [
        (f.image_id, f.study_id, f.patient_id, f.split, f.report)
        for f in read_manifest(tmp_path / "out")
    ] == [
        (f"{name}/{i}", study, study, split, report)
        for name, study, split, report in (
            ("CXR2384_IM-0942", "CXR2384", "train", "Lungs are clear."),
            ("CXR1_1_IM-0001", "CXR1", "val", "A large effusion."),
            ("CXR7_IM-2-1001", "CXR7", "test", "Cardiomegaly."),
        )
        for i in (0, 1)
    ]


def test_a_study_with_another_split_or_without_a_report_is_left_out(tmp_path: Path):
    listed = json.loads(annotations(STUDIES))
    listed["train"][0]["split"] = "dev"
    del listed["val"][0]["report"]
    listed["val"].append("nothing")
    root = lay_out(tmp_path, {"annotation.json": json.dumps(listed)})
    samples, excluded = parted(read_openi_r2gen(root))
    assert [sample.image_id for sample in samples] == ["CXR7"]
    assert [(out.row, out.image_id) for out in excluded] == [
        (0, "CXR2384_IM-0942"), (1, "CXR1_1_IM-0001"), (2, ""),
    ]  # fmt: skip
    assert "'dev'" in excluded[0].detail and "'report'" in excluded[1].detail


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"train": 3}'])
def test_a_damaged_annotation_file_is_one_line(tmp_path: Path, text: str):
    with pytest.raises(SourceError, match=r"is no annotation file .*; download it again"):
        read_openi_r2gen(lay_out(tmp_path, {"annotation.json": text}))


def test_a_missing_table_is_one_line(tmp_path: Path):
    with pytest.raises(SourceError, match=r"holds no annotation\.json or iu_xray_annotation\.json"):
        read_openi_r2gen(tmp_path)
    lay_out(tmp_path, {"indiana_reports.csv": REPORTS, "a.png": IMAGE})
    with pytest.raises(SourceError, match=r"holds no indiana_projections\.csv; it comes from"):
        read_openi_kaggle(tmp_path)


# The real files, whole.

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/openi")


@pytest.mark.slow
@needs_real
def test_every_row_of_the_real_tables_of_kaggle_is_in_a_record(tmp_path: Path):
    texts, without = parted(read_openi_kaggle(REAL))
    assert (len(texts), len(without)) == (3_826, 25)
    names = ("indiana_reports.csv", "indiana_projections.csv")
    tables: dict[str, bytes | str | Path] = {name: REAL / name for name in names}
    made = {"images/images_normalized/1_IM-0001-4001.dcm.png": IMAGE}
    samples, excluded = parted(read_openi_kaggle(lay_out(tmp_path, {**tables, **made})))
    assert (len(samples), len(excluded)) == (7_466, 0)
    assert Counter(sample.view for sample in samples) == {"unknown": 3_818, "L": 3_648}
    assert len({sample.study_id for sample in samples}) == 3_851
    assert len({sample.image_id for sample in samples}) == 7_466
    with_report = {sample.study_id: sample.report for sample in samples if sample.report}
    assert with_report == {sample.study_id: sample.report for sample in texts}


@pytest.mark.slow
@needs_real
def test_every_study_of_the_real_annotation_file_is_in_a_record(tmp_path: Path):
    texts, excluded = parted(read_openi_r2gen(REAL))
    splits = {"train": 2_069, "val": 296, "test": 590}
    assert not excluded and Counter(sample.split for sample in texts) == splits
    assert all(sample.report for sample in texts)
    files = {"annotation.json": REAL / "iu_xray_annotation.json", "images/a/0.png": IMAGE}
    samples, _ = parted(read_openi_r2gen(lay_out(tmp_path, files)))
    assert len({sample.image_id for sample in samples}) == len(samples) == 2 * 2_955
    in_splits: dict[str | None, set[str | None]] = {}
    for sample in texts:
        in_splits.setdefault(sample.report, set()).add(sample.split)
    assert sum(len(splits) > 1 for splits in in_splits.values()) == 99
    findings = {sample.study_id: sample.findings for sample in parted(read_openi_kaggle(REAL))[0]}
    assert all(sample.report == findings[sample.study_id] for sample in texts)
