"""The synthetic images: what they show, what their reports say, and what must not leak."""

import csv
import hashlib
import json
import re
import tomllib
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.sources import open_reader
from mmclip.data.manifest import read_manifest
from mmclip.data.sample import Split
from mmclip.data.synthetic import (
    FINDINGS,
    PRESETS,
    Combination,
    Lesion,
    Preset,
    SyntheticSample,
    make_patient,
    make_study,
    n_images,
    read_masks,
    write_dataset,
)
from mmclip.data.synthetic.image import develop, draw_exposure
from mmclip.data.synthetic.language import write_report
from mmclip.data.synthetic.lesions import DEVICES, HEART_RATIO, draw_lesion
from mmclip.data.synthetic.phantom import Canvas, draw_anatomy
from mmclip.data.synthetic.preset import SIDES, SIZES

DEMO = PRESETS["demo"]
TINY = replace(DEMO, name="tiny", n_train=30, n_val=10, n_test=10, n_held_out=12, n_unpaired=5)

SAYS = {
    "atelectasis": r"atelecta",
    "cardiomegaly": r"cardiomegaly|enlarge\w* of the heart|cardiac enlarg|heart is \w* ?enlarged",
    "consolidation": r"consolidation|airspace opacity",
    "edema": r"edema",
    "hiatal hernia": r"hernia",
    "hilar enlargement": (
        r"hilar (enlarge|promin|adeno)|enlargement of (the \w+|both) hil|the hila$"
    ),
    "mass": r"\bmass\b",
    "nodule": r"nodule",
    "pleural effusion": r"effusion|pleural fluid|costophrenic angle is blunted",
    "pneumothorax": r"pneumothorax",
    "rib fracture": r"rib fracture|fracture",
    "support devices": r"support device|lines (or|and) tubes|catheter|tube|pacemaker",
}
"""Written by hand from radiology words, apart from the generator's templates."""

DENIED = re.compile(r"^(No|There is no|There are no)\b")


@cache
def samples(n: int = 420, split: str = "train") -> tuple[SyntheticSample, ...]:
    return tuple(make_patient(DEMO, split, i) for i in range(n))  # pyright: ignore


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.]) ", re.sub(r"(^| )\d+\. ", r"\1", text)) if text else []


def statements(text: str, finding: str) -> tuple[int, int]:
    """Sentences that say a finding is there, and sentences that deny it."""
    about = [s for s in sentences(text) if re.search(SAYS[finding], s, re.IGNORECASE)]
    denied = sum(bool(DENIED.match(s)) for s in about)
    return len(about) - denied, denied


def drawn(finding: str, size: str, side: str, seed: int, image_size: int = 64):
    """One finding alone, with all else decided by the seed: image, mask and canvas."""
    preset = replace(DEMO, image_size=image_size)
    rng = np.random.default_rng(seed)
    anatomy, exposure = draw_anatomy(rng, "M"), draw_exposure(rng, preset)
    if finding == "cardiomegaly":
        anatomy = replace(anatomy, heart_ratio=HEART_RATIO[size])
    kinds = DEVICES[: 1 + SIZES.index(size)] if finding == "support devices" else ()
    canvas = Canvas(anatomy, image_size, exposure.pose)
    lesion, mask = draw_lesion(canvas, rng, Lesion(finding, side, size, kinds=kinds), preset)
    image = develop(canvas, exposure, np.random.default_rng(seed), preset)
    return image, mask, canvas, lesion


# --- determinism -------------------------------------------------------------------------------


def same(a: SyntheticSample, b: SyntheticSample) -> bool:
    masks = all(np.array_equal(a.masks[k], b.masks[k]) for k in FINDINGS if k in a.masks)
    plain = (a.image_id, a.lesions, a.findings, a.impression, a.age_years, a.sex, a.view)
    other = (b.image_id, b.lesions, b.findings, b.impression, b.age_years, b.sex, b.view)
    return np.array_equal(a.image, b.image) and masks and plain == other


def test_patient_does_not_depend_on_those_made_before():
    alone = make_patient(DEMO, "val", 7)
    for i in (3, 9, 1):
        make_patient(DEMO, "val", i)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    assert same(make_patient(DEMO, "val", 7), alone)


def test_seed_version_split_and_index_each_change_the_patient():
    base = make_patient(DEMO, "train", 3)
    others = [
        make_patient(replace(DEMO, seed=DEMO.seed + 1), "train", 3),
        make_patient(replace(DEMO, version=DEMO.version + 1), "train", 3),
        make_patient(DEMO, "val", 3),
        make_patient(DEMO, "train", 4),
    ]
    for other in others:
        assert not np.array_equal(base.image, other.image)


def test_other_counts_leave_a_patient_alone():
    assert same(make_patient(replace(DEMO, n_train=5000), "train", 3), samples()[3])


def test_unknown_patient_is_an_error_that_names_the_split():
    with pytest.raises(IndexError, match="patient 400 of val"):
        make_patient(DEMO, "val", 400)


# --- anatomy and lesions -----------------------------------------------------------------------


def test_image_is_an_image():
    for made in samples(40):
        assert made.image.shape == (64, 64) and made.image.dtype == np.uint8
        assert made.image.std() > 25, made.image_id


def test_right_lung_is_on_the_left_of_the_image_and_heart_on_the_right():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        canvas = Canvas(draw_anatomy(rng, "F"), 64, draw_exposure(rng, DEMO).pose)
        columns = np.arange(64)
        lung_of = {side: canvas.air * canvas.side(side) for side in ("right", "left")}
        centre = {side: (air.sum(0) @ columns) / air.sum() for side, air in lung_of.items()}
        assert centre["right"] < centre["left"]
        heart = (canvas.heart.sum(0) @ columns) / canvas.heart.sum()
        assert heart > (canvas.lung.sum(0) @ columns) / canvas.lung.sum()


def test_lungs_are_darker_than_heart_and_diaphragm():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        exposure = draw_exposure(rng, DEMO)
        canvas = Canvas(draw_anatomy(rng, "M"), 64, exposure.pose)
        image = develop(canvas, exposure, rng, DEMO)
        assert image[canvas.air > 0.9].mean() < image[canvas.heart > 0.9].mean() - 25


def test_a_healthy_heart_is_at_most_half_the_chest_and_an_enlarged_one_more():
    def ratio(heart_ratio: float | None, seed: int) -> float:
        rng = np.random.default_rng(seed)
        anatomy = draw_anatomy(rng, "M")
        if heart_ratio is not None:
            anatomy = replace(anatomy, heart_ratio=heart_ratio)
        upright = replace(draw_exposure(rng, DEMO).pose, rotation_rad=0.0)
        canvas = Canvas(anatomy, 256, upright)
        inside = canvas.v < max(anatomy.dome_left_v, anatomy.dome_right_v) + 0.1
        heart = np.ptp(canvas.u[(canvas.heart > 0.5) & inside])
        return float(heart / np.ptp(canvas.u[canvas.lung > 0.5]))

    healthy = [ratio(None, seed) for seed in range(15)]
    enlarged = [ratio(HEART_RATIO["small"] - 0.02, seed) for seed in range(15)]
    assert max(healthy) <= 0.5 < min(enlarged)


@pytest.mark.parametrize("finding", FINDINGS)
def test_mask_lies_in_the_image_on_its_side_and_grows_with_size(finding: str):
    area: dict[str, list[float]] = {size: [] for size in SIZES}
    for side in SIDES[finding]:
        for size in SIZES:
            for seed in range(6):
                _, mask, canvas, _ = drawn(finding, size, side, seed)
                assert mask.dtype == bool and mask.any(), (size, side, seed)
                if side in ("left", "right"):
                    other = canvas.side("right" if side == "left" else "left")
                    assert not (mask & other).any(), (size, side, seed)
                if side == "bilateral":
                    assert (mask & canvas.side("left")).any(), (size, seed)
                    assert (mask & canvas.side("right")).any(), (size, seed)
                area[size].append(float(mask.mean()))
    small, moderate, large = (np.mean(area[size]) for size in SIZES)
    assert small < moderate < large


@pytest.mark.parametrize("finding", [f for f in FINDINGS if f != "support devices"])
def test_mask_lies_in_the_chest(finding: str):
    for seed in range(8):
        _, mask, canvas, _ = drawn(finding, "large", SIDES[finding][0], seed)
        chest = (canvas.r < canvas.wall + 0.1) & (canvas.v < canvas.dome + 0.35)
        assert (mask & ~chest).sum() <= 0.02 * mask.sum()


@pytest.mark.parametrize("finding", FINDINGS)
def test_image_changes_in_the_mask_more_than_outside(finding: str):
    if finding == "cardiomegaly":
        pytest.skip("the heart moves its own borders; the heart ratio test covers it")
    for seed in range(6):
        preset = DEMO
        image, mask, _, _ = drawn(finding, "large", SIDES[finding][0], seed)
        rng = np.random.default_rng(seed)
        anatomy, exposure = draw_anatomy(rng, "M"), draw_exposure(rng, preset)
        healthy = develop(
            Canvas(anatomy, 64, exposure.pose), exposure, np.random.default_rng(seed), preset
        )
        change = np.abs(image.astype(float) - healthy)
        assert change[mask].mean() > 4 * change[~mask].mean() + 4, seed


def test_lesions_of_the_demo_are_small_against_the_image():
    focal = {"nodule", "atelectasis", "rib fracture"}
    areas = [m.mean() for made in samples() for k, m in made.masks.items() if k in focal]
    assert len(areas) > 50 and np.mean(areas) < 0.02


def test_zone_says_where_the_mask_is():
    for seed in range(30):
        _, mask, canvas, lesion = drawn("nodule", "large", "left", seed)
        height = canvas.v[mask].mean()
        assert (lesion.zone == "upper") == (height < -0.22)
        assert (lesion.zone == "lower") == (height >= 0.12)


def test_second_image_shows_the_same_lesion_under_another_exposure():
    checked = 0
    for index in range(60):
        first, second = make_patient(DEMO, "train", index), make_patient(DEMO, "train", index, 1)
        assert (first.study_id, first.findings) == (second.study_id, second.findings)
        assert [(x.finding, x.side, x.size) for x in first.lesions] == [
            (x.finding, x.side, x.size) for x in second.lesions
        ]
        assert first.image_id != second.image_id
        assert not np.array_equal(first.image, second.image)
        for lesion, again in zip(first.lesions, second.lesions, strict=True):
            if lesion.finding == "nodule":
                a, b = (np.argwhere(x.masks["nodule"]).mean(0) for x in (first, second))
                assert np.hypot(*(a - b)) < 24  # pose moves it, chance would put it anywhere
                assert {lesion.zone, again.zone} != {"upper", "lower"}
                checked += 1
    assert checked >= 3


def test_share_of_second_images_is_the_preset_s():
    n = sum(n_images(DEMO, "train", i) - 1 for i in range(2000))
    assert 60 < n < 140
    two = next(i for i in range(200) if n_images(DEMO, "train", i) == 2)
    assert len(make_study(DEMO, "train", two)) == 2


# --- what is drawn -----------------------------------------------------------------------------


def test_number_of_findings_follows_the_prior_and_findings_are_independent():
    labels = np.array([[k in made.labels for k in FINDINGS] for made in samples()])
    counts = np.bincount(labels.sum(1), minlength=4) / len(labels)
    assert np.abs(counts - DEMO.n_findings_probs).max() < 0.06
    correlation = np.corrcoef(labels.T)[np.triu_indices(len(FINDINGS), 1)]
    assert abs(correlation.mean()) < 0.02 and np.abs(correlation).max() < 0.16


def test_held_out_combinations_occur_in_their_test_patients_only():
    held_out = set(DEMO.held_out)
    ordinary = [*samples(), *samples(60, "val"), *samples(60, "test")]
    seen = {Combination(x.finding, x.side, x.size) for made in ordinary for x in made.lesions}
    assert not seen & held_out
    assert all(made.held_out is None for made in ordinary)
    for i in range(DEMO.n_test, DEMO.n_test + 18):
        made = make_patient(DEMO, "test", i)
        shown = {Combination(x.finding, x.side, x.size) for x in made.lesions}
        assert made.held_out in held_out and shown & held_out == {made.held_out}


def test_every_finding_side_and_size_occurs():
    seen = {(x.finding, x.side, x.size) for made in samples() for x in made.lesions}
    assert {(f, s) for f, s, _ in seen} == {(f, s) for f in FINDINGS for s in SIDES[f]}
    assert {(f, z) for f, _, z in seen} == {(f, z) for f in FINDINGS for z in SIZES}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"finding_weights": (("cough", 1.0),)}, "cough"),
        ({"held_out": (Combination("edema", "left", "small"),)}, "edema"),
        ({"size_probs": (0.5, 0.5, 0.5)}, "size_probs"),
        ({"n_findings_probs": (1.5, -0.5)}, "n_findings_probs"),
        ({"held_out": ()}, "n_held_out"),
    ],
)
def test_a_preset_that_cannot_be_made_is_refused(knobs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(DEMO, **knobs)


def test_finding_weights_change_the_frequency():
    preset = replace(DEMO, finding_weights=(("nodule", 10.0), ("mass", 0.0)))
    labels = [make_patient(preset, "train", i).labels for i in range(100)]
    n = {name: sum(name in x for x in labels) for name in ("nodule", "mass", "edema")}
    assert n["mass"] == 0 and n["nodule"] > 2 * n["edema"]


# --- reports -----------------------------------------------------------------------------------


def test_reports_state_every_present_finding_and_no_absent_one():
    for made in samples():
        for finding in FINDINGS:
            stated, denied = statements(made.findings, finding)
            concluded, _ = statements(made.impression, finding)
            if finding in made.labels:
                assert stated >= 1 and concluded >= 1, (made.image_id, finding, made.findings)
                assert denied == 0, (made.image_id, finding, made.findings)
            else:
                assert stated == concluded == 0, (made.image_id, finding, made.findings)


def test_reports_do_not_deny_every_absent_finding():
    shares = [
        np.mean([statements(made.findings, f)[1] > 0 for f in FINDINGS if f not in made.labels])
        for made in samples(200)
    ]
    assert 0.1 < np.mean(shares) < 0.5


def test_side_in_the_report_is_the_side_of_the_mask():
    checked = 0
    for made in samples():
        if len(made.lesions) != 1 or made.lesions[0].side not in ("left", "right"):
            continue
        lesion, text = made.lesions[0], made.findings + " " + made.impression
        other = "right" if lesion.side == "left" else "left"
        assert re.search(rf"\b{lesion.side}\b", text, re.IGNORECASE), text
        assert not re.search(rf"\b{other}\b", text, re.IGNORECASE), text
        columns = np.argwhere(made.masks[lesion.finding])[:, 1]
        # The patient's right is on the image's left, up to the patient's own shift and rotation.
        assert (columns.mean() < 40) if lesion.side == "right" else (columns.mean() > 24)
        checked += 1
    assert checked > 60


def test_size_words_do_not_contradict_the_size():
    small = re.compile(r"\b(small|tiny|minimal|mild|slight|mildly|slightly)\b(?! rotated)")
    large = re.compile(r"\b(large|extensive|severe|marked|sizeable|severely|markedly)\b", re.I)
    for made in samples():
        text = made.findings.replace("Mild degenerative", "") + " " + made.impression
        sizes = {lesion.size for lesion in made.lesions}
        if "small" not in sizes:
            assert not small.search(text), text
        if "large" not in sizes:
            assert not large.search(text), text


def test_reports_are_varied_and_well_formed():
    texts = [made.findings for made in samples()]
    assert len(set(texts)) > 0.97 * len(texts)
    for made in samples():
        for sentence in sentences(made.findings) + sentences(made.impression):
            assert re.fullmatch(r"[A-Z][^{}]*\.", sentence), sentence
            assert "  " not in sentence and " ." not in sentence and " ," not in sentence
            assert not re.search(
                r"\ba [aeiou]|\ban [^aeiou]|(effusions|fractures|devices|tubes) is|"
                r"\bnone\b(?! avail)",
                sentence,
            )


def test_reports_hedge_and_omit_as_often_as_the_preset_says():
    lesions = (Lesion("mass", "left", "large", "upper"),)
    hedge = re.compile(
        "possible|suspected|cannot be excluded|may represent|questionable|probable", re.I
    )
    for prob in (0.0, 0.5, 1.0):
        preset = replace(DEMO, uncertain_prob=prob)
        texts = [write_report(np.random.default_rng(i), lesions, preset)[0] for i in range(200)]
        assert np.mean([bool(hedge.search(t)) for t in texts]) == pytest.approx(prob, abs=0.1)
    preset = replace(DEMO, omission_prob=1.0)
    for i in range(20):
        text = " ".join(write_report(np.random.default_rng(i), lesions, preset))
        assert statements(text, "mass") == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    finding=st.sampled_from(FINDINGS),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_any_single_lesion_is_told_with_its_side(finding, size, seed, data):
    side = data.draw(st.sampled_from(SIDES[finding]))
    kinds = DEVICES[:2] if finding == "support devices" else ()
    zone = "mid" if side in ("left", "right") else ""
    lesion = Lesion(finding, side, size, zone, kinds)
    findings, impression = write_report(np.random.default_rng(seed), (lesion,), DEMO)
    assert statements(findings, finding)[0] >= 1
    words = {"left": "left", "right": "right", "bilateral": "bilateral|both|bilaterally"}
    if side in words:
        assert re.search(words[side], impression, re.IGNORECASE), impression
    assert "{" not in findings + impression


# --- shortcuts ---------------------------------------------------------------------------------


def shortcut_auroc(features: np.ndarray, made: tuple[SyntheticSample, ...]) -> np.ndarray:
    """AUROC of a logistic regression on `features`, for each finding, on the last third."""
    labels = np.array([[k in m.labels for k in FINDINGS] for m in made])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    cut = len(made) * 2 // 3
    scores = []
    for k in range(len(FINDINGS)):
        model = LogisticRegression(C=0.01).fit(features[:cut], labels[:cut, k])
        scores.append(roc_auc_score(labels[cut:, k], model.decision_function(features[cut:])))
    return np.array(scores)


def test_markers_and_border_tell_nothing():
    made = samples()
    edge = np.stack([np.r_[m.image[:5].ravel(), m.image[-3:].ravel()] for m in made]) / 255
    scores = shortcut_auroc(edge, made)
    assert scores.mean() < 0.56, scores  # a shortcut raises it; chance alone moves it by 0.03


def test_age_sex_view_and_index_tell_nothing():
    made = samples()
    facts = np.array([[m.age_years, m.sex == "F", m.view == "AP", i] for i, m in enumerate(made)])
    scores = shortcut_auroc(facts.astype(float), made)
    assert scores.mean() < 0.56, scores  # a shortcut raises it; chance alone moves it by 0.03


def test_mean_brightness_tells_little():
    made = samples()
    brightness = np.array([[m.image.mean() / 255] for m in made])
    scores = np.maximum(shortcut_auroc(brightness, made), 0.5)
    assert scores.mean() < 0.6, scores


def test_the_indication_tells_nothing():
    made = samples()
    cough = np.array([["cough" in m.findings, "breath" in m.findings] for m in made], float)
    assert abs(shortcut_auroc(cough, made).mean() - 0.5) < 0.06


# --- on disk -----------------------------------------------------------------------------------


def rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix != ".npz"
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(TINY, tmp_path_factory.mktemp("synthetic") / "tiny")


def test_written_folder_agrees_with_the_patients(written: Path):
    studies = rows(written / "studies.csv")
    assert len({row["image_id"] for row in studies}) == len(studies) >= 67
    masks, lesions = read_masks(written), rows(written / "lesions.csv")
    for row in studies:
        index, which = int(row["patient_id"].rsplit("-", 1)[1]), int(row["image_id"][-1]) - 1
        made = make_patient(TINY, row["split"], index, which)  # pyright: ignore
        assert np.array_equal(np.array(Image.open(written / row["image"])), made.image)
        assert (row["findings"], row["impression"]) == (made.findings, made.impression)
        assert row["labels"] == "|".join(made.labels)
        assert row["held_out"] == ("" if made.held_out is None else str(made.held_out))
        for name, mask in made.masks.items():
            assert np.array_equal(masks[row["image_id"], name], mask)
    assert {(x["image_id"], x["finding"]) for x in lesions} == set(masks)
    for x in lesions:
        area = masks[x["image_id"], x["finding"]].mean()
        assert float(x["area_ratio"]) == pytest.approx(area, abs=1e-6)


def test_patients_have_one_split_and_unpaired_ones_no_report(written: Path):
    studies = rows(written / "studies.csv")
    for a, b in combinations(("train", "val", "test"), 2):
        patients = [{r["patient_id"] for r in studies if r["split"] == s} for s in (a, b)]
        assert not patients[0] & patients[1]
    silent = {r["patient_id"] for r in studies if not r["findings"] and not r["impression"]}
    assert silent == {f"tiny-train-{i:06d}" for i in range(30, 35)}


def test_bytes_do_not_depend_on_the_number_of_workers(written: Path, tmp_path: Path):
    calls = []
    two = write_dataset(TINY, tmp_path / "two", 2, calls.append)
    assert contents(two) == contents(written)
    assert np.array_equal(
        np.stack(list(read_masks(two).values())), np.stack(list(read_masks(written).values()))
    )
    assert sum(calls) == 67 and min(calls) > 0


def test_mapping_names_columns_of_the_table_and_all_findings(written: Path):
    mapping = tomllib.loads((written / "mapping.toml").read_text("utf-8"))
    assert set(mapping["columns"].values()) <= set(rows(written / "studies.csv")[0])
    assert tuple(mapping["labels"]["closed"]["*"]) == FINDINGS


def test_a_folder_of_something_else_is_not_written_into(written: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty folder"):
        write_dataset(TINY, tmp_path)
    with pytest.raises(ValueError, match="empty folder"):
        write_dataset(replace(TINY, seed=1), written)


def test_presets_are_named_after_their_key():
    assert all(isinstance(p, Preset) and p.name == key for key, p in PRESETS.items())


# --- the frozen benchmark ----------------------------------------------------------------------

HARD = PRESETS["hard"]


def patients_hash(preset: Preset, split: Split, indices: range) -> str:
    """SHA-256 over the images, labels and reports of some patients."""
    digest = hashlib.sha256()
    for index in indices:
        for made in make_study(preset, split, index):
            told = [made.image_id, made.labels, made.findings, made.impression]
            digest.update(json.dumps(told).encode())
            digest.update(made.image.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "7cc19b473a0b4e60a76c4ab97dbe1ac4245cb8cc3d1df8a284b25d500bf19b94"),
        ("val", "4a5431d1d5bc7a09ccc80616e1f275a7958806c13b9f616939e82ad55c727e08"),
        ("test", "221825d2a1ac4c95068817e2156e5ae06e50759c50941cb2a2b07d13789e31ad"),
    ],
)
def test_the_frozen_preset_makes_the_images_and_reports_it_made_when_it_was_chosen(
    split: Split, digest: str
):
    assert patients_hash(HARD, split, range(16)) == digest


def test_no_knob_of_the_frozen_preset_has_moved():
    # Images pin the knobs that draw, not the counts; a changed knob needs another preset.
    knobs = json.dumps(asdict(HARD), sort_keys=True)
    assert hashlib.sha256(knobs.encode()).hexdigest() == (
        "c02cc25b956906d6f54db37db6e3d1366cff8f61e797079b47dc238041bbb221"
    )


def test_unpaired_patients_of_the_frozen_preset_have_labels_and_no_report(tmp_path: Path):
    few = replace(HARD, n_train=3, n_unpaired=8, n_val=2, n_test=2, second_image_prob=0.0)
    raw = write_dataset(few, tmp_path / "raw")
    reader = open_reader("csv", raw, mapping=raw / "mapping.toml", table=None)
    meta = build_data(reader, raw, tmp_path / "data", image_size=few.image_size)
    built = read_manifest(tmp_path / "data")
    unpaired = [sample for sample in built if sample.report is None]
    assert (meta["n_paired"], len(unpaired)) == (7, 8)
    for sample in unpaired:
        assert sample.split == "train" and sample.image is not None
        assert set(sample.labels) == set(FINDINGS) and set(sample.labels.values()) <= {0, 1}
        assert sample.labels == {
            name: int(name in made.labels)
            for made in [make_patient(few, "train", int(sample.patient_id.rsplit("-", 1)[1]))]
            for name in FINDINGS
        }
