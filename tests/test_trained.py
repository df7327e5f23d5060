"""What a run trained on is refused where it can be told, and never called clean where it cannot."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmclip.data.cache import ImageCache
from mmclip.data.folder import ManifestError
from mmclip.data.image_text_dataset import ImageTextDataset, open_dataset
from mmclip.data.leakage.check import patient_key
from mmclip.data.leakage.duplicates import HASHES_FILE, image_hashes, near_any
from mmclip.data.leakage.trained import (
    KEY_FILE,
    LOOKS_FILE,
    TRAINED_FILE,
    UNDECIDED,
    Trained,
    collections_of,
    looks_of,
    read_trained,
    refuse_trained,
    trained_keys,
    write_trained,
)
from mmclip.data.sample import Sample


def images(n: int, px: int = 32, seed: int = 0) -> np.ndarray:
    """Different smooth images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 8, 8), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((px, px))) for c in coarse])


def dataset(samples: Sequence[Sample], pixels: np.ndarray) -> ImageTextDataset:
    where = np.array([(0, i) for i in range(len(samples))], np.int64).reshape(-1, 2)
    return ImageTextDataset(tuple(samples), (ImageCache(pixels),), where, "0" * 64)


def sample(i: int, source: str, **more: str) -> Sample:
    given = {"patient_id": str(i), "image_sha256": f"{source}{i}", **more}
    return Sample(image_id=f"{source}-{i}", study_id=f"s{i}", source=source, split="test", **given)


def kept(folder: Path, trained: ImageTextDataset) -> Trained:
    write_trained(folder, trained)
    found = read_trained(folder, collections_of(trained.samples))
    assert found is not None
    return found


NIH = [sample(i, "chestxray14") for i in range(1, 5)]


def test_looks_come_back_with_the_key_and_say_nothing_without(tmp_path: Path):
    trained = dataset(NIH, images(4))
    found = kept(tmp_path, trained)
    looks = image_hashes(images(4))
    assert found.looks is not None
    np.testing.assert_array_equal(found.looks, np.unique(looks, axis=0))
    stored = np.load(tmp_path / LOOKS_FILE)
    assert stored.shape == found.looks.shape
    shared_bits = 1 - np.bitwise_count(stored ^ found.looks).sum() / stored.size / 16
    assert 0.4 < shared_bits < 0.6  # as two independent tables
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / KEY_FILE).unlink()
    assert read_trained(tmp_path, {}) is None


def test_no_key_can_be_made_of_an_id_without_the_secret(tmp_path: Path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        write_trained(tmp_path / folder, dataset(NIH, images(4)))
    one, other = (np.load(tmp_path / folder / TRAINED_FILE) for folder in ("one", "other"))
    assert len(one) == 8 and not np.isin(one, other).any()
    guesses = [replace(NIH[0], patient_id=str(i)) for i in range(2000)]  # ids are counted up
    for secret in (b"", b"\0" * 32, tmp_path.name.encode()):
        assert not np.isin(trained_keys(guesses, secret), one).any()
    mine = bytes.fromhex((tmp_path / "one" / KEY_FILE).read_text())
    assert np.isin(trained_keys(NIH, mine), one).all()


def test_a_damaged_key_is_one_clear_error(tmp_path: Path):
    write_trained(tmp_path, dataset(NIH, images(4)))
    for text in ("", "abc", "g" * 64):
        (tmp_path / KEY_FILE).write_text(text)
        with pytest.raises(ManifestError, match="put the key of this run back"):
            read_trained(tmp_path, {})


def again(pixels: np.ndarray, how: str) -> np.ndarray:
    """The same images as another publisher has them."""
    if how == "brighter":
        return np.clip(pixels.astype(float) * 0.8 + 30, 0, 255).astype(np.uint8)
    if how == "larger":
        return np.stack([np.asarray(Image.fromarray(p).resize((64, 64))) for p in pixels])
    return pixels


@pytest.mark.parametrize("how", ["as they are", "brighter", "larger"])
@pytest.mark.parametrize("source", ["rsna", "siim", "of nobody"])
def test_the_same_images_under_other_names_and_bytes_are_refused(
    tmp_path: Path, source: str, how: str
):
    trained = kept(tmp_path, dataset(NIH, images(4)))
    others = [sample(i, source, patient_id=f"uuid-{i}") for i in range(3)]
    pixels = np.concatenate([images(2, seed=1), images(4)[1:2]])
    with pytest.raises(ManifestError, match=r"on 1 of these 3 images \(1 as another file.*-2"):
        refuse_trained(dataset(others, again(pixels, how)), trained)


def test_patients_of_one_collection_that_cannot_be_matched_are_not_called_clean(tmp_path: Path):
    trained = kept(tmp_path, dataset(NIH, images(4)))
    of_others = dataset(
        [sample(i, "rsna", patient_id=f"uuid-{i}") for i in range(3)], images(3, 32, 1)
    )
    verdict = refuse_trained(of_others, trained)
    assert verdict.startswith(UNDECIDED) and "3 images are of chestxray14" in verdict
    covidx = [
        sample(1, "covidx", patient_id="rsna/uuid"),
        sample(2, "covidx", patient_id="cohen/2"),
    ]
    verdict = refuse_trained(dataset(covidx, images(2, 32, 1)), trained)
    assert verdict.startswith(UNDECIDED) and "1 images are of chestxray14" in verdict
    known = dataset(
        [sample(i, "rsna", patient_id=f"{i:08d}") for i in range(9, 12)], images(3, 32, 1)
    )
    assert refuse_trained(known, trained).startswith("no image and no patient of these was trained")


def test_a_run_on_unknown_patients_of_a_collection_decides_nothing_there(tmp_path: Path):
    rsna = [sample(i, "rsna", patient_id=f"uuid-{i}") for i in range(4)]
    trained = kept(tmp_path, dataset(rsna, images(4)))
    assert trained.collections == {"chestxray14": False}
    others = dataset(NIH, images(4, seed=1))
    assert refuse_trained(others, trained).startswith(UNDECIDED)
    far = dataset([sample(i, "padchest") for i in range(4)], images(4, seed=1))
    assert refuse_trained(far, trained).startswith("no image and no patient")


@pytest.mark.parametrize("given", ["3", "0003", "00000003"])
def test_ids_of_chestxray14_match_with_and_without_leading_zeros(tmp_path: Path, given: str):
    trained = kept(tmp_path, dataset(NIH, images(4)))
    other = dataset([sample(7, "rsna", patient_id=given)], images(1, seed=1))
    with pytest.raises(ManifestError, match="on patients of 1, such as rsna-7"):
        refuse_trained(other, trained)


def test_images_of_covidx_and_rsna_are_of_one_patient_where_the_file_is():
    one = sample(1, "rsna", patient_id="0a1b")
    assert patient_key(one) == patient_key(sample(1, "covidx", patient_id="rsna/0a1b"))
    assert patient_key(sample(1, "padchest", patient_id="007")) != patient_key(
        sample(1, "padchest", patient_id="7")
    )


def test_the_looks_of_a_data_folder_are_made_once(
    made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(made_data, tmp_path / "data")
    (folder / HASHES_FILE).unlink(missing_ok=True)
    found = open_dataset([folder], 32)
    some = found.select(np.arange(len(found)) % 3 == 0)
    rows = some.where[some.where[:, 1] >= 0, 1]
    cache = found.caches[0]
    assert cache is not None
    looks, has_look = looks_of(some)
    assert (folder / HASHES_FILE).is_file()
    np.testing.assert_array_equal(looks, image_hashes(cache.images[rows]))
    np.testing.assert_array_equal(has_look, some.where[:, 1] >= 0)

    def made_again(images: np.ndarray) -> np.ndarray:
        raise AssertionError(f"{len(images)} images are hashed again")

    monkeypatch.setattr("mmclip.data.leakage.duplicates.image_hashes", made_again)
    np.testing.assert_array_equal(looks_of(some)[0], looks)


def test_small_images_and_texts_are_checked_without_looks(tmp_path: Path):
    trained = kept(tmp_path, dataset(NIH, images(4, px=12)))
    assert trained.looks is None
    verdict = refuse_trained(dataset([sample(9, "padchest")], images(1)), trained)
    assert verdict == (
        "no image and no patient of these was trained on (by patient id, content of the file)"
    )


def test_near_hashes_are_found_as_by_a_slow_loop():
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 1 << 16, (200, 16), np.uint16)
    queries = rng.integers(0, 1 << 16, (60, 16), np.uint16)
    for i in range(40):  # near by 0 to 39 bits
        bits = rng.choice(256, i, replace=False)
        queries[i] = stored[i]
        for bit in bits:
            queries[i, bit // 16] ^= np.uint16(1 << (bit % 16))
    distance = np.bitwise_count(queries[:, None] ^ stored[None]).sum(2).min(1)
    for most in (0, 10, 24, 31):
        np.testing.assert_array_equal(near_any(queries, stored, most), distance <= most)
    assert (
        not near_any(queries, stored[:0], 24).any() and len(near_any(queries[:0], stored, 5)) == 0
    )
