"""The pure parts of bench/ablation.py: intervals, which runs are left, the guard, the shift."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmclip.data.image_text_dataset import open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.evaluation.intervals import interval_over_seeds
from tests.made import write_images

BENCH = str(Path(__file__).parents[1] / "bench")
sys.path.insert(0, BENCH)  # as `python bench/ablation.py` has it
ablation, compare = importlib.import_module("ablation"), importlib.import_module("compare")
sys.path.remove(BENCH)

NAMES = ["edema", "mass"]
DONE = ablation.Key("contrastive", 0, "val", "c", "d")
MADE = np.random.default_rng(0)
PATIENTS = np.repeat([f"p{i:02}" for i in range(30)], 2)  # two images each
TRUTH = MADE.integers(0, 2, (60, 2)).astype(float)


def made_run(strength: float, seed: int) -> tuple[dict, tuple]:
    """The line and the scores of a run that tells images apart with some strength."""
    noise = np.random.default_rng(seed).standard_normal((2, 60, 2))
    plain, shifted = strength * TRUTH + noise[0], noise[1]

    def each(scores: np.ndarray) -> dict[str, float]:
        aurocs = roc_auc_score(TRUTH, scores, average=None)
        return dict(zip(NAMES, np.atleast_1d(aurocs).tolist(), strict=True))

    line = {
        "auroc": each(plain), "shift_auroc": each(shifted), "macro_findings": NAMES,
        "cpu_s": 100.0 + seed, "commit": "c" * 40,
    }  # fmt: skip
    images = np.array([f"f{i}" for i in range(60)])
    return line, compare.Scores(images, PATIENTS, np.array(NAMES), TRUTH, plain, shifted)


RUNS = {
    "contrastive": {s: made_run(0.5, s) for s in (0, 1, 2)},
    "whole": {s: made_run(1.5, 10 + s) for s in (1, 2, 3)},
}


def test_the_paired_interval_equals_the_slow_loop_over_resampled_images():
    n_resamples, shared = 200, (1, 2)
    rng = np.random.default_rng(0)
    patients = list(dict.fromkeys(PATIENTS))
    rows_of = {patient: np.flatnonzero(patient == PATIENTS) for patient in patients}

    def gain(seed: int, rows: np.ndarray) -> float:
        ours, theirs = (RUNS[arm][seed][1].scores[rows] for arm in ("whole", "contrastive"))
        return roc_auc_score(TRUTH[rows], ours) - roc_auc_score(TRUTH[rows], theirs)

    slow = []
    for _ in range(n_resamples):
        drawn = rng.integers(0, len(patients), len(patients))
        rows = np.concatenate([rows_of[patients[i]] for i in drawn])
        slow.append([gain(seed, rows) for seed in shared])
    gains = np.array([gain(seed, np.arange(len(TRUTH))) for seed in shared])
    expected = interval_over_seeds(gains, np.array(slow).T)
    found = compare.Comparison(RUNS, "contrastive", n_resamples=n_resamples).compare("whole", NAMES)
    assert found.difference == pytest.approx(gains.mean())
    assert found.interval == pytest.approx(expected, abs=1e-9)


def test_the_difference_is_that_of_the_seeds_of_both_and_the_mean_that_of_all():
    comparison = compare.Comparison(RUNS, "contrastive", n_resamples=50)
    found = comparison.compare("whole", ["mass"])

    def of(arm: str, seeds: tuple[int, ...]) -> float:
        return float(np.mean([RUNS[arm][s][0]["auroc"]["mass"] for s in seeds]))

    assert found.auroc == pytest.approx(of("whole", (1, 2, 3)))
    assert found.difference == pytest.approx(of("whole", (1, 2)) - of("contrastive", (1, 2)))
    low, high = found.interval
    assert low < found.difference < high
    base = comparison.compare("contrastive", NAMES)
    assert base.difference is None and base.interval is None
    shifted = comparison.compare("whole", NAMES, "shift_auroc")
    assert shifted.auroc < found.auroc  # noise alone, here


def test_runs_on_other_images_are_not_compared():
    line, scores = made_run(1.0, 5)
    other = scores._replace(image_id=scores.image_id[::-1])
    with pytest.raises(ValueError, match="scored different images"):
        compare.Comparison({**RUNS, "pixels": {0: (line, other)}}, "contrastive")


def test_the_table_has_a_row_an_arm_and_the_small_findings_apart():
    runs = {
        arm: {seed: (dict(line), scores) for seed, (line, scores) in by_seed.items()}
        for arm, by_seed in RUNS.items()
    }
    renamed = {"edema": "edema", "mass": "nodule"}
    for by_seed in runs.values():
        for seed, (line, scores) in by_seed.items():
            for which in ("auroc", "shift_auroc"):
                line[which] = {renamed[name]: value for name, value in line[which].items()}
            line["macro_findings"] = ["edema", "nodule"]
            by_seed[seed] = line, scores._replace(findings=np.array(["edema", "nodule"]))
    text, numbers = compare.table(runs, "contrastive")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0]] == [
        "arm", "seeds", "macro AUROC", "under domain shift", "small findings", "CPU s",
    ]  # fmt: skip
    assert [row[0].strip() for row in rows[2:4]] == ["contrastive", "whole"]
    assert rows[3][1].strip() == "3" and rows[3][-1].strip() == "112"
    assert "(+" in rows[3][2] and "(" not in rows[2][2]
    assert [cell.strip() for cell in rows[4]] == ["arm", "nodule"]
    assert numbers["whole"]["nodule"] == numbers["whole"]["small findings"]
    assert numbers["whole"]["macro AUROC"]["auroc"] == pytest.approx(
        compare.Comparison(RUNS, "contrastive").compare("whole", NAMES).auroc
    )


def test_against_another_base_the_difference_turns_around():
    forth = compare.Comparison(RUNS, "contrastive", n_resamples=50).compare("whole", NAMES)
    back = compare.Comparison(RUNS, "whole", n_resamples=50).compare("contrastive", NAMES)
    assert back.difference == pytest.approx(-forth.difference)
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))


def test_two_configurations_of_one_arm_and_seed_have_scores_of_their_own(tmp_path: Path):
    paths = {ablation.scores_path(tmp_path, DONE._replace(config_hash=h)) for h in ("e", "f")}
    assert len(paths) == 2


def test_a_finished_run_is_left_out_and_any_change_of_its_key_is_another_run(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({**DONE._asdict(), "macro_auroc": 0.7}) + "\n")
    done = ablation.read_lines(path)
    others = [
        DONE._replace(**change)
        for change in (
            {"arm": "whole"}, {"seed": 1}, {"split": "test"}, {"config_hash": "e"},
            {"data_hash": "f"},
        )
    ]  # fmt: skip
    config = ablation.config_of("contrastive", 0, [])
    wanted = dict.fromkeys([DONE, *others], config)
    assert list(ablation.unfinished(wanted, done)) == others
    assert ablation.read_lines(tmp_path / "none.jsonl") == {}


def test_half_a_line_is_an_error_that_names_it(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(DONE._asdict()) + '\n{"arm": "who')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2 is no line of a finished run"):
        ablation.read_lines(path)


def test_test_images_are_refused_until_every_run_has_finished_on_val():
    wanted = [DONE._replace(split="test"), DONE._replace(split="test", arm="whole", seed=3)]
    with pytest.raises(ValueError, match="these have not: whole seed 3; run them with --split val"):
        ablation.check_test_may_be_scored(wanted, [DONE])
    done = [DONE, DONE._replace(arm="whole", seed=3)]
    ablation.check_test_may_be_scored(wanted, done)
    for change in ({"config_hash": "e"}, {"data_hash": "f"}, {"split": "test"}):
        with pytest.raises(ValueError, match="contrastive seed 0"):
            ablation.check_test_may_be_scored(wanted, [DONE._replace(**change), done[1]])


def test_arms_are_read_with_their_seed_and_the_overrides():
    config = ablation.config_of("whole+shuffled_pairs", 7, ["train.steps=4"])
    assert (config.train.seed, config.train.steps) == (7, 4)
    assert config.loss.image == config.loss.text == config.unpaired.rows_per_pair == 1
    own = ablation.config_of("contrastive,train.steps=9", 0, ["train.steps=4", "loss.text=0"])
    assert own.train.steps == 9
    assert ablation.arm_argument("whole+shuffled_pairs,train.steps=9").startswith("whole")
    with pytest.raises(argparse.ArgumentTypeError, match="'half' is none of"):
        ablation.arm_argument("half,train.steps=9")


def test_the_domain_shift_follows_the_image_and_its_name_alone():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    names = [f"f{i}" for i in range(6)]
    shifted = ablation.shift_domain(images, names)
    assert shifted.dtype == np.uint8 and shifted.shape == images.shape
    turned = ablation.shift_domain(images[::-1], names[::-1])
    assert np.array_equal(shifted[::-1], turned)
    for image, moved in zip(images, shifted, strict=True):
        assert np.mean(image != moved) > 0.9
    same = ablation.shift_domain(np.stack([images[0]] * 2), ["a", "b"])
    assert not np.array_equal(same[0], same[1])


def test_the_domain_shift_keeps_what_is_bright_bright_and_loses_detail():
    image = np.full((64, 64), 60, np.uint8)
    image[16:48, 16:48] = 180
    flat = np.full((64, 64), 120, np.uint8)
    detailed = np.indices((64, 64)).sum(0) % 2 * np.uint8(200)
    names = [str(i) for i in range(20)]
    shifted = ablation.shift_domain(np.stack([image] * 20), names).astype(float)
    assert (shifted[:, 24:40, 24:40].mean((1, 2)) > shifted[:, :8].mean((1, 2)) + 20).all()
    assert len(set(shifted[:, 24:40, 24:40].mean((1, 2)).round())) > 5  # exposures differ
    noise = ablation.shift_domain(np.stack([flat] * 20), names).std((1, 2))
    assert ((noise > 5) & (noise < 10)).all()  # 3 % of 255
    lost = ablation.shift_domain(np.stack([detailed.astype(np.uint8)] * 20), names).std((1, 2))
    assert (lost < 70).all()  # 100 before


def test_shifted_rows_are_the_scored_images_with_other_pixels(tmp_path: Path):
    build_data(write_images(tmp_path, n=8), tmp_path, tmp_path / "data", image_size=32)
    dataset = open_dataset([tmp_path / "data"], 32)
    moved = ablation.shifted_dataset(dataset, "train")
    assert moved.samples == dataset.samples
    numbers = np.array([3, 1])
    names = [dataset.samples[i].image_id for i in numbers]
    expected = ablation.shift_domain(dataset.pixels(numbers).numpy(), names)
    assert np.array_equal(moved.pixels(numbers).numpy(), expected)


def test_scores_of_another_configuration_are_not_taken_for_these(tmp_path: Path):
    _, scores = made_run(1.0, 0)
    path = ablation.scores_path(tmp_path, DONE)
    path.parent.mkdir()
    np.savez_compressed(path, **scores._asdict(), config_hash="c", data_hash="d")
    loaded = ablation.load_scores(path, DONE)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, scores, strict=True))
    with pytest.raises(ValueError, match="scores of another config"):
        ablation.load_scores(path, DONE._replace(config_hash="e"))
    with pytest.raises(ValueError, match="the JSONL has this run from another OUT; name"):
        ablation.load_scores(path.with_name("none.npz"), DONE)
