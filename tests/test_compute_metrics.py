"""Evaluation: calibration and tuned thresholds by hand, subgroups, comparisons that refuse."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.sample import Sample
from mmclip.evaluation.comparison import compare, compute_metrics_of_csv, published
from mmclip.evaluation.compute_metrics import compute_metrics, subgroups
from mmclip.evaluation.metrics import calibration_error
from mmclip.evaluation.pages import extreme_cases, write_card
from mmclip.evaluation.protocols import Protocol, load_protocol, protocol_names
from mmclip.evaluation.results import (
    About,
    RunResults,
    ScoredImages,
    provenance,
    read_results,
    run_results,
    write_results,
)
from mmclip.evaluation.scores import (
    Predictions,
    ScoresError,
    load_scores,
    make_predictions,
    read_scores_csv,
    scores_of_images,
)
from mmclip.evaluation.selection import (
    LabelledImages,
    images_hash,
    protocol_labels,
    select_samples,
)
from mmclip.evaluation.thresholds import best_on_these

NAN = float("nan")
NAMES = ["edema", "mass"]


def made(n: int = 400, seed: int = 0, signal: float = 1.0) -> Predictions:
    """Images of two findings; scores are probabilities, better with more signal."""
    rng = np.random.default_rng(0)
    labels = (rng.random((n, 2)) < 0.3).astype(float)
    ages = rng.integers(20, 95, n).astype(float)
    sexes = rng.choice(["F", "M", ""], n)
    noise = np.random.default_rng(seed).normal(size=(n, 2))
    return Predictions(
        image_id=np.array([f"f{i}" for i in range(n)]),
        patient_id=np.array([f"p{i // 2}" for i in range(n)]),
        sex=sexes,
        age_years=ages,
        view=rng.choice(["PA", "AP", "unknown"], n),
        findings=np.array(NAMES),
        labels=labels,
        scores=1 / (1 + np.exp(-(signal * (2 * labels - 1) + noise))),
    )


def leave(
    folder: Path,
    test: Predictions,
    val: Predictions | None = None,
    protocol: Protocol | None = None,
    **changes: str,
) -> RunResults:
    """Results of some scores in a folder, as a command leaves them but for plots and pages."""
    made = provenance(
        "c", 0, ScoredImages("d" * 64), device=torch.device("cpu"), wall_s=1.0
    ).model_copy(update=changes)
    results = run_results(
        compute_metrics(test, val, n_resamples=50),
        About(title="t", kind="scores", summary="s"),
        made,
        protocol=protocol,
    )
    folder.mkdir(exist_ok=True)
    of_val = {} if val is None else {f"val_{name}": value for name, value in val.arrays().items()}
    test.save(folder / "scores.npz", **of_val)
    write_results(folder, results)
    return results


def test_calibration_error_by_hand():
    # Two bins: 0.1 said and 0 found of two images, 0.9 said and 0.5 found of two.
    labels, said = np.array([0.0, 0.0, 1.0, 0.0, NAN]), np.array([0.1, 0.1, 0.9, 0.9, 0.5])
    assert calibration_error(labels, said) == pytest.approx((2 * 0.1 + 2 * 0.4) / 4)
    assert calibration_error(labels, said * 2) is None  # no probabilities
    assert calibration_error(np.zeros(3), np.full(3, 0.5)) is None
    sure = np.array([0.0, 1.0])
    assert calibration_error(sure, sure) == 0.0


def test_perfectly_said_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    said = rng.random(200_000)
    truth = (rng.random(200_000) < said).astype(float)
    assert (calibration_error(truth, said) or 1) < 0.005
    assert (calibration_error(truth, said**3) or 0) > 0.2


def test_tuned_figures_are_the_best_of_all_cuts_and_accuracy_is_above_the_cut():
    test = made()
    labels, scores = test.labels[:, 0], np.round(test.scores[:, 0], 2)
    found = best_on_these(labels, scores)
    assert found is not None
    by_threshold = {
        threshold: f1_score(labels == 1, scores >= threshold) for threshold in np.unique(scores)
    }
    assert found.f1 == pytest.approx(max(by_threshold.values()), abs=1e-12)
    threshold = max(c for c, value in by_threshold.items() if value > found.f1 - 1e-12)
    assert found.accuracy == pytest.approx(((scores > threshold) == (labels == 1)).mean())
    assert best_on_these(np.zeros(4), np.arange(4.0)) is None


def test_test_labels_choose_no_cut():
    test, val = made(), made(seed=1)
    found = compute_metrics(test, val, n_resamples=5)
    other = compute_metrics(replace(test, labels=1 - test.labels), val, n_resamples=5)
    thresholds, theirs = ([row.threshold for row in r.findings] for r in (found, other))
    assert thresholds == theirs and all(threshold.chosen_on == "val" for threshold in thresholds)


def test_validation_scores_of_other_findings_are_refused():
    test = made()
    swapped = replace(test, findings=np.array(["mass", "edema"]))
    with pytest.raises(ValueError, match="validation scores are of mass, edema"):
        compute_metrics(test, swapped, n_resamples=5)


def test_subgroups_compare_the_same_findings_and_equal_the_part_alone():
    test = made()
    groups = subgroups(test, n_resamples=20)
    by = {(g.kind, g.group): g for g in groups}
    assert set(by) == {
        ("sex", "F"), ("sex", "M"), ("age", "under 40"), ("age", "40 to 59"), ("age", "60 to 79"),
        ("age", "80 and over"), ("view", "PA"), ("view", "AP"),
    }  # fmt: skip
    women = test.sex == "F"
    expected = np.mean(
        [roc_auc_score(test.labels[women, k], test.scores[women, k]) for k in range(2)]
    )
    assert by["sex", "F"].macro_auroc == pytest.approx(expected, abs=1e-12)
    assert by["sex", "F"].n_images == women.sum()
    rare = test.labels.copy()
    rare[(test.sex == "M"), 1] = 0.0  # no man has a mass: it counts for neither
    by = {(g.kind, g.group): g for g in subgroups(replace(test, labels=rare), n_resamples=5)}
    assert by["sex", "F"].findings == by["sex", "M"].findings == ["edema"]


def test_ages_at_the_edge_of_a_band_and_unknown_ones():
    test = made()
    ages = np.where(np.arange(len(test)) % 2 == 0, 40.0, NAN)
    assert not [
        g for g in subgroups(replace(test, age_years=ages), n_resamples=5) if g.kind == "age"
    ]
    ages[1::2] = 39.99
    found = [g.group for g in subgroups(replace(test, age_years=ages), n_resamples=5)]
    assert found[2:4] == ["under 40", "40 to 59"]


def test_extreme_cases_are_the_highest_and_lowest_positives_by_hand():
    test = replace(
        made(4),
        labels=np.array([[1.0, NAN], [1.0, NAN], [0.0, NAN], [0.0, NAN]]),
        scores=np.array([[0.9, 0.5], [0.1, 0.5], [0.5, 0.5], [0.2, 0.5]]),
    )
    found = extreme_cases(test, most=1)
    assert list(found) == [0, 1]
    assert found[0].startswith("among the best: edema above 100 of 100")
    assert found[1].startswith("among the worst: edema above 0 of 100")


def test_scores_come_back_as_they_were_saved(tmp_path: Path):
    test, val = made(), made(20, seed=1)
    leave(tmp_path, test, val)
    back = load_scores(tmp_path / "scores.npz")
    assert np.array_equal(back.scores, test.scores) and back.patients() == test.patients()
    assert back.names() == NAMES
    with np.load(tmp_path / "scores.npz") as stored:
        assert np.array_equal(stored["val_scores"], val.scores)
    (tmp_path / "scores.npz").write_bytes(b"PK")
    with pytest.raises(ScoresError, match="run the command that made these results again"):
        load_scores(tmp_path / "scores.npz")


def test_the_card_says_what_results_say(tmp_path: Path):
    test = made()
    results = leave(tmp_path, test)
    write_card(tmp_path, results)
    card = (tmp_path / "MODEL_CARD.md").read_text("utf-8")
    assert f"**{results.macro_auroc:.3f}**" in card
    for row in results.findings:
        assert re.search(rf"\| {row.finding} \| unknown \| {row.auroc:.3f} \|", card)
    assert "d" * 64 in card and "| sex | F |" in card


def test_a_comparison_is_paired_and_signed(tmp_path: Path):
    weak, strong = made(signal=0.3), made(signal=1.5)
    folders = [tmp_path / "weak", tmp_path / "strong"]
    for folder, test in zip(folders, (weak, strong), strict=True):
        leave(folder, test)
    base, other = compare(folders, n_resamples=100)
    assert base.macro is None and base.findings == {}
    expected = np.mean(
        [
            roc_auc_score(strong.labels[:, k], strong.scores[:, k])
            - roc_auc_score(weak.labels[:, k], weak.scores[:, k])
            for k in range(2)
        ]
    )
    assert other.macro is not None and other.macro.interval is not None
    assert other.macro.value == pytest.approx(expected, abs=1e-5)
    low, high = other.macro.interval
    assert 0 < low < other.macro.value < high
    _, same = compare([folders[0], folders[0]], n_resamples=20)
    assert same.macro == (0.0, (0.0, 0.0))


def test_a_difference_that_rests_on_few_images_has_no_interval(tmp_path: Path):
    few = made()
    few.labels[:, 0] = 0
    few.labels[:3, 0] = 1
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, scores in zip(folders, (few.scores, few.scores[::-1].copy()), strict=True):
        leave(folder, replace(few, scores=scores))
    _, other = compare(folders, n_resamples=50)
    rare, common = (other.findings[name] for name in few.names())
    assert rare.value and rare.interval is None
    assert common.value and common.interval is not None


def test_results_without_a_benchmark_compare_with_ones_by_named_findings(tmp_path: Path):
    test = made()
    own = small_protocol(id="own", title="edema, mass")
    leave(tmp_path / "free", test)
    turned = test.in_order(["mass", "edema"])
    leave(tmp_path / "own", turned, protocol=own)
    leave(tmp_path / "benchmark", test, protocol=small_protocol())
    _, other = compare([tmp_path / "free", tmp_path / "own"], n_resamples=5)
    assert other.macro == (0.0, (0.0, 0.0)) and set(other.findings) == set(NAMES)
    assert other.differs == ("protocol 'edema, mass', the first: no protocol",)
    with pytest.raises(ScoresError, match="not of the same protocol"):
        compare([tmp_path / "free", tmp_path / "benchmark"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_hash": "e" * 64}, "not of the same data hash"),
        ({"split": "clean 12ab"}, "not of the same split .built and clean 12ab"),
    ],
)
def test_results_of_other_data_or_split_do_not_compare(
    tmp_path: Path, change: dict[str, str], message: str
):
    leave(tmp_path / "a", made())
    leave(tmp_path / "b", made(), **change)
    with pytest.raises(ScoresError, match=message):
        compare([tmp_path / "a", tmp_path / "b"])


def test_one_test_set_of_two_folders_compares_and_what_differs_is_said(tmp_path: Path):
    test = made()
    same = "i" * 64
    leave(tmp_path / "a", test, split="clean 12ab", images_hash=same)
    turned = test.where(np.arange(len(test))[::-1])
    leave(tmp_path / "b", turned, data_hash="e" * 64, split="clean 34cd", images_hash=same)
    _, found = compare([tmp_path / "a", tmp_path / "b"], n_resamples=5)
    assert found.macro is not None and found.macro.value == 0
    assert found.differs == (
        "data folder eeeeeeeeeeee, split clean 34cd, the first: data folder dddddddddddd, "
        "split clean 12ab",
    )
    leave(tmp_path / "c", test, split="clean 12ab", images_hash="j" * 64)
    with pytest.raises(ScoresError, match=r"content of images.*build both data folders of one"):
        compare([tmp_path / "a", tmp_path / "c"])
    leave(tmp_path / "old", test, data_hash="e" * 64)
    with pytest.raises(ScoresError, match=r"data hash.*older version.*score again"):
        compare([tmp_path / "a", tmp_path / "old"])


def test_results_by_two_versions_of_a_protocol_say_so(tmp_path: Path):
    leave(tmp_path / "a", made(), protocol=small_protocol())
    leave(tmp_path / "b", made(), protocol=small_protocol(version=2))
    with pytest.raises(ScoresError, match=r"small version 1 and small version 2\)"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_the_hash_of_images_is_of_ids_and_bytes_in_any_order():
    images = [sample(image_id="a", image_sha256="1"), sample(image_id="b", image_sha256="2")]
    known = images_hash(images)
    assert images_hash(images[::-1]) == known
    assert images_hash([replace(f, split="test", labels={"mass": 1}) for f in images]) == known
    assert images_hash([images[0], replace(images[1], image_sha256="3")]) != known
    assert images_hash(images[:1]) != known


def test_patients_of_two_sources_with_one_number_are_two():
    images = (
        sample(image_id="a", patient_id="1"),
        sample(image_id="b", patient_id="1", source="other"),
    )
    dataset = ImageTextDataset(images, (), np.full(2, -1), "d" * 64)
    one_each = np.zeros((2, 1))
    two = LabelledImages(dataset, ("mass",), one_each)
    assert len(set(make_predictions(two, one_each).patients())) == 2
    of_one = replace(dataset, samples=(images[0], replace(images[1], source="made")))
    one = replace(two, dataset=of_one)
    assert len(set(make_predictions(one, one_each).patients())) == 1


def test_results_of_other_images_or_labels_do_not_compare(tmp_path: Path):
    test = made()
    leave(tmp_path / "a", test)
    leave(tmp_path / "fewer", test.where(np.arange(len(test)) > 0))
    leave(tmp_path / "relabelled", replace(test, labels=1 - test.labels))
    with pytest.raises(ScoresError, match="not of the same images"):
        compare([tmp_path / "a", tmp_path / "fewer"])
    with pytest.raises(ScoresError, match="other labels of the same images"):
        compare([tmp_path / "a", tmp_path / "relabelled"])


def test_every_published_number_names_a_protocol_and_what_differs():
    rows = [row for name in protocol_names() for row in published(name)]
    assert len(rows) == 173
    assert all(row.differs and row.source.startswith("http") for row in rows)
    unfit = [r for name in protocol_names() for r in published(name)
             if r.setting == "fine-tuned" and load_protocol(name).finetune is None]  # fmt: skip
    assert not unfit  # a number with nothing of ours beside it
    assert len(published("vindr-benchx")) == 30
    mavl = next(r for r in published("siim") if r.method == "MAVL")
    assert (mavl.auroc, mavl.f1, mavl.accuracy) == (92.04, 77.95, 87.14)


def sample(**changes: object) -> Sample:
    facts = {
        "image_id": "f",
        "study_id": "s",
        "patient_id": "p",
        "source": "made",
        "image": "f.png",
    }
    return Sample(**{**facts, **changes})  # pyright: ignore[reportArgumentType]


def small_protocol(**changes: object) -> Protocol:
    facts = {
        "id": "small", "version": 1, "title": "Small", "description": "Made.", "readers": ["csv"],
        "splits": ["built"], "findings": NAMES, "prompt_sets": ["pair"],
    }  # fmt: skip
    return Protocol.model_validate({**facts, **changes})


def test_labels_of_a_protocol_are_known_ones_in_its_order():
    images = [sample(labels={"mass": 1, "edema": -1, "gout": 1}), sample(labels={"edema": 0})]
    found = protocol_labels(small_protocol(), images)
    np.testing.assert_array_equal(found, [[NAN, 1], [0, NAN]])


def test_own_words_are_absent_in_images_with_others_and_unknown_in_unfinished_ones():
    rules = small_protocol(
        own_words=True, words={"mass": ["Lung Mass"]}, unfinished=["suboptimal study"]
    )
    images = [
        sample(source_labels=("Edema/severe", "normal")),
        sample(source_labels=("lung mass", "suboptimal study")),
        sample(source_labels=()),
        sample(source_labels=("mass",)),  # `words` name another
    ]
    found = protocol_labels(rules, images)
    np.testing.assert_array_equal(found, [[1, 0], [NAN, 1], [NAN, NAN], [0, 0]])


def test_a_protocol_refuses_folders_of_other_sources_and_splits():
    rules = load_protocol("siim")
    rules.check_folder("siim", "clean", "data/siim")
    with pytest.raises(ValueError, match=r"protocol siim is for data of 'siim'.*reader 'csv'"):
        rules.check_folder("csv", "clean", "data/x")
    with pytest.raises(ValueError, match="`mmclip data split data/siim --name clean`"):
        rules.check_folder("siim", "built", "data/siim")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"findings": ["edema", "edema"]}, "names edema twice"),
        ({"words": {"gout": ["x"]}, "own_words": True}, "words names gout"),
        ({"words": {"mass": ["x"]}}, "own_words = true"),
        ({"finetune": {"uncertain_of": {"gout": "ignore"}}}, "uncertain_of names gout"),
        ({"finetune": {"fractions": [1.5]}}, "less than or equal to 1"),
    ],
)
def test_a_protocol_that_contradicts_itself_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small_protocol(**change)


def test_the_packages_protocols_are_told_apart_by_their_hash():
    protocols = [load_protocol(name) for name in protocol_names()]
    assert {p.id for p in protocols} == set(protocol_names())
    assert len({p.hash for p in protocols}) == len(protocols) >= 14
    assert all("clean" in p.splits for p in protocols if p.id == "siim")  # the others leak


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["image_id", "mass"], ["a", 1]], "lacks the columns 'edema'"),
        ([["image_id", "edema", "mass"], ["a", 1, 2]], "no score of 1 of the 2 images, such as b"),
        ([["image_id", "edema", "mass"], ["a", 1, "x"]], "line 2: the score of 'mass' is 'x'"),
        ([["image_id", "edema", "mass"], ["a", 1, "inf"]], "'inf', no finite number"),
        (
            [["image_id", "edema", "mass"], ["a", 1, 2], ["a", 1, 2]],
            "line 3: image 'a' occurs twice",
        ),
    ],
)
def test_a_damaged_table_of_scores_is_refused(tmp_path: Path, rows: list, message: str):
    path = write_csv(tmp_path / "s.csv", rows)
    with pytest.raises(ScoresError, match=message):
        scores_of_images(path, read_scores_csv(path, NAMES), ["a", "b"])
    with pytest.raises(ScoresError, match="cannot be read"):
        read_scores_csv(tmp_path / "none.csv", NAMES)


def test_scores_of_another_model_are_judged_as_ours_would_be(made_data: Path, tmp_path: Path):
    rules = tmp_path / "small.toml"
    rules.write_text(
        'id = "small"\nversion = 1\ntitle = "Small"\n'
        'description = "Made."\nreaders = ["csv", "made"]\n'
        'splits = ["built"]\nfindings = ["nodule", "mass"]\nprompt_sets = ["pair"]\nmin_count = 1\n'
    )
    reader = json.loads((made_data / "meta.json").read_text()).get("reader", "unknown")
    rules.write_text(rules.read_text().replace('"made"', json.dumps(reader)))
    dataset = open_dataset([made_data])
    rng = np.random.default_rng(0)
    parts = {part: select_samples(dataset, part).samples for part in ("val", "test")}
    lines = [[f.image_id, *rng.random(2)] for part in parts.values() for f in part]
    both = write_csv(tmp_path / "peer.csv", [["image_id", "nodule", "mass"], *lines])
    results = compute_metrics_of_csv(
        both, [made_data], tmp_path / "out", protocol=str(rules), n_resamples=10
    )
    assert results.kind == "scores" and results.protocol is not None
    scores = load_scores(tmp_path / "out" / "scores.npz")
    truth = select_samples(dataset, "test").labels(["nodule", "mass"])
    assert results.findings[0].auroc == pytest.approx(
        roc_auc_score(truth[:, 0], scores.scores[:, 0])
    )
    assert results.findings[0].threshold is not None
    only = write_csv(
        tmp_path / "test.csv",
        [["image_id", "nodule", "mass"], *[line for line in lines if line[0] in
         {f.image_id for f in parts["test"]}]],
    )  # fmt: skip
    results = compute_metrics_of_csv(
        only, [made_data], tmp_path / "two", protocol=str(rules), n_resamples=10
    )
    assert results.findings[0].threshold is None and "no thresholds" in results.summary
    assert read_results(tmp_path / "two").macro_auroc == pytest.approx(
        results.macro_auroc, rel=1e-5
    )
