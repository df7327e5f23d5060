"""What an image tells without being read: thumbnails by hand, scores blind to test labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.ingest.build import build_data
from mmclip.data.sample import Sample
from mmclip.data.synthetic import FINDINGS
from mmclip.evaluation import baselines
from mmclip.evaluation.baselines import (
    STRENGTHS,
    logistic_scores,
    shortcut_features,
    shortcut_scores,
    thumbnail_scores,
    thumbnails,
)
from mmclip.evaluation.metrics import auroc


def test_thumbnails_are_block_means_laid_flat(tmp_path: Path):
    image = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(image).save(tmp_path / "a.png")
    facts = {"image_id": "a", "study_id": "a", "patient_id": "a", "source": "made"}
    made = Sample(**facts, image="a.png", report="Clear lungs.", split="train")
    build_data([made], tmp_path, tmp_path / "data", image_size=16)
    dataset = open_dataset([tmp_path / "data"])
    small = thumbnails(dataset, side=2)
    # Rows of 16 pixels: the block mean of 8 x 8 is that of its corners.
    assert small.tolist() == [[59.5, 67.5, 187.5, 195.5]]
    blocks = dataset.pixels(np.array([0])).numpy().reshape(8, 2, 8, 2).mean((1, 3))
    assert np.array_equal(thumbnails(dataset), blocks.reshape(1, 64))


@pytest.fixture(scope="module")
def splits(made_data: Path) -> dict[str, ImageTextDataset]:
    dataset = open_dataset([made_data])
    return {
        split: dataset.select([sample.split == split for sample in dataset.samples])
        for split in ("train", "val", "test")
    }


def test_thumbnail_scores_never_look_at_test_labels(splits: dict[str, ImageTextDataset]):
    test = splits["test"]
    opposite = replace(
        test,
        samples=tuple(
            replace(sample, labels={k: 1 - v for k, v in sample.labels.items()})
            for sample in test.samples
        ),
    )
    findings = FINDINGS[:3]
    straight = thumbnail_scores(splits["train"], splits["val"], test, findings)
    turned = thumbnail_scores(splits["train"], splits["val"], opposite, findings)
    assert straight.shape == (len(test), 3)
    assert np.array_equal(straight, turned)


@pytest.fixture
def separable() -> tuple[np.ndarray, np.ndarray]:
    """One feature that tells the classes apart and one that tells nothing."""
    rng = np.random.default_rng(0)
    y = np.repeat([0.0, 1.0], 20)
    return np.stack([y + rng.normal(0, 0.1, 40), rng.normal(size=40)], 1), y[:, None]


def test_what_can_be_told_is_told(separable: tuple[np.ndarray, np.ndarray]):
    x, y = separable
    scores = logistic_scores(x, y, x, y, np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert scores[0, 0] < 0.5 < scores[1, 0]


def test_unknown_labels_are_left_out(separable: tuple[np.ndarray, np.ndarray]):
    x, y = separable
    wild = np.array([[1e6, -1e6]])
    with_unknown = logistic_scores(
        np.concatenate([x, wild]), np.concatenate([y, [[np.nan]]]), x, y, x
    )
    assert np.array_equal(with_unknown, logistic_scores(x, y, x, y, x))


def test_a_finding_of_one_class_scores_one_half_throughout(
    separable: tuple[np.ndarray, np.ndarray],
):
    x, y = separable
    labels = np.concatenate([y, np.zeros_like(y), np.full_like(y, np.nan)], 1)
    scores = logistic_scores(x, labels, x, labels, x)
    assert (scores[:, 1:] == 0.5).all() and not (scores[:, 0] == 0.5).any()


@pytest.mark.parametrize("n_val", [40, 0])
def test_without_both_classes_to_validate_on_the_strongest_regularisation_is_taken(
    separable: tuple[np.ndarray, np.ndarray], n_val: int
):
    x, y = separable
    val, val_labels = x[:n_val], np.ones_like(y[:n_val])
    cautious = logistic_scores(x, y, val, val_labels, x)
    assert np.abs(cautious - 0.5).max() < 0.05  # C = 1e-4 hardly leaves the base rate
    assert STRENGTHS[0] == min(STRENGTHS)


def labelled(dataset: ImageTextDataset, values: np.ndarray) -> ImageTextDataset:
    """The rows with one label, "x"; NaN is unknown."""
    samples = tuple(
        replace(sample, labels={} if np.isnan(v) else {"x": int(v)})
        for sample, v in zip(dataset.samples, values, strict=True)
    )
    return replace(dataset, samples=samples)


def test_shortcut_features_by_hand(tmp_path: Path):
    image = np.zeros((16, 16), np.uint8)
    image[8:] = 255  # lower half white
    Image.fromarray(image).save(tmp_path / "a.png")
    facts = {"image_id": "a", "study_id": "a", "patient_id": "a", "source": "made", "view": "AP"}
    made = Sample(**facts, image="a.png", report="Clear lungs.", split="train")
    build_data([made], tmp_path, tmp_path / "data", image_size=16)
    found = shortcut_features(open_dataset([tmp_path / "data"]))[0]
    sizes = [np.log(17), np.log(17), 1.0]
    assert found == pytest.approx([*sizes, 0.5, 0.5, 1 / 15, 0.0, 0.5, 1.0, 0.0])


def test_a_label_that_brightness_gives_away_is_found_and_a_random_one_is_not(
    splits: dict[str, ImageTextDataset],
):
    dataset = splits["train"]
    brightness = shortcut_features(dataset)[:, 3]
    shown = (brightness > np.median(brightness)).astype(float)
    shown[::7] = np.nan
    scores = shortcut_scores(dataset, shown[:, None])[:, 0]
    is_known = ~np.isnan(shown)
    assert (auroc(shown[is_known], scores[is_known]) or 0) > 0.9
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):  # by patient: a learner that saw a patient's other image would know
        of_patient = {sample.patient_id: float(rng.integers(2)) for sample in dataset.samples}
        values = np.array([of_patient[sample.patient_id] for sample in dataset.samples])
        found.append(auroc(values, shortcut_scores(dataset, values[:, None])[:, 0]))
    assert abs(np.mean(found) - 0.5) < 0.06, found


def test_one_patient_or_one_class_teaches_nothing(splits: dict[str, ImageTextDataset]):
    dataset = splits["val"]
    assert (shortcut_scores(dataset, np.ones((len(dataset), 1))) == 0.5).all()
    alone = dataset.select(np.arange(len(dataset)) == 0)
    assert (shortcut_scores(alone, alone.labels(FINDINGS)) == 0.5).all()


def test_shortcut_features_of_many_images_are_those_of_parts(
    splits: dict[str, ImageTextDataset], monkeypatch: pytest.MonkeyPatch
):
    whole = shortcut_features(splits["test"])
    monkeypatch.setattr(baselines, "_IMAGES_AT_ONCE", 7)
    assert np.array_equal(shortcut_features(splits["test"]), whole)
