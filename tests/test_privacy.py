"""Names and numbers of patients in a DICOM header reach nothing that a build leaves or says."""

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmclip.data.manifest import read_manifest
from tests.commands import mmclip
from tests.made_files import NAME, NUMBER, dicom, ramp
from tests.published import lay_out

SECRETS = (*NAME.split("^"), NUMBER, "19531224", "Hope Hospital", "Dr^Watson", "ACC-99")
HIDDEN = {
    "PatientBirthDate": "19531224",
    "OtherPatientIDs": NUMBER,
    "PatientComments": NAME,
    "PatientAddress": NAME,
    "InstitutionName": "Hope Hospital",
    "ReferringPhysicianName": "Dr^Watson",
    "AccessionNumber": "ACC-99",
    "StudyDescription": f"CHEST {NAME}",
    "ImageComments": NAME,
}


def images() -> dict[str, bytes]:
    """Six files: one sound, and others that a build may complain of in different places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that break the standard
        sound = dicom(ramp(), ViewPosition="PA", PatientAge="063Y", PatientSex="F", **HIDDEN)
        return {
            "1": sound,
            # Names where facts are read from: a careless hospital, and a file that breaks rules.
            "2": dicom(ramp(), ViewPosition=NAME, PatientAge=NAME, PatientSex=NAME, **HIDDEN),
            # What pydicom quotes: the first in a warning and a log, the second in an error.
            "3": dicom(ramp(), SpecificCharacterSet=NAME, **HIDDEN),
            "4": dicom(ramp(), PhotometricInterpretation=NAME, **HIDDEN),
            "5": sound[: len(sound) - 400],
            "6": dicom(np.full((24, 32), 7, np.uint8), WindowCenter=None, **HIDDEN),
        }


def layouts(samples: dict[str, bytes]) -> dict[str, dict[str, bytes | str]]:
    """A data set a reader, whose images are these."""
    ids = sorted(samples)
    study = {i: f"p10/p1000003{i}/s5041426{i}" for i in ids}
    return {
        "siim": {
            "train-rle.csv": "ImageId,EncodedPixels\n" + "".join(f"{i},-1\n" for i in ids),
            **{f"{i}.dcm": sample for i, sample in samples.items()},
        },
        "rsna": {
            "stage_2_train_labels.csv": "patientId,x,y,width,height,Target\n"
            + "".join(f"{i},,,,,0\n" for i in ids),
            **{f"{i}.dcm": sample for i, sample in samples.items()},
        },
        "vindr": {
            "train.csv": "image_id,class_name,rad_id\n"
            + "".join(f"{i},No finding,R{r}\n" for i in ids for r in (1, 2, 3)),
            **{f"train/{i}.dicom": sample for i, sample in samples.items()},
        },
        "mimic-cxr": {
            "cxr-record-list.csv.gz": gzip.compress(
                b"subject_id,study_id,dicom_id,path\n"
                + b"".join(f"1000003{i},5041426{i},{i},x\n".encode() for i in ids)
            ),
            **{f"files/{study[i]}/{i}.dcm": sample for i, sample in samples.items()},
            **{f"files/{study[i]}.txt": "FINDINGS: Lungs are clear." for i in ids},
        },
        "chexpert-plus": {
            "df_chexpert_plus_240401.csv": "path_to_image,frontal_lateral,ap_pa,report,"
            "section_findings,section_impression,split\n"
            + "".join(
                f"train/patient0000{i}/study1/view1.jpg,Frontal,PA,,Clear lungs.,,train\n"
                for i in ids
            ),
            **{f"train/patient0000{i}/study1/view1.dcm": sample for i, sample in samples.items()},
        },
        "csv": {
            "t.csv": "file,patient\n" + "".join(f"{i}.dcm,p{i}\n" for i in ids),
            "m.toml": 'table = "t.csv"\nsource = "s"\n[columns]\nimage = "file"\n'
            'patient_id = "patient"\n',
            **{f"{i}.dcm": sample for i, sample in samples.items()},
        },
    }


@pytest.mark.parametrize("reader", layouts({}))
def test_nothing_that_a_build_leaves_or_says_holds_a_word_of_the_patient(
    tmp_path: Path, reader: str
):
    root = lay_out(tmp_path / "raw", layouts(images())[reader])
    assert any(NUMBER.encode() in path.read_bytes() for path in root.rglob("*.d*m"))
    out = tmp_path / "out"
    mapping = ("--mapping", root / "m.toml") if reader == "csv" else ()
    build = ("data", "build", reader, "--root", root, "--out", out, "--image-size", 16, *mapping)
    ended = mmclip(tmp_path / "said", "--debug", *map(str, build), "--workers", "1")
    assert ended.code == 0, ended
    # Sound, and complained of: both kinds of image are among what is searched.
    assert {sample.image_id for sample in read_manifest(out)}
    assert (out / "excluded.jsonl").read_text("utf-8").count("\n") >= 2
    assert f"rows are excluded; which and why: {out / 'excluded.jsonl'}" in ended.err
    texts = {"stdout": ended.out, "stderr": ended.err, "the records": repr(read_manifest(out))}
    for path in out.rglob("*"):
        texts[path.name] = path.read_bytes().decode("latin1") if path.is_file() else ""
    assert not [(name, s) for name, text in texts.items() for s in SECRETS if s in name + text]
