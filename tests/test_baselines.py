"""What a film tells without being read: thumbnails by hand, scores blind to test labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.build import build_data
from mmclip.data.dataset import Rows, open_rows
from mmclip.data.records import Film
from mmclip.data.synthetic import FINDINGS
from mmclip.evaluation import baselines
from mmclip.evaluation.baselines import (
    STRENGTHS,
    logistic_scores,
    nuisance_facts,
    nuisance_scores,
    thumbnail_scores,
    thumbnails,
)
from mmclip.evaluation.metrics import auroc


def test_thumbnails_are_block_means_laid_flat(tmp_path: Path):
    film = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(film).save(tmp_path / "a.png")
    facts = {"film_id": "a", "study_id": "a", "patient_id": "a", "source": "made"}
    made = Film(**facts, image="a.png", report="Clear lungs.", split="train")
    build_data([made], tmp_path, tmp_path / "data", film_px=16)
    rows = open_rows([tmp_path / "data"])
    small = thumbnails(rows, side=2)
    # Rows of 16 pixels: the block mean of 8 x 8 is that of its corners.
    assert small.tolist() == [[59.5, 67.5, 187.5, 195.5]]
    blocks = rows.pixels(np.array([0])).numpy().reshape(8, 2, 8, 2).mean((1, 3))
    assert np.array_equal(thumbnails(rows), blocks.reshape(1, 64))


@pytest.fixture(scope="module")
def splits(made_data: Path) -> dict[str, Rows]:
    rows = open_rows([made_data])
    return {
        split: rows.select([film.split == split for film in rows.films])
        for split in ("train", "val", "test")
    }


def test_thumbnail_scores_never_look_at_test_labels(splits: dict[str, Rows]):
    test = splits["test"]
    opposite = replace(
        test,
        films=tuple(
            replace(film, labels={k: 1 - v for k, v in film.labels.items()}) for film in test.films
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


def labelled(rows: Rows, values: np.ndarray) -> Rows:
    """The rows with one label, "x"; NaN is unknown."""
    films = tuple(
        replace(film, labels={} if np.isnan(v) else {"x": int(v)})
        for film, v in zip(rows.films, values, strict=True)
    )
    return replace(rows, films=films)


def test_nuisance_facts_by_hand(tmp_path: Path):
    film = np.zeros((16, 16), np.uint8)
    film[8:] = 255  # lower half white
    Image.fromarray(film).save(tmp_path / "a.png")
    facts = {"film_id": "a", "study_id": "a", "patient_id": "a", "source": "made", "view": "AP"}
    made = Film(**facts, image="a.png", report="Clear lungs.", split="train")
    build_data([made], tmp_path, tmp_path / "data", film_px=16)
    found = nuisance_facts(open_rows([tmp_path / "data"]))[0]
    sizes = [np.log(17), np.log(17), 1.0]
    assert found == pytest.approx([*sizes, 0.5, 0.5, 1 / 15, 0.0, 0.5, 1.0, 0.0])


def test_a_label_that_brightness_gives_away_is_found_and_a_random_one_is_not(
    splits: dict[str, Rows],
):
    rows = splits["train"]
    brightness = nuisance_facts(rows)[:, 3]
    shown = (brightness > np.median(brightness)).astype(float)
    shown[::7] = np.nan
    scores = nuisance_scores(rows, shown[:, None])[:, 0]
    is_known = ~np.isnan(shown)
    assert (auroc(shown[is_known], scores[is_known]) or 0) > 0.9
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):  # by patient: a learner that saw a patient's other film would know
        of_patient = {film.patient_id: float(rng.integers(2)) for film in rows.films}
        values = np.array([of_patient[film.patient_id] for film in rows.films])
        found.append(auroc(values, nuisance_scores(rows, values[:, None])[:, 0]))
    assert abs(np.mean(found) - 0.5) < 0.06, found


def test_one_patient_or_one_class_teaches_nothing(splits: dict[str, Rows]):
    rows = splits["val"]
    assert (nuisance_scores(rows, np.ones((len(rows), 1))) == 0.5).all()
    alone = rows.select(np.arange(len(rows)) == 0)
    assert (nuisance_scores(alone, alone.labels(FINDINGS)) == 0.5).all()


def test_nuisance_facts_of_many_films_are_those_of_parts(
    splits: dict[str, Rows], monkeypatch: pytest.MonkeyPatch
):
    whole = nuisance_facts(splits["test"])
    monkeypatch.setattr(baselines, "_FILMS_AT_ONCE", 7)
    assert np.array_equal(nuisance_facts(splits["test"]), whole)
