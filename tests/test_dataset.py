from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmclip.config import AugmentConfig, DataConfig
from mmclip.data.build import build_data
from mmclip.data.dataset import (
    MAX_SENTENCES,
    PairedBatches,
    augment,
    kept_sentences,
    normalise,
    open_rows,
    paired_rows,
    tokenise_reports,
)
from mmclip.data.manifest import Film, ManifestError
from mmclip.data.text import train_tokenizer

REPORTS = [
    "The heart is enlarged. No pleural effusion. Clear lungs.",
    "Large left pleural effusion. The heart size is normal.",
    "No acute disease.",
    "No acute disease.",
]
DATA = DataConfig(film_px=32, max_tokens=32)
STILL = AugmentConfig(rotation_deg=0, translate_ratio=0, scale_ratio=0, brightness=0, contrast=0)


def write_films(root: Path, n: int = 8) -> list[Film]:
    rng = np.random.default_rng(0)
    films = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 48), dtype=np.uint8)).save(root / f"{i}.png")
        films.append(
            Film(
                film_id=f"f{i}", study_id=f"s{i}", patient_id=f"p{i}", source="made",
                split="train", image=f"{i}.png", report=REPORTS[i % len(REPORTS)],
                labels={"cardiomegaly": i % 2, "mass": -1}, view="PA",
            )  # fmt: skip
        )
    return films


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    films = write_films(tmp_path)
    films[6] = replace(films[6], report=None)
    films[7] = replace(films[7], view="L")
    build_data(films, tmp_path, tmp_path / "data", film_px=32)
    return tmp_path / "data"


def make_batches(folder: Path, data: DataConfig = DATA, augment_config=STILL, **options):
    rows = paired_rows(open_rows([folder], 32), "train", data)
    tokenizer = train_tokenizer(REPORTS, vocab_size=200, min_frequency=1)
    return PairedBatches(rows, tokenizer, data, augment_config, 4, seed=5, **options), tokenizer


def test_pairs_have_film_report_split_and_view(folder: Path):
    rows = paired_rows(open_rows([folder], 32), "train", DATA)
    assert [film.film_id for film in rows.films] == [f"f{i}" for i in range(6)]


def test_a_batch_holds_the_films_and_reports_of_its_rows(folder: Path):
    batches, tokenizer = make_batches(folder)
    films = {film.film_id: (i, film) for i, film in enumerate(batches.rows.films)}
    batch = batches.batch(3)
    for row, film_id in enumerate(batch.film_ids):
        i, film = films[film_id]
        pixels = batches.rows.pixels(np.array([i]))
        torch.testing.assert_close(batch.image[row], normalise(pixels)[0], atol=1e-4, rtol=0)
        ids = batch.ids[row][batch.is_valid[row]].tolist()
        assert ids == tokenizer(film.report)["input_ids"]


def test_a_part_of_a_batch_is_that_part(folder: Path):
    batches, _ = make_batches(folder, augment_config=AugmentConfig())
    whole, part = batches.batch(2, slice(0, 4)), batches.batch(2, slice(2, 4))
    assert torch.equal(whole.image[2:], part.image)
    assert torch.equal(whole.keys[2:], part.keys)
    assert whole.film_ids[2:] == part.film_ids


def test_equal_reports_have_equal_text_keys_and_others_not(folder: Path):
    batches, _ = make_batches(folder)
    report_of = {film.film_id: film.report for film in batches.rows.films}
    for step in range(6):
        batch = batches.batch(step)
        for i, a in enumerate(batch.film_ids):
            for j, b in enumerate(batch.film_ids):
                same = bool(batch.keys[i, 1] == batch.keys[j, 1])
                assert same == (report_of[a] == report_of[b])
    assert (batch.keys >= 0).all()


def test_reports_read_in_part_are_whole_sentences_of_the_report(folder: Path):
    batches, tokenizer = make_batches(folder, DATA.model_copy(update={"sentence_drop_prob": 1.0}))
    report_of = {film.film_id: film.report for film in batches.rows.films}
    lengths = set()
    for step in range(12):
        batch = batches.batch(step)
        for row, film_id in enumerate(batch.film_ids):
            report = report_of[film_id]
            assert report is not None
            said = tokenizer.decode(batch.ids[row], skip_special_tokens=True)
            sentences = [s.strip() for s in report.lower().split(".") if s.strip()]
            kept = [s.strip() for s in said.split(".") if s.strip()]
            assert kept and all(s in sentences for s in kept)
            assert kept == [s for s in sentences if s in kept]  # in the order of the report
            lengths.add(len(kept))
    assert lengths == {1, 2, 3}


def test_the_number_of_kept_sentences_is_uniform():
    rng = np.random.default_rng(0)
    counts = np.bincount(
        [kept_sentences(4, rng.random(1 + MAX_SENTENCES)).sum() for _ in range(4000)], minlength=5
    )
    assert counts[0] == 0
    assert (abs(counts[1:] - 1000) < 4 * np.sqrt(750)).all()


def test_shuffled_pairs_give_no_film_its_own_report(folder: Path):
    straight, _ = make_batches(folder)
    shuffled, _ = make_batches(folder, shuffle_pairs=True)
    assert sorted(straight.report_of_row) == sorted(shuffled.report_of_row)
    assert (straight.report_of_row != shuffled.report_of_row).any()
    assert len(set(shuffled.study_keys)) == len(shuffled.rows)


def test_augmentation_by_one_half_everywhere_changes_nothing():
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    same = augment(image, torch.full((2, 6), 0.5), AugmentConfig())
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)


def test_a_shift_by_whole_pixels_moves_the_film_and_fills_with_black():
    image = normalise(torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8))
    config = AugmentConfig(
        rotation_deg=0, translate_ratio=0.125, scale_ratio=0, brightness=0, contrast=0
    )
    draws = torch.tensor([[0.5, 0.5, 1.0, 0.5, 0.5, 0.5]])  # +1: by an eighth of 16 px
    moved = augment(image, draws, config)
    torch.testing.assert_close(moved[..., :-2], image[..., 2:], atol=1e-5, rtol=0)
    assert torch.allclose(moved[..., -2:], torch.tensor(-2.0))


def test_labels_tell_unknown_from_absent(folder: Path):
    labels = open_rows([folder]).labels(["cardiomegaly", "mass", "nodule"])
    assert labels[:2, 0].tolist() == [0.0, 1.0]
    assert np.isnan(labels[:, 1:]).all()


def test_a_long_report_is_cut_and_keeps_its_special_tokens():
    tokenizer = train_tokenizer(REPORTS, vocab_size=200, min_frequency=1)
    reports = tokenise_reports(tokenizer, REPORTS, max_tokens=8)
    ids, is_valid = reports.assemble(np.array([0, 2]), max_tokens=8)
    assert ids.shape == (2, 8)
    assert ids[0, 0] == tokenizer.cls_token_id and ids[0, 7] == tokenizer.sep_token_id
    assert is_valid[0].all() and not is_valid[1].all()


def test_films_of_another_size_are_refused_with_both_remedies(folder: Path):
    with pytest.raises(ManifestError, match="--film-px 64 or set data.film_px=32"):
        open_rows([folder], 64)


def test_a_folder_given_twice_is_refused(folder: Path):
    with pytest.raises(ManifestError, match="more than one of the data folders"):
        open_rows([folder, folder])
