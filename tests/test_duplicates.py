"""Perceptual hashes: what changes them and what does not, and that no near pair is missed."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmclip.data.folder import ManifestError
from mmclip.data.ingest.build import build_data
from mmclip.data.leakage.duplicates import (
    HASHES_FILE,
    MAX_DISTANCE,
    MIN_LIKENESS,
    SURE_DISTANCE,
    image_hashes,
    likeness,
    look,
    near_groups,
    near_pairs,
    read_hashes,
)
from mmclip.data.sample import Sample
from mmclip.data.synthetic import PRESETS, make_patient
from tests.made_files import encoded


def blurred(n: int, px: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 [n, px, px]: dark lungs on a bright chest, under smooth noise of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : px * 1j, -1 : 1 : px * 1j]
    lungs = sum(np.exp(-(((x - at) / 0.3) ** 2) - (y / 0.6) ** 2) for at in (-0.45, 0.45))
    coarse = rng.normal(0, 22, (n, 20, 20)).astype(np.float32)
    noise = [
        np.asarray(Image.fromarray(c).resize((px, px), Image.Resampling.BICUBIC)) for c in coarse
    ]
    return np.clip(140 - 80 * lungs + np.stack(noise), 0, 255).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ other).sum(-1)


def slow_pairs(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Every pair, one by one."""
    return [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if distance(hashes[i], hashes[j]) <= MAX_DISTANCE
    ]


def test_the_bits_are_the_signs_of_frequencies_and_their_order_is_this_one():
    px = 32
    i = np.arange(px)
    one, other = (np.cos(np.pi * k * (i + 0.5) / px) for k in (1, 2))
    # Across 1 and down 2 frequencies: above 128 where both cosines agree, so its sign is positive.
    image = (128 + 100 * np.outer(other, one)).round().astype(np.uint8)
    bits = np.unpackbits(
        image_hashes(np.stack([image, 255 - image])).astype(">u2").view(np.uint8)
    ).reshape(2, 16, 16)
    # By rising sum of frequencies, pairs (across, down) as they come: (0,0) (0,1) (1,0) (0,2) (1,1)
    # (2,0) (0,3) (1,2): number 7, so bit 0 of part 7.
    assert bits[0, 7, 0] == 1 and bits[1, 7, 0] == 0


def test_brightness_and_contrast_change_no_bit_and_size_and_compression_few():
    samples = blurred(20)
    hashes = image_hashes(samples)
    darker = samples // 3
    assert distance(image_hashes(darker), image_hashes(2 * darker + 40)).max() <= 1  # of float32

    def as_jpeg(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((48, 48))
        again = Image.open(io.BytesIO(encoded(np.asarray(small), "JPEG", quality=60)))
        return np.asarray(again.resize((64, 64)))

    changed = image_hashes(np.stack([as_jpeg(image) for image in samples]))
    assert distance(hashes, changed).max() <= MAX_DISTANCE
    different = distance(hashes[:, None], hashes[None])[np.triu_indices(20, 1)]
    assert different.min() > MAX_DISTANCE + 15


def test_images_of_other_sides_have_nearly_equal_hashes():
    large = blurred(10, px=128)
    small = large.reshape(10, 64, 2, 64, 2).mean((2, 4)).astype(np.uint8)
    assert distance(image_hashes(large), image_hashes(small)).max() <= 8


def flipped(hashes: np.ndarray, n_bits: int, rng: np.random.Generator) -> np.ndarray:
    """Copies that differ in exactly so many bits, anywhere."""
    out = hashes.copy()
    for row in out:
        for bit in rng.choice(256, n_bits, replace=False):
            row[bit // 16] ^= np.uint16(1 << (bit % 16))
    return out


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_pairs_are_those_of_the_slow_loop(seed: int, n: int):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << 16, (n, 16), dtype=np.uint16)
    near = [flipped(base[: n // 2], int(bits), rng) for bits in rng.integers(1, 45, 2)]
    hashes = np.unique(np.concatenate([base, *near]), axis=0)
    assert list(map(tuple, near_pairs(hashes).tolist())) == slow_pairs(hashes)


@pytest.mark.parametrize("n_bits", [MAX_DISTANCE - 1, MAX_DISTANCE])
def test_no_pair_within_the_distance_is_missed_and_none_beyond_is_found(n_bits: int):
    """The worst case: the differing bits spread evenly over the parts."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 16, (50, 16), dtype=np.uint16)
    spread = base.copy()
    for number in range(n_bits):
        spread[:, number % 16] ^= np.uint16(1 << (number // 16))
    assert len(near_pairs(np.concatenate([base, spread]))) == 50
    spread[:, n_bits % 16] ^= np.uint16(1 << 9)
    beyond = len(near_pairs(np.concatenate([base, spread])))
    assert beyond == (50 if n_bits < MAX_DISTANCE else 0)


def test_a_pair_that_differs_in_one_bit_of_every_part_is_found_whichever_bit_it_is():
    first = np.random.default_rng(0).integers(0, 1 << 16, (1, 16), dtype=np.uint16)
    for bit in range(16):
        assert len(near_pairs(np.concatenate([first, first ^ np.uint16(1 << bit)]))) == 1, bit


def test_images_joined_one_by_one_and_equal_ones_are_one_group():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1 << 16, (1, 16), dtype=np.uint16)
    second = flipped(first, 25, rng)
    third = flipped(second, 25, rng)
    alone = rng.integers(0, 1 << 16, (1, 16), dtype=np.uint16)
    images = blurred(2)
    hashes = np.concatenate([third, alone, first, second, alone])
    groups = near_groups(hashes, lambda i: images[0])
    assert groups[0] == groups[2] == groups[3] != groups[1] == groups[4]
    apart = near_groups(hashes, lambda i: images[int(i == 3)])  # the one in the middle looks other
    assert len(set(apart[[0, 2, 3]].tolist())) == 3
    assert len(near_groups(np.zeros((0, 16), np.uint16), lambda i: images[0])) == 0
    assert set(near_groups(np.zeros((3000, 16), np.uint16), lambda i: images[0]).tolist()) == {0}


def test_an_image_that_was_changed_looks_like_itself_and_like_no_other():
    images = blurred(12, px=128)
    looks = [look(image) for image in images]
    changed = {
        "pixel over": np.roll(images, 2, axis=2),
        "paler": (images * 0.6 + 50).astype(np.uint8),
        "gamma": (255 * (images / 255) ** 0.6).astype(np.uint8),
        "smaller": images.reshape(12, 64, 2, 64, 2).mean((2, 4)).astype(np.uint8),
    }
    for what, others in changed.items():
        least = min(likeness(look(b), a) for a, b in zip(looks, others, strict=True))
        assert least >= MIN_LIKENESS, (what, least)
    assert max(likeness(a, b) for i, a in enumerate(looks) for b in looks[:i]) < MIN_LIKENESS


def test_patients_whose_hashes_are_close_by_chance_are_told_apart():
    """Two of the demo's synthetic patients, whose hashes differ in 28 bits."""
    one = make_patient(PRESETS["demo"], "val", 245).image
    other = make_patient(PRESETS["demo"], "test", 635).image
    hashes = image_hashes(np.stack([one, other]))
    assert SURE_DISTANCE < distance(*hashes) <= MAX_DISTANCE
    groups = near_groups(hashes, lambda i: (one, other)[i])
    assert groups[0] != groups[1]
    again = image_hashes(np.stack([one, (one * 0.8 + 20).astype(np.uint8)]))
    assert len(set(near_groups(again, lambda i: one).tolist())) == 1


def build(root: Path, samples: np.ndarray, px: int = 32) -> Path:
    records = []
    root.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(samples):
        (root / f"{i}.png").write_bytes(encoded(image))
        records.append(
            Sample(
                image_id=f"f{i}", study_id=f"f{i}", patient_id=f"p{i}", source="a", image=f"{i}.png"
            )
        )
    build_data(records, root, root / "data", image_size=px, overwrite=True)
    return root / "data"


def test_hashes_are_stored_once_and_made_anew_for_other_images(tmp_path: Path):
    data = build(tmp_path, blurred(5))
    seen: list[int] = []
    first = read_hashes(data, seen.append)
    assert first.shape == (5, 16) and sum(seen) == 5
    os.utime(data / HASHES_FILE, (1, 1))
    assert (read_hashes(data) == first).all() and (data / HASHES_FILE).stat().st_mtime == 1
    (data / HASHES_FILE).write_bytes((data / HASHES_FILE).read_bytes()[:-30])
    assert (read_hashes(data) == first).all()
    build(tmp_path, blurred(6, seed=1))
    assert len(read_hashes(data)) == 6


def test_images_too_small_for_a_hash_are_an_error_that_says_how_to_go_on(tmp_path: Path):
    with pytest.raises(ManifestError, match="8 px, near-duplicates need 16"):
        read_hashes(build(tmp_path, blurred(2), px=8))
