from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.leakage.splits import physician_split
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.padchest import read_padchest
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import ABSENT, PRESENT, UNCERTAIN, RandomSplit, Reason, Sample
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
LEFT_OPEN = {f for meaning in load_words("padchest").words.values() for f in meaning.unknown}


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
    assert isinstance(sample, Sample)
    assert sample.labels == {"kyphosis": PRESENT, "thoracic cage deformation": PRESENT}
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
    for name, born in (("a", "2020.0"), ("b", "1850"), ("c", "inf")):
        assert read_one(tmp_path / name, PatientBirth=born).age_years is None
    assert read_one(tmp_path / "infant", PatientBirth="2014").age_years == 0.5


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


def test_unchanged_beside_normal_leaves_nothing_open(tmp_path: Path):
    sample = read_one(tmp_path, Labels="['normal', ' unchanged']")
    assert isinstance(sample, Sample)
    assert sample.labels == {f: int(f == "no finding") for f in sorted(CLOSED)}
    sample = read_one(tmp_path / "poor", Labels="['normal', 'suboptimal study']")
    assert isinstance(sample, Sample) and sample.labels == {"no finding": PRESENT}
    sample = read_one(tmp_path / "both", Labels="['unchanged', 'normal', 'suboptimal study']")
    assert isinstance(sample, Sample) and sample.labels == {"no finding": PRESENT}


PARENTS = {
    "calcified densities": (
        "calcified granuloma", "calcified adenopathy", "calcified pleural thickening",
        "calcified pleural plaques", "heart valve calcified", "calcified fibroadenoma",
    ),
    "calcified adenopathy": ("calcified mediastinal adenopathy",),
    "granuloma": ("calcified granuloma",),
    "adenopathy": ("calcified adenopathy",),
    "nodule": ("multiple nodules",),
    "pseudonodule": ("nipple shadow", "end on vessel"),
    "pneumothorax": ("hydropneumothorax",),
    "infiltrates": ("interstitial pattern", "alveolar pattern"),
    "interstitial pattern": (
        "ground glass pattern", "reticular interstitial pattern",
        "reticulonodular interstitial pattern", "miliary opacities",
    ),
    "alveolar pattern": ("consolidation", "air bronchogram"),
    "consolidation": ("air bronchogram",),
    "atelectasis": (
        "total atelectasis", "lobar atelectasis", "segmental atelectasis", "laminar atelectasis",
        "round atelectasis", "atelectasis basal",
    ),
    "fissure thickening": (
        "minor fissure thickening", "major fissure thickening", "loculated fissural effusion",
    ),
    "pleural thickening": ("apical pleural thickening", "calcified pleural thickening"),
    "pleural plaques": ("calcified pleural plaques",),
    "pleural effusion": (
        "loculated pleural effusion", "loculated fissural effusion", "hydropneumothorax", "empyema",
    ),
    "vascular redistribution": ("central vascular redistribution",),
    "hilar enlargement": ("adenopathy", "vascular hilar enlargement"),
    "vascular hilar enlargement": ("pulmonary artery enlargement",),
    "aortic elongation": (
        "descendent aortic elongation", "ascendent aortic elongation", "aortic button enlargement",
        "supra aortic elongation",
    ),
    "mediastinal enlargement": (
        "superior mediastinal enlargement", "descendent aortic elongation",
        "ascendent aortic elongation", "aortic aneurysm", "mediastinal mass", "hiatal hernia",
    ),
    "superior mediastinal enlargement": ("goiter", "supra aortic elongation"),
    "mass": (
        "mediastinal mass", "breast mass", "pleural mass", "pulmonary mass", "soft tissue mass",
    ),
    "thoracic cage deformation": (
        "scoliosis", "kyphosis", "pectum excavatum", "pectum carinatum", "cervical rib",
    ),
    "vertebral degenerative changes": ("vertebral compression",),
    "vertebral compression": ("vertebral anterior compression",),
    "sclerotic bone lesion": ("blastic bone lesion",),
    "fracture": ("clavicle fracture", "humeral fracture", "vertebral fracture", "rib fracture"),
    "rib fracture": ("callus rib fracture",),
    "catheter": ("central venous catheter",),
    "central venous catheter": (
        "central venous catheter via subclavian vein", "central venous catheter via jugular vein",
        "reservoir central venous catheter", "central venous catheter via umbilical vein",
    ),
    "electrical device": ("dual chamber device", "single chamber device", "pacemaker", "dai"),
    "artificial heart valve": ("artificial mitral heart valve", "artificial aortic heart valve"),
    "surgery": (
        "metal", "bone cement", "prosthesis", "surgery breast", "surgery neck", "surgery lung",
        "surgery heart", "surgery humeral",
    ),
    "metal": ("osteosynthesis material", "sternotomy", "suture material"),
    "prosthesis": ("humeral prosthesis", "mammary prosthesis", "endoprosthesis"),
    "endoprosthesis": ("aortic endoprosthesis",),
    "surgery breast": ("mastectomy",),
    "pneumonia": ("atypical pneumonia",),
    "tuberculosis": ("tuberculosis sequelae",),
    "pulmonary fibrosis": ("post radiotherapy changes", "asbestosis signs"),
    "pulmonary hypertension": ("pulmonary artery hypertension", "pulmonary venous hypertension"),
}  # fmt: skip
"""The branches of the authors' tree of terms (tree_term_CUI_counts_image_covid_1.csv of
auriml/Rx-thorax-automatic-captioning), by their words. Adenopathy stands in it twice, once with its
calcified kind: that one is no kind of hilar enlargement."""

NOT_A_KIND = {("tuberculosis", "tuberculosis sequelae")}  # healed


@pytest.mark.parametrize("parent", PARENTS)
def test_a_kind_of_a_finding_names_it_and_the_finding_alone_leaves_its_kinds_open(parent: str):
    words = load_words("padchest")
    own = set(words.words[parent].present)
    for kind in PARENTS[parent]:
        said = words.words[kind]
        if (parent, kind) in NOT_A_KIND:
            assert own <= set(said.unknown)
            continue
        above = own if (parent, kind) != ("adenopathy", "calcified adenopathy") else own - {
            "hilar enlargement"
        }  # fmt: skip
        assert above <= set(said.present), kind
        below = set(said.present) & CLOSED - own
        beside = {f for other, kinds in PARENTS.items() if other != parent and kind in kinds
                  for f in words.words[other].present}  # fmt: skip
        assert below - beside <= set(words.words[parent].unknown), kind


@pytest.mark.parametrize(
    ("word", "present", "unknown"),
    [
        ("empyema", {"empyema", "pleural effusion"}, set()),
        ("air bronchogram", {"consolidation", "infiltration", "alveolar pattern"}, set()),
        ("alveolar pattern", {"infiltration"}, {"consolidation"}),
        ("ground glass pattern", {"infiltration"}, set()),
        ("pleural mass", {"mass"}, set()),
        ("mediastinal mass", {"mass"}, set()),
        ("electrical device", {"support devices"}, {"pacemaker"}),
        ("costophrenic angle blunting", set(), {"pleural effusion"}),
        ("vertebral compression", set(), {"fracture"}),
        ("vertebral anterior compression", set(), {"fracture"}),
        ("kerley lines", set(), {"edema"}),
    ],
)
def test_a_word_alone_is_absent_for_nothing_that_it_shows_or_may_show(
    tmp_path: Path, word: str, present: set[str], unknown: set[str]
):
    sample = read_one(tmp_path, Labels=f"['{word}']")
    assert isinstance(sample, Sample)
    assert present <= {f for f, label in sample.labels.items() if label == PRESENT}
    assert not unknown & sample.labels.keys()
    named = set(load_words("padchest").words[word].present)
    assert {f for f in CLOSED if f not in sample.labels} == unknown | (
        CLOSED & set(load_words("padchest").words[word].unknown)
    )
    assert all(sample.labels[f] == ABSENT for f in sample.labels.keys() - named)


def test_a_finding_that_another_word_names_is_present_beside_its_sign(tmp_path: Path):
    sample = read_one(tmp_path, Labels="['costophrenic angle blunting', 'pleural effusion']")
    assert isinstance(sample, Sample) and sample.labels["pleural effusion"] == PRESENT


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
    chosen = physician_split(samples, RandomSplit())
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
    n_open = n_partly_open = 0
    for sample in samples:
        words = set(sample.source_labels)
        if (
            not words
            or "suboptimal study" in words
            or words & {"unchanged", "normal"} == {"unchanged"}
        ):
            n_open += 1
            assert ABSENT not in sample.labels.values()
        else:
            assert sample.labels.keys() >= CLOSED - LEFT_OPEN
            n_partly_open += not sample.labels.keys() >= CLOSED
    assert n_open == 16_001 - 28 + 880  # 28 are both unchanged and normal
    assert n_partly_open > 0
    assert sum(sample.findings is None for sample in samples) == 133
    assert samples[0].image == f"0/{name}"


@pytest.mark.parametrize(
    "cell", ["['pneumonia', nan]", "[nan, ' pneumonia']", "[nan,'pneumonia',nan]"]
)
def test_a_missing_word_in_a_list_is_passed_over(tmp_path: Path, cell: str):
    assert read_one(tmp_path, Labels=cell).source_labels == ("pneumonia",)
